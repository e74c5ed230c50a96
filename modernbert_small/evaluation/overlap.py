"""Training texts that equal texts of an evaluation set, which make the score on that set too high."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from modernbert_small.evaluation.sets import PairSet, RetrievalSet
from modernbert_small.run.errors import UserError
from modernbert_small.run.records import find_records
from modernbert_small.run.shards import read_table, split_files
from modernbert_small.run.tables import counted

logger = logging.getLogger(__name__)


def warn_of_overlap(labels: str, retrieval: Sequence[RetrievalSet], pairs: Sequence[PairSet]) -> dict[str, int]:
    """Log a warning for each evaluation set of which queries are among the training texts.

    Args:
        labels: phase 4's folder.
        retrieval, pairs: as in `texts_in_training`.

    Returns:
        What `texts_in_training` returns.
    """
    overlap = texts_in_training(split_files(labels, "train"), "sentence", retrieval, pairs)
    for name, count in overlap.items():
        what = overlap_words(name, count)
        logger.warning("%s, so its score will be too high; keep them out with --eval_datasets of phase 1", what)
    return overlap


def warn_of_own_overlap(student: str, retrieval: Sequence[RetrievalSet], pairs: Sequence[PairSet]) -> None:
    """Log the same for the labels that a student was trained on, or that they are not there to be compared.

    Args:
        student: a model's folder or hub id.
        retrieval, pairs: as in `texts_in_training`.
    """
    with suppress(UserError):  # parts of what it was made of may have been moved since
        if labels := find_records([student]).get("create_distil_dataset"):
            warn_of_overlap(labels["folder"], retrieval, pairs)
            return
    logger.info("%s: what it was trained on was not found, so it is not known whether these sets are in it", student)


def overlap_words(name: str, count: int) -> str:
    """How many training texts equal a query of a set, in words."""
    return f"{counted(count, 'training text')} {'equals' if count == 1 else 'equal'} a query of {name}"


def texts_in_training(
    files: Sequence[Path], column: str, retrieval: Sequence[RetrievalSet], pairs: Sequence[PairSet]
) -> dict[str, int]:
    """How many training texts equal a query, or a sentence of a pair, of each evaluation set.

    Case and blanks do not count. Phase 1 also drops texts that share a run of words with a set. This check finds a
    corpus that was not made by phase 1, or that was made without naming the sets that phase 5 reports.

    Args:
        files: Parquet shards of the training texts.
        column: the column that holds the texts.
        retrieval: retrieval sets; their queries are compared.
        pairs: sets of sentence pairs; both sentences are compared.

    Returns:
        The number of training texts by set; sets without any are left out.
    """
    reported = {one.name: list(one.queries.values()) for one in retrieval}
    reported |= {one.name: [*one.first, *one.second] for one in pairs}
    wanted = {name: _plain(pa.array(texts, pa.large_string())) for name, texts in reported.items()}
    counts = dict.fromkeys(wanted, 0)
    for table in read_table(files, [column]):
        texts = _plain(table[column].cast(pa.large_string()))
        for name, values in wanted.items():
            counts[name] += pc.sum(pc.is_in(texts, value_set=values)).as_py() or 0
    return {name: count for name, count in counts.items() if count}


def _plain(texts: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Texts in lower case, with one blank between words and none around them."""
    return pc.utf8_trim_whitespace(pc.replace_substring_regex(pc.utf8_lower(texts), r"\s+", " "))
