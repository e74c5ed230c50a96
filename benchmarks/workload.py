"""What one measurement runs on, what it gives, and how its padding and its time are counted.

Nothing heavy is imported here: a measurement's peak memory is that of its own libraries.
"""

import functools
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parent.parent
MAX_SEQ_LENGTH = 1024
TEACHER_WIDTH, STUDENT_WIDTH = 768, 384
# Usual batches: rows, drawn at random.
MLM_ROWS_PER_BATCH, DISTILLATION_ROWS_PER_BATCH, ENCODE_ROWS_PER_BATCH = 16, 64, 32
MLM_PROBABILITY = 0.3
WARM_UP_ROWS = 4


@dataclass(frozen=True)
class Workload:
    """The same for both ways of doing it.

    Attributes:
        folder: what prepare.py wrote: corpus, distil, source, student, teacher, sources.json.
        scratch: an empty folder.
        first, rows: this measurement's rows of the corpus.
        cuda: whether to use the GPU's batch sizes.
    """

    folder: Path
    scratch: Path
    first: int
    rows: int
    cuda: bool = False

    def slice(self, warm_up: bool = False) -> tuple[int, int]:
        """First row and one past the last; warming up takes the corpus's first rows, which nothing is timed on."""
        return (0, WARM_UP_ROWS) if warm_up else (self.first, self.first + self.rows)

    @property
    def tokens_per_batch(self) -> int:
        """Of our batches: what the caches hold on a CPU, what fills the device on CUDA."""
        return 65_536 if self.cuda else 4096

    @property
    def sources(self) -> dict[str, str]:
        """Name -> path of the texts that the corpus is made of."""
        return json.loads((self.folder / "sources.json").read_text(encoding="utf-8"))


@dataclass
class Measurement:
    """What was measured.

    Attributes:
        tokens: real tokens gone through in the timed part.
        seconds: of the timed part.
        positions: tokens and padding that the model ran on, or that the batches hold; None without batches.
        peak_bytes: of the process's memory, of the device's on CUDA.
    """

    tokens: int
    seconds: float
    positions: int | None = None
    peak_bytes: int = 0

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))


class Positions:
    """Counts the tokens and the positions, padding included, that a model is called on."""

    def __init__(self, model: Any) -> None:
        self.tokens = self.positions = 0
        # Not a hook: sentence-transformers calls `forward` itself.
        model.forward = self._counting(model.forward)

    def _counting(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def counted(*args: Any, **inputs: Any) -> Any:
            mask = inputs.get("attention_mask")
            self.positions += inputs["input_ids"].numel()
            self.tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())
            return forward(*args, **inputs)

        return counted

    def reset(self) -> None:
        """Forget what came before, the warm-up."""
        self.tokens = self.positions = 0


def load_script(path: str) -> ModuleType:
    """One of the phases' scripts as a module; they lie in no package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
