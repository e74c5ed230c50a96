"""A random sample of a corpus, and the vectors that fitting the projection has made of it."""

import logging
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from modernbert_small.run.durable import publish
from modernbert_small.run.shards import count_rows, read_table, split_files

logger = logging.getLogger(__name__)


def sample_texts(data: str, split: str, size: int, seed: int) -> tuple[NDArray[np.int64], list[str], list[str]]:
    """A random sample of a corpus's split, or the whole split if it is smaller.

    Args:
        data: the corpus's folder.
        split: train or validation.
        size: how many texts to draw.
        seed: fixes which.

    Returns:
        The rows' positions in the split (n,), ascending; their texts; their kinds.
    """
    files = split_files(data, split)
    chosen = np.sort(np.random.default_rng(seed).permutation(count_rows(files))[:size])
    texts: list[str] = []
    kinds: list[str] = []
    first = 0
    for table in read_table(files, ("text", "kind")):
        rows = chosen[np.searchsorted(chosen, first) : np.searchsorted(chosen, first + len(table))] - first
        picked = table.take(pa.array(rows))
        texts += picked["text"].to_pylist()
        kinds += picked["kind"].to_pylist()
        first += len(table)
    return chosen, texts, kinds


class Sample(NamedTuple):
    """Vectors of some rows of the training split, so that these rows are not embedded again.

    rows: (n,), ascending positions in the training split. vectors: (n, D) float32.
    """

    rows: NDArray[np.int64]
    vectors: NDArray[np.float32]

    def save(self, path: Path) -> None:
        """Write both, for the other processes and for a run that goes on."""
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as stream:
            np.savez(stream, rows=self.rows, vectors=self.vectors)
        publish(temporary, path)

    @classmethod
    def none(cls, width: int) -> "Sample":
        """An empty sample of vectors of a width D."""
        return cls(np.empty(0, np.int64), np.empty((0, width), np.float32))

    @classmethod
    def load(cls, path: Path, width: int) -> "Sample":
        """The sample that was saved, or an empty one if the file is not there or is damaged.

        The file is a zip archive, whose reader compares the size and a checksum of each array.
        """
        if not path.exists():
            return cls.none(width)
        try:
            with np.load(path) as saved:
                return cls(saved["rows"], saved["vectors"])
        except (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile) as error:
            logger.warning("%s is damaged, and the rows of the sample are embedded again: %s", path, error)
            return cls.none(width)

    def within(self, first: int, count: int) -> "Sample":
        """The part of the sample that lies in `count` rows from row `first` on, with positions counted from there."""
        part = slice(*np.searchsorted(self.rows, (first, first + count)))
        return Sample(self.rows[part] - first, self.vectors[part])
