"""A model that embeds texts in float32, and what embedding costs; vectors that are kept for a later comparison."""

import platform
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from modernbert_small.algebra import unit_vectors
from modernbert_small.run.progress import ProgressBar
from modernbert_small.run.records import RUN_FILE, read_run

Vectors = NDArray[np.float32]
KnownVectors = dict[str, Vectors]  # a model's vectors (N, D) of N texts, by a hash of these texts and their kind

VECTORS_FILE = "teacher.npz"  # beside the labels: the teacher's vectors of phase 4's evaluation sets
LATENCY_QUERIES = 30
SPEED_TEXTS = 256
_TEXTS_PER_UPDATE = 1024  # of the progress bar


class Embedder:
    """A model that embeds in float32, as it does for its users.

    Args:
        model: the model.
        known: vectors that it gave earlier, which are not computed again; new ones are added.
    """

    def __init__(self, model: SentenceTransformer, known: KnownVectors | None = None) -> None:
        self.model = model
        self._known = known

    def __call__(self, texts: Sequence[str], kind: str, description: str) -> Vectors:
        """Embed texts under a progress bar.

        Args:
            texts: N texts.
            kind: `query` or `document`; some models embed them differently.
            description: of the progress bar.

        Returns:
            (N, D) float32, unit length.

        Raises:
            ValueError: a vector is zero or not finite.
        """
        key = _key(texts, kind)
        if self._known is not None and key in self._known:
            return self._known[key]
        blocks = []
        with ProgressBar(len(texts), description, "text") as bar:
            for first in range(0, len(texts), _TEXTS_PER_UPDATE):
                block = texts[first : first + _TEXTS_PER_UPDATE]
                blocks.append(self.encode(block, kind))
                bar.update(len(block))
        vectors = unit_vectors(np.concatenate(blocks).astype(np.float32))
        if self._known is not None:
            self._known[key] = vectors
        return vectors

    def encode(self, texts: Sequence[str], kind: str) -> Vectors:
        """Vectors (N, D) as the model gives them."""
        encode = self.model.encode_query if kind == "query" else self.model.encode_document
        return encode(list(texts), batch_size=32, show_progress_bar=False)

    def cost(self, queries: Sequence[str], documents: Sequence[str]) -> dict[str, float]:
        """The model's size, and its speed on this machine.

        Args:
            queries: each is embedded alone.
            documents: are embedded together.

        Returns:
            parameters; megabytes of weights; texts_per_second of the documents; query_milliseconds, the median time of
            a single query.
        """
        seconds = []
        for query in queries:
            began = time.perf_counter()
            self.encode([query], "query")
            seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        self.encode(documents, "document")
        weights = list(self.model.state_dict().values())
        return {
            "parameters": sum(weight.numel() for weight in weights),
            "megabytes": round(sum(weight.numel() * weight.element_size() for weight in weights) / 1e6, 1),
            "texts_per_second": round(len(documents) / (time.perf_counter() - began), 1),
            "query_milliseconds": round(1000 * float(np.median(seconds)), 2),
        }


def _key(texts: Sequence[str], kind: str) -> str:
    """A hash of texts and their kind."""
    digest = xxhash.xxh3_128(kind.encode())
    for text in texts:
        digest.update(f"{len(text)} {text}".encode(errors="surrogatepass"))
    return digest.hexdigest()


def save_vectors(folder: Path, known: KnownVectors) -> None:
    """Keep the vectors that a teacher gave beside the labels that it made."""
    np.savez(folder / VECTORS_FILE, **known)  # type: ignore[arg-type]  # the names are data


def load_vectors(labels: str, teacher_hash: str | None) -> KnownVectors:
    """The vectors that were kept beside labels, if this teacher made both; else none.

    Args:
        labels: phase 4's output folder.
        teacher_hash: of the reduced teacher's folder.
    """
    file = Path(labels, VECTORS_FILE)
    is_of_teacher = Path(labels, RUN_FILE).exists() and read_run(labels).get("reduced_teacher") == teacher_hash
    if not (is_of_teacher and file.exists()):
        return {}
    with np.load(file) as vectors:
        return dict(vectors)


def machine(device: torch.device) -> str:
    """What a model was timed on: the GPU's name, or the CPU's kind and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}), threads: {torch.get_num_threads()}"
