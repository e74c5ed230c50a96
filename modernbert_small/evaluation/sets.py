"""Sets to evaluate on: retrieval by NanoBEIR name or from a folder, sentence pairs from a file."""

import logging
from collections.abc import Sequence
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
    """Queries, documents and which documents answer which query, all by id."""

    name: str
    queries: dict[str, str]
    corpus: dict[str, str]
    relevant: dict[str, set[str]]


@dataclass(frozen=True)
class PairSet:
    """Pairs of sentences and how alike people found them."""

    name: str
    first: list[str]
    second: list[str]
    scores: list[float]


def load_evaluation_sets(flag: str, names: Sequence[str]) -> tuple[list[RetrievalSet], list[PairSet]]:
    """Load sets by name, from folders laid out like NanoBEIR, and from files of sentence pairs.

    A folder holds `corpus/`, `queries/` and `qrels/` with files `<Set>-*.parquet`; columns `_id`, `text`
    and `query-id`, `corpus-id`. One folder may hold several sets. A file is Parquet with `sentence1`,
    `sentence2`, `score`.

    Args:
        flag: where the names come from, for errors.
        names: NanoBEIR's, `nanobeir` for all of them, `stsb`, folders, files.

    Raises:
        UserError: an unknown name, the hub out of reach, or a folder or file laid out otherwise.
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
    from datasets import load_dataset  # only needed here, and slow to import

    try:
        rows = load_dataset(_STSB_HUB_ID, split="test")
    except Exception as error:  # datasets and the hub's client raise many kinds
        if is_own(error):
            raise
        raise UserError(_no_hub(flag, STSB, _STSB_HUB_ID, error)) from error
    return PairSet(STSB, *(list(rows[name]) for name in _PAIR_COLUMNS))


def _no_hub(flag: str, name: str, hub_id: str, error: Exception) -> str:
    logger.debug("%s %s", flag, name, exc_info=True)
    return f"{flag} {name}: {hub_id}: {why_the_hub_failed(error)}, or pass {flag} <local folder>"


def _load_nanobeir(flag: str, name: str) -> RetrievalSet:
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
    names = sorted({file.name.split("-")[0] for file in folder.glob("qrels/*.parquet")})
    if not names:
        raise UserError(f"{flag} {folder}: no qrels/*.parquet; expected corpus/, queries/ and qrels/ as in NanoBEIR")
    return [_read_set(flag, folder, name) for name in names]


def _read_set(flag: str, folder: Path, name: str) -> RetrievalSet:
    columns = {"corpus": ("_id", "text"), "queries": ("_id", "text"), "qrels": ("query-id", "corpus-id")}
    parts = {}
    for part, (first, second) in columns.items():
        files = sorted(folder.glob(f"{part}/{name}-*.parquet"))
        if not files:
            raise UserError(f"{flag} {folder}: no {part}/{name}-*.parquet")
        try:
            tables = [pq.read_table(file, columns=[first, second]) for file in files]
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{flag} {folder}: {part}: expected Parquet with {first}, {second}: {error}") from error
        table = pa.concat_tables(tables)
        if set(table.column_names) != {first, second}:
            raise UserError(f"{flag} {folder}: {part}: columns {table.column_names}, expected {first}, {second}")
        parts[part] = list(zip(table[first].to_pylist(), table[second].to_pylist(), strict=True))
    corpus, queries = dict(parts["corpus"]), dict(parts["queries"])
    relevant: dict[str, set[str]] = {}
    for query, document in parts["qrels"]:
        if query in queries and document in corpus:
            relevant.setdefault(query, set()).add(document)
    if not relevant:
        raise UserError(f"{flag} {folder}: no query of {name} has a relevant document in its corpus")
    return RetrievalSet(name, {query: queries[query] for query in relevant}, corpus, relevant)


def _cosines(queries: Tensor, documents: Tensor) -> Tensor:
    """Scores (Q, N) in float32, whatever the autocast that the vectors were made under: bf16 would make ties."""
    with torch.autocast(queries.device.type, enabled=False):
        return cos_sim(queries.float(), documents.float())


def evaluator(dataset: RetrievalSet) -> InformationRetrievalEvaluator:
    """Sentence-transformers' evaluator for a set; its primary metric is nDCG@10."""
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
