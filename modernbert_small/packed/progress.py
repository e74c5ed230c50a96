"""The progress of a training run, in tokens a second."""

import logging
import time
from typing import Any

from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from modernbert_small.packed.batches import PackedSampler
from modernbert_small.packed.flops import peak_flops_per_second
from modernbert_small.run.progress import SECONDS_BETWEEN_LINES

logger = logging.getLogger(__name__)


class Progress(TrainerCallback):
    """Shows a bar on a terminal, and elsewhere a line for each logging interval.

    There a line also follows the first step, and every half minute in which nothing else was logged.

    Args:
        tokens_per_step: mean number of tokens in a step, of all processes together.
        peak_seconds_per_token: seconds that a token would take if the devices computed at their peak rate; None if
            that rate is unknown.

    Attributes:
        tokens_per_second: mean speed of all processes together since training started or resumed, without the time
            for evaluations, checkpoints and the first step, which compiles; None before the second step.
    """

    def __init__(self, tokens_per_step: float, peak_seconds_per_token: float | None = None) -> None:
        self.tokens_per_step, self.peak_seconds_per_token = tokens_per_step, peak_seconds_per_token
        self.tokens_per_second: float | None = None
        self._steps, self._seconds, self._evaluation_seconds, self._last_line = 0, 0.0, 0.0, 0.0
        self._step_began: float | None = None
        self._bar: tqdm | None = None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation, from 0 to 1: counted operations over what the devices could compute at their peak.

        None before the second step, or if the devices' peak rate is unknown.
        """
        if self.peak_seconds_per_token is None or self.tokens_per_second is None:
            return None
        return self.tokens_per_second * self.peak_seconds_per_token

    @property
    def evaluation_share(self) -> float | None:
        """What evaluations took, over the time of the training between them; None before the second step."""
        return self._evaluation_seconds / self._seconds if self._seconds else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar, at the step from which training resumes."""
        if state.is_world_process_zero:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=None)
            if self._bar.disable:
                steps = state.max_steps - state.global_step
                logger.info("%s steps of some %s tokens each", f"{steps:,}", f"{self.tokens_per_step:,.0f}")
                self._last_line = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the step and its time."""
        now = time.monotonic()
        if self._step_began is not None:
            self._steps, self._seconds = self._steps + 1, self._seconds + now - self._step_began
            self.tokens_per_second = self._steps * self.tokens_per_step / self._seconds
        self._step_began = now
        if self._bar is not None:
            self._bar.update()
            is_due = self._steps == 1 or now - self._last_line > SECONDS_BETWEEN_LINES
            if self._bar.disable and is_due and not control.should_log:
                self._log_line(state, "")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave out the time of the evaluation."""
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
        """Show what the Trainer logs, and count the time of evaluations."""
        self._evaluation_seconds += (logs or {}).get("eval_runtime", 0.0)
        if self._bar is None or not logs or "train_runtime" in logs:
            return
        shown = " ".join(f"{name} {_short(value)}" for name, value in logs.items() if _is_worth_showing(name, value))
        if "eval_runtime" in logs and self.evaluation_share is not None:
            shown += f" (evaluations: {self.evaluation_share:.0%} of the training's time)"
        if self._bar.disable:
            if state.global_step:
                self._log_line(state, shown)
        elif any(name.startswith("eval_") for name in logs):
            with tqdm.external_write_mode():
                logger.info("step %d/%d  %s", state.global_step, state.max_steps, shown)
        else:
            self._bar.set_postfix_str(f"{shown} {self._speed()}")

    def _log_line(self, state: TrainerState, shown: str) -> None:
        self._last_line = time.monotonic()
        words = [f"step {state.global_step}/{state.max_steps}", shown, self._speed(), self._time_left(state)]
        logger.info("%s", "  ".join(word for word in words if word))

    def _speed(self) -> str:
        """The speed as it is shown; empty before the second step."""
        if self.tokens_per_second is None:
            return ""
        share = "" if self.mfu is None else f" ({self.mfu:.0%} of peak)"
        return f"{self.tokens_per_second:,.0f} tokens/s{share}"

    def _time_left(self, state: TrainerState) -> str:
        """The time until the last step as it is shown; empty before the second step."""
        if self.tokens_per_second is None:
            return ""
        tokens_left = (state.max_steps - state.global_step) * self.tokens_per_step
        minutes, seconds = divmod(round(tokens_left / self.tokens_per_second), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_worth_showing(name: str, value: object) -> bool:
    """Whether a metric is shown: numbers, but no clocks."""
    hidden = ("runtime", "per_second", "epoch", "total_flos", "num_input_tokens_seen")
    return isinstance(value, int | float) and not any(word in name for word in hidden)


def use_progress(trainer: Trainer, sampler: PackedSampler, flops_per_token: float) -> Progress:
    """Replace the Trainer's own display of progress with ours.

    Args:
        trainer: modified.
        sampler: the batches of its training set.
        flops_per_token: floating-point operations of forward and backward for one token.
    """
    for default in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(default)
    peak = peak_flops_per_second(trainer.args.device)
    peak_seconds = None if peak is None else flops_per_token / (peak * trainer.args.world_size)
    tokens_per_step = float(sampler.lengths.sum()) / len(sampler) * trainer.args.gradient_accumulation_steps
    progress = Progress(tokens_per_step, peak_seconds)
    trainer.add_callback(progress)
    return progress
