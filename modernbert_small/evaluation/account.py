"""Where a student stands against its teacher, step by step, and where the rest was lost.

The same sets for every system: the teacher, the teacher after phase 4's projection (the ceiling), the student, its
queries against the teacher's documents, the student truncated and quantised. nDCG@10 in per cent of the teacher's
with a paired bootstrap over queries, Spearman on sentence pairs, speed on this machine, size.
"""

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense

from modernbert_small.algebra import unit_vectors
from modernbert_small.evaluation.metrics import (
    PRECISIONS,
    mean_ratio_interval,
    ndcg_at_10,
    similarities,
    store_scores,
    truncated,
)
from modernbert_small.evaluation.sets import PairSet, RetrievalSet
from modernbert_small.run.artefacts import read_run
from modernbert_small.run.devices import bf16_autocast
from modernbert_small.run.progress import ProgressBar

logger = logging.getLogger(__name__)


Vectors = NDArray[np.float32]


WIDTHS = (256, 128, 64, 32)  # what vectors are truncated to, and half of their own width


LATENCY_QUERIES = 30


SEARCHES = 5  # queries of all sets together whose first results are kept, to read


_BLOCK = 1024  # texts between two steps of a progress bar
RESULTS, EXCERPT = 3, 160  # documents of a search, characters of a document


class Embedder:
    """A model that embeds in bf16 where the hardware has it, and counts texts and seconds."""

    def __init__(self, model: SentenceTransformer) -> None:
        self.model = model
        self.texts, self.seconds = 0, 0.0

    def __call__(self, texts: Sequence[str], kind: str, description: str) -> Vectors:
        """Unit vectors (N, D) of queries or documents, under a progress bar."""
        began, vectors = time.perf_counter(), []
        with ProgressBar(len(texts), description, "text") as bar:
            for first in range(0, len(texts), _BLOCK):
                block = texts[first : first + _BLOCK]
                vectors.append(self._encode(block, kind))
                bar.update(len(block))
        self.texts, self.seconds = self.texts + len(texts), self.seconds + time.perf_counter() - began
        return unit_vectors(np.concatenate(vectors).astype(np.float32))

    def _encode(self, texts: Sequence[str], kind: str) -> Vectors:
        encode = self.model.encode_query if kind == "query" else self.model.encode_document
        with bf16_autocast(self.model.device):
            return encode(list(texts), batch_size=32, show_progress_bar=False)

    def cost(self, queries: Sequence[str]) -> dict[str, float]:
        """Speed so far, latency of one query, and size."""
        rate = self.texts / max(self.seconds, 1e-9)
        seconds = []
        for query in queries[:LATENCY_QUERIES]:
            began = time.perf_counter()
            self._encode([query], "query")
            seconds.append(time.perf_counter() - began)
        values = list(self.model.state_dict().values())
        return {
            "parameters": sum(value.numel() for value in values),
            "megabytes": round(sum(value.numel() * value.element_size() for value in values) / 1e6, 1),
            "texts_per_second": round(rate, 1),
            "query_milliseconds": round(1000 * float(np.median(seconds)), 2) if seconds else 0.0,
        }


def split_projection(teacher: SentenceTransformer, is_reduced: bool) -> tuple[SentenceTransformer, Vectors | None]:
    """A reduced teacher as it was before phase 4, and the projection (D_T, D); None where there is none."""
    dense = [module for module in teacher if isinstance(module, Dense)]
    if not is_reduced or not dense:
        return teacher, None
    weight = dense[-1].linear.weight.detach().float().cpu().numpy()
    whole = SentenceTransformer(
        modules=[module for module in teacher if module is not dense[-1]],
        prompts=teacher.prompts,
        default_prompt_name=teacher.default_prompt_name,
        device=str(teacher.device),
    )
    return whole, weight.T


def systems(
    T: tuple[Vectors, Vectors], S: tuple[Vectors, Vectors] | None, projection: Vectors | None
) -> dict[str, NDArray[np.floating]]:
    """Scores (Q, N) of each step from the teacher down.

    Args:
        T: the teacher's queries (Q, D_T) and documents (N, D_T), unit length.
        S: the student's (Q, D), (N, D); None before there is one.
        projection: (D_T, D), None if the teacher has none.
    """
    found = {"teacher": similarities(*T)}
    if projection is not None:
        T = unit_vectors(T[0] @ projection), unit_vectors(T[1] @ projection)
        found["teacher, projected"] = similarities(*T)
    if S is None:
        return found
    found["student"] = similarities(*S)
    if S[0].shape[1] == T[0].shape[1]:
        found["student's queries, teacher's documents"] = similarities(S[0], T[1])
    for size in _widths(S[0].shape[1])[1:]:
        found[f"student, {size} values"] = similarities(truncated(S[0], size), truncated(S[1], size))
    for precision in PRECISIONS[1:]:
        found[f"student, {precision}"] = similarities(*S, precision)
    return found


def _widths(width: int) -> list[int]:
    """What vectors of a width are cut to, itself first."""
    return sorted({width, width // 2, *(size for size in WIDTHS if size < width)}, reverse=True)


def sample_searches(
    dataset: RetrievalSet, scores: dict[str, NDArray[np.floating]], relevant: Sequence[Sequence[int]], count: int
) -> list[dict[str, Any]]:
    """The first results of a few queries, evenly spaced in their set, by each of several systems.

    Args:
        dataset: the set.
        scores: (Q, N) by system.
        relevant: for each query the columns of its relevant documents.
        count: queries at most.

    Returns:
        For each query `set`, `query` and, by system, `results`: documents with `text`, `score` and `relevant`.
    """
    queries, documents = list(dataset.queries.values()), list(dataset.corpus.values())
    found = []
    for row in range(0, len(queries), math.ceil(len(queries) / count)) if count else ():
        results = {}
        for system, matrix in scores.items():
            nearest = np.argsort(-matrix[row], kind="stable")[:RESULTS].tolist()
            texts = [_excerpt(documents[i]) for i in nearest]
            ranked = zip(texts, matrix[row, nearest].tolist(), [i in relevant[row] for i in nearest], strict=True)
            results[system] = [{"text": t, "score": round(score, 3), "relevant": hit} for t, score, hit in ranked]
        found.append({"set": dataset.name, "query": _excerpt(queries[row]), "results": results})
    return found


def _excerpt(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= EXCERPT else words[:EXCERPT].rstrip() + "…"


def account(
    student: SentenceTransformer | None,
    teacher: SentenceTransformer,
    is_reduced: bool,
    retrieval_sets: Sequence[RetrievalSet],
    pair_sets: Sequence[PairSet] = (),
) -> dict[str, Any]:
    """Measure every step from the teacher to the student on the same sets.

    Args:
        student: None for the ceiling alone.
        teacher: as phase 4 left it, or any.
        is_reduced: whether its last Dense module is phase 4's projection.
        retrieval_sets: for nDCG@10.
        pair_sets: for Spearman.

    Returns:
        retrieval: a row per system with `scores` by set, `mean`, `retention` and its 95 % `interval` (means over sets
        of the share of the teacher's). grid: the student's retention by width and precision of its vectors.
        searches: see `sample_searches`, the teacher projected. pairs: a row per system with `scores` by set. cost: by
        model.
    """
    whole, projection = split_projection(teacher, is_reduced)
    embedders = {"teacher": Embedder(whole)} | ({} if student is None else {"student": Embedder(student)})
    pairs: dict[str, dict[str, float]] = {}
    for pair_set in pair_sets:
        vectors = {
            name: (
                embed(pair_set.first, "document", f"{pair_set.name}, {name}, first sentences"),
                embed(pair_set.second, "document", f"{pair_set.name}, {name}, second sentences"),
            )
            for name, embed in embedders.items()
        }
        for system, scores in _pair_scores(vectors["teacher"], vectors.get("student"), projection).items():
            pairs.setdefault(system, {})[pair_set.name] = round(float(spearmanr(scores, pair_set.scores)[0]), 4)
    queries = [text for dataset in retrieval_sets for text in dataset.queries.values()]
    return {
        **_retrieval(embedders, projection, retrieval_sets),
        "queries": {dataset.name: len(dataset.queries) for dataset in retrieval_sets},
        "pairs": [{"system": system, "scores": scores} for system, scores in pairs.items()],
        "cost": {name: embed.cost(queries) for name, embed in embedders.items()} if queries else {},
    }


def _retrieval(
    embedders: dict[str, Embedder], projection: Vectors | None, retrieval_sets: Sequence[RetrievalSet]
) -> dict[str, Any]:
    """Of an account: retrieval, grid and searches."""
    per_query: dict[str, dict[str, NDArray[np.floating]]] = {}
    shares: dict[int, dict[str, list[float]]] = {}
    searches: list[dict[str, Any]] = []
    for dataset in retrieval_sets:
        column = {document: index for index, document in enumerate(dataset.corpus)}
        relevant = [sorted(column[document] for document in dataset.relevant[query]) for query in dataset.queries]
        vectors = {
            name: (
                embed(list(dataset.queries.values()), "query", f"{dataset.name}, {name}, queries"),
                embed(list(dataset.corpus.values()), "document", f"{dataset.name}, {name}, documents"),
            )
            for name, embed in embedders.items()
        }
        scores = systems(vectors["teacher"], vectors.get("student"), projection)
        for system, matrix in scores.items():
            per_query.setdefault(system, {})[dataset.name] = ndcg_at_10(matrix, relevant)
        if "student" in vectors:
            ceiling = max(float(per_query["teacher"][dataset.name].mean()), 1e-9)
            widths = _widths(vectors["student"][0].shape[1])
            for (size, precision), score in store_scores(*vectors["student"], relevant, widths).items():
                shares.setdefault(size, {}).setdefault(precision, []).append(score / ceiling)
            count = min(math.ceil(SEARCHES / len(retrieval_sets)), SEARCHES - len(searches))
            both = {"teacher": scores.get("teacher, projected", scores["teacher"]), "student": scores["student"]}
            searches += sample_searches(dataset, both, relevant, count)
        logger.info("%s: %d queries, %d documents", dataset.name, len(dataset.queries), len(dataset.corpus))
    return {
        "retrieval": [_row(name, scores, per_query["teacher"]) for name, scores in per_query.items()],
        "grid": {
            str(size): {precision: round(float(np.mean(kept)), 4) for precision, kept in row.items()}
            for size, row in shares.items()
        },
        "searches": searches,
    }


def _pair_scores(
    T: tuple[Vectors, Vectors], S: tuple[Vectors, Vectors] | None, projection: Vectors | None
) -> dict[str, Vectors]:
    """Cosines of pairs (N,) by each system."""
    found = {"teacher": (T[0] * T[1]).sum(1)}
    if projection is not None:
        first, second = (unit_vectors(x @ projection) for x in T)
        found["teacher, projected"] = (first * second).sum(1)
    if S is not None:
        found["student"] = (S[0] * S[1]).sum(1)
    return found


def _row(
    system: str, scores: dict[str, NDArray[np.floating]], teacher: dict[str, NDArray[np.floating]]
) -> dict[str, Any]:
    """A system's means by set, and its share of the teacher's."""
    means = {name: float(values.mean()) for name, values in scores.items()}
    shares = [means[name] / max(float(teacher[name].mean()), 1e-9) for name in scores]
    low, high = mean_ratio_interval([(scores[name], teacher[name]) for name in scores])
    return {
        "system": system,
        "scores": {name: round(value, 4) for name, value in means.items()},
        "mean": round(float(np.mean(list(means.values()))), 4),
        "retention": round(float(np.mean(shares)), 4),
        "interval": [round(low, 4), round(high, 4)],
    }


def format_account(record: dict[str, Any]) -> str:
    """Markdown tables: nDCG@10 by step, Spearman, cost."""
    blocks = []
    if record["retrieval"]:
        names = list(record["retrieval"][0]["scores"])
        lines = [["nDCG@10", *names, "mean", "kept (95 %)"], ["---", *["---:"] * (len(names) + 2)]]
        for row in record["retrieval"]:
            low, high = (100 * value for value in row["interval"])
            kept = f"{100 * row['retention']:.1f} % ({low:.1f} - {high:.1f})" if row["system"] != "teacher" else ""
            lines.append([row["system"], *(f"{row['scores'][name]:.3f}" for name in names), f"{row['mean']:.3f}", kept])
        blocks.append(lines)
    for what, title in (("pairs", "Spearman"), ("mteb", "MTEB")):
        if rows := record.get(what):
            names = list(rows[0]["scores"])
            lines = [[title, *names], ["---", *["---:"] * len(names)]]
            lines += [[row["system"], *(f"{row['scores'][name]:.3f}" for name in names)] for row in rows]
            blocks.append(lines)
    if record["cost"]:
        lines = [["", "parameters", "MB", "texts/s", "ms a query"], ["---", *["---:"] * 4]]
        for name, cost in record["cost"].items():
            size = f"{cost['parameters'] / 1e6:.1f} M"
            speed = f"{cost['texts_per_second']:,.0f}"
            lines.append([name, size, f"{cost['megabytes']:,.0f}", speed, f"{cost['query_milliseconds']:.1f}"])
        blocks.append(lines)
    return "\n\n".join("\n".join(f"| {' | '.join(line)} |" for line in lines) for lines in blocks)


def is_reduced_teacher(folder: str) -> bool:
    """Whether phase 4 made this folder and added a projection."""
    return (Path(folder) / "run.json").exists() and bool(read_run(folder).get("projection"))
