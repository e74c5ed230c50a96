"""Masked language modelling: which tokens are hidden, and the loss on them alone."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modernbert_small.batches import Batch, packed_features
from modernbert_small.tokens import TokenStore

IGNORED = -100


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
        rng: source of chance.

    Returns:
        Input ids (T,) and labels (T,): the token where it is hidden, else IGNORED. At least one token is
        hidden if there is an ordinary one.
    """
    ordinary = np.flatnonzero(~np.isin(tokens, special_ids))
    hidden = ordinary[rng.random(len(ordinary)) < mlm_probability]
    if not len(hidden):
        hidden = ordinary[:1]
    labels = np.full_like(tokens, IGNORED)
    labels[hidden] = tokens[hidden]
    fate = rng.random(len(hidden))
    input_ids = tokens.copy()
    input_ids[hidden[fate < 0.8]] = mask_id
    random_ones = hidden[fate >= 0.9]
    input_ids[random_ones] = rng.integers(0, vocab_size, len(random_ones))
    return input_ids, labels


class MaskedLMDataset(Dataset):
    """Packed, masked batches of a token store; a batch's masks follow from its seed."""

    def __init__(self, store: TokenStore, tokenizer: PreTrainedTokenizerBase, mlm_probability: float) -> None:
        if tokenizer.mask_token_id is None:
            raise ValueError(f"tokenizer {tokenizer.name_or_path} has no mask token; expected one for masking")
        self.store, self.mlm_probability = store, mlm_probability
        self.special_ids = np.array(tokenizer.all_special_ids)
        self.mask_id, self.vocab_size = tokenizer.mask_token_id, len(tokenizer)

    def __len__(self) -> int:
        return len(self.store)

    def __getitems__(self, batch: Batch) -> dict[str, Tensor | int]:
        """Model inputs and labels (1, T) of a packed batch."""
        tokens, lengths = self.store.gather(batch.rows)
        rng = np.random.default_rng(batch.seed)
        input_ids, labels = mask_tokens(
            tokens, self.special_ids, self.mask_id, self.vocab_size, self.mlm_probability, rng
        )
        return {**packed_features(input_ids, lengths), "labels": torch.from_numpy(labels)[None]}


@torch.no_grad()
def masked_lm_loss(model: PreTrainedModel, dataset: MaskedLMDataset, max_tokens: int, seed: int) -> float:
    """Mean cross-entropy in nats over the hidden tokens of a dataset's first rows, the same for one seed.

    Rows are padded, so that any architecture can be measured. The model is put into eval mode.

    Args:
        model: a masked-LM model that shares the dataset's vocabulary.
        dataset: rows to measure on.
        max_tokens: rows are taken until they hold this many tokens.
        seed: fixes which tokens are hidden.
    """
    model.eval()
    total, count = 0.0, 0
    last = int(np.searchsorted(dataset.store.offsets, max_tokens, side="right"))
    for first in range(0, min(last, len(dataset)), 8):
        rows = np.arange(first, min(first + 8, last, len(dataset)))
        packed = dataset.__getitems__(Batch(rows, (seed, first)))
        lengths = dataset.store.lengths[rows].tolist()
        input_ids, labels = (
            pad_sequence(list(packed[name][0].split(lengths)), batch_first=True, padding_value=fill)  # type: ignore[index]
            for name, fill in (("input_ids", 0), ("labels", IGNORED))
        )
        attention_mask = (torch.arange(input_ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
        logits = model(input_ids=input_ids.to(model.device), attention_mask=attention_mask.to(model.device)).logits
        hidden = labels != IGNORED
        total += cross_entropy(logits.float().cpu()[hidden], labels[hidden], reduction="sum").item()
        count += int(hidden.sum())
    return total / max(count, 1)
