"""Training text that an evaluation set holds too: found, so that it can be dropped.

A text is contaminated if its words, whatever their case and punctuation, are those of a query or document of an
evaluation set, or if it shares a run of 13 words with one (GPT-3's criterion, https://arxiv.org/abs/2005.14165,
appendix C).
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from modernbert_small.evaluation.sets import PairSet, RetrievalSet

RUN_WORDS = 13
_WORD = re.compile(r"\w+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Contamination:
    """What evaluation texts say, ready to be looked for.

    Words are numbered; a run is the sum of its words' numbers times powers of an odd constant, modulo 2^64.

    Args:
        texts: queries, documents or both.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._numbers: dict[str, int] = {}
        self._whole: set[bytes] = set()
        runs: list[NDArray[np.uint64]] = []
        for text in texts:
            words = _WORD.findall(text.casefold())
            ids = np.array([self._numbers.setdefault(word, len(self._numbers) + 1) for word in words], np.uint64)
            if len(ids):
                self._whole.add(ids.tobytes())
                runs.append(_runs(ids))
        self._runs = np.unique(np.concatenate(runs)) if runs else np.zeros(0, np.uint64)

    def found_in(self, text: str) -> bool:
        """Whether a text equals an evaluation text or shares a run of 13 words with one."""
        number = self._numbers.get
        ids = np.array([number(word, 0) for word in _WORD.findall(text.casefold())], np.uint64)
        unknown = np.flatnonzero(ids == 0)
        if not len(unknown) and ids.tobytes() in self._whole:
            return True
        # Runs lie between unknown words: most texts have none long enough, and are through here.
        edges = np.concatenate([[-1], unknown, [len(ids)]])
        for gap in np.flatnonzero(np.diff(edges) > RUN_WORDS):
            if np.isin(_runs(ids[edges[gap] + 1 : edges[gap + 1]]), self._runs).any():
                return True
        return False

    def drop(self, table: pa.Table, counts: Counter[str]) -> pa.Table:
        """A table of `text` and `source` without contaminated rows, which are counted by source."""
        bad = pa.array([self.found_in(text) for text in table["text"].to_pylist()], pa.bool_())
        counts.update(table["source"].filter(bad).to_pylist())
        return table.filter(pc.invert(bad))


def _runs(ids: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hashes of all runs of 13 of (n,) words; none for fewer."""
    count = max(0, len(ids) - RUN_WORDS + 1)
    total = np.zeros(count, np.uint64)
    for offset in range(RUN_WORDS):
        total = total * _MULTIPLIER + ids[offset : offset + count]
    return total


def evaluation_texts(retrieval: Sequence[RetrievalSet], pairs: Sequence[PairSet], documents: bool) -> Iterator[str]:
    """Queries and sentences of pairs, and documents if asked for."""
    for dataset in retrieval:
        yield from dataset.queries.values()
        if documents:
            yield from dataset.corpus.values()
    for pair_set in pairs:
        yield from pair_set.first
        yield from pair_set.second
