"""What an evaluation set must hold: strings, ids that are unique, and scores that tell something.

Everything is checked before a model is trained, so that no set can spoil the evaluation afterwards. An error
names the set, its part and the row, which is counted from 0.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from modernbert_small.run.errors import UserError
from modernbert_small.run.shards import is_text


def texts(where: str, column: str, values: pa.ChunkedArray) -> list[str]:
    """A column of texts.

    Args:
        where: the set and its part, for errors.
        column: the column's name.
        values: N strings.

    Raises:
        UserError: a text is null, or the column does not hold strings.
    """
    if not is_text(values.type):
        raise UserError(f"{where}: column {column} holds {values.type} in all rows, expected strings")
    _require_values(where, column, values, "a string")
    return values.to_pylist()


def ids(where: str, column: str, values: pa.ChunkedArray) -> list[str]:
    """A column of ids, which are strings or whole numbers, as strings.

    Raises:
        UserError: an id is null, or the column holds something else.
    """
    if not is_text(values.type) and not pa.types.is_integer(values.type):
        raise UserError(f"{where}: column {column} holds {values.type} in all rows, expected strings or whole numbers")
    _require_values(where, column, values, "an id")
    return [str(value) for value in values.to_pylist()]


def numbers(where: str, column: str, values: pa.ChunkedArray) -> list[float]:
    """A column of finite numbers.

    Raises:
        UserError: a number is null or not finite, or the column holds something else.
    """
    if not pa.types.is_floating(values.type) and not pa.types.is_integer(values.type):
        raise UserError(f"{where}: column {column} holds {values.type} in all rows, expected numbers")
    _require_values(where, column, values, "a number")
    found = values.to_pylist()
    for row, number in enumerate(found):
        if not math.isfinite(number):
            raise UserError(f"{where}: {column} is {number} in row {row}, expected a finite number")
    return found


def _require_values(where: str, column: str, values: pa.ChunkedArray, expected: str) -> None:
    """Refuse a column with a null."""
    if values.null_count:
        row = int(np.flatnonzero(values.is_null().to_numpy())[0])
        raise UserError(f"{where}: {column} is null in row {row}, expected {expected}")


def by_id(where: str, keys: Iterable[str], values: Iterable[str]) -> dict[str, str]:
    """Texts by id. A row that repeats an earlier one does no harm.

    Raises:
        UserError: two rows have the same id and different texts.
    """
    found: dict[str, str] = {}
    for row, (key, value) in enumerate(zip(keys, values, strict=True)):
        if found.setdefault(key, value) != value:
            raise UserError(
                f"{where}: row {row} repeats the id {key!r} with another text; expected one text for each id"
            )
    return found


def gains(where: str, pairs: Iterable[tuple[str, str]], scores: Iterable[float]) -> dict[tuple[str, str], float]:
    """The scores of qrels by (query id, document id). A row that repeats an earlier one does no harm.

    Raises:
        UserError: two rows give one pair different scores.
    """
    found: dict[tuple[str, str], float] = {}
    for row, (pair, score) in enumerate(zip(pairs, scores, strict=True)):
        if found.setdefault(pair, score) != score:
            raise UserError(
                f"{where}: row {row} gives query {pair[0]!r} and document {pair[1]!r} the score {score}, but an "
                f"earlier row {found[pair]}; expected one score for each pair"
            )
    return found


def require_ranking(where: str, first: Sequence[str], second: Sequence[str], scores: Sequence[float]) -> None:
    """Refuse sentence pairs that no correlation can be computed of.

    Raises:
        UserError: all scores, or all pairs, are equal.
    """
    if len(set(scores)) < 2:
        raise UserError(f"{where}: the scores of all {len(scores)} rows do not differ; expected pairs to tell apart")
    if len(set(zip(first, second, strict=True))) < 2:
        raise UserError(f"{where}: all {len(scores)} rows hold the same two sentences; expected different ones")
