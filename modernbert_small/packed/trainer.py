"""What phases 3 and 5 add to transformers' Trainer: packed batches, only finite steps, whole checkpoints."""

import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import ModernBertConfig, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SchedulerType, rotate_checkpoints

from modernbert_small.packed.batches import PackedDataset, PackedLoader, PackedSampler
from modernbert_small.packed.checkpoints import (
    StopOnSignal,
    checkpoint_step,
    last_whole_checkpoint,
    remove_later_checkpoints,
)
from modernbert_small.packed.flops import training_flops_per_token
from modernbert_small.packed.progress import use_progress
from modernbert_small.run.artefacts import Run
from modernbert_small.run.devices import peak_memory_bytes
from modernbert_small.run.durable import publish
from modernbert_small.run.errors import UserError
from modernbert_small.run.loading import require_finite
from modernbert_small.run.manifest import write_manifest
from modernbert_small.run.processes import any_process, wait_for_all

logger = logging.getLogger(__name__)

_MAX_SKIPPED_IN_A_ROW = 10
_UNFINISHED = "checkpoint.partial"


class PackedTrainer(Trainer):
    """transformers' Trainer on packed batches, from PackedDatasets.

    A batch holds about `args.tokens_per_batch` tokens, which the processes share.

    A step whose loss or gradient is not finite is not applied. A checkpoint gets its name when it is whole.

    It also stands before another subclass of Trainer: `class X(PackedTrainer, SentenceTransformerTrainer)`.
    """

    _loss: Tensor | float = 0.0  # of the step in progress, the sum over its batches so far
    _finite_loss: Tensor | float = 0.0  # of the last batch whose loss was finite
    _skipped_in_a_row = 0

    def get_train_dataloader(self) -> DataLoader:
        """Batches that hold every row once an epoch, in random order, and are dealt to the processes."""
        sampler = self._sampler(self.train_dataset, shuffle=True)
        return PackedLoader(self.train_dataset, sampler, self.args.dataloader_num_workers)

    def get_eval_dataloader(self, eval_dataset: PackedDataset | None = None) -> DataLoader:
        """Batches that hold every row once, in order."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return PackedLoader(dataset, self._sampler(dataset, shuffle=False))

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """The Trainer's schedule, with defaults for warmup_stable_decay: a linear decay over the last tenth.

        `lr_scheduler_kwargs` changes them. A `num_decay_steps` below 1 is a share of all steps, as `warmup_steps` is.
        """
        if self.args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY:
            given = {"decay_type": "linear", "num_decay_steps": 0.1} | (self.args.lr_scheduler_kwargs or {})
            if given["num_decay_steps"] < 1:
                given["num_decay_steps"] = math.ceil(given["num_decay_steps"] * num_training_steps)
            self.args.lr_scheduler_kwargs = given
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one batch; returns its loss for the log, or the one before if it is not finite."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._loss = self._loss + loss
        self._finite_loss = torch.where(torch.isfinite(loss), loss, self._finite_loss)
        return self._finite_loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor:
        """The norm of a complete step's gradients; drops them if it or the loss is not finite.

        The Trainer calls this once a step, with the norm that it has clipped by. This is the only point of a step at
        which the program waits for the device, unless the step is logged.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        loss, self._loss = self._loss, 0.0
        if self.accelerator.scaler is None:  # fp16's scaler skips by itself
            if any_process(not bool(torch.isfinite(norm + loss))):
                self._skipped_in_a_row += 1
                model.zero_grad()  # sets gradients to None, and optimisers leave out what has none
                self._note_skipped_step(float(loss))
            else:
                self._skipped_in_a_row = 0
        return norm

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch on the device; the copy from pinned memory is not waited for."""
        return super()._prepare_inputs(send_to_device(inputs, self.args.device, non_blocking=True))

    def _note_skipped_step(self, loss: float) -> None:
        """Count the step in progress, log which rows it was made of, and give up after too many in a row."""
        step = self.state.global_step + 1
        self.state.log_history.append({"step": step, "skipped_steps": 1})  # checkpoints keep this history
        rows = ", ".join(map(str, self._rows_in_progress()))
        what = f"loss {loss:.4g}, or its gradient, is not finite"
        logger.warning("step %d is not applied: %s; it was made of rows %s of the training split", step, what, rows)
        if self._skipped_in_a_row > _MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"step {step}: loss or gradient not finite {self._skipped_in_a_row} times in a row; {self._last_good()}"
            )

    def _rows_in_progress(self) -> NDArray[np.int64]:
        """The rows, (n,), that this process reads for the step in progress."""
        sampler, accumulated = self._sampler(self.train_dataset, shuffle=True), self.args.gradient_accumulation_steps
        epoch, step = divmod(self.state.global_step, math.ceil(len(sampler) / accumulated))
        sampler.set_epoch(epoch)
        batches = islice(sampler, step * accumulated, (step + 1) * accumulated)
        return np.concatenate([batch.rows for batch in batches])

    def _last_good(self) -> str:
        """The end of an error: the last good checkpoint, and what to do."""
        checkpoint = last_whole_checkpoint(Path(self.args.output_dir))
        return f"last good checkpoint: {checkpoint}; lower learning_rate and pass --overwrite, or look at those rows"

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch, but none after the last step: resumed from there, the Trainer would make one step more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """Write a checkpoint aside and rename it when all processes are done; then remove old ones."""
        try:
            require_finite(self.model, f"step {self.state.global_step}")
        except UserError as error:
            raise UserError(f"{error}; {self._last_good()}") from error
        folder = Path(self.args.output_dir)
        aside = folder / _UNFINISHED
        asked = self.args.output_dir, self.args.save_total_limit
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        wait_for_all()
        self.args.output_dir, self.args.save_total_limit = str(aside), None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir, self.args.save_total_limit = asked
        wait_for_all()
        self._publish_checkpoint(folder, aside)
        wait_for_all()

    def _publish_checkpoint(self, folder: Path, aside: Path) -> None:
        """Move the checkpoint of this step from `aside` to `folder`, where the best one is named by its final path."""
        name = f"checkpoint-{self.state.global_step}"
        best = folder / f"checkpoint-{self.state.best_global_step}"
        if best.name == name or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            self.state.save_to_json(str(aside / name / TRAINER_STATE_NAME))
            if (folder / name).exists():  # it was saved at the step's end, and is saved again at the epoch's end
                (folder / name).rename(aside / "earlier")
            write_manifest(aside / name)
            publish(aside / name, folder / name)
            shutil.rmtree(aside)
            remove_later_checkpoints(folder, self.state.global_step)
            rotate_checkpoints(str(folder), self.args.save_total_limit, self.state.best_model_checkpoint)

    def _sampler(self, dataset: PackedDataset, shuffle: bool) -> PackedSampler:
        """The batches of a dataset for this process."""
        try:
            return PackedSampler(
                dataset.store.lengths,
                self.args.tokens_per_process,
                self.args.seed if self.args.data_seed is None else self.args.data_seed,
                shuffle,
                self.args.process_index,
                self.args.world_size,
                self.args.gradient_accumulation_steps if shuffle else 1,
            )
        except ValueError as error:
            raise UserError(
                f"--train_file: {error}; use fewer processes, a smaller gradient_accumulation_steps or more text"
            ) from error


def require_context(max_seq_length: int, config: ModernBertConfig) -> None:
    """Refuse a `max_seq_length` that is longer than the model can read.

    Raises:
        UserError: names the greatest length that the model can read.
    """
    if max_seq_length > config.max_position_embeddings:
        raise UserError(
            f"max_seq_length: {max_seq_length} is more than the model's max_position_embeddings; "
            f"use at most {config.max_position_embeddings}"
        )


def train(trainer: Trainer, run: Run, config: ModernBertConfig, predicted_share: float = 0.0) -> dict[str, Any]:
    """Train from the last whole checkpoint in the run's folder, or from the start if there is none.

    Args:
        trainer: a PackedTrainer.
        run: started; the trainer's output folder is the run's, where the checkpoints are written.
        config: the encoder's, from which its floating-point operations are counted.
        predicted_share: share of the tokens whose logits are computed; 0 without a masked-LM head.

    Returns:
        Measurements for run.json.

    Raises:
        UserError: the training loss is not finite.
    """
    sampler = trainer.get_train_dataloader().batch_sampler
    flops = training_flops_per_token(config, sampler.lengths, predicted_share)
    progress = use_progress(trainer, sampler, flops)
    shutil.rmtree(run.folder / _UNFINISHED, ignore_errors=True)
    checkpoint = last_whole_checkpoint(run.folder)
    if checkpoint:
        logger.info("resuming from %s", checkpoint)
    run.note_checkpoint(checkpoint_step(Path(checkpoint)) if checkpoint else None)
    with StopOnSignal() as stop:
        trainer.add_callback(stop)
        result = trainer.train(resume_from_checkpoint=checkpoint)
    if not math.isfinite(result.training_loss):
        raise UserError(f"training loss is {result.training_loss}; lower learning_rate and run again with --overwrite")
    history = [
        {key: value for key, value in entry.items() if _is_finite_number(value)} for entry in trainer.state.log_history
    ]
    losses = [entry["loss"] for entry in history if "loss" in entry]  # those before an interruption too
    speed, share = progress.tokens_per_second, progress.evaluation_share
    return {
        "steps": trainer.state.global_step,
        "skipped_steps": sum("skipped_steps" in entry for entry in history),
        "train_loss": round(sum(losses) / len(losses) if losses else result.training_loss, 6),
        "train_tokens_per_second": None if speed is None else round(speed),
        "train_flops_per_token": round(flops),
        "mfu": progress.mfu,
        "evaluation_share": None if share is None else round(share, 4),
        "padding_share": 0.0,  # packed rows have no padding
        "peak_memory_bytes": peak_memory_bytes(),
        "history": history,
    }


class EndedWorse(TypedDict):
    """A held-out measure that got worse: what is measured, its value at the beginning and its value at the end."""

    measure: str
    began: float
    ended: float


def note_if_worse(measure: str, began: float, ended: float, *, greater_is_better: bool = True) -> dict[str, EndedWorse]:
    """Warn of a model that training has made worse.

    Args:
        measure: what is measured on held-out texts, such as `held-out loss`.
        began: its value at the beginning.
        ended: its value for the model that is kept.
        greater_is_better: False for a loss.

    Returns:
        The measurement `ended_worse` for run.json; nothing if the model did not get worse.
    """
    if ended >= began if greater_is_better else ended <= began:
        return {}
    logger.warning(
        "TRAINING MADE THE MODEL WORSE: its %s was %.4f at the beginning and is %.4f at the end; lower learning_rate, "
        "train for more steps or on more text, and run again with --overwrite",
        measure,
        began,
        ended,
    )
    return {"ended_worse": {"measure": measure, "began": round(began, 6), "ended": round(ended, 6)}}


def worse_notice(measurements: Mapping[str, Any]) -> str:
    """The beginning of a script's last message if the model got worse (see `note_if_worse`), else nothing."""
    worse: EndedWorse | None = measurements.get("ended_worse")
    if worse is None:
        return ""
    return (
        f"THE MODEL ENDED WORSE THAN IT BEGAN, {worse['measure']} {worse['began']:.4f} -> {worse['ended']:.4f}, "
        "so do not use it; "
    )


def compare_held_out_losses(
    history: Sequence[Mapping[str, float]], metrics: Mapping[str, float]
) -> dict[str, EndedWorse]:
    """Compare the first held-out loss of the training with that of the model that is kept, see `note_if_worse`.

    Args:
        history: of `train`'s measurements.
        metrics: of `last_evaluation`.
    """
    first = next((entry["eval_loss"] for entry in history if "eval_loss" in entry), None)
    if first is None:
        return {}
    return note_if_worse("held-out loss", first, metrics["eval_loss"], greater_is_better=False)


def last_evaluation(trainer: Trainer) -> dict[str, float]:
    """Held-out metrics of the trained model, which are measured only if the last step's evaluation does not hold.

    It holds if it was made at the last step, and the last step's weights are those that were kept.

    Args:
        trainer: a PackedTrainer after `train`. Every process must call this.
    """
    state = trainer.state
    last = next((entry for entry in reversed(state.log_history) if "eval_loss" in entry), None)
    if last is not None and last["step"] == state.global_step:
        is_last_model = not trainer.args.load_best_model_at_end or state.best_global_step == state.global_step
        if is_last_model:
            return last
    return trainer.evaluate()


def _is_finite_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
