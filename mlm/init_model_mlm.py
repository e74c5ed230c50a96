"""Phase 2: the small model's first weights, from a large ModernBERT by GUIDE.

In:   a ModernBERT with masked-LM head (--teacher_name_or_path), and phase 1's corpus for the report.
Out:  checkpoints/init, which ModernBertForMaskedLM.from_pretrained loads, with the teacher's tokenizer.

    python mlm/init_model_mlm.py                                     # ModernBERT-base -> 12 layers x 384
    python mlm/init_model_mlm.py --hidden_size 192 --num_attention_heads 3 --intermediate_size 384

PCA of the teacher's token embeddings gives a basis and the student's embeddings. The first layer, the norms and the
masked-LM head are projected onto the basis. The other layers start at random, as ModernBERT initialises them.
Trinh et al. 2025, GUIDE, https://arxiv.org/abs/2510.06502. docs/initialisation.md explains
--init all_layers.
"""

from modernbert_small.settings.parse import check_command_line, parse_settings, require_inputs

if __name__ == "__main__":
    check_command_line("init_model_mlm", __doc__)  # before the imports below, which take seconds

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import (
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from modernbert_small.initialise.agreement import format_agreement, layer_agreement
from modernbert_small.initialise.guide import student_config
from modernbert_small.initialise.transfer import Transferred, transfer, usable_init
from modernbert_small.packed.attention import use_packed_attention
from modernbert_small.packed.tokens import tokenize_split
from modernbert_small.pretrain.loss import masked_lm_loss
from modernbert_small.pretrain.masking import MaskedLMDataset, sample_batches
from modernbert_small.run.artefacts import begin
from modernbert_small.run.devices import best_device
from modernbert_small.run.errors import UserError
from modernbert_small.run.loading import load_config, load_encoder, load_tokenizer, require_finite
from modernbert_small.run.saving import save_encoder
from modernbert_small.run.script import next_command, run_script
from modernbert_small.settings.init_model_mlm import InitModelArguments

logger = logging.getLogger(__name__)

SAMPLE_TOKENS = 32_768  # about a minute of ModernBERT-base on two CPU cores
MLM_PROBABILITY = 0.3


def check_sizes(args: InitModelArguments, teacher: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a student that the teacher cannot fill."""
    if args.init == "random":
        return
    problems = []
    if teacher.hidden_size < args.hidden_size:
        problems.append(f"hidden_size: {args.hidden_size} is wider than the teacher's {teacher.hidden_size}")
    if len(tokenizer) > teacher.vocab_size:
        problems.append(f"the tokenizer has {len(tokenizer)} entries, the teacher's embeddings {teacher.vocab_size}")
    if args.init != "embeddings" and isinstance(teacher, ModernBertConfig):
        head_dim = teacher.hidden_size // teacher.num_attention_heads
        heads = max(1, round(args.hidden_size / head_dim))
        if args.hidden_size != args.num_attention_heads * head_dim:
            problems.append(
                f"num_attention_heads: {args.num_attention_heads} x head_dim {head_dim} = "
                f"{args.num_attention_heads * head_dim}, but hidden_size is {args.hidden_size}; "
                f"use {heads} heads and hidden_size {heads * head_dim}, or --init embeddings"
            )
        limited = ["num_attention_heads", "intermediate_size"]
        if args.init == "all_layers":
            limited.append("num_hidden_layers")
        for name in limited:
            if getattr(args, name) > getattr(teacher, name):
                problems.append(f"{name}: {getattr(args, name)} is more than the teacher's {getattr(teacher, name)}")
    if problems:
        raise UserError("; ".join(problems))


def new_student(
    args: InitModelArguments, teacher: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> ModernBertForMaskedLM:
    """A student of the requested sizes, initialised at random as ModernBERT does."""
    set_seed(args.seed)
    return ModernBertForMaskedLM(
        student_config(
            hidden_size=args.hidden_size,
            num_hidden_layers=args.num_hidden_layers,
            num_attention_heads=args.num_attention_heads,
            intermediate_size=args.intermediate_size,
            max_position_embeddings=args.max_position_embeddings,
            vocab_size=teacher.vocab_size,
            special_ids={f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep")}
            | {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id},
            teacher=teacher if isinstance(teacher, ModernBertConfig) else None,
        )
    )


def sample_corpus(
    args: InitModelArguments, tokenizer: PreTrainedTokenizerBase, models: Sequence[PreTrainedModel]
) -> list[dict[str, torch.Tensor | int]]:
    """Packed, masked batches for all_layers; the models are made ready to read them."""
    device = best_device()
    for model in models:
        use_packed_attention(model.to(device), "auto", device, torch.float32)
    store = tokenize_split(args.train_file, "train", "text", tokenizer, args.max_position_embeddings)
    return sample_batches(MaskedLMDataset(store, tokenizer, MLM_PROBABILITY), SAMPLE_TOKENS, args.seed, device)


def measure(
    args: InitModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    models: dict[str, PreTrainedModel],
    has_head: bool,
    transferred: Transferred,
) -> dict[str, Any]:
    """Held-out masked-LM losses, and agreement by layer, on the corpus's validation split, if there is a corpus."""
    if not Path(args.train_file).exists():
        logger.info("no corpus at %s: held-out losses and agreement by layer are not measured", args.train_file)
        return {"heldout_mlm_loss": {}, "layers": None}
    store = tokenize_split(args.train_file, "validation", "text", tokenizer, args.max_position_embeddings)
    dataset = MaskedLMDataset(store, tokenizer, MLM_PROBABILITY)
    losses = {}
    for name, model in models.items():
        model.to(best_device())
        if name != "teacher" or has_head:
            losses[name] = round(masked_lm_loss(model, dataset, SAMPLE_TOKENS, args.seed), 4)
    compared = (models["student"], models["teacher"], dataset, SAMPLE_TOKENS // 2, args.seed)
    layers = layer_agreement(*compared, transferred.teacher_layers, transferred.projection)
    return {"heldout_mlm_loss": losses, "layers": layers}


def log_report(student: ModernBertForMaskedLM, report: dict[str, Any]) -> None:
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


def main() -> None:
    """Check the settings, load the teacher, fill a student from it, measure both, write the student."""
    args = parse_settings(InitModelArguments, "init_model_mlm", __doc__)
    inputs = {"teacher": args.teacher_name_or_path}
    if Path(args.train_file).exists():
        inputs["corpus"] = args.train_file
    elif args.init == "all_layers":
        require_inputs("init_model_mlm", args)
    run = begin("init_model_mlm", args.output_dir, asdict(args), inputs, args.overwrite, one_process=True)
    if run is None:
        return
    source = ("--teacher_name_or_path", args.teacher_name_or_path, args.trust_remote_code)
    teacher_config, tokenizer = load_config(*source), load_tokenizer(*source)
    check_sizes(args, teacher_config, tokenizer)
    teacher, has_head = load_encoder(*source)
    require_finite(teacher, f"--teacher_name_or_path {args.teacher_name_or_path}")
    init = usable_init(args.init, teacher)
    run.start()

    student = new_student(args, teacher_config, tokenizer)
    batches = sample_corpus(args, tokenizer, (student, teacher)) if init == "all_layers" else ()
    transferred = transfer(init, student, teacher, batches)
    require_finite(student, "the student")
    models = {"teacher": teacher, "student": student, "random student": new_student(args, teacher_config, tokenizer)}
    report = {"init_used": init, "transferred": transferred.names, "spectrum": transferred.spectrum}
    report |= measure(args, tokenizer, models, has_head, transferred)
    log_report(student, report)

    tokenizer.model_max_length = args.max_position_embeddings
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # ModernBERT has no token types
    save_encoder(student, tokenizer, run.folder)
    run.finish({**report, "parameters": student.num_parameters()})
    logger.info("wrote %s; next: %s", args.output_dir, next_command("mlm/pre_train.py"))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run_script(main)
