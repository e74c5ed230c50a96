"""Phase 2: the small model's first weights, from a large ModernBERT by GUIDE.

In:   a ModernBERT with masked-LM head (--teacher_name_or_path), and phase 1's corpus for the report.
Out:  checkpoints/init, which ModernBertForMaskedLM.from_pretrained loads, with the teacher's tokenizer.

    python mlm/init_model_mlm.py                                     # ModernBERT-base -> 12 layers x 384
    python mlm/init_model_mlm.py --hidden_size 192 --num_attention_heads 3 --intermediate_size 384

PCA of the teacher's token embeddings gives a basis and the student's embeddings; the first layer, the norms
and the MLM head are projected with it; the other layers start as ModernBERT's do.
Trinh et al. 2025, GUIDE, https://arxiv.org/abs/2510.06502. For --init all_layers see
modernbert_small/initialise/all_layers.py.
"""

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

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
from modernbert_small.initialise.all_layers import transfer_all_layers
from modernbert_small.initialise.guide import principal_basis, student_config, transfer_embeddings, transfer_first_layer
from modernbert_small.packed.attention import use_packed_attention
from modernbert_small.packed.tokens import tokenize_split
from modernbert_small.pretrain.loss import masked_lm_loss
from modernbert_small.pretrain.masking import MaskedLMDataset, sample_batches
from modernbert_small.run.artefacts import begin
from modernbert_small.run.devices import best_device
from modernbert_small.run.errors import UserError
from modernbert_small.run.loading import load_config, load_encoder, load_tokenizer, require_finite
from modernbert_small.run.script import next_command, run_script
from modernbert_small.run.settings import parse_settings

logger = logging.getLogger(__name__)

REPORT_TOKENS = 32_768  # about a minute of ModernBERT-base on two CPU cores


@dataclass
class InitModelArguments:
    """Settings of phase 2. Sizes are ModernBERT-small-v2's: 12 layers x 384."""

    teacher_name_or_path: str = field(
        default="answerdotai/ModernBERT-base",
        metadata={"help": "large encoder, hub id or folder; if not a ModernBERT, only its embeddings transfer"},
    )
    output_dir: str = field(default="checkpoints/init", metadata={"help": "folder to write"})
    hidden_size: int = field(default=384, metadata={"help": "width of the student"})
    num_hidden_layers: int = field(default=12, metadata={"help": "layers of the student"})
    num_attention_heads: int = field(
        default=6, metadata={"help": "heads of the student; hidden_size / heads must be the teacher's head_dim"}
    )
    intermediate_size: int = field(
        default=768, metadata={"help": "GeGLU neurons a layer; twice the width makes 37 M parameters in all"}
    )
    max_position_embeddings: int = field(default=1024, metadata={"help": "longest input, in tokens"})
    init: Literal["guide", "random", "embeddings", "all_layers"] = field(
        default="guide",
        metadata={
            "help": "guide: embeddings, first layer, norms and head; embeddings: these alone; random: none; "
            "all_layers: every layer, fitted on a sample of train_file, docs/initialisation.md"
        },
    )
    train_file: str = field(
        default="data/corpus",
        metadata={"help": "corpus: all_layers' sample, and the report's held-out losses; else it may be missing"},
    )
    seed: int = field(default=42, metadata={"help": "of the layers that start at random"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that the teacher's repository brings"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier result of other settings"})

    def problems(self) -> list[str]:
        """What is wrong with these settings, before anything is loaded."""
        found = [
            f"{name}: {getattr(self, name)}, expected at least 1"
            for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
            if getattr(self, name) < 1
        ]
        if self.init == "all_layers" and not Path(self.train_file).exists():
            found.append(f"train_file: {self.train_file} does not exist; --init all_layers needs a corpus (phase 1)")
        if self.max_position_embeddings < 8:
            found.append(f"max_position_embeddings: {self.max_position_embeddings}, expected at least 8")
        if not found and self.hidden_size % (2 * self.num_attention_heads):
            found.append(
                f"num_attention_heads: hidden_size {self.hidden_size} / {self.num_attention_heads} heads is not an "
                f"even whole number, which RoPE needs; ModernBERT's heads are 64 wide: {max(1, self.hidden_size // 64)}"
            )
        return found


def check_sizes(args: InitModelArguments, teacher: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a student that the teacher cannot fill."""
    if args.init == "random":
        return
    problems = []
    if teacher.hidden_size < args.hidden_size:
        problems.append(f"hidden_size: {args.hidden_size} is wider than the teacher's {teacher.hidden_size}")
    if len(tokenizer) > teacher.vocab_size:
        problems.append(f"the tokenizer has {len(tokenizer)} entries, the teacher's embeddings {teacher.vocab_size}")
    if args.init in ("guide", "all_layers") and isinstance(teacher, ModernBertConfig):
        head_dim = teacher.hidden_size // teacher.num_attention_heads
        heads = max(1, round(args.hidden_size / head_dim))
        if args.hidden_size != args.num_attention_heads * head_dim:
            problems.append(
                f"num_attention_heads: {args.num_attention_heads} x head_dim {head_dim} = "
                f"{args.num_attention_heads * head_dim}, but hidden_size is {args.hidden_size}; "
                f"use {heads} heads and hidden_size {heads * head_dim}, or --init embeddings"
            )
        for name in ("num_attention_heads", "intermediate_size", "num_hidden_layers")[
            : 3 if args.init != "guide" else 2
        ]:
            if getattr(args, name) > getattr(teacher, name):
                problems.append(f"{name}: {getattr(args, name)} is more than the teacher's {getattr(teacher, name)}")
    if problems:
        raise UserError("; ".join(problems))


def new_student(
    args: InitModelArguments, teacher: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> ModernBertForMaskedLM:
    """A student of the asked sizes as ModernBERT initialises it."""
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


def transfer(
    args: InitModelArguments,
    student: ModernBertForMaskedLM,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[dict[str, Any], torch.Tensor | None, list[int] | None]:
    """Fill the student from the teacher.

    Returns:
        The report; P (D_S, D_T), what the student's stream stands for; the teacher's layers that were kept. None of
        either where there are none.
    """
    if args.init == "random":
        return {"transferred": [], "spectrum": None}, None, None
    if args.init == "all_layers":
        for model in (student, teacher):
            # In float32, which flash kernels do not take.
            use_packed_attention(model.to(best_device()), "packed_sdpa", best_device())
        store = tokenize_split(args.train_file, "train", "text", tokenizer, args.max_position_embeddings)
        batches = sample_batches(MaskedLMDataset(store, tokenizer, 0.3), REPORT_TOKENS, args.seed, best_device())
        try:
            projection, kept = transfer_all_layers(student, teacher, batches)
        except ValueError as error:
            raise UserError(f"init: all_layers: {error}") from error
        return {"transferred": [name for name, _ in student.named_parameters()], "spectrum": None}, projection, kept
    embeddings = teacher.get_input_embeddings().weight.detach()
    basis, explained = principal_basis(embeddings, args.hidden_size)
    names = transfer_embeddings(student, embeddings, basis)
    if args.init == "guide" and isinstance(teacher, ModernBertForMaskedLM):
        names += transfer_first_layer(student, teacher, basis)
    elif args.init == "guide":
        logger.warning(
            "the teacher is a %s, not a ModernBERT with masked-LM head: its embeddings transfer, its layers do not",
            type(teacher).__name__,
        )
    report = {"transferred": names, "spectrum": [round(value, 8) for value in explained.tolist()]}
    return report, basis.T, None


def measure(
    args: InitModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    models: dict[str, PreTrainedModel],
    has_head: bool,
    projection: torch.Tensor | None,
    kept: list[int] | None,
) -> dict[str, Any]:
    """Held-out MLM losses, and agreement by layer, on the corpus's validation split, if there is one."""
    if not Path(args.train_file).exists():
        logger.info("no corpus at %s: held-out losses and agreement by layer are not measured", args.train_file)
        return {"heldout_mlm_loss": {}, "layers": None}
    store = tokenize_split(args.train_file, "validation", "text", tokenizer, args.max_position_embeddings)
    dataset = MaskedLMDataset(store, tokenizer, mlm_probability=0.3)
    losses = {}
    for name, model in models.items():
        model.to(best_device())
        if name != "teacher" or has_head:
            losses[name] = round(masked_lm_loss(model, dataset, REPORT_TOKENS, args.seed), 4)
    student, teacher = models["student"], models["teacher"]
    layers = layer_agreement(student, teacher, dataset, REPORT_TOKENS // 2, args.seed, kept, projection)
    return {"heldout_mlm_loss": losses, "layers": layers}


def log_report(student: ModernBertForMaskedLM, report: dict[str, Any]) -> None:
    """Say which tensors came from where, and what that is worth."""
    tensors = len(dict(student.named_parameters()))
    logger.info("student: %.1f M parameters, %d tensors", student.num_parameters() / 1e6, tensors)
    if len(report["transferred"]) < tensors:
        logger.info("  from the teacher: %s", ", ".join(report["transferred"]) or "nothing")
        logger.info("  all else as ModernBERT initialises it (norms 1, truncated normal)")
    if report["spectrum"]:
        logger.info("explained variance of the token embeddings: %.1f %%", 100 * sum(report["spectrum"]))
    for line in format_agreement(report["layers"]) if report["layers"] else ():
        logger.info("  %s", line)
    for name, loss in report["heldout_mlm_loss"].items():
        logger.info("held-out MLM loss, %-14s %.3f nats", name, loss)


def main() -> None:
    """Teacher in, student out."""
    args = parse_settings(InitModelArguments, "init_model_mlm", __doc__)
    inputs = {"teacher": args.teacher_name_or_path}
    if Path(args.train_file).exists():
        inputs["corpus"] = args.train_file
    run = begin("init_model_mlm", args.output_dir, asdict(args), inputs, args.overwrite)
    if run is None:
        return
    source = ("--teacher_name_or_path", args.teacher_name_or_path, args.trust_remote_code)
    teacher_config, tokenizer = load_config(*source), load_tokenizer(*source)
    check_sizes(args, teacher_config, tokenizer)
    teacher, has_head = load_encoder(*source)
    require_finite(teacher, f"--teacher_name_or_path {args.teacher_name_or_path}")
    if args.init == "all_layers" and not isinstance(teacher, ModernBertForMaskedLM):
        raise UserError(f"init: all_layers needs a ModernBERT with masked-LM head, found a {type(teacher).__name__}")
    run.start()
    student = new_student(args, teacher_config, tokenizer)
    report, projection, kept = transfer(args, student, teacher, tokenizer)
    require_finite(student, "the student")
    models = {"teacher": teacher, "student": student, "random student": new_student(args, teacher_config, tokenizer)}
    report |= measure(args, tokenizer, models, has_head, projection, kept)
    log_report(student, report)

    tokenizer.model_max_length = args.max_position_embeddings
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # ModernBERT has no token types
    student.save_pretrained(run.folder)
    tokenizer.save_pretrained(run.folder)
    run.finish({**report, "parameters": student.num_parameters()})
    logger.info("wrote %s; next: %s", args.output_dir, next_command("mlm/pre_train.py"))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run_script(main)
