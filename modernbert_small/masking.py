"""Masked language modelling: which tokens are hidden, and the loss on them alone."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modernbert_small.batches import Batch, PackedSampler, packed_features
from modernbert_small.progress import ProgressBar
from modernbert_small.settings import UserError
from modernbert_small.tokens import TokenStore

IGNORED = -100
# Logits turned into float32 at a time: a CPU's cache; on CUDA enough to fill the device.
_ROWS_PADDED = 8
_LOGITS_AT_A_TIME = {"cpu": 1 << 20, "cuda": 1 << 28}


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


class _CrossEntropy(torch.autograd.Function):
    """Sum of the rows' cross-entropies, with the gradient made in the same pass, some rows at a time.

    Logits over a vocabulary of 50,000 are the largest tensor of the step. Autograd holds them three times in
    float32; here float32 lives for some rows only, and one copy in the logits' own precision is kept.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        gradient, total = torch.empty_like(logits), logits.new_zeros((), dtype=torch.float32)
        step = max(1, _LOGITS_AT_A_TIME.get(logits.device.type, 1 << 28) // logits.shape[1])
        for first in range(0, len(labels), step):
            rows, target = logits[first : first + step].float(), labels[first : first + step, None]
            rows = rows - rows.amax(1, keepdim=True)
            at_target = rows.gather(1, target)
            normaliser = rows.exp_().sum(1, keepdim=True)
            total += (normaliser.log() - at_target).sum()
            rows /= normaliser
            rows.scatter_add_(1, target, rows.new_full(target.shape, -1))
            gradient[first : first + step] = rows
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None


def masked_cross_entropy(
    logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Tensor | int | None = None, **kwargs: Any
) -> Tensor:
    """transformers' masked-LM loss, in less time and memory.

    Args:
        logits: (N, V) of the hidden tokens alone, as ModernBERT's `sparse_prediction` gives them.
        labels: (N,), none IGNORED.
        vocab_size: V.
        num_items_in_batch: what to divide by if not N.
        kwargs: what else transformers' losses take.
    """
    total = _CrossEntropy.apply(logits.view(-1, vocab_size), labels)
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


@torch.no_grad()
def masked_lm_loss(model: PreTrainedModel, dataset: MaskedLMDataset, max_tokens: int, seed: int) -> float:
    """Mean cross-entropy in nats over the hidden tokens of a dataset's first rows, the same for one seed.

    The model is put into eval mode.

    Args:
        model: any masked-LM model that shares the dataset's vocabulary.
        dataset: rows to measure on.
        max_tokens: rows are taken until they hold this many tokens.
        seed: fixes which tokens are hidden.
    """
    model.eval()
    total, count = 0.0, 0
    for input_ids, attention_mask, labels in padded_batches(dataset, max_tokens, seed, "held-out loss"):
        logits = model(input_ids=input_ids.to(model.device), attention_mask=attention_mask.to(model.device)).logits
        hidden = labels != IGNORED
        total += cross_entropy(logits.float().cpu()[hidden], labels[hidden], reduction="sum").item()
        count += int(hidden.sum())
    return total / max(count, 1)


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
