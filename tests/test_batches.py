"""Batches hold every row once and equally many tokens, are the same for a seed, and are dealt to processes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening

from modernbert_small.packed.batches import PackedSampler, longest_first, packed_features

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=300).map(lambda values: np.array(values, np.int64))


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(50, 400), st.integers(0, 5))
def test_every_row_once_and_the_same_number_of_batches(lengths: np.ndarray, budget: int, epoch: int) -> None:
    sampler = PackedSampler(lengths, budget, seed=3)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert sorted(np.concatenate([batch.rows for batch in batches])) == list(range(len(lengths)))
    mean = lengths.sum() / len(sampler)
    for batch in batches:
        assert len(batch.rows) > 0
        assert abs(lengths[batch.rows].sum() - mean) <= lengths.max()
    assert sum(batch.weight for batch in batches) == pytest.approx(len(batches))


def test_a_seed_fixes_the_order_and_epochs_differ() -> None:
    lengths = np.random.default_rng(0).integers(1, 30, 500)

    def order(seed: int, epoch: int) -> list[int]:
        sampler = PackedSampler(lengths, 100, seed)
        sampler.set_epoch(epoch)
        return [row for batch in sampler for row in batch.rows]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_position_in_an_epoch_does_not_depend_on_length() -> None:
    lengths = np.repeat([5, 50], 500)
    positions = []
    for seed in range(20):
        order = np.concatenate([batch.rows for batch in PackedSampler(lengths, 500, seed)])
        positions.append(np.flatnonzero(lengths[order] == 50).mean())
    # In an unbiased shuffle, the mean position of 500 of 1,000 rows has a standard deviation of about 9.
    assert abs(np.mean(positions) - 499.5) < 4 * 9 / np.sqrt(20)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 3))
def test_processes_and_accumulated_batches_share_one_epoch(world_size: int, accumulated: int, epoch: int) -> None:
    lengths = np.random.default_rng(5).integers(1, 40, 800)
    whole = PackedSampler(lengths, 200 * world_size * accumulated, seed=9)
    whole.set_epoch(epoch)
    shared = {"world_size": world_size, "accumulated": accumulated}
    parts = [PackedSampler(lengths, 200, 9, rank=rank, **shared) for rank in range(world_size)]
    for part in parts:
        part.set_epoch(epoch)
    in_turn = [batch for turn in zip(*parts, strict=True) for batch in turn]
    in_step = world_size * accumulated
    steps = [in_turn[first : first + in_step] for first in range(0, len(in_turn), in_step)]
    for together, separate in zip(whole, steps, strict=True):
        assert list(together.rows) == [row for batch in separate for row in batch.rows]
        drawn = 0
        for batch in separate:
            assert (batch.seed, batch.position) == (together.seed, together.position + drawn)
            drawn += lengths[batch.rows].sum()


def test_a_row_longer_than_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="100 is less than the longest row's 120"):
        PackedSampler(np.array([5, 120]), 100, seed=0)


def test_longest_first_by_hand() -> None:
    tokens = np.array([10, 20, 21, 22, 30, 31, 32, 40])
    rows, order = longest_first(np.array([1, 3, 3, 1]))
    assert rows.tolist() == [1, 2, 0, 3]
    assert tokens[order].tolist() == [20, 21, 22, 30, 31, 32, 10, 40]


def test_packed_features_by_hand() -> None:
    features = packed_features(np.array([7, 8, 9, 7, 9, 7]), np.array([3, 2, 1]))
    assert features["input_ids"].tolist() == [[7, 8, 9, 7, 9, 7]]
    assert features["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0]]
    assert features["seq_idx"].tolist() == [[0, 0, 0, 1, 1, 2]]
    assert features["cu_seq_lens_q"].tolist() == [0, 3, 5, 6]
    assert features["max_length_q"] == 3


@settings(deadline=None, max_examples=30)
@given(LENGTHS, st.integers(0, 1000))
def test_packed_features_are_those_of_transformers_collator(lengths: np.ndarray, seed: int) -> None:
    tokens = np.random.default_rng(seed).integers(0, 50_000, lengths.sum())
    rows = [{"input_ids": row} for row in np.split(tokens, np.cumsum(lengths)[:-1])]
    expected = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(rows)
    del expected["labels"]
    features = packed_features(tokens, lengths)
    assert features.keys() == expected.keys()
    for name, value in expected.items():
        if name.startswith("max_length"):
            assert features[name] == value
            continue
        assert features[name].dtype == value.dtype, name
        assert features[name].tolist() == value.tolist(), name
