"""Evaluation sets: retrieval sets and sentence pairs, by name from the hub, from folders and from files."""

import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from sentence_transformers.sentence_transformer.evaluation import NanoBEIREvaluator
from sentence_transformers.sentence_transformer.evaluation.nano_beir import DATASET_NAME_TO_HUMAN_READABLE

from modernbert_small.evaluation import checks, own_sets
from modernbert_small.run.columns import Place, split_mapping
from modernbert_small.run.errors import UserError
from modernbert_small.run.hub import is_own, why_the_hub_failed
from modernbert_small.run.readers import ending

logger = logging.getLogger(__name__)

ALL_NANOBEIR = "nanobeir"
STSB = "stsb"
HUB_SETS = {STSB, ALL_NANOBEIR, *DATASET_NAME_TO_HUMAN_READABLE}
_STSB_HUB_ID = "sentence-transformers/stsb"
_SHARD = re.compile(r"(?P<name>.+?)(-\d{5}-of-(?P<files>\d{5}))?")  # `wiki-en-00000-of-00001` is of the set wiki-en


@dataclass(frozen=True)
class RetrievalSet:
    """Queries, documents, and which documents are relevant to which query.

    Attributes:
        name: of the set, for tables.
        queries: texts by query id; every query has a relevant document.
        corpus: texts by document id.
        relevant: for each query id the ids of its relevant documents.
        gains: how relevant a document is, above 0, by (query id, document id); 1 where nothing is said.
    """

    name: str
    queries: dict[str, str]
    corpus: dict[str, str]
    relevant: dict[str, set[str]]
    gains: dict[tuple[str, str], float] = field(default_factory=dict)


@dataclass(frozen=True)
class PairSet:
    """Pairs of sentences, and how similar people found them.

    Attributes:
        name: of the set, for tables.
        first: N sentences.
        second: N sentences, each to be compared with the one in `first` at the same place.
        scores: N numbers; a higher one means more similar.
    """

    name: str
    first: list[str]
    second: list[str]
    scores: list[float]


# A set, and the folder that it was read from; None for a set from the hub.
_Found = tuple[RetrievalSet | PairSet, Path | None]


def load_evaluation_sets(flag: str, names: Sequence[str]) -> tuple[list[RetrievalSet], list[PairSet]]:
    """Load sets by name, from folders laid out like NanoBEIR or BEIR, and from files.

    A folder like NanoBEIR holds `corpus/`, `queries/` and `qrels/` with files `<Set>.parquet` or
    `<Set>-00000-of-00001.parquet`. Corpus and queries have the columns `_id` and `text`; qrels have `query-id` and
    `corpus-id`, and `score` if the relevance is graded. A score of 0 or less says that a document is not relevant. One
    folder may hold several sets. `own_sets` describes folders like BEIR, and files of queries with their answers. A
    file of sentence pairs has the columns `sentence1`, `sentence2` and `score`.

    Args:
        flag: the flag that gave the names, for errors.
        names: NanoBEIR's names, `nanobeir` for all of them, `stsb`, folders, files, which a mapping may follow.

    Returns:
        Retrieval sets, and sets of sentence pairs. Sets that have the same name are told apart by their folders' names.

    Raises:
        UserError: a name is unknown, the hub cannot be reached, a folder or file has another layout, a value is missing
            or of the wrong type, or two sets cannot be told apart.
    """
    loaded = _tell_apart(flag, [found for name in names for found in _load(flag, name)])
    return (
        [one for one in loaded if isinstance(one, RetrievalSet)],
        [one for one in loaded if isinstance(one, PairSet)],
    )


def _load(flag: str, name: str) -> list[_Found]:
    """The sets of one name, folder or file."""
    place = split_mapping(flag, name)
    path = Path(place.path)
    if path.is_dir():
        return [(one, path) for one in _read_folder(flag, path)]
    if path.is_file():
        return [(_read_file(flag, place), path.parent)]
    if name.lower() == STSB:
        return [(_load_stsb(flag), None)]
    if name.lower() == ALL_NANOBEIR:
        return [(_load_nanobeir(flag, one), None) for one in DATASET_NAME_TO_HUMAN_READABLE]
    if name.lower() in DATASET_NAME_TO_HUMAN_READABLE:
        return [(_load_nanobeir(flag, name.lower()), None)]
    if name == own_sets.HELDOUT:
        raise UserError(
            f"{flag} {name}: stands for the set that phase 1 wrote; give its folder, such as data/corpus/{name}"
        )
    known = ", ".join(DATASET_NAME_TO_HUMAN_READABLE)
    raise UserError(
        f"{flag} {name}: no such folder or file, and not one of NanoBEIR's sets ({known}), {ALL_NANOBEIR} for all of "
        f"them, or {STSB}; looked at {path.absolute()}"
    )


def _tell_apart(flag: str, loaded: Sequence[_Found]) -> list[RetrievalSet | PairSet]:
    """The sets, with `<folder>/` before a name that several of them have."""
    counts = Counter(one.name for one, _ in loaded)
    named = [
        replace(one, name=f"{folder.resolve().name}/{one.name}") if folder and counts[one.name] > 1 else one
        for one, folder in loaded
    ]
    for name, count in Counter(one.name for one in named).items():
        if count > 1:
            raise UserError(
                f"{flag}: {count} sets have the name {name}, expected a name for each; name a set only once, or rename "
                "one of the folders"
            )
    return named


def _read_file(flag: str, place: Place) -> RetrievalSet | PairSet:
    """A set of sentence pairs, or of queries with their answers, from a file."""
    file, where = Path(place.path), f"{flag} {place.path}"
    columns = own_sets.file_columns(where, file, place.encoding)
    name = file.name.removesuffix(ending(file) or "")
    if set(own_sets.PAIR_COLUMNS) <= set(columns) and not place.columns:
        return _pair_set(where, name, own_sets.read_rows(where, file, own_sets.PAIR_COLUMNS, (), place.encoding))
    return _retrieval_set(where, name, *own_sets.read_answers(where, place, columns))


def _pair_set(where: str, name: str, table: pa.Table) -> PairSet:
    """A checked set of sentence pairs.

    Args:
        where: the flag and the file, for errors.
        name: of the set.
        table: with the columns `own_sets.PAIR_COLUMNS`.
    """
    first, second = (checks.texts(where, column, table[column]) for column in own_sets.PAIR_COLUMNS[:2])
    scores = checks.numbers(where, "score", table["score"])
    checks.require_ranking(where, first, second, scores)
    return PairSet(name, first, second, scores)


def _load_stsb(flag: str) -> PairSet:
    """The test split of the STS benchmark, from the hub."""
    from datasets import load_dataset  # only needed here, and slow to import

    try:
        rows = load_dataset(_STSB_HUB_ID, split="test")
    except Exception as error:  # datasets and the hub's client raise many kinds
        if is_own(error):
            raise
        raise UserError(_no_hub(flag, STSB, _STSB_HUB_ID, error)) from error
    return _pair_set(f"{flag} {STSB}", STSB, pa.table({name: list(rows[name]) for name in own_sets.PAIR_COLUMNS}))


def _no_hub(flag: str, name: str, hub_id: str, error: Exception) -> str:
    """The error text for a set that the hub did not give."""
    logger.debug("%s %s", flag, name, exc_info=True)
    return f"{flag} {name}: {hub_id}: {why_the_hub_failed(error)}, or pass {flag} <local folder>"


def _load_nanobeir(flag: str, name: str) -> RetrievalSet:
    """One of NanoBEIR's sets, from the hub."""
    try:
        loaded = NanoBEIREvaluator([name]).evaluators[0]
    except Exception as error:  # datasets and the hub's client raise many kinds
        if is_own(error):
            raise
        raise UserError(_no_hub(flag, name, "sentence-transformers/NanoBEIR-en", error)) from error
    gains = {(query, document): 1.0 for query, found in loaded.relevant_docs.items() for document in found}
    return _retrieval_set(
        f"{flag} {name}",
        f"Nano{DATASET_NAME_TO_HUMAN_READABLE[name]}",
        dict(zip(loaded.queries_ids, loaded.queries, strict=True)),
        dict(zip(loaded.corpus_ids, loaded.corpus, strict=True)),
        gains,
    )


def _retrieval_set(
    where: str, name: str, queries: dict[str, str], corpus: dict[str, str], gains: dict[tuple[str, str], float]
) -> RetrievalSet:
    """A set without the queries that have no relevant document in its corpus.

    Args:
        where: what the set was read from, for errors.
        name: of the set.
        queries: texts by query id.
        corpus: texts by document id.
        gains: scores of the qrels by (query id, document id).
    """
    relevant: dict[str, set[str]] = {}
    unknown = 0
    for (query, document), gain in gains.items():
        if query not in queries or document not in corpus:
            unknown += 1
        elif gain > 0:
            relevant.setdefault(query, set()).add(document)
    if not relevant:
        raise UserError(
            f"{where}: no query of {name} has a relevant document in its corpus; expected qrels with ids of queries/ "
            "and corpus/, and scores above 0 if there are any"
        )
    if unknown or len(relevant) < len(queries):
        logger.info(
            "%s: left out are %d of %d queries, which have no relevant document, and %d of %d qrels, which name a "
            "query or document that the set does not hold",
            name,
            len(queries) - len(relevant),
            len(queries),
            unknown,
            len(gains),
        )
    graded = {pair: gain for pair, gain in gains.items() if gain != 1 and pair[1] in relevant.get(pair[0], ())}
    return RetrievalSet(name, {query: queries[query] for query in relevant}, corpus, relevant, graded)


def _read_folder(flag: str, folder: Path) -> list[RetrievalSet]:
    """All sets of a folder laid out like NanoBEIR, or the one of a folder laid out like BEIR."""
    if own_sets.is_beir(folder):
        where = f"{flag} {folder}"
        return [_retrieval_set(where, folder.resolve().name, *own_sets.read_beir(where, folder))]
    for part in ("", "corpus", "queries", "qrels"):
        with suppress(FileNotFoundError, NotADirectoryError):
            os.listdir(folder / part)  # a denied permission is an error here, but no file at all for `glob`
    names = sorted({_set_name(file) for file in folder.glob("qrels/*.parquet")})
    if not names:
        raise UserError(
            f"{flag} {folder}: no qrels/*.parquet; expected corpus/, queries/ and qrels/ as in NanoBEIR, or "
            "corpus.jsonl, queries.jsonl and qrels/test.tsv as in BEIR"
        )
    return [_read_set(flag, folder, name) for name in names]


def _set_name(file: Path) -> str:
    """The set that a file belongs to: its name without `-00000-of-00001` and `.parquet`."""
    match = _SHARD.fullmatch(file.stem)
    return match["name"] if match else file.stem


def _read_set(flag: str, folder: Path, name: str) -> RetrievalSet:
    """One set of a folder."""
    where = f"{flag} {folder}"
    by_part = {}
    for part in ("corpus", "queries"):
        table, of_part = _read_part(where, part, name, folder, ("_id", "text")), f"{where}: {name}: {part}"
        found = checks.ids(of_part, "_id", table["_id"])
        by_part[part] = checks.by_id(of_part, found, checks.texts(of_part, "text", table["text"]))
    table, of_part = _read_part(where, "qrels", name, folder, ("query-id", "corpus-id")), f"{where}: {name}: qrels"
    pairs = zip(*(checks.ids(of_part, key, table[key]) for key in ("query-id", "corpus-id")), strict=True)
    has_scores = "score" in table.column_names
    scores = checks.numbers(of_part, "score", table["score"]) if has_scores else [1.0] * len(table)
    return _retrieval_set(where, name, by_part["queries"], by_part["corpus"], checks.gains(of_part, pairs, scores))


def _read_part(where: str, part: str, name: str, folder: Path, columns: tuple[str, str]) -> pa.Table:
    """The rows of a part of a set, from all of its files: two columns, and of qrels `score` if there is one."""
    files = sorted(file for file in folder.glob(f"{part}/*.parquet") if _set_name(file) == name)
    if not files:
        raise UserError(f"{where}: no {part}/{name}-*.parquet; expected corpus/, queries/ and qrels/ as in NanoBEIR")
    of_all = _SHARD.fullmatch(files[0].stem)
    if of_all and of_all["files"] and int(of_all["files"]) != len(files):
        raise UserError(
            f"{where}: {part}: {len(files)} of {int(of_all['files'])} files of {name}; copy the missing ones"
        )
    try:
        tables = [pq.read_table(file) for file in files]
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{where}: {part}: expected Parquet with {', '.join(columns)}: {error}") from error
    wanted = [*columns, "score"] if "score" in tables[0].column_names and part == "qrels" else list(columns)
    for file, table in zip(files, tables, strict=True):
        if not set(wanted) <= set(table.column_names):
            raise UserError(
                f"{where}: {part}: columns {table.column_names} in {file.name}, expected {', '.join(wanted)}"
            )
    try:
        return pa.concat_tables(table.select(wanted) for table in tables)
    except pa.ArrowInvalid as error:
        raise UserError(f"{where}: {part}: the columns of its files differ in type: {error}") from error
