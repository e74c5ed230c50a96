"""Training a student on label vectors: memory-mapped labels, packed batches, mean squared error."""

import logging
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from torch import Tensor
from torch.utils.data import Dataset
from transformers.trainer_utils import EvalLoopOutput

from modernbert_small.distil.alignment import best_rotation, rotate
from modernbert_small.packed.batches import Batch, PackedSampler, packed_features
from modernbert_small.packed.tokens import TokenStore, cache_folder, made_once
from modernbert_small.packed.trainer import PackedTrainerMixin
from modernbert_small.run.artefacts import content_hash
from modernbert_small.run.devices import bf16_autocast
from modernbert_small.run.errors import UserError
from modernbert_small.run.shards import count_rows, read_table, split_files

logger = logging.getLogger(__name__)


def load_labels(data: str | Path, split: str) -> NDArray[np.float16]:
    """The labels of one split, (n_rows, D) float16, memory-mapped from a copy beside the data.

    Raises:
        UserError: bad Parquet, labels of different widths, or some not finite or not of unit length.
    """
    files = split_files(data, split)
    key = xxhash.xxh3_64_hexdigest("\0".join(map(content_hash, files)).encode())
    path = cache_folder(data) / f"{split}-labels-{key}.npy"
    with made_once(path) as is_missing:
        if is_missing:
            _write_labels(path, files)
    return np.load(path, mmap_mode="r")


def _write_labels(path: Path, files: list[Path]) -> None:
    """Copy labels to one array, streamed: a memory map on a full disk ends the process without a word."""
    blocks = _checked_labels(files)
    first = next(blocks, None)
    if first is None:
        raise UserError(f"{files[0].parent}: no rows")
    header = {"descr": "<f2", "fortran_order": False, "shape": (count_rows(files), first.shape[1])}
    partial = path.with_suffix(".partial")
    with partial.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for labels in chain([first], blocks):
            stream.write(labels.astype("<f2").tobytes())
    partial.replace(path)


def _checked_labels(files: list[Path]) -> Iterator[NDArray[np.floating]]:
    """Labels (n, D) of some rows at a time, all of one width and of length one."""
    rows, known_width = 0, None
    for table in read_table(files, ["label"]):
        column = table["label"].combine_chunks()
        width = getattr(column.type, "list_size", None)
        if width is None or not pa.types.is_floating(column.type.value_type) or known_width not in (None, width):
            raise UserError(f"{files[0].parent}: label is {column.type}; expected fixed-size lists of one width")
        labels = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
        lengths = np.linalg.norm(labels.astype(np.float32), axis=1)
        bad = np.flatnonzero(~(np.abs(lengths - 1) < 0.01))
        if len(bad):
            raise UserError(
                f"{files[0].parent}: the label of row {rows + bad[0]} has length {lengths[bad[0]]}, expected 1; "
                "make the labels again with create_distil_dataset.py"
            )
        rows, known_width = rows + len(labels), width
        yield labels


class DistillationDataset(Dataset):
    """Packed batches of token rows with their labels."""

    def __init__(self, store: TokenStore, labels: NDArray[np.float16]) -> None:
        if len(store) != len(labels):
            raise ValueError(f"{len(store)} rows of tokens but {len(labels)} labels")
        self.store, self.labels = store, labels

    def __len__(self) -> int:
        return len(self.store)

    def __getitems__(self, batch: Batch) -> dict[str, Tensor | int | float]:
        """Model inputs prefixed as sentence-transformers expects, labels (B, D) float32, the batch's weight."""
        features = packed_features(*self.store.gather(batch.rows))
        return {
            **{f"sentence_{name}": value for name, value in features.items()},
            "label": torch.from_numpy(self.labels[batch.rows].astype(np.float32)),
            "weight": batch.weight,
        }


def align(student: SentenceTransformer, dataset: DistillationDataset, tokens_per_batch: int) -> dict[str, float]:
    """Turn a student into the labels' coordinates, see `alignment`.

    Args:
        student: modified; ModernBERT, pooling, Normalize.
        dataset: its first 10 * D rows are the sample; rows are in random order.
        tokens_per_batch: of the student's forward passes.

    Returns:
        Mean cosine to the labels before and after.
    """
    rows = min(len(dataset), 10 * dataset.labels.shape[1])
    labels = torch.from_numpy(dataset.labels[:rows].astype(np.float32))
    encoder = student[0].auto_model
    before = _embed(student, dataset, rows, tokens_per_batch)
    encoder.final_norm.weight.data.fill_(1)
    Q = best_rotation(_embed(student, dataset, rows, tokens_per_batch), labels)
    rotate(encoder, Q.to(encoder.device))
    after = _embed(student, dataset, rows, tokens_per_batch)
    return {name: round(float((e * labels).sum(1).mean()), 4) for name, e in (("before", before), ("after", after))}


@torch.no_grad()
def _embed(student: SentenceTransformer, dataset: DistillationDataset, rows: int, tokens_per_batch: int) -> Tensor:
    """Embeddings (rows, D) float32 of a dataset's first rows, on the CPU."""
    student.eval()
    device, parts = student.device, []
    for batch in PackedSampler(dataset.store.lengths[:rows], tokens_per_batch, seed=0, shuffle=False):
        features = send_to_device(packed_features(*dataset.store.gather(batch.rows)), device)
        with bf16_autocast(device):
            parts.append(student(features)["sentence_embedding"].float().cpu())
    return torch.cat(parts)


class DistillationTrainer(PackedTrainerMixin, SentenceTransformerTrainer):
    """SentenceTransformerTrainer on packed batches, every row of equal weight.

    Batches hold equal tokens, not equal rows; each is weighted by its rows, so that short texts do not count
    less for sharing their batch with many. The mean squared error is taken times the width: the squared distance,
    2 - 2 cos for unit vectors. Its gradients are of a size that the gradient limit and Adam's epsilon are made for.
    """

    def preprocess_dataset(self, dataset: Any = None, dataset_name: str | None = None) -> Any:
        """Packed datasets are ready as they are."""
        return dataset

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """The card is written at the end, from what was measured."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The squared distance to the labels, weighted by the batch's rows."""
        weight = inputs.pop("weight") * inputs["label"].shape[1]
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return (result[0] * weight, result[1]) if return_outputs else result * weight

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Adds the mean cosine to the labels, which for unit vectors is 1 - squared distance / 2."""
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16):  # for the evaluators too
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss = output.metrics.get(f"{metric_key_prefix}_loss")
        if loss is not None:
            output.metrics[f"{metric_key_prefix}_similarity"] = 1 - loss / 2
        return output
