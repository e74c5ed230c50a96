"""A model that embeds texts, and what embedding costs."""

import platform
import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from modernbert_small.algebra import unit_vectors
from modernbert_small.run.progress import ProgressBar

Vectors = NDArray[np.float32]

LATENCY_QUERIES = 30
_TEXTS_PER_UPDATE = 1024  # of the progress bar


class Embedder:
    """A model that embeds in float32, as it does for its users, and counts its texts and seconds.

    Attributes:
        model: the model.
        texts: how many texts it has embedded so far.
        seconds: how long that took.
    """

    def __init__(self, model: SentenceTransformer) -> None:
        self.model = model
        self.texts, self.seconds = 0, 0.0

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
        began, blocks = time.perf_counter(), []
        with ProgressBar(len(texts), description, "text") as bar:
            for first in range(0, len(texts), _TEXTS_PER_UPDATE):
                block = texts[first : first + _TEXTS_PER_UPDATE]
                blocks.append(self.encode(block, kind))
                bar.update(len(block))
        self.texts += len(texts)
        self.seconds += time.perf_counter() - began
        return unit_vectors(np.concatenate(blocks).astype(np.float32))

    def encode(self, texts: Sequence[str], kind: str) -> Vectors:
        """Vectors (N, D) as the model gives them, uncounted."""
        encode = self.model.encode_query if kind == "query" else self.model.encode_document
        return encode(list(texts), batch_size=32, show_progress_bar=False)

    def cost(self, queries: Sequence[str]) -> dict[str, float]:
        """The model's size, its speed so far, and its latency on this machine.

        Args:
            queries: the first LATENCY_QUERIES of them are embedded one by one.

        Returns:
            parameters; megabytes of weights; texts_per_second of all calls so far; query_milliseconds, the median time
            of a single query.
        """
        seconds = []
        for query in queries[:LATENCY_QUERIES]:
            began = time.perf_counter()
            self.encode([query], "query")
            seconds.append(time.perf_counter() - began)
        weights = list(self.model.state_dict().values())
        return {
            "parameters": sum(weight.numel() for weight in weights),
            "megabytes": round(sum(weight.numel() * weight.element_size() for weight in weights) / 1e6, 1),
            "texts_per_second": round(self.texts / max(self.seconds, 1e-9), 1),
            "query_milliseconds": round(1000 * float(np.median(seconds)), 2) if seconds else 0.0,
        }


def machine(device: torch.device) -> str:
    """What a model was timed on: the GPU's name, or the CPU's kind and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}), threads: {torch.get_num_threads()}"
