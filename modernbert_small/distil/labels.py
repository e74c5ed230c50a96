"""The teacher's labels: checked, memory-mapped, and given out in packed batches beside their texts.

D: width of the labels.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from modernbert_small.packed.batches import Batch, PackedDataset, longest_first, packed_features
from modernbert_small.packed.tokens import TokenStore, cache_folder, made_once
from modernbert_small.run.content import content_hash
from modernbert_small.run.errors import UserError
from modernbert_small.run.shards import count_rows, read_table, split_files

_LABELS = "labels.npy"
_LENGTH_TOLERANCE = 0.01  # float16 moves the length of a unit vector by less than 0.001


def load_labels(data: str | Path, split: str) -> NDArray[np.float16]:
    """Memory-map the labels of one split, from a copy beside the data, which is made if it is missing or damaged.

    Args:
        data: folder of Parquet shards with a column `label`.
        split: train or validation.

    Returns:
        (n_rows, D) float16, in the order of the shards' rows.

    Raises:
        UserError: bad Parquet, no rows, labels of different widths, or a label that is not of unit length.
    """
    files = split_files(data, split)
    key = xxhash.xxh3_64_hexdigest("\0".join(map(content_hash, files)).encode())
    folder = cache_folder(data, f"{split}-labels-{key}")
    with made_once(folder) as partial:
        if partial is not None:
            _write_labels(partial / _LABELS, files)
    return np.load(folder / _LABELS, mmap_mode="r")


def _write_labels(path: Path, files: list[Path]) -> None:
    """Copy the labels into one .npy file, block by block.

    They are written as a stream and not through a memory map, which on a full disk ends the process without an error.
    """
    width = None
    with path.open("wb") as stream:
        for block in _checked_labels(files):
            if width is None:
                width = block.shape[1]
                header = {"descr": "<f2", "fortran_order": False, "shape": (count_rows(files), width)}
                np.lib.format.write_array_header_1_0(stream, header)
            stream.write(block.astype("<f2").tobytes())
    if width is None:
        raise UserError(f"{files[0].parent}: found no rows, expected labels; make them with create_distil_dataset.py")


def _checked_labels(files: list[Path]) -> Iterator[NDArray[np.floating]]:
    """Blocks of labels, (n, D) each: all of the same width and of unit length."""
    first_row, common_width = 0, None
    for table in read_table(files, ["label"]):
        labels = _as_matrix(table["label"].combine_chunks(), files[0].parent)
        width = labels.shape[1]
        if common_width not in (None, width):
            raise UserError(
                f"{files[0].parent}: labels of {common_width} and {width} values; expected lists of one width"
            )
        common_width = width
        lengths = np.linalg.norm(labels.astype(np.float32), axis=1)
        bad = np.flatnonzero(~(np.abs(lengths - 1) < _LENGTH_TOLERANCE))  # a length of NaN is bad too
        if len(bad):
            raise UserError(
                f"{files[0].parent}: the label of row {first_row + bad[0]} has length {lengths[bad[0]]}, expected 1; "
                "make the labels again with create_distil_dataset.py, or scale those made elsewhere to length 1"
            )
        first_row += len(labels)
        yield labels


def _as_matrix(column: pa.Array, folder: Path) -> NDArray[np.floating]:
    """Labels (n, D) of a column of lists, however its writer stored them.

    Raises:
        UserError: no lists of numbers, lists of different widths, or nulls in them.
    """
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not pa.types.is_floating(kind.value_type):
        raise UserError(f"{folder}: label is {kind}; expected lists of one width, of floating-point numbers")
    widths = pc.min_max(pc.list_value_length(column)).as_py()
    if widths["min"] != widths["max"]:
        raise UserError(f"{folder}: labels of {widths['min']} and {widths['max']} values; expected lists of one width")
    values = column.flatten()
    if values.null_count:
        raise UserError(f"{folder}: {values.null_count} nulls within labels; expected numbers")
    return values.to_numpy(zero_copy_only=False).reshape(len(column), widths["min"])


class DistillationDataset(PackedDataset):
    """Tokenised texts with their labels, given out in packed batches.

    Args:
        store: N rows of tokens.
        labels: (N, D), the label of each row.
    """

    def __init__(self, store: TokenStore, labels: NDArray[np.float16]) -> None:
        if len(store) != len(labels):
            raise ValueError(f"{len(store)} rows of tokens but {len(labels)} labels")
        self.store, self.labels = store, labels

    def __getitems__(self, batch: Batch) -> dict[str, Tensor | int | float]:
        """The inputs of one training step, B being the rows of the batch.

        Returns:
            What `packed_features` gives, with names that begin with `sentence_`, as sentence-transformers' trainer
            expects; `label` (B, D) float32; and `weight`, the batch's weight.
        """
        tokens, lengths = self.store.gather(batch.rows)
        rows, order = longest_first(lengths)
        features = packed_features(tokens[order], lengths[rows])
        return {
            **{f"sentence_{name}": value for name, value in features.items()},
            "label": torch.from_numpy(self.labels[batch.rows[rows]].astype(np.float32)),
            "weight": batch.weight,
        }
