"""The masked-LM loss: cross-entropy of the hidden tokens alone."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from modernbert_small.pretrain.masking import IGNORED, MaskedLMDataset, padded_batches

_LOGITS_AT_A_TIME = {"cpu": 1 << 20, "cuda": 1 << 28}


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
