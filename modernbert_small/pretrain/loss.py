"""The masked-LM loss: the mean cross-entropy of the masked tokens alone.

N: masked tokens. V: vocab_size.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.nn.functional import cross_entropy
from transformers import ModernBertForMaskedLM, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from modernbert_small.pretrain.masking import IGNORED, MaskedLMDataset, padded_batches

# Logits that are held in float32 at a time: what fits into a CPU's cache; on CUDA, enough to fill the device.
_LOGITS_AT_A_TIME = {"cpu": 1 << 20, "cuda": 1 << 28}


class _CrossEntropy(torch.autograd.Function):
    """The sum of the rows' cross-entropies; the gradient is computed in the same pass, some rows at a time.

    Logits over a vocabulary of 50,000 are the largest tensor of a training step. Autograd would hold three copies of
    them in float32. Here only some rows at a time are in float32, and one copy in the precision of the logits is kept
    for backward.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, labels: Tensor, compiled: bool) -> Tensor:
        """(N, V) logits and (N,) labels -> a scalar in float32."""
        gradient, total = torch.empty_like(logits), logits.new_zeros((), dtype=torch.float32)
        of_rows = _compiled_cross_entropy() if compiled else _cross_entropy
        step = max(1, _LOGITS_AT_A_TIME.get(logits.device.type, 1 << 28) // logits.shape[1])
        for rows, target, out in zip(logits.split(step), labels.split(step), gradient.split(step), strict=True):
            total += of_rows(rows, target[:, None], out)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: BackwardCFunction, grad: Tensor) -> tuple[Tensor, None, None]:
        """A scalar -> (N, V), in the precision of the logits."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None


def _cross_entropy(logits: Tensor, target: Tensor, gradient: Tensor) -> Tensor:
    """The sum of the cross-entropies of some rows, a scalar in float32.

    Args:
        logits: (n, V).
        target: (n, 1) int64.
        gradient: (n, V), is filled.
    """
    rows = logits.float()
    rows = rows - rows.amax(1, keepdim=True)
    at_target = rows.gather(1, target)
    normaliser = rows.exp_().sum(1, keepdim=True)
    rows /= normaliser
    gradient.copy_(rows)
    gradient.scatter_(1, target, (rows.gather(1, target) - 1).to(gradient.dtype))
    return (normaliser.log() - at_target).sum()


@functools.cache
def _compiled_cross_entropy() -> Callable[..., Tensor]:
    return torch.compile(_cross_entropy, dynamic=True)


def masked_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    compiled: bool = False,
    **kwargs: Any,
) -> Tensor:
    """transformers' masked-LM loss, in less time and memory.

    Args:
        logits: (N, V) of the masked tokens alone, as ModernBERT gives them with `sparse_prediction`.
        labels: (N,) int64, none of them IGNORED.
        vocab_size: V.
        num_items_in_batch: number to divide the sum by; N by default.
        compiled: whether it is computed by compiled code.
        kwargs: further arguments of transformers' losses; not used.

    Returns:
        A scalar in float32, in nats.
    """
    total = _CrossEntropy.apply(logits.view(-1, vocab_size), labels, compiled)
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def predict_masked(
    model: ModernBertForMaskedLM,
    masked: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    compiled: bool = False,
    **features: Any,
) -> MaskedLMOutput:
    """The loss of a packed batch; logits are computed for the masked tokens alone, and are not returned.

    With `sparse_prediction` transformers does the same, but finds the masked tokens on the device, where it waits for
    their number.

    Args:
        model: a ModernBERT with its masked-LM head.
        masked: (N,) int64, the positions of the masked tokens.
        labels: (1, T) int64.
        num_items_in_batch: number to divide the sum of cross-entropies by; N by default.
        compiled: whether the cross-entropy is computed by compiled code.
        features: the rest of the batch.
    """
    hidden = model.model(**features).last_hidden_state[0].index_select(0, masked)
    logits = model.decoder(model.head(hidden))
    targets = labels[0].index_select(0, masked)
    loss = masked_cross_entropy(
        logits, targets, model.config.vocab_size, num_items_in_batch=num_items_in_batch, compiled=compiled
    )
    return MaskedLMOutput(loss=loss)


@torch.no_grad()
def masked_lm_loss(model: PreTrainedModel, dataset: MaskedLMDataset, max_tokens: int, seed: int) -> float:
    """Mean cross-entropy in nats over the masked tokens of a dataset's first rows.

    Args:
        model: any masked-LM model that shares the dataset's vocabulary; is put into eval mode.
        dataset: rows to measure on.
        max_tokens: rows are taken from the first on, until they hold more than this many tokens.
        seed: fixes which tokens are masked, so that losses of several models can be compared.
    """
    model.eval()
    total, count = 0.0, 0
    for input_ids, attention_mask, labels in padded_batches(dataset, max_tokens, seed, "held-out loss"):
        logits = model(input_ids=input_ids.to(model.device), attention_mask=attention_mask.to(model.device)).logits
        masked = labels != IGNORED
        total += cross_entropy(logits.float().cpu()[masked], labels[masked], reduction="sum").item()
        count += int(masked.sum())
    return total / max(count, 1)
