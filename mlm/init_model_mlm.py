"""Phase 2: the small model's first weights, from a large ModernBERT by GUIDE.

In:   a ModernBERT (--teacher_name_or_path) with masked-LM head, or with --init all_layers an embedding model;
      phase 1's corpus for the report, and for --init all_layers.
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

import torch
from transformers import (
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from modernbert_small.initialise.guide import student_config
from modernbert_small.initialise.report import log_start, measure_start
from modernbert_small.initialise.transfer import transfer, usable_init
from modernbert_small.packed.attention import use_packed_attention
from modernbert_small.packed.tokens import tokenize_split
from modernbert_small.pretrain.masking import MaskedLMDataset, sample_batches
from modernbert_small.run.artefacts import begin
from modernbert_small.run.devices import best_device
from modernbert_small.run.errors import UserError
from modernbert_small.run.loading import (
    load_config,
    load_encoder,
    load_masked_lm,
    load_tokenizer,
    pooling_of,
    require_finite,
)
from modernbert_small.run.saving import save_encoder
from modernbert_small.run.script import next_command, run_script
from modernbert_small.settings.init_model_mlm import InitModelArguments

logger = logging.getLogger(__name__)

SAMPLE_TOKENS = 131_072
MLM_PROBABILITY = 0.3


def check_sizes(args: InitModelArguments, teacher: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a student that the teacher cannot fill."""
    if args.init == "random":
        return
    problems = []
    if teacher.hidden_size < args.hidden_size:
        problems.append(
            f"hidden_size: {args.hidden_size} is wider than the teacher's {teacher.hidden_size}; use at most as "
            "many, or --init random"
        )
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


def load_head_teacher(args: InitModelArguments, teacher: PreTrainedConfig) -> ModernBertForMaskedLM | None:
    """The model of --mlm_head_name_or_path."""
    name = args.mlm_head_name_or_path
    if name is None:
        return None
    head_teacher = load_masked_lm("--mlm_head_name_or_path", name)
    if head_teacher.config.vocab_size != teacher.vocab_size:
        raise UserError(
            f"--mlm_head_name_or_path {name}: has {head_teacher.config.vocab_size} tokens, the teacher "
            f"{teacher.vocab_size}; expected a model of the same vocabulary"
        )
    return head_teacher


def sample_corpus(
    args: InitModelArguments, tokenizer: PreTrainedTokenizerBase, models: Sequence[PreTrainedModel]
) -> list[dict[str, torch.Tensor | int]]:
    """Packed, masked batches for all_layers; the models are made ready to read them."""
    device = best_device()
    for model in models:
        use_packed_attention(model.to(device), "auto", device, torch.float32)
    store = tokenize_split(args.train_file, "train", "text", tokenizer, args.max_position_embeddings)
    return sample_batches(MaskedLMDataset(store, tokenizer, MLM_PROBABILITY), SAMPLE_TOKENS, args.seed, device)


def heldout_data(args: InitModelArguments, tokenizer: PreTrainedTokenizerBase) -> MaskedLMDataset | None:
    """The corpus's validation split, if there is a corpus."""
    if not Path(args.train_file).exists():
        logger.info("no corpus at %s: held-out losses and agreement by layer are not measured", args.train_file)
        return None
    store = tokenize_split(args.train_file, "validation", "text", tokenizer, args.max_position_embeddings)
    return MaskedLMDataset(store, tokenizer, MLM_PROBABILITY)


def main() -> None:
    """Check the settings, load the teacher, fill a student from it, measure both, write the student."""
    args = parse_settings(InitModelArguments, "init_model_mlm", __doc__)
    inputs = {"teacher": args.teacher_name_or_path}
    if args.mlm_head_name_or_path:
        inputs["masked-LM head"] = args.mlm_head_name_or_path
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
    from_embedding_model = init == "all_layers" and not has_head
    pooling = pooling_of(*source[:2]) or "mean" if from_embedding_model else None
    head_teacher = load_head_teacher(args, teacher_config)
    run.start()

    student = new_student(args, teacher_config, tokenizer)
    read = [model for model in (student, teacher, head_teacher) if model is not None]
    batches = sample_corpus(args, tokenizer, read) if init == "all_layers" else ()
    transferred = transfer(init, student, teacher, batches, pooling, head_teacher)
    require_finite(student, "the student")
    models = {"teacher": teacher, "student": student, "random student": new_student(args, teacher_config, tokenizer)}
    report = {"init_used": init, "transferred": transferred.names, "spectrum": transferred.spectrum, "pooling": pooling}
    is_masked_lm = not from_embedding_model or head_teacher is not None
    with_head = ["teacher"] * has_head + ["student", "random student"] * is_masked_lm
    report |= measure_start(models, with_head, heldout_data(args, tokenizer), transferred, args.seed)
    log_start(student, report)

    tokenizer.model_max_length = args.max_position_embeddings
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # ModernBERT has no token types
    saved = student if is_masked_lm else student.base_model
    save_encoder(saved, tokenizer, run.folder, pooling)
    run.finish({**report, "parameters": saved.num_parameters()})
    following = next_command("mlm/pre_train.py" if is_masked_lm else "create_distil_dataset.py")
    without = "" if is_masked_lm else ", without a masked-LM head, so phase 3 is left out"
    logger.info("wrote %s%s; next: %s", args.output_dir, without, following)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run_script(main)
