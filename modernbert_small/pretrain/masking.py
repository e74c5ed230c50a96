"""Masked language modelling: which tokens are hidden, and the loss on them alone."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from modernbert_small.packed.batches import Batch, PackedSampler, packed_features
from modernbert_small.packed.tokens import TokenStore
from modernbert_small.run.errors import UserError
from modernbert_small.run.progress import ProgressBar

IGNORED = -100
# Logits turned into float32 at a time: a CPU's cache; on CUDA enough to fill the device.
_ROWS_PADDED = 8


def mask_tokens(
    tokens: NDArray[np.int64],
    special_ids: NDArray[np.int64],
    mask_id: int,
    vocab_size: int,
    mlm_probability: float,
    rng: np.random.Generator,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Hide a share of the tokens: 80 % become [MASK], 10 % a random token, 10 % stay (BERT, arXiv:1810.04805).

    Args:
        tokens: (T,) ids; not modified.
        special_ids: ids that are never hidden ([CLS], [SEP], ...).
        mask_id: id of [MASK].
        vocab_size: random tokens are drawn below it.
        mlm_probability: share of the ordinary tokens to hide; 0.3 as in ModernBERT (arXiv:2412.13663).
        rng: source of chance; one number is drawn for each token.

    Returns:
        Input ids (T,) and labels (T,): the token where it is hidden, else IGNORED. At least one token is
        hidden if there is an ordinary one.
    """
    ordinary = ~np.isin(tokens, special_ids)
    # One number decides all about a token, so that its fate does not depend on what shares its batch.
    fate = rng.random(len(tokens)) / mlm_probability
    hidden = ordinary & (fate < 1)
    if not hidden.any():
        hidden[np.flatnonzero(ordinary)[:1]] = True
    labels = np.where(hidden, tokens, IGNORED)
    input_ids = np.where(hidden & (fate < 0.8), mask_id, tokens)
    random_ones = hidden & (fate >= 0.9) & (fate < 1)
    input_ids[random_ones] = np.minimum((fate[random_ones] - 0.9) * 10 * vocab_size, vocab_size - 1)
    return input_ids, labels


class MaskedLMDataset(Dataset):
    """Packed, masked batches of a token store; masks follow from the batch's seed and position."""

    def __init__(self, store: TokenStore, tokenizer: PreTrainedTokenizerBase, mlm_probability: float) -> None:
        if tokenizer.mask_token_id is None:
            raise UserError(f"tokenizer {tokenizer.name_or_path} has no mask token; expected one for masking")
        self.store, self.mlm_probability = store, mlm_probability
        self.special_ids = np.array(tokenizer.all_special_ids)
        self.mask_id, self.vocab_size = tokenizer.mask_token_id, len(tokenizer)

    def __len__(self) -> int:
        return len(self.store)

    def __getitems__(self, batch: Batch) -> dict[str, Tensor | int]:
        """Model inputs and labels (1, T) of a packed batch."""
        tokens, lengths = self.store.gather(batch.rows)
        rng = np.random.Generator(np.random.PCG64(batch.seed).advance(batch.position))
        input_ids, labels = mask_tokens(
            tokens, self.special_ids, self.mask_id, self.vocab_size, self.mlm_probability, rng
        )
        return {**packed_features(input_ids, lengths), "labels": torch.from_numpy(labels)[None]}


def sample_batches(
    dataset: MaskedLMDataset, tokens: int, seed: int, device: torch.device
) -> list[dict[str, Tensor | int]]:
    """Packed, masked batches of random rows, about `tokens` in all, on a device."""
    size = max(8192, int(dataset.store.lengths.max()))
    sampler = PackedSampler(dataset.store.lengths, size, seed)
    batches = map(dataset.__getitems__, islice(sampler, max(1, tokens // size)))
    return [send_to_device(batch, device) for batch in batches]


def padded_batches(
    dataset: MaskedLMDataset, max_tokens: int, seed: int, description: str
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A dataset's first rows, masked, in padded batches, which any architecture takes.

    Args:
        dataset: rows to read.
        max_tokens: rows are taken until they hold this many tokens.
        seed: fixes which tokens are hidden.
        description: of what is done, for the progress bar.

    Yields:
        input_ids, attention_mask and labels (at most 8, longest row) int64.
    """
    last = min(int(np.searchsorted(dataset.store.offsets, max_tokens, side="right")), len(dataset))
    with ProgressBar(last, description, "text") as bar:
        for first in range(0, last, _ROWS_PADDED):
            rows = np.arange(first, min(first + _ROWS_PADDED, last))
            packed = dataset.__getitems__(Batch(rows, (seed, first)))
            lengths = dataset.store.lengths[rows].tolist()
            input_ids, labels = (
                pad_sequence(list(packed[name][0].split(lengths)), batch_first=True, padding_value=fill)  # type: ignore[index]
                for name, fill in (("input_ids", 0), ("labels", IGNORED))
            )
            yield input_ids, (torch.arange(input_ids.shape[1]) < torch.tensor(lengths)[:, None]).long(), labels
            bar.update(len(rows))
