"""Filling a student from its teacher in one of the ways that `--init` names."""

import logging
from typing import NamedTuple

from torch import Tensor
from transformers import ModernBertForMaskedLM, ModernBertModel, PreTrainedModel

from modernbert_small.initialise.all_layers import Batches, transfer_all_layers
from modernbert_small.initialise.guide import principal_basis, transfer_embeddings, transfer_first_layer
from modernbert_small.run.errors import UserError
from modernbert_small.run.loading import PoolingMode
from modernbert_small.settings.init_model_mlm import Init

logger = logging.getLogger(__name__)


class Transferred(NamedTuple):
    """What a student has from its teacher; None where the initialisation has no such thing.

    names: the filled tensors.
    spectrum: the share of the token embeddings' variance that each of the D_S directions explains.
    projection: P (D_S, D_T) float64, with which the student's residual stream is P times the teacher's.
    teacher_layers: the teacher's layer that each of the student's layers is made of.
    """

    names: list[str]
    spectrum: list[float] | None = None
    projection: Tensor | None = None
    teacher_layers: list[int] | None = None


def usable_init(requested: Init, teacher: PreTrainedModel) -> Init:
    """The requested initialisation, or "embeddings" where "guide" finds no layers to transfer.

    Raises:
        UserError: all_layers is requested, and the teacher is not a ModernBERT.
    """
    if requested in ("random", "embeddings") or isinstance(teacher, ModernBertForMaskedLM):
        return requested
    found = type(teacher).__name__
    if requested == "all_layers":
        if isinstance(teacher, ModernBertModel):
            return requested
        raise UserError(
            f"init: all_layers needs a ModernBERT, found a {found}, whose layers are built otherwise; use --init "
            "embeddings, which takes the token embeddings of any encoder"
        )
    logger.warning(
        "init: guide takes layers from a ModernBERT with masked-LM head, found a %s: only its token embeddings "
        "transfer, as with --init embeddings; all layers start at random%s",
        found,
        "; --init all_layers transfers them too" if isinstance(teacher, ModernBertModel) else "",
    )
    return "embeddings"


def transfer(
    init: Init,
    student: ModernBertForMaskedLM,
    teacher: PreTrainedModel,
    batches: Batches = (),
    pooling: PoolingMode | None = None,
    head_teacher: ModernBertForMaskedLM | None = None,
) -> Transferred:
    """Fill a student from its teacher.

    Args:
        init: guide needs a ModernBERT with masked-LM head, all_layers a ModernBERT, see `usable_init`.
        student: modified; random and embeddings leave its layers as they are.
        teacher: not modified.
        batches, pooling, head_teacher: what all_layers needs, see `transfer_all_layers`.

    Raises:
        UserError: the student's sizes do not suit all_layers.
        ValueError: the student's sizes do not suit guide or embeddings.
    """
    if init == "random":
        return Transferred([])
    if init == "all_layers":
        try:
            projection, kept = transfer_all_layers(student, teacher, batches, pooling, head_teacher)
        except ValueError as error:
            raise UserError(f"init: all_layers: {error}") from error
        has_head = head_teacher is not None or isinstance(teacher, ModernBertForMaskedLM)
        names = [name for name, _ in student.named_parameters() if has_head or name.startswith("model.")]
        return Transferred(names, None, projection, kept)
    embeddings = teacher.get_input_embeddings().weight.detach()
    basis, explained = principal_basis(embeddings, student.config.hidden_size)
    names = transfer_embeddings(student, embeddings, basis)
    if init == "guide":
        names += transfer_first_layer(student, teacher, basis)
    return Transferred(names, [round(share, 8) for share in explained.tolist()], basis.T)
