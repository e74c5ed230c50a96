"""Evaluation sets of one's own: BEIR's layout, files of queries with their answers, and pairs held out by phase 1."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from modernbert_small.evaluation import checks
from modernbert_small.run.columns import LAYOUTS, Place, find_columns, listed, listed_columns, split_mapping
from modernbert_small.run.errors import UserError
from modernbert_small.run.hub import is_own, reason
from modernbert_small.run.readers import KNOWN_ENDINGS, BadRow, ending, open_file
from modernbert_small.settings.create_dataset import HELDOUT

logger = logging.getLogger(__name__)

PAIR_COLUMNS = ["sentence1", "sentence2", "score"]
_BEIR_FILES = ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv")


class Parts(NamedTuple):
    """What a retrieval set is made of.

    queries, corpus: texts by id. gains: how relevant a document is, by (query id, document id); 0 or less: not at all.
    """

    queries: dict[str, str]
    corpus: dict[str, str]
    gains: dict[tuple[str, str], float]


def is_beir(folder: Path) -> bool:
    """Whether a folder is laid out like BEIR's sets."""
    return (folder / _BEIR_FILES[0]).is_file()


def read_beir(where: str, folder: Path) -> Parts:
    """A set of BEIR, whose documents are `title text`, as BEIR itself joins them.

    Args:
        where: the flag and the folder, for errors.
        folder: with corpus.jsonl (`_id`, `text`, `title`), queries.jsonl (`_id`, `text`) and qrels/test.tsv
            (`query-id`, `corpus-id`, `score`).

    Raises:
        UserError: a file, column or value is missing or of the wrong type.

    References:
        Thakur et al. 2021, BEIR, arXiv:2104.08663; https://github.com/beir-cellar/beir/wiki/Load-your-custom-dataset
    """
    for name in _BEIR_FILES:
        if not (folder / name).is_file():
            raise UserError(f"{where}: no {name}; expected {', '.join(_BEIR_FILES)} as in BEIR")
    texts = []
    for name in _BEIR_FILES[:2]:
        of_part = f"{where}: {name}"
        table = read_rows(of_part, folder / name, ["_id", "text"], ["title"])
        found = checks.texts(of_part, "text", table["text"])
        if "title" in table.column_names:
            titles = table["title"].to_pylist()
            found = [f"{title or ''} {text}".strip() for title, text in zip(titles, found, strict=True)]
        texts.append(checks.by_id(of_part, checks.ids(of_part, "_id", table["_id"]), found))
    of_part = f"{where}: {_BEIR_FILES[2]}"
    qrels = read_rows(of_part, folder / _BEIR_FILES[2], ["query-id", "corpus-id", "score"])
    pairs = zip(*(checks.ids(of_part, key, qrels[key]) for key in ("query-id", "corpus-id")), strict=True)
    corpus, queries = texts
    return Parts(queries, corpus, checks.gains(of_part, pairs, checks.numbers(of_part, "score", qrels["score"])))


def read_answers(where: str, place: Place, columns: Sequence[str]) -> Parts:
    """A set from a file whose rows are a query and an answer, or a list of answers; the documents are all answers.

    Args:
        where: the flag and the file, for errors.
        place: the file, with a mapping or without. A column `score` says how relevant the answers of its row are.
        columns: of the file.

    Raises:
        UserError: there are no such columns, or a value is missing or of the wrong type.
    """
    found = find_columns(columns, where, place.columns)
    wanted = [names[0] for names in (found["query"], found["positive"] or found["text"], found["score"]) if names]
    if not found["query"] or len(wanted) < 2:
        raise UserError(
            f"{where}: {listed_columns(columns)}; expected {', '.join(PAIR_COLUMNS)}, or queries: {LAYOUTS}"
        )
    unused = ", ".join(name for name in columns if name not in wanted)
    logger.info("%s: read: %s%s", where, ", ".join(wanted), f"; not used: {unused}" if unused else "")
    table = read_rows(where, Path(place.path), wanted, encoding=place.encoding)
    queries = checks.texts(where, wanted[0], table[wanted[0]])
    answers = table[wanted[1]]
    if pa.types.is_list(answers.type) or pa.types.is_large_list(answers.type):
        rows = [row for row, listed in enumerate(answers.to_pylist()) for _ in listed or ()]
        answers = pa.chunked_array([answers.combine_chunks().flatten()])
    else:
        rows = list(range(len(queries)))
    texts = checks.texts(where, wanted[1], answers)
    scores = checks.numbers(where, wanted[2], table[wanted[2]]) if len(wanted) > 2 else [1.0] * len(queries)
    query_ids = {text: f"q{number}" for number, text in enumerate(dict.fromkeys(queries))}
    ids = {text: f"d{number}" for number, text in enumerate(dict.fromkeys(texts))}
    pairs = [(query_ids[queries[row]], ids[text]) for row, text in zip(rows, texts, strict=True)]
    return Parts(
        {key: text for text, key in query_ids.items()},
        {key: text for text, key in ids.items()},
        checks.gains(where, pairs, [scores[row] for row in rows]),
    )


def read_rows(
    where: str, file: Path, columns: Sequence[str], optional: Sequence[str] = (), encoding: str | None = None
) -> pa.Table:
    """Some columns of a file of any known format; scores are numbers.

    Raises:
        UserError: the file cannot be read, a row of it is broken, or a column is missing or of mixed types.
    """
    present = file_columns(where, file, encoding)
    wanted = [*columns, *(name for name in optional if name in present)]
    if absent := [name for name in columns if name not in present]:
        raise UserError(f"{where}: no column {absent[0]!r}; found {listed(present)}")
    if ending(file) == ".parquet":
        return pq.read_table(file, columns=wanted, partitioning=None)
    rows = []
    for number, row in enumerate(open_file(file, encoding).values(wanted, None)):
        if isinstance(row, BadRow):
            raise UserError(f"{where}: row {number}: {row.why}")
        rows.append(row)
    try:
        table = pa.table(dict(zip(wanted, zip(*rows, strict=True) if rows else [[]] * len(wanted), strict=True)))
        if "score" in wanted and table["score"].type == pa.string():  # CSV has no numbers
            table = table.set_column(wanted.index("score"), "score", table["score"].cast(pa.float64()))
    except pa.ArrowException as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}; expected values of one type in a column") from error
    return table


def file_columns(where: str, file: Path, encoding: str | None) -> list[str]:
    """The columns of a file.

    Raises:
        UserError: of no known format, or it cannot be read.
    """
    if ending(file) is None:
        raise UserError(f"{where}: found a {file.suffix or 'nameless'} file; expected {KNOWN_ENDINGS}")
    try:
        return open_file(file, encoding).columns
    except Exception as error:  # readers raise many kinds
        if is_own(error):
            raise
        raise UserError(f"{where}: cannot be read: {reason(error)}") from error


def write_set(folder: Path, name: str, parts: Parts) -> None:
    """Write a set whose documents are relevant or not, laid out like NanoBEIR."""
    pairs = list(parts.gains)
    tables = {
        "corpus": {"_id": list(parts.corpus), "text": list(parts.corpus.values())},
        "queries": {"_id": list(parts.queries), "text": list(parts.queries.values())},
        "qrels": {"query-id": [query for query, _ in pairs], "corpus-id": [document for _, document in pairs]},
    }
    for part, columns in tables.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), folder / part / f"{name}-00000-of-00001.parquet")


def set_locations(names: Sequence[str], data: str) -> dict[str, str]:
    """Where each set of --eval_datasets lies, as `load_evaluation_sets` takes it; `heldout` lies in a phase's data.

    Args:
        names: of --eval_datasets.
        data: the corpus or the labels.

    Raises:
        UserError: phase 1 held nothing out.
    """
    heldout = Path(data, HELDOUT)
    if HELDOUT in names and not heldout.is_dir():
        raise UserError(f"--eval_datasets {HELDOUT}: no {heldout}; make it with --eval_datasets {HELDOUT} of phase 1")
    return {name: str(heldout) if name == HELDOUT else name for name in names}


def set_inputs(locations: Mapping[str, str]) -> dict[str, str]:
    """The sets as inputs of a run: their paths, without mappings, or names.

    Args:
        locations: of `set_locations`.
    """
    return {
        f"eval_datasets {name}": split_mapping("--eval_datasets", location).path for name, location in locations.items()
    }
