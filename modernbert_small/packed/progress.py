"""A training's progress, in real tokens a second."""

import logging
import time
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from modernbert_small.packed.batches import PackedSampler
from modernbert_small.packed.flops import peak_flops_per_second

logger = logging.getLogger(__name__)


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
        if self.share_per_token is None or not self.tokens_per_second:
            return None
        return self.tokens_per_second * self.share_per_token

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
            if any(name.startswith("eval_") for name in logs):
                with tqdm.external_write_mode():
                    logger.info("step %d/%d  %s", state.global_step, state.max_steps, shown)
            else:
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
    tokens_per_step = float(sampler.lengths.sum()) / len(sampler) * trainer.args.gradient_accumulation_steps
    progress = Progress(tokens_per_step, share)
    trainer.add_callback(progress)
    return progress
