"""Masked language modelling: which tokens are masked, and batches of masked texts."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from modernbert_small.packed.batches import (
    Batch,
    PackedDataset,
    PackedSampler,
    longest_first,
    packed_features,
)
from modernbert_small.packed.tokens import TokenStore
from modernbert_small.run.errors import UserError
from modernbert_small.run.progress import ProgressBar

IGNORED = -100
_ROWS_PADDED = 8  # rows of a padded batch
_SAMPLE_BATCH_TOKENS = 8192


def mask_tokens(
    tokens: NDArray[np.int64],
    special_ids: NDArray[np.int64],
    mask_id: int,
    vocab_size: int,
    mlm_probability: float,
    rng: np.random.Generator,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Mask a share of the tokens, as BERT does (arXiv:1810.04805).

    Of the masked tokens 80 % become [MASK], 10 % become a random token and 10 % stay as they are. The model has to
    predict all of them.

    Args:
        tokens: (T,) ids; not modified.
        special_ids: ids that are never masked ([CLS], [SEP], ...).
        mask_id: id of [MASK].
        vocab_size: random tokens have ids below it.
        mlm_probability: share of the ordinary tokens to mask; 0.3 in ModernBERT (arXiv:2412.13663).
        rng: random numbers; one is drawn for each token.

    Returns:
        Input ids (T,), and labels (T,) that hold the original id of each masked token and IGNORED elsewhere. At least
        one token is masked, unless all are special.
    """
    ordinary = ~np.isin(tokens, special_ids)
    # One number decides everything about a token, so that its masking does not depend on the rest of its batch:
    # below 0.8 the token becomes [MASK], below 0.9 it stays, below 1 it becomes random, from 1 on it is not masked.
    drawn = rng.random(len(tokens)) / mlm_probability
    masked = ordinary & (drawn < 1)
    if not masked.any():
        masked[np.flatnonzero(ordinary)[:1]] = True  # the first ordinary token, if there is one
    labels = np.where(masked, tokens, IGNORED)
    input_ids = np.where(masked & (drawn < 0.8), mask_id, tokens)
    is_random = masked & (drawn >= 0.9) & (drawn < 1)
    input_ids[is_random] = np.minimum((drawn[is_random] - 0.9) * 10 * vocab_size, vocab_size - 1)
    return input_ids, labels


class MaskedLMDataset(PackedDataset):
    """Tokenised texts, given out in packed batches in which tokens are masked.

    A batch's masks depend on its seed and position alone, so they are the same when a killed run resumes.

    Args:
        store: rows of tokens.
        tokenizer: the tokenizer that made them; it must have a mask token.
        mlm_probability: share of the ordinary tokens to mask.
    """

    def __init__(self, store: TokenStore, tokenizer: PreTrainedTokenizerBase, mlm_probability: float) -> None:
        if tokenizer.mask_token_id is None:
            raise UserError(f"tokenizer {tokenizer.name_or_path}: has no mask token, expected a tokenizer with one")
        self.store, self.mlm_probability = store, mlm_probability
        self.special_ids = np.array(tokenizer.all_special_ids)
        self.mask_id, self.vocab_size = tokenizer.mask_token_id, len(tokenizer)

    def __getitems__(self, batch: Batch) -> dict[str, Tensor | int]:
        """What `packed_features` gives for a batch of T tokens, N of them masked.

        Returns:
            The features; `labels` (1, T) int64; and `masked` (N,) int64, the positions of the masked tokens.
        """
        tokens, lengths = self.store.gather(batch.rows)
        rng = np.random.Generator(np.random.PCG64(batch.seed).advance(batch.position))
        input_ids, labels = mask_tokens(
            tokens, self.special_ids, self.mask_id, self.vocab_size, self.mlm_probability, rng
        )
        rows, order = longest_first(lengths)  # after the masks, which follow the order of the shuffle
        labels = labels[order]
        masked = torch.from_numpy(np.flatnonzero(labels != IGNORED))
        features = packed_features(input_ids[order], lengths[rows])
        return {**features, "labels": torch.from_numpy(labels)[None], "masked": masked}


def sample_batches(
    dataset: MaskedLMDataset, tokens: int, seed: int, device: torch.device
) -> list[dict[str, Tensor | int]]:
    """Packed, masked batches of random rows.

    Args:
        dataset: rows to draw from.
        tokens: about how many tokens all batches hold together; there is at least one batch.
        seed: fixes the rows and the masks.
        device: where the batches are put.
    """
    size = max(_SAMPLE_BATCH_TOKENS, int(dataset.store.lengths.max()))
    sampler = PackedSampler(dataset.store.lengths, size, seed)
    batches = map(dataset.__getitems__, islice(sampler, max(1, tokens // size)))
    return [send_to_device(batch, device) for batch in batches]


def padded_batches(
    dataset: MaskedLMDataset, max_tokens: int, seed: int, description: str
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A dataset's first rows, masked, in padded batches, which models of any architecture take.

    Args:
        dataset: rows to read.
        max_tokens: rows are taken from the first on, until they hold more than this many tokens.
        seed: fixes which tokens are masked.
        description: label of the progress bar.

    Yields:
        input_ids, attention_mask and labels, (B, longest row) int64 each, of at most 8 rows.
    """
    last = min(int(np.searchsorted(dataset.store.offsets, max_tokens, side="right")), len(dataset))
    with ProgressBar(last, description, "text") as bar:
        for first in range(0, last, _ROWS_PADDED):
            rows = np.arange(first, min(first + _ROWS_PADDED, last))
            packed = dataset.__getitems__(Batch(rows, (seed, first)))
            lengths = packed["cu_seq_lens_q"].diff().tolist()  # type: ignore[union-attr]
            input_ids, labels = (
                pad_sequence(list(packed[name][0].split(lengths)), batch_first=True, padding_value=fill)  # type: ignore[index]
                for name, fill in (("input_ids", 0), ("labels", IGNORED))
            )
            attention_mask = (torch.arange(input_ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
            yield input_ids, attention_mask, labels
            bar.update(len(rows))
