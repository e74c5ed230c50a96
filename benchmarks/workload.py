"""A measurement's input, its result, and how its padding is counted.

No large library is imported here, so that a measurement's peak memory counts only the libraries that it needs.
"""

import functools
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, SupportsInt

ROOT = Path(__file__).parent.parent
MAX_SEQ_LENGTH = 1024  # what the student reads
TEACHER_WIDTH, STUDENT_WIDTH = 768, 384
# Rows of a usual batch, which are drawn at random.
MLM_ROWS_PER_BATCH, DISTILLATION_ROWS_PER_BATCH, ENCODE_ROWS_PER_BATCH = 16, 64, 32
MLM_PROBABILITY = 0.3


@dataclass(frozen=True)
class Workload:
    """What a measurement runs on, the same for all ways of doing it.

    Attributes:
        folder: what prepare.py wrote: corpus, distil, source, student, teacher, sources.json.
        scratch: an empty folder to write into.
        first: the first row of the corpus to run on.
        rows: the number of rows to run on.
        cuda: whether to use the GPU's batch sizes.
        warm_up_rows: the corpus's first rows, which are run once before the clock starts.
        max_seq_length: tokens at which texts are cut.
        torch_compile: whether ours compiles the layers; None for what the phases do by default.
        profile: whether ours runs the warm-up's rows once more, to count the device's work.
    """

    folder: Path
    scratch: Path
    first: int
    rows: int
    cuda: bool = False
    warm_up_rows: int = 0
    max_seq_length: int = MAX_SEQ_LENGTH
    torch_compile: bool | None = None
    profile: bool = False

    def slice(self, warm_up: bool = False) -> tuple[int, int]:
        """The first row and the one after the last; the warm-up has the corpus's first rows, which are not timed."""
        return (0, self.warm_up_rows) if warm_up else (self.first, self.first + self.rows)

    @property
    def tokens_per_batch(self) -> int:
        """Tokens of a batch of phases 3 and 4: few enough for a CPU's caches, or many enough to keep a GPU busy."""
        return 65_536 if self.cuda else 4096

    @property
    def distillation_tokens_per_batch(self) -> int:
        """Tokens of a batch of phase 5, whose default is smaller."""
        return min(self.tokens_per_batch, 16_384)

    @property
    def sources(self) -> dict[str, str]:
        """The texts that the corpus is made of: paths by name."""
        return json.loads((self.folder / "sources.json").read_text(encoding="utf-8"))


@dataclass
class Measurement:
    """What was measured.

    Attributes:
        tokens: tokens processed in the timed part, without padding.
        seconds: duration of the timed part.
        positions: tokens and padding that the model ran on, or that the batches hold; None without batches.
        peak_bytes: peak memory of the GPU with CUDA, of the process without.
        flops_per_token: counted, see packed/flops.py; only of ours.
        busy_seconds_per_token: seconds for which kernels ran; only with CUDA and `profile`.
    """

    tokens: int
    seconds: float
    positions: int | None = None
    peak_bytes: int = 0
    flops_per_token: float | None = None
    busy_seconds_per_token: float | None = None

    def to_json(self) -> str:
        """The measurement as one line of JSON."""
        return json.dumps(asdict(self))


class Model(Protocol):
    """A torch module, without importing torch."""

    forward: Callable[..., object]


class Positions:
    """Counts the tokens and the positions, padding included, that a model is called on."""

    def __init__(self, model: Model) -> None:
        self.positions = 0
        self._tokens: list[SupportsInt] = []  # numbers, or scalars on the device, which are not waited for
        # A forward hook would not do: sentence-transformers calls `forward` itself, which runs no hooks.
        model.forward = self._counting(model.forward)

    def _counting(self, forward: Callable[..., object]) -> Callable[..., object]:
        """A forward method that counts its inputs (B, L)."""

        @functools.wraps(forward)
        def counted(*args: Any, **inputs: Any) -> object:
            mask = inputs.get("attention_mask")
            self.positions += inputs["input_ids"].numel()
            self._tokens.append(inputs["input_ids"].numel() if mask is None else mask.sum())
            return forward(*args, **inputs)

        return counted

    def reset(self) -> None:
        """Begin counting at zero again, after the warm-up."""
        self.positions = 0
        self._tokens.clear()

    @property
    def tokens(self) -> int:
        """How many tokens, without padding, the model was called on; waits for the device."""
        return sum(map(int, self._tokens))


def load_script(path: str) -> ModuleType:
    """A phase's script as a module; the scripts are in no package.

    Args:
        path: of the script, relative to the repository.
    """
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
