"""Attention over packed rows: no padding through the model, none across rows.

Rows lie end to end in one sequence (see `batches.packed_features`). On CUDA the kernel is PyTorch's own
variable-length Flash Attention (`torch.nn.attention.varlen`), so flash-attn need not be compiled, or
flash-attn where it is installed. On CPU, rows of similar length are gathered into dense groups for
`scaled_dot_product_attention`, sliding windows in blocks of the window's reach; only attention sees the
groups' padding, everything else in the model runs on the tokens there are.

Both are registered with transformers' AttentionInterface. Given padded input (no `cu_seq_lens_q`), they
are transformers' sdpa, so the same model serves `encode` and evaluators.
"""

import functools
import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

logger = logging.getLogger(__name__)

ATTN_IMPLEMENTATIONS = ("auto", "varlen", "packed_sdpa", "flash_attention_2")
# Rows share a dense group down to this share of its longest row: fewer kernels against more padding.
_SHORTEST_IN_GROUP = 0.75
# 4 MB in bf16: of 2^20 to 2^23 scores the fastest, forward and backward, for rows of 256 to 1,024 tokens.
_SCORES_IN_CACHE = 1 << 21


def choose_attn_implementation(requested: str, device: torch.device) -> tuple[str, str]:
    """The implementation to use, and why.

    Args:
        requested: one of ATTN_IMPLEMENTATIONS.
        device: where the model runs.

    Raises:
        ValueError: no such implementation, or it cannot run there.
    """
    if requested not in ATTN_IMPLEMENTATIONS:
        raise ValueError(f"attn_implementation: {requested}, expected {', '.join(ATTN_IMPLEMENTATIONS)}")
    has_flash = importlib.util.find_spec("flash_attn") is not None
    if requested == "auto":
        if device.type != "cuda":
            return "packed_sdpa", f"auto: on {device.type}"
        return ("flash_attention_2", "auto: flash-attn is installed") if has_flash else ("varlen", "auto: on cuda")
    if requested in ("varlen", "flash_attention_2") and device.type != "cuda":
        raise ValueError(f"attn_implementation: {requested} needs a CUDA device, found {device.type}; use auto")
    if requested == "flash_attention_2" and not has_flash:
        raise ValueError("attn_implementation: flash_attention_2 needs the flash-attn package; use auto")
    return requested, "as asked"


def use_packed_attention(model: PreTrainedModel, requested: str, device: torch.device) -> str:
    """Switch a model to packed attention; logs and returns what was chosen."""
    AttentionInterface.register("varlen", varlen_attention)
    AttentionInterface.register("packed_sdpa", packed_sdpa_attention)
    for name in ("varlen", "packed_sdpa"):
        AttentionMaskInterface.register(name, _mask_for_padded_input)
    name, reason = choose_attn_implementation(requested, device)
    model.set_attn_implementation(name)
    logger.info("attention: %s (%s)", name, reason)
    return name


def _mask_for_padded_input(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Packed input comes without a mask and needs none; padded input gets sdpa's."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function on torch's variable-length Flash Attention (CUDA).

    Args:
        module: the calling layer.
        query, key, value: (1, H, T, d).
        attention_mask: None for packed input.
        scaling: factor of the scores.
        sliding_window: ModernBERT's, one more than the reach to each side; None attends to the whole row.
        cu_seq_lens_q: (B + 1,) int32 row boundaries; None for padded input.
        max_length_q: longest row.
        kwargs: passed on for padded input.

    Returns:
        (1, T, H, d), and no attention weights.
    """
    if cu_seq_lens_q is None:
        return _padded(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    from torch.nn.attention.varlen import varlen_attn  # CUDA builds only

    reach = -1 if sliding_window is None else sliding_window - 1
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    out = varlen_attn(
        q,
        k,
        v,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(reach, reach),
    )
    return out[None], None


@torch.compiler.disable  # the groups are made in NumPy and differ in every batch
def packed_sdpa_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function on `scaled_dot_product_attention` over dense groups of rows.

    Arguments and result as in `varlen_attention`.
    """
    if cu_seq_lens_q is None:
        return _padded(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    _, H, T, d = query.shape
    groups = _groups(cu_seq_lens_q.cpu().numpy().tobytes())
    to_slots, to_tokens = groups.to_slots.to(query.device), groups.to_tokens.to(query.device)
    q, k, v = (_Reorder.apply(x[0].transpose(0, 1).reshape(T, H * d), to_slots, to_tokens) for x in (query, key, value))
    outputs, first = [], 0
    for rows, length in groups.shapes:
        part = slice(first, first + rows * length)
        first += rows * length
        q_g, k_g, v_g = (x[part].view(rows, length, H, d).transpose(1, 2) for x in (q, k, v))
        filled = (to_slots[part] < T).view(rows, length)
        if sliding_window is None or length <= sliding_window:
            out = _whole_rows(q_g, k_g, v_g, None if bool(filled.all()) else filled, scaling)
        else:
            out = _sliding_window(q_g, k_g, v_g, filled, sliding_window - 1, scaling)
        outputs.append(out.transpose(1, 2).reshape(rows * length, H * d))
    out = _Reorder.apply(torch.cat(outputs), to_tokens, to_slots)
    return out.view(1, T, H, d), None


def _whole_rows(q: Tensor, k: Tensor, v: Tensor, filled: Tensor | None, scale: float | None) -> Tensor:
    """Attention between all tokens of a row.

    q, k, v: (B, H, L, d). filled: (B, L) bool, False where a slot is padding; None without padding.
    Returns (B, H, L, d).
    """
    mask = None if filled is None else filled[:, None, None, :]
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    # The CPU's fused kernel computes in float32. Matrix products in bf16 are twice as fast, if only so many
    # heads are taken at a time that their scores stay in the cache.
    B, H, L, d = q.shape
    q = q * (d**-0.5 if scale is None else scale)
    bias = q.new_zeros(B, H, 1, L) if mask is None else q.new_zeros(B, H, 1, L).masked_fill(~mask, float("-inf"))
    heads = max(1, _SCORES_IN_CACHE // L**2)
    parts = zip(*(x.reshape(B * H, -1, x.shape[-1]).split(heads) for x in (q, k, v, bias)), strict=True)
    outputs = [torch.softmax(torch.baddbmm(b, q_h, k_h.transpose(1, 2)), -1) @ v_h for q_h, k_h, v_h, b in parts]
    return torch.cat(outputs).view(B, H, L, d)


def _sliding_window(q: Tensor, k: Tensor, v: Tensor, filled: Tensor, reach: int, scale: float | None) -> Tensor:
    """Attention within `reach` tokens: blocks of `reach` queries against their own and both next blocks.

    q, k, v: (B, H, L, d). filled: (B, L) bool, False where a slot is padding. Returns (B, H, L, d).
    """
    B, H, L, d = q.shape
    n_blocks = -(-L // reach)
    fill = n_blocks * reach - L

    def with_neighbours(x: Tensor) -> Tensor:
        """(B, H, L, d) -> (B, H, n_blocks, 3 * reach, d). Three shifted views: unfold's gradient is slow on CPU."""
        blocks = pad(x, (0, 0, reach, reach + fill)).reshape(B, H, n_blocks + 2, reach, d)
        return torch.cat([blocks[:, :, :-2], blocks[:, :, 1:-1], blocks[:, :, 2:]], 3)

    q, k, v = pad(q, (0, 0, 0, fill)).reshape(B, H, n_blocks, reach, d), with_neighbours(k), with_neighbours(v)
    keys = pad(filled, (reach, reach + fill)).unfold(1, 3 * reach, reach)  # (B, n_blocks, 3 * reach)
    distance = torch.arange(3 * reach, device=q.device)[None] - torch.arange(reach, 2 * reach, device=q.device)[:, None]
    mask = keys[:, None, :, None, :] & (distance.abs() <= reach)
    # A padding query may have no key at all: let it see itself, its output goes nowhere.
    mask = mask | (distance == 0)
    # Matrix products, not sdpa: with a mask on CPU its fused kernel is slower at this size.
    scores = (q * (d**-0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    out = torch.softmax(scores.masked_fill(~mask, float("-inf")), -1) @ v
    return out.reshape(B, H, n_blocks * reach, d)[:, :, :L]


def _padded(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa, for input that was padded."""
    return sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=False, **kwargs)


@dataclass(frozen=True)
class _Groups:
    """Where each token goes. Slots: the dense groups' positions, end to end, padding among them.

    to_slots: (n_slots,) the token in each slot, T for padding. to_tokens: (T,) the slot of each token.
    shapes: (rows, length) of each group.
    """

    to_slots: Tensor
    to_tokens: Tensor
    shapes: list[tuple[int, int]]


@functools.lru_cache(maxsize=4)
def _groups(cu_seq_lens: bytes) -> _Groups:
    """Group rows of similar length. The argument is the int32 array's bytes: all layers of a batch share it."""
    bounds: NDArray[np.int64] = np.frombuffer(cu_seq_lens, np.int32).astype(np.int64)
    starts, lengths, T = bounds[:-1], np.diff(bounds), int(bounds[-1])
    order = np.argsort(-lengths, kind="stable")
    shapes, slots, first = [], [], 0
    while first < len(order):
        longest = int(lengths[order[first]])
        last = int(np.searchsorted(-lengths[order], -longest * _SHORTEST_IN_GROUP + 4, side="right"))
        rows = order[first : max(last, first + 1)]
        position = np.arange(longest)
        slots.append(np.where(position < lengths[rows, None], starts[rows, None] + position, T).ravel())
        shapes.append((len(rows), longest))
        first += len(rows)
    to_slots = np.concatenate(slots)
    to_tokens = np.empty(T, np.int64)
    is_token = to_slots < T
    to_tokens[to_slots[is_token]] = np.flatnonzero(is_token)
    with torch.inference_mode(False):  # cached: what is made for an inference may be met again in training
        return _Groups(torch.from_numpy(to_slots), torch.from_numpy(to_tokens), shapes)


class _Reorder(torch.autograd.Function):
    """Rows of x in the order `index`; an index past the end gives zeros.

    `index` is one-to-one but for those, so the gradient is a gather by its inverse, not the scatter-add
    that autograd would use.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _take(x, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return _take(grad, inverse), None, None


def _take(x: Tensor, index: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(1, x.shape[1])]).index_select(0, index)
