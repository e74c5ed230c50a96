"""Progress of long work."""

import logging
import time
from types import TracebackType

from tqdm import tqdm

from modernbert_small.run.processes import rank

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30


class ProgressBar:
    """A progress bar on a terminal, and log lines elsewhere.

    A line is logged every half minute. Work that takes longer also gets a line at its end.

    Args:
        total: how many units of work there are.
        description: what is done, for people.
        unit: name of a unit of work, in the singular.
    """

    def __init__(self, total: int, description: str, unit: str = "row") -> None:
        self.total, self.description, self.unit, self.done = total, description, unit, 0
        self._bar = tqdm(total=total, desc=description, unit=unit, disable=rank() > 0 or None)
        self._last_line, self._lines = time.monotonic(), 0

    def update(self, count: int, note: str = "") -> None:
        """Count more units as done.

        Args:
            count: units done since the last call.
            note: shown behind the numbers.
        """
        self.done += count
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)
        is_due = time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES
        if self._bar.disable and (is_due or (self._lines and self.done == self.total)):
            self._last_line, self._lines = time.monotonic(), self._lines + 1
            counts = f"{self.done:,} of {self.total:,} {self.unit}s"
            logger.info("%s: %s%s", self.description, counts, f", {note}" if note else "")

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
