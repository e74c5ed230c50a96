"""What phases 3 and 5 add to transformers' Trainer: packed batches, progress in tokens, safe resuming."""

import logging
import math
import os
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader
from transformers import ModernBertConfig, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SchedulerType, rotate_checkpoints

from modernbert_small.packed.attention import choose_attn_implementation
from modernbert_small.packed.batches import PackedLoader, PackedSampler
from modernbert_small.packed.checkpoints import StopOnSignal, last_whole_checkpoint
from modernbert_small.packed.flops import training_flops_per_token
from modernbert_small.packed.progress import use_progress
from modernbert_small.packed.tokens import TokenStore
from modernbert_small.run.devices import best_device, has_bf16, peak_memory_bytes
from modernbert_small.run.errors import UserError
from modernbert_small.run.loading import require_finite
from modernbert_small.run.processes import any_process, wait_for_all

logger = logging.getLogger(__name__)

_MAX_SKIPPED_IN_A_ROW = 10
_UNFINISHED = "checkpoint.partial"


class _PackedDataset(Protocol):
    store: TokenStore


class PackedTrainerMixin:
    """Packed batches of about `args.tokens_per_batch` tokens from datasets that have a `store`; finite, whole states.

    A step whose loss or gradient is not finite is not applied, and a checkpoint has its name when it is whole.
    Mixed in before Trainer or SentenceTransformerTrainer.
    """

    accelerator: Any
    args: Any
    control: Any
    eval_dataset: Any
    model: Any
    state: Any
    train_dataset: Any
    _losses_are_finite = True  # of the step in progress
    _skipped_in_a_row = 0

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

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward; when a step's gradients are complete, they are dropped if not all is finite."""
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        self._losses_are_finite &= bool(torch.isfinite(loss))
        if self.accelerator.sync_gradients and self.accelerator.scaler is None:  # fp16's scaler skips by itself
            gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
            is_sound = self._losses_are_finite and bool(torch.isfinite(get_total_norm(gradients)))
            self._losses_are_finite = True
            self._skipped_in_a_row += 1
            if any_process(not is_sound):
                model.zero_grad()  # to None, which optimisers pass over
                self._note_skipped_step(loss)
            else:
                self._skipped_in_a_row = 0
        return loss

    def _note_skipped_step(self, loss: torch.Tensor) -> None:
        """Count the step in progress, say which rows it was made of, give up after too many in a row."""
        step = self.state.global_step + 1
        self.state.log_history.append({"step": step, "skipped_steps": 1})  # which checkpoints keep
        rows = ", ".join(map(str, self._rows_in_progress()))
        what = f"loss {loss.item():.4g}, or its gradient, is not finite"
        logger.warning("step %d is not applied: %s; rows %s of the training split", step, what, rows)
        if self._skipped_in_a_row > _MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"step {step}: loss or gradient not finite {self._skipped_in_a_row} times in a row; {self._last_good()}"
            )

    def _rows_in_progress(self) -> NDArray[np.int64]:
        """The rows of this process in the step in progress."""
        sampler, accumulated = self._sampler(self.train_dataset, True), self.args.gradient_accumulation_steps
        epoch, step = divmod(self.state.global_step, math.ceil(len(sampler) / accumulated))
        sampler.set_epoch(epoch)
        batches = islice(sampler, step * accumulated, (step + 1) * accumulated)
        return np.concatenate([batch.rows for batch in batches])

    def _last_good(self) -> str:
        checkpoint = last_whole_checkpoint(Path(self.args.output_dir))
        return f"last good checkpoint: {checkpoint}; lower learning_rate and pass --overwrite, or look at those rows"

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """An epoch; nothing if training was resumed from its last step, where the Trainer would make one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint aside and rename it when all processes are done; then remove old ones."""
        try:
            require_finite(self.model, f"step {self.state.global_step}")
        except UserError as error:
            raise UserError(f"{error}; {self._last_good()}") from error
        folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        aside = folder / _UNFINISHED
        changed = {"output_dir": str(aside), "save_total_limit": None}
        asked = {setting: getattr(self.args, setting) for setting in changed}
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        wait_for_all()
        vars(self.args).update(changed)
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            vars(self.args).update(asked)
        wait_for_all()
        best = folder / f"checkpoint-{self.state.best_global_step}"
        if best.name == name or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            self.state.save_to_json(str(aside / name / TRAINER_STATE_NAME))
            if (folder / name).exists():  # saved at the step's end, and now at the epoch's
                (folder / name).rename(aside / "earlier")
            (aside / name).rename(folder / name)
            shutil.rmtree(aside)
            rotate_checkpoints(str(folder), self.args.save_total_limit, self.state.best_model_checkpoint)
        wait_for_all()

    def _sampler(self, dataset: _PackedDataset, shuffle: bool) -> PackedSampler:
        try:
            return PackedSampler(
                dataset.store.lengths,
                self.args.tokens_per_batch,
                self.args.seed if self.args.data_seed is None else self.args.data_seed,
                shuffle,
                self.args.process_index,
                self.args.world_size,
            )
        except ValueError as error:
            raise UserError(f"--train_file: {error}; use fewer processes or more text") from error


def resolve_hardware(args: TrainingArguments) -> None:
    """The CPU where there is no CUDA; bf16 unless told otherwise, where the hardware has it; no search by DDP for
    parameters without gradient, of which there are none.

    Called before TrainingArguments checks itself.
    """
    args.use_cpu = args.use_cpu or best_device().type == "cpu"
    if args.bf16 is None:
        args.bf16 = not args.fp16 and has_bf16(torch.device("cpu") if args.use_cpu else best_device())
    if args.torch_compile:  # a layer at a time and for any length: whole models compile anew for each batch
        os.environ.setdefault("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
        os.environ.setdefault("ACCELERATE_DYNAMO_USE_DYNAMIC", "true")
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False


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
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        if getattr(args, name) != 8:
            found.append(f"{name}: batches are counted in tokens here; use tokens_per_batch")
    if args.resume_from_checkpoint is not None:
        found.append("resume_from_checkpoint: a killed run goes on by itself; leave it out")
    try:
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:  # no such name; not installed
        found.append(f"report_to: {error}")
    if args.num_train_epochs <= 0 and args.max_steps <= 0:
        found.append(f"num_train_epochs: {args.num_train_epochs}, expected more than 0")
    if args.gradient_accumulation_steps < 1:
        found.append(f"gradient_accumulation_steps: {args.gradient_accumulation_steps}, expected at least 1")
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


def require_context(max_seq_length: int, config: ModernBertConfig) -> None:
    """Refuse texts that are longer than the model reads.

    Raises:
        UserError: with the most that it reads.
    """
    if max_seq_length > config.max_position_embeddings:
        raise UserError(
            f"max_seq_length: {max_seq_length} is more than the model's max_position_embeddings; "
            f"use at most {config.max_position_embeddings}"
        )


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
    shutil.rmtree(folder / _UNFINISHED, ignore_errors=True)
    checkpoint = last_whole_checkpoint(folder)
    if checkpoint:
        logger.info("resuming from %s", checkpoint)
    with StopOnSignal() as stop:
        trainer.add_callback(stop)
        result = trainer.train(resume_from_checkpoint=checkpoint)
    if not math.isfinite(result.training_loss):
        raise UserError(f"training loss is {result.training_loss}; lower learning_rate and run again with --overwrite")
    history = [
        {key: value for key, value in entry.items() if _is_finite_number(value)} for entry in trainer.state.log_history
    ]
    losses = [entry["loss"] for entry in history if "loss" in entry]  # before an interruption too
    return {
        "steps": trainer.state.global_step,
        "skipped_steps": sum("skipped_steps" in entry for entry in history),
        "train_loss": round(sum(losses) / len(losses) if losses else result.training_loss, 6),
        "train_tokens_per_second": round(progress.tokens_per_second) or None,  # none: killed after the last step
        "train_flops_per_token": round(flops),
        "mfu": progress.mfu,
        "padding_share": 0.0,  # rows are packed
        "peak_memory_bytes": peak_memory_bytes(),
        "history": history,
    }


def last_evaluation(trainer: Any) -> dict[str, float]:
    """Held-out metrics of the trained model: the last step's, if it was evaluated there and is what was kept.

    Args:
        trainer: after `train`; every process calls this.
    """
    last: dict[str, float] = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), {})
    is_last_model = not trainer.args.load_best_model_at_end or trainer.state.best_global_step == last.get("step")
    if last.get("step") == trainer.state.global_step and is_last_model:
        return last
    return trainer.evaluate()


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
