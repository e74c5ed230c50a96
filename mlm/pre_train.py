"""Phase 3: teach the small model language, by masked language modelling on the corpus.

In:   checkpoints/init (phase 2), data/corpus (phase 1).
Out:  checkpoints/mlm, which ModernBertForMaskedLM.from_pretrained loads, with the Trainer's checkpoint-*.

    python mlm/pre_train.py                                        # one CUDA GPU
    torchrun --nproc_per_node 4 mlm/pre_train.py                   # four, which share each batch
    python mlm/pre_train.py --tokens_per_batch 4096 --max_steps 200   # a laptop

30 % of the tokens are masked, as in ModernBERT (https://arxiv.org/abs/2412.13663). Rows are packed without padding, and
logits are computed only for masked tokens. --push_to_hub uploads the finished folder once; it also uploads a folder
that an earlier run finished.
"""

from modernbert_small.settings.parse import check_command_line, parse_settings, require_inputs

if __name__ == "__main__":
    check_command_line("pre_train", __doc__)  # before the imports below, which take seconds

import logging
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import ModernBertForMaskedLM, PreTrainedTokenizerBase

from modernbert_small.evaluation.metrics import perplexity
from modernbert_small.packed.arguments import PackedTrainingArguments
from modernbert_small.packed.attention import use_packed_attention
from modernbert_small.packed.compiling import compile_layers
from modernbert_small.packed.tokens import tokenize_shares, tokenize_split
from modernbert_small.packed.trainer import (
    PackedTrainer,
    compare_held_out_losses,
    last_evaluation,
    require_context,
    train,
    worse_notice,
)
from modernbert_small.plan import note_without_gpu
from modernbert_small.pretrain.loss import predict_masked
from modernbert_small.pretrain.masking import MaskedLMDataset
from modernbert_small.run.artefacts import Run, begin
from modernbert_small.run.errors import UserError
from modernbert_small.run.hub import prepare_upload
from modernbert_small.run.loading import load_masked_lm, load_tokenizer, pooling_of, require_finite
from modernbert_small.run.processes import first_process_first, rank, world_size
from modernbert_small.run.saving import save_encoder
from modernbert_small.run.script import next_command, run_script
from modernbert_small.run.shards import check_splits
from modernbert_small.settings.pre_train import PreTrainSettings

logger = logging.getLogger(__name__)


@dataclass
class PreTrainArguments(PreTrainSettings, PackedTrainingArguments):
    """Settings of phase 3: those of modernbert_small/settings/pre_train.py, and transformers' TrainingArguments."""


class MaskedLMTrainer(PackedTrainer):
    """transformers' Trainer on packed, masked batches."""

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | int | None:
        """The masked tokens of a step; if no other process adds any, a number, which needs no copy to the device."""
        if self.args.world_size > 1:
            return super()._get_num_items_in_batch(batch_samples, device)
        return sum(len(batch["masked"]) for batch in batch_samples)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what the Trainer logs, and the perplexity of a held-out loss."""
        if "eval_loss" in logs:
            logs["eval_perplexity"] = perplexity(logs["eval_loss"])
        super().log(logs, start_time)


def load_student(args: PreTrainArguments) -> tuple[ModernBertForMaskedLM, PreTrainedTokenizerBase]:
    """The student with packed attention, and its tokenizer."""
    flag = "--model_name_or_path"
    tokenizer = load_tokenizer(flag, args.model_name_or_path)
    student = load_masked_lm(flag, args.model_name_or_path)
    if len(tokenizer) > student.config.vocab_size:
        raise UserError(
            f"{flag} {args.model_name_or_path}: the tokenizer has {len(tokenizer)} entries, but the model has "
            f"{student.config.vocab_size} embeddings; expected the model's own tokenizer"
        )
    require_context(args.max_seq_length, student.config)
    require_finite(student, f"{flag} {args.model_name_or_path}")
    student.forward = partial(predict_masked, student, compiled=bool(args.torch_compile))
    use_packed_attention(student, args.attn_implementation, args.device, args.compute_dtype)
    if args.torch_compile:
        compile_layers(student.model, args.torch_compile_mode)
    return student, tokenizer


def load_data(args: PreTrainArguments, tokenizer: PreTrainedTokenizerBase, split: str) -> MaskedLMDataset:
    """The texts of one split, tokenised."""
    store = tokenize_split(args.train_file, split, "text", tokenizer, args.max_seq_length)
    logger.info("%s: %s rows, %s tokens", split, f"{len(store):,}", f"{store.offsets[-1]:,}")
    return MaskedLMDataset(store, tokenizer, args.mlm_probability)


def pretrain(
    args: PreTrainArguments, run: Run, student: ModernBertForMaskedLM, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Train the student, in the run's folder; returns the measurements for run.json."""
    tokenize_shares(args.train_file, "train", "text", tokenizer, args.max_seq_length)
    with first_process_first():
        train_data = load_data(args, tokenizer, "train")
        heldout = load_data(args, tokenizer, "validation")
    trainer = MaskedLMTrainer(
        model=student,
        args=args,
        train_dataset=train_data,
        eval_dataset=heldout,
        processing_class=tokenizer,
    )
    measurements = train(trainer, run, student.config, args.mlm_probability)
    heldout_metrics = last_evaluation(trainer)
    require_finite(student, "the trained student")
    return measurements | {
        **compare_held_out_losses(measurements["history"], heldout_metrics),
        "heldout_mlm_loss": heldout_metrics["eval_loss"],
        "rows": {"train": len(train_data), "validation": len(heldout)},
        "tokens": {"train": int(train_data.store.offsets[-1]), "validation": int(heldout.store.offsets[-1])},
        "truncated_rows": train_data.store.truncated,
    }


def main() -> None:
    """Load the student, train it on the corpus with masked tokens, write it, upload it if asked to."""
    args = parse_settings(PreTrainArguments, "pre_train", __doc__)
    require_inputs("pre_train", args)
    output_dir = args.output_dir
    inputs = {"model": args.model_name_or_path, "corpus": args.train_file}
    run = begin("pre_train", output_dir, args.to_dict() | {"processes": world_size()}, inputs, args.overwrite)
    if run is None:
        upload = prepare_upload(args)
        upload(output_dir)
        return
    note_without_gpu("pre_train", vars(args))
    check_splits(args.train_file, ["text"])
    student, tokenizer = load_student(args)
    pooling = pooling_of("--model_name_or_path", args.model_name_or_path)
    upload = prepare_upload(args)
    run.start()
    args.output_dir = str(run.folder)  # the Trainer writes its checkpoints there
    measurements = pretrain(args, run, student, tokenizer)
    if rank() > 0:
        return
    save_encoder(student, tokenizer, run.folder, pooling)
    run.finish(measurements)
    upload(output_dir)
    logger.info(
        "%swrote %s, held-out loss %.4f nats per masked token, where a guess among all tokens has %.1f; next: %s",
        worse_notice(measurements),
        output_dir,
        measurements["heldout_mlm_loss"],
        math.log(student.config.vocab_size),
        next_command("create_distil_dataset.py"),
    )


if __name__ == "__main__":
    run_script(main)
