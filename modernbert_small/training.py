"""What phases 3 and 5 add to transformers' Trainer: packed batches, progress in tokens, safe resuming."""

import json
import logging
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import ModernBertConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import SchedulerType

from modernbert_small.attention import choose_attn_implementation
from modernbert_small.batches import PackedLoader, PackedSampler
from modernbert_small.flops import peak_flops_per_second, training_flops_per_token
from modernbert_small.models import best_device, has_bf16, peak_memory_bytes
from modernbert_small.settings import UserError
from modernbert_small.tokens import TokenStore

logger = logging.getLogger(__name__)


class _PackedDataset(Protocol):
    store: TokenStore


class PackedTrainerMixin:
    """Loads packed batches of about `args.tokens_per_batch` tokens from datasets that have a `store`.

    Mixed in before Trainer or SentenceTransformerTrainer.
    """

    args: Any
    train_dataset: Any
    eval_dataset: Any

    def get_train_dataloader(self) -> DataLoader:
        """Every row once an epoch, shuffled, dealt to the processes."""
        return PackedLoader(
            self.train_dataset, self._sampler(self.train_dataset, True), self.args.dataloader_num_workers
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Every row once, in order."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return PackedLoader(dataset, self._sampler(dataset, False))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule; the trapezoidal one decays over the last tenth unless `lr_scheduler_kwargs` says otherwise.

        A `num_decay_steps` below 1 is a share of all steps, as `warmup_steps` is.
        """
        if self.args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY:
            given = {"decay_type": "linear", "num_decay_steps": 0.1} | (self.args.lr_scheduler_kwargs or {})
            if given["num_decay_steps"] < 1:
                given["num_decay_steps"] = math.ceil(given["num_decay_steps"] * num_training_steps)
            self.args.lr_scheduler_kwargs = given
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]

    def _sampler(self, dataset: _PackedDataset, shuffle: bool) -> PackedSampler:
        return PackedSampler(
            dataset.store.lengths,
            self.args.tokens_per_batch,
            self.args.seed if self.args.data_seed is None else self.args.data_seed,
            shuffle,
            self.args.process_index,
            self.args.world_size,
        )


class Progress(TrainerCallback):
    """A bar on a terminal, else a line per logging interval; both in real tokens a second.

    Args:
        tokens_per_step: of all processes.
        share_per_token: of a second at the devices' peak rate, to turn speed into utilisation; None where
            no peak is known.

    Attributes:
        tokens_per_second: since training started or resumed, evaluations left out.
    """

    def __init__(self, tokens_per_step: float, share_per_token: float | None = None) -> None:
        self.tokens_per_step, self.share_per_token = tokens_per_step, share_per_token
        self.tokens_per_second = 0.0
        self._steps, self._seconds, self._step_began = 0, 0.0, 0.0
        self._bar: tqdm | None = None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation: counted work over what the devices could do."""
        return None if self.share_per_token is None else self.tokens_per_second * self.share_per_token

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar, at the step that training resumes from."""
        if state.is_world_process_zero:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=None)
        self._step_began = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the step."""
        now = time.monotonic()
        self._steps, self._seconds, self._step_began = self._steps + 1, self._seconds + now - self._step_began, now
        self.tokens_per_second = self._steps * self.tokens_per_step / self._seconds
        if self._bar is not None:
            self._bar.update()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave the evaluation's time out."""
        self._step_began = time.monotonic()

    on_save = on_evaluate

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show what the Trainer logs."""
        if self._bar is None or not logs or "train_runtime" in logs:
            return
        shown = " ".join(f"{name} {_short(value)}" for name, value in logs.items() if _is_worth_showing(name, value))
        remaining = (state.max_steps - state.global_step) * self.tokens_per_step / max(self.tokens_per_second, 1e-9)
        speed = f"{self.tokens_per_second:,.0f} tokens/s" + ("" if self.mfu is None else f" ({self.mfu:.0%} of peak)")
        if not self._bar.disable:
            self._bar.set_postfix_str(f"{shown} {speed}")
        elif state.global_step:
            eta = time.strftime("%H:%M:%S", time.gmtime(remaining))
            logger.info("step %d/%d  %s  %s  %s left", state.global_step, state.max_steps, shown, speed, eta)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_worth_showing(name: str, value: Any) -> bool:
    hidden = ("runtime", "per_second", "epoch", "total_flos", "num_input_tokens_seen")
    detail = ("accuracy", "precision", "recall", "mrr", "map")
    return isinstance(value, int | float) and not any(word in name for word in hidden + detail)


def use_progress(trainer: Any, sampler: PackedSampler, flops_per_token: float) -> Progress:
    """Replace the Trainer's own progress with ours."""
    for default in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(default)
    peak = peak_flops_per_second(trainer.args.device)
    share = None if peak is None else flops_per_token / (peak * trainer.args.world_size)
    progress = Progress(float(sampler.lengths.sum()) / len(sampler), share)
    trainer.add_callback(progress)
    return progress


def resolve_hardware(args: TrainingArguments) -> None:
    """The CPU where there is no CUDA; bf16 unless told otherwise, where the hardware has it.

    Called before TrainingArguments checks itself.
    """
    args.use_cpu = args.use_cpu or best_device().type == "cpu"
    if args.bf16 is None:
        args.bf16 = not args.fp16 and has_bf16(torch.device("cpu") if args.use_cpu else best_device())
    if args.torch_compile:  # a layer at a time and for any length: whole models compile anew for each batch
        os.environ.setdefault("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
        os.environ.setdefault("ACCELERATE_DYNAMO_USE_DYNAMIC", "true")


def training_problems(args: Any, metrics: Sequence[str]) -> list[str]:
    """What is wrong with a training phase's settings, beyond what TrainingArguments checks.

    Args:
        args: the settings.
        metrics: what the best checkpoint can be chosen by.
    """
    found = []
    if args.tokens_per_batch < args.max_seq_length:
        found.append(
            f"tokens_per_batch: {args.tokens_per_batch} is less than max_seq_length {args.max_seq_length}; a batch "
            "must hold the longest text"
        )
    if args.per_device_train_batch_size != 8:
        found.append("per_device_train_batch_size: batches are counted in tokens here; use tokens_per_batch")
    if args.max_seq_length < 8:
        found.append(f"max_seq_length: {args.max_seq_length}, expected at least 8")
    try:
        choose_attn_implementation(args.attn_implementation, args.device)
    except ValueError as error:
        found.append(str(error))
    if args.n_gpu > 1:
        found.append(
            f"{args.n_gpu} GPUs are visible to one process: use torchrun --nproc_per_node {args.n_gpu}, or "
            "CUDA_VISIBLE_DEVICES=0"
        )
    metric = str(args.metric_for_best_model).removeprefix("eval_")
    if args.load_best_model_at_end and metric not in metrics:
        found.append(f"metric_for_best_model: {metric}, expected {' or '.join(metrics)}")
    if args.learning_rate <= 0:
        found.append(f"learning_rate: {args.learning_rate}, expected more than 0")
    return found


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest `checkpoint-*` that was written to its end, None if there is none.

    The Trainer writes trainer_state.json after weights, optimiser, schedule and random state.
    """
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    for path in sorted(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            logger.warning("%s is half-written and left out", path)
            continue
        return str(path)
    return None


def train(trainer: Any, folder: Path, config: ModernBertConfig, predicted_share: float = 0.0) -> dict[str, Any]:
    """Train from the last whole checkpoint in `folder`, or from the start.

    Args:
        trainer: with a packed training set.
        folder: where checkpoints go.
        config: the encoder's, to count its work.
        predicted_share: of the tokens whose logits are computed.

    Returns:
        Measurements for run.json.

    Raises:
        UserError: the last logged loss is not finite.
    """
    sampler = trainer.get_train_dataloader().batch_sampler
    flops = training_flops_per_token(config, sampler.lengths, predicted_share)
    progress = use_progress(trainer, sampler, flops)
    checkpoint = last_whole_checkpoint(folder)
    if checkpoint:
        logger.info("resuming from %s", checkpoint)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    if not math.isfinite(result.training_loss):
        raise UserError(f"training loss is {result.training_loss}; lower learning_rate and run again with --overwrite")
    history = [
        {key: value for key, value in entry.items() if _is_finite_number(value)} for entry in trainer.state.log_history
    ]
    return {
        "steps": trainer.state.global_step,
        "train_loss": round(result.training_loss, 6),
        "train_tokens_per_second": round(progress.tokens_per_second),
        "train_flops_per_token": round(flops),
        "mfu": progress.mfu,
        "padding_share": 0.0,  # rows are packed
        "peak_memory_bytes": peak_memory_bytes(),
        "history": history,
    }


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
