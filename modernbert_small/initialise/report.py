"""What phase 2 measures and says of a student that nobody has trained yet."""

import logging
from collections.abc import Collection, Mapping
from typing import Any

from transformers import ModernBertForMaskedLM, PreTrainedModel

from modernbert_small.initialise.agreement import format_agreement, layer_agreement
from modernbert_small.initialise.transfer import Transferred
from modernbert_small.pretrain.loss import masked_lm_loss
from modernbert_small.pretrain.masking import MaskedLMDataset
from modernbert_small.run.devices import best_device

logger = logging.getLogger(__name__)

_LOSS_TOKENS = 32_768
_AGREEMENT_TOKENS = 16_384


def measure_start(
    models: Mapping[str, PreTrainedModel],
    with_head: Collection[str],
    heldout: MaskedLMDataset | None,
    transferred: Transferred,
    seed: int,
) -> dict[str, Any]:
    """Held-out masked-LM losses, and agreement by layer.

    Args:
        models: by name; `student` and `teacher` are compared layer by layer.
        with_head: names of the models that have a masked-LM head.
        heldout: texts that the student was not fitted on; without them nothing is measured.
        transferred: what the student has of its teacher.
        seed: chooses the masked tokens.

    Returns:
        `heldout_mlm_loss`, in nats by name; `layers`, see `layer_agreement`, or None.
    """
    if heldout is None:
        return {"heldout_mlm_loss": {}, "layers": None}
    losses = {}
    for name, model in models.items():
        model.to(best_device())
        if name in with_head:
            losses[name] = round(masked_lm_loss(model, heldout, _LOSS_TOKENS, seed), 4)
    compared = (models["student"], models["teacher"], heldout, _AGREEMENT_TOKENS, seed)
    layers = layer_agreement(*compared, transferred.teacher_layers, transferred.projection)
    return {"heldout_mlm_loss": losses, "layers": layers}


def log_start(student: ModernBertForMaskedLM, report: Mapping[str, Any]) -> None:
    """Log which tensors come from the teacher, and the measurements."""
    tensors = len(dict(student.named_parameters()))
    logger.info("student: %.1f M parameters, %d tensors", student.num_parameters() / 1e6, tensors)
    if len(report["transferred"]) < tensors:
        logger.info("  from the teacher: %s", ", ".join(report["transferred"]) or "nothing")
        logger.info("  all else is as ModernBERT initialises it (norms 1, truncated normal)")
    if report["spectrum"]:
        logger.info("explained variance of the token embeddings: %.1f %%", 100 * sum(report["spectrum"]))
    for line in format_agreement(report["layers"]) if report["layers"] else ():
        logger.info("  %s", line)
    for name, loss in report["heldout_mlm_loss"].items():
        logger.info("held-out MLM loss, %-14s %.3f nats", name, loss)
    if comment := comment_on_losses(report["heldout_mlm_loss"]):
        logger.info("%s", comment)


def comment_on_losses(losses: Mapping[str, float]) -> str:
    """What the losses before any training say, in a sentence; nothing if one of the two students has none.

    Args:
        losses: in nats by model, as `measure_start` names them.
    """
    if not {"student", "random student"} <= losses.keys():
        return ""
    gain = losses["random student"] - losses["student"]
    if gain > 0:
        return f"The student starts {gain:.2f} nats better than one with random weights."
    return (
        "The student starts no better than one with random weights. Before any training that says little: its other "
        "layers do not use yet what it has from the teacher."
    )
