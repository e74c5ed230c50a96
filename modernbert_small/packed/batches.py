"""Batches of packed rows: the same tokens in every batch, no padding, resumable, the same for a seed.

An epoch is one shuffle of all rows, cut where the running token count passes multiples of the epoch's
tokens / n. Rows of all lengths mix freely, so a batch is a fair sample of the corpus, and the number of
batches is the same in each epoch, which transformers' Trainer needs to resume at the right one.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

_NOT_THE_SHUFFLE = 1  # in a seed: another stream than that of the same epoch's shuffle


class Batch(NamedTuple):
    """Rows of one batch.

    seed, position: for what is drawn at random, the masks: one number a token from the seed's stream, of which
    the batch begins with number `position`. weight: its rows over the mean of all batches; a loss that is a
    mean over the batch's rows, times this, gives every row equal weight.
    """

    rows: NDArray[np.int64]
    seed: tuple[int, ...]
    weight: float = 1.0
    position: int = 0


class PackedSampler(Sampler[Batch]):
    """Cuts a shuffle of all rows into batches of about `tokens_per_batch` tokens.

    Each batch holds tokens_per_batch on average (more when the corpus is too small for two batches) and
    differs from it by at most the longest row. With `world_size` processes the n batches are dealt in
    turn; batch k of one process with budget w * b is the union of batches k*w .. k*w + w - 1 of budget b,
    with the same numbers drawn for each token.

    Args:
        lengths: (n_rows,) tokens of each row, all positive.
        tokens_per_batch: at least the longest row.
        seed: with the epoch, fixes the shuffle.
        shuffle: False keeps the rows' order (evaluation).
        rank, world_size: this process and how many there are.

    Raises:
        ValueError: a row longer than `tokens_per_batch`, or too few tokens for a batch per process.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64],
        tokens_per_batch: int,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        longest, total = int(lengths.max()), int(lengths.sum())
        if longest > tokens_per_batch:
            raise ValueError(f"tokens_per_batch: {tokens_per_batch} is less than the longest row's {longest} tokens")
        if total < longest * world_size:  # or a batch might be empty
            raise ValueError(f"{total} tokens in rows of up to {longest} cannot be dealt to {world_size} processes")
        self.lengths, self.seed, self.shuffle = lengths, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.n_batches = world_size * max(1, total // (tokens_per_batch * world_size))
        self.epoch = 0

    def __len__(self) -> int:
        return self.n_batches // self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose shuffle the next iteration yields."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        order = np.arange(len(self.lengths))
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.lengths))
        starts = np.cumsum(self.lengths[order]) - self.lengths[order]
        total = int(self.lengths.sum())
        edges = np.searchsorted(starts, np.arange(self.n_batches + 1) * total / self.n_batches)
        seed = (self.seed, self.epoch if self.shuffle else 0, _NOT_THE_SHUFFLE)
        for index in range(self.rank, self.n_batches, self.world_size):
            rows = order[edges[index] : edges[index + 1]]
            yield Batch(rows, seed, len(rows) * self.n_batches / len(order), int(starts[edges[index]]))


class PackedLoader(DataLoader):
    """DataLoader over `dataset.__getitems__(Batch)` that hands the Trainer's epoch to its sampler."""

    def __init__(self, dataset: torch.utils.data.Dataset, sampler: PackedSampler, num_workers: int = 0) -> None:
        super().__init__(
            dataset,
            batch_sampler=sampler,  # type: ignore[arg-type]
            collate_fn=_as_is,  # type: ignore[arg-type]
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose shuffle the next iteration yields."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def _as_is(features: dict[str, Tensor]) -> dict[str, Tensor]:
    return features


def packed_features(tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> dict[str, Tensor | int]:
    """Model inputs for rows laid end to end, in the names of transformers' flash attention.

    Args:
        tokens: (T,) ids of all rows.
        lengths: (B,) tokens of each row, summing to T.

    Returns:
        input_ids, position_ids (1, T) int64, each row's positions from 0; cu_seq_lens_q and _k (B + 1,)
        int32, where the rows begin and end; max_length_q and _k, the longest row.
    """
    ends = np.cumsum(lengths)
    positions = np.arange(len(tokens)) - np.repeat(ends - lengths, lengths)
    cu_seq_lens = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32))
    longest = int(lengths.max())
    return {
        "input_ids": torch.from_numpy(tokens)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": longest,
        "max_length_k": longest,
    }
