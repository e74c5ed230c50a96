"""Retrieval sets, by NanoBEIR name or from a folder, and how student and teacher do on them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator, NanoBEIREvaluator
from sentence_transformers.sentence_transformer.evaluation.nano_beir import DATASET_NAME_TO_HUMAN_READABLE

from modernbert_small.models import has_bf16
from modernbert_small.settings import UserError

logger = logging.getLogger(__name__)

FLAG = "--eval_datasets"


@dataclass(frozen=True)
class RetrievalSet:
    """Queries, documents and which documents answer which query, all by id."""

    name: str
    queries: dict[str, str]
    corpus: dict[str, str]
    relevant: dict[str, set[str]]


def load_retrieval_sets(names: Sequence[str]) -> list[RetrievalSet]:
    """Load sets by NanoBEIR name, or folders laid out like NanoBEIR.

    A folder holds `corpus/`, `queries/` and `qrels/` with files `<Set>-*.parquet`; columns `_id`, `text`
    and `query-id`, `corpus-id`. One folder may hold several sets.

    Raises:
        UserError: an unknown name, the hub out of reach, or a folder laid out otherwise.
    """
    sets = []
    for name in names:
        if Path(name).is_dir():
            sets += _read_folder(Path(name))
        elif name.lower() in DATASET_NAME_TO_HUMAN_READABLE:
            sets.append(_load_nanobeir(name.lower()))
        else:
            known = ", ".join(DATASET_NAME_TO_HUMAN_READABLE)
            raise UserError(f"{FLAG} {name}: no such folder, and not one of NanoBEIR's sets: {known}")
    return sets


def _load_nanobeir(name: str) -> RetrievalSet:
    try:
        loaded = NanoBEIREvaluator([name]).evaluators[0]
    except Exception as error:  # datasets and the hub raise many kinds for one cause
        raise UserError(
            f"{FLAG} {name}: sentence-transformers/NanoBEIR-en did not come from the Hugging Face hub "
            f"({type(error).__name__}); check the network, or pass {FLAG} <local folder>"
        ) from error
    return RetrievalSet(
        f"Nano{DATASET_NAME_TO_HUMAN_READABLE[name]}",
        dict(zip(loaded.queries_ids, loaded.queries, strict=True)),
        dict(zip(loaded.corpus_ids, loaded.corpus, strict=True)),
        {query: set(documents) for query, documents in loaded.relevant_docs.items()},
    )


def _read_folder(folder: Path) -> list[RetrievalSet]:
    names = sorted({file.name.split("-")[0] for file in folder.glob("qrels/*.parquet")})
    if not names:
        raise UserError(f"{FLAG} {folder}: no qrels/*.parquet; expected corpus/, queries/ and qrels/ as in NanoBEIR")
    return [_read_set(folder, name) for name in names]


def _read_set(folder: Path, name: str) -> RetrievalSet:
    columns = {"corpus": ("_id", "text"), "queries": ("_id", "text"), "qrels": ("query-id", "corpus-id")}
    parts = {}
    for part, (first, second) in columns.items():
        files = sorted(folder.glob(f"{part}/{name}-*.parquet"))
        if not files:
            raise UserError(f"{FLAG} {folder}: no {part}/{name}-*.parquet")
        try:
            tables = [pq.read_table(file, columns=[first, second]) for file in files]
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{FLAG} {folder}: {part}: expected Parquet with {first}, {second}: {error}") from error
        table = pa.concat_tables(tables)
        if set(table.column_names) != {first, second}:
            raise UserError(f"{FLAG} {folder}: {part}: columns {table.column_names}, expected {first}, {second}")
        parts[part] = list(zip(table[first].to_pylist(), table[second].to_pylist(), strict=True))
    corpus, queries = dict(parts["corpus"]), dict(parts["queries"])
    relevant: dict[str, set[str]] = {}
    for query, document in parts["qrels"]:
        if query in queries and document in corpus:
            relevant.setdefault(query, set()).add(document)
    if not relevant:
        raise UserError(f"{FLAG} {folder}: no query of {name} has a relevant document in its corpus")
    return RetrievalSet(name, {query: queries[query] for query in relevant}, corpus, relevant)


def evaluator(dataset: RetrievalSet, batch_size: int = 32) -> InformationRetrievalEvaluator:
    """Sentence-transformers' evaluator for a set; its primary metric is nDCG@10."""
    return InformationRetrievalEvaluator(
        dataset.queries,
        dataset.corpus,
        dataset.relevant,
        name=dataset.name,
        batch_size=batch_size,
        mrr_at_k=[10],
        ndcg_at_k=[10],
        accuracy_at_k=[1],
        precision_recall_at_k=[10],
        map_at_k=[100],
        write_csv=False,
    )


def ndcg_at_10(model: SentenceTransformer, dataset: RetrievalSet) -> float:
    """A model's nDCG@10 by cosine, in bf16 where the hardware has it."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=has_bf16(model.device)):
        return float(evaluator(dataset)(model)[f"{dataset.name}_cosine_ndcg@10"])


def compare(
    student: SentenceTransformer, teacher: SentenceTransformer, datasets: Sequence[RetrievalSet]
) -> list[dict[str, float | str]]:
    """nDCG@10 of both models on each set, and the student's share of the teacher's.

    Returns:
        A row per set: dataset, teacher, student, retention; last their mean, whose retention is the mean
        of the sets' retentions.
    """
    rows: list[dict[str, float | str]] = []
    for dataset in datasets:
        scores = [round(ndcg_at_10(model, dataset), 4) for model in (teacher, student)]
        retention = round(scores[1] / max(scores[0], 1e-9), 4)
        rows.append({"dataset": dataset.name, "teacher": scores[0], "student": scores[1], "retention": retention})
    if rows:
        means = {
            name: round(sum(float(row[name]) for row in rows) / len(rows), 4)
            for name in ("teacher", "student", "retention")
        }
        rows.append({"dataset": "mean", **means})
    return rows


def format_comparison(rows: Sequence[dict[str, float | str]]) -> str:
    """The comparison as a Markdown table."""
    lines = ["| nDCG@10 | teacher | student | retention |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {row['dataset']} | {row['teacher']:.3f} | {row['student']:.3f} | {100 * float(row['retention']):.1f} % |"
        for row in rows
    ]
    return "\n".join(lines)
