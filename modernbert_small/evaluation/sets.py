"""Evaluation sets: retrieval sets by NanoBEIR name or from a folder, sentence pairs by name or from a file."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator, NanoBEIREvaluator
from sentence_transformers.sentence_transformer.evaluation.nano_beir import DATASET_NAME_TO_HUMAN_READABLE
from sentence_transformers.util import cos_sim
from torch import Tensor

from modernbert_small.run.errors import UserError
from modernbert_small.run.hub import is_own, why_the_hub_failed
from modernbert_small.run.shards import is_text

logger = logging.getLogger(__name__)

ALL_NANOBEIR = "nanobeir"
STSB = "stsb"
_STSB_HUB_ID = "sentence-transformers/stsb"
_PAIR_COLUMNS = ["sentence1", "sentence2", "score"]


@dataclass(frozen=True)
class RetrievalSet:
    """Queries, documents, and which documents are relevant to which query.

    Attributes:
        name: of the set, for tables.
        queries: texts by query id; every query has a relevant document.
        corpus: texts by document id.
        relevant: for each query id the ids of its relevant documents.
    """

    name: str
    queries: dict[str, str]
    corpus: dict[str, str]
    relevant: dict[str, set[str]]


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


def load_evaluation_sets(flag: str, names: Sequence[str]) -> tuple[list[RetrievalSet], list[PairSet]]:
    """Load sets by name, from folders laid out like NanoBEIR, and from files of sentence pairs.

    A folder holds `corpus/`, `queries/` and `qrels/` with files `<Set>-*.parquet`. Corpus and queries have the columns
    `_id` and `text`, qrels `query-id` and `corpus-id`. One folder may hold several sets. A file of sentence pairs is
    Parquet with the columns `sentence1`, `sentence2` and `score`.

    Args:
        flag: the flag that gave the names, for errors.
        names: NanoBEIR's names, `nanobeir` for all of them, `stsb`, folders, files.

    Returns:
        Retrieval sets, and sets of sentence pairs.

    Raises:
        UserError: a name is unknown, the hub cannot be reached, or a folder or file has another layout.
    """
    retrieval: list[RetrievalSet] = []
    pairs: list[PairSet] = []
    for name in names:
        if Path(name).is_dir():
            retrieval += _read_folder(flag, Path(name))
        elif Path(name).is_file():
            pairs.append(_read_pairs(flag, Path(name)))
        elif name.lower() == STSB:
            pairs.append(_load_stsb(flag))
        elif name.lower() == ALL_NANOBEIR:
            retrieval += [_load_nanobeir(flag, one) for one in DATASET_NAME_TO_HUMAN_READABLE]
        elif name.lower() in DATASET_NAME_TO_HUMAN_READABLE:
            retrieval.append(_load_nanobeir(flag, name.lower()))
        else:
            known = ", ".join(DATASET_NAME_TO_HUMAN_READABLE)
            raise UserError(
                f"{flag} {name}: no such folder or file, and not one of NanoBEIR's sets ({known}), {ALL_NANOBEIR} "
                f"for all of them, or {STSB}"
            )
    return retrieval, pairs


def _read_pairs(flag: str, file: Path) -> PairSet:
    """A set of sentence pairs from a Parquet file."""
    try:
        table = pq.read_table(file, columns=_PAIR_COLUMNS)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{flag} {file}: expected Parquet with {', '.join(_PAIR_COLUMNS)}: {error}") from error
    if set(table.column_names) != set(_PAIR_COLUMNS) or any(column.null_count for column in table.columns):
        raise UserError(f"{flag} {file}: columns {table.column_names}, expected {_PAIR_COLUMNS} without nulls")
    kinds = [table.schema.field(name).type for name in _PAIR_COLUMNS]
    if not all(map(is_text, kinds[:2])) or not (pa.types.is_floating(kinds[2]) or pa.types.is_integer(kinds[2])):
        raise UserError(f"{flag} {file}: columns of {', '.join(map(str, kinds))}, expected two of strings and a number")
    if len(set(table["score"].to_pylist())) < 2:
        raise UserError(f"{flag} {file}: {len(table)} rows whose scores do not differ; expected pairs to tell apart")
    return PairSet(file.stem, *(table[name].to_pylist() for name in _PAIR_COLUMNS))


def _load_stsb(flag: str) -> PairSet:
    """The test split of the STS benchmark, from the hub."""
    from datasets import load_dataset  # only needed here, and slow to import

    try:
        rows = load_dataset(_STSB_HUB_ID, split="test")
    except Exception as error:  # datasets and the hub's client raise many kinds
        if is_own(error):
            raise
        raise UserError(_no_hub(flag, STSB, _STSB_HUB_ID, error)) from error
    return PairSet(STSB, *(list(rows[name]) for name in _PAIR_COLUMNS))


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
    return RetrievalSet(
        f"Nano{DATASET_NAME_TO_HUMAN_READABLE[name]}",
        dict(zip(loaded.queries_ids, loaded.queries, strict=True)),
        dict(zip(loaded.corpus_ids, loaded.corpus, strict=True)),
        {query: set(documents) for query, documents in loaded.relevant_docs.items()},
    )


def _read_folder(flag: str, folder: Path) -> list[RetrievalSet]:
    """All sets of a folder laid out like NanoBEIR."""
    names = sorted({file.name.split("-")[0] for file in folder.glob("qrels/*.parquet")})
    if not names:
        raise UserError(f"{flag} {folder}: no qrels/*.parquet; expected corpus/, queries/ and qrels/ as in NanoBEIR")
    return [_read_set(flag, folder, name) for name in names]


def _read_set(flag: str, folder: Path, name: str) -> RetrievalSet:
    """One set of a folder, without the queries that have no relevant document in its corpus."""
    corpus = dict(_read_columns(flag, folder, "corpus", name, ("_id", "text")))
    queries = dict(_read_columns(flag, folder, "queries", name, ("_id", "text")))
    relevant: dict[str, set[str]] = {}
    for query, document in _read_columns(flag, folder, "qrels", name, ("query-id", "corpus-id")):
        if query in queries and document in corpus:
            relevant.setdefault(query, set()).add(document)
    if not relevant:
        raise UserError(
            f"{flag} {folder}: no query of {name} has a relevant document in its corpus; expected qrels with ids "
            "of queries/ and corpus/"
        )
    return RetrievalSet(name, {query: queries[query] for query in relevant}, corpus, relevant)


def _read_columns(flag: str, folder: Path, part: str, name: str, columns: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """The rows of a part of a set: its two columns, from all of its files."""
    files = sorted(folder.glob(f"{part}/{name}-*.parquet"))
    if not files:
        raise UserError(
            f"{flag} {folder}: no {part}/{name}-*.parquet; expected corpus/, queries/ and qrels/ as in NanoBEIR"
        )
    try:
        table = pa.concat_tables(pq.read_table(file, columns=list(columns)) for file in files)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{flag} {folder}: {part}: expected Parquet with {', '.join(columns)}: {error}") from error
    if set(table.column_names) != set(columns):
        raise UserError(f"{flag} {folder}: {part}: columns {table.column_names}, expected {', '.join(columns)}")
    return zip(*(table[column].to_pylist() for column in columns), strict=True)


def _cosines(queries: Tensor, documents: Tensor) -> Tensor:
    """Scores (Q, N) of vectors (Q, D) and (N, D) in float32, also under autocast, since bf16 would make ties."""
    with torch.autocast(queries.device.type, enabled=False):
        return cos_sim(queries.float(), documents.float())


def evaluator(dataset: RetrievalSet) -> InformationRetrievalEvaluator:
    """sentence-transformers' evaluator for a set; its primary metric is nDCG@10."""
    return InformationRetrievalEvaluator(
        dataset.queries,
        dataset.corpus,
        dataset.relevant,
        name=dataset.name,
        batch_size=32,
        score_functions={"cosine": _cosines},
        mrr_at_k=[10],
        ndcg_at_k=[10],
        accuracy_at_k=[1],
        precision_recall_at_k=[10],
        map_at_k=[100],
        write_csv=False,
    )
