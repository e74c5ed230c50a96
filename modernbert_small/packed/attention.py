"""Attention over packed rows: the model computes no padding, and no row attends to another row.

Rows lie end to end in one sequence (see `batches.packed_features`). On CUDA the kernel is PyTorch's own variable-length
Flash Attention (`torch.nn.attention.varlen`). It computes in bf16 and fp16 alone, on GPUs from Ampere on, and for some
widths of heads. Elsewhere, and on a CPU, rows of similar length are gathered into dense groups. A sliding window is a
band of the whole row's scores in short rows, and is computed in blocks as long as its reach in long ones. Only
attention computes the padding of these groups; the rest of the model computes the tokens alone.

Both kernels are registered with transformers' AttentionInterface. For padded input, which has no `cu_seq_lens_q`, they
call transformers' sdpa, so the same model serves `encode` and the evaluators.

B: rows. H: heads. T: tokens of all rows. L: tokens of a dense group's longest row. d: width of a head.
"""

import functools
import importlib
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available

from modernbert_small.run.errors import UserError
from modernbert_small.settings.training import attention_problems

logger = logging.getLogger(__name__)

# A dense group takes rows down to this share of its longest row. Less would give fewer kernels and more padding.
_SHORTEST_IN_GROUP = 0.75
# Attention scores that are computed at a time, 4 MB in bf16. Of 2^20 to 2^23 scores this is the fastest for forward
# and backward, for rows of 256 to 1,024 tokens.
_SCORES_IN_CACHE = 1 << 21
# In rows of up to so many times a sliding window's reach all scores are computed. In float32 with backward this takes a
# fifth of the time of blocks at 80 tokens, half at 256, and four fifths at 384.
_WHOLE_UP_TO_REACHES = 4
_DIMENSIONS_OF_BLOCKS = 5  # of the scores in blocks; those of whole rows have 4


def choose_attn_implementation(
    requested: str, device: torch.device, dtype: torch.dtype, head_dim: int | None = None
) -> tuple[str, str]:
    """Choose an attention implementation.

    Args:
        requested: one of settings.training's ATTN_IMPLEMENTATIONS.
        device: where the model runs.
        dtype: in which it computes: under autocast autocast's, else that of the weights.
        head_dim: width of a head; None while the model is not known yet.

    Returns:
        The implementation's name, and the reason for the choice.

    Raises:
        UserError: there is no such implementation, or it cannot run so.
    """
    if problems := attention_problems(requested):
        raise UserError("; ".join(problems))
    if requested == "packed_sdpa":
        return requested, "as asked"
    lacking = _what_flash_lacks(device, dtype, head_dim)
    if requested == "auto":
        # Never flash-attn: varlen is the same algorithm, and nothing has to be compiled for it.
        return ("varlen", "auto: on cuda") if lacking is None else ("packed_sdpa", f"auto: varlen needs {lacking}")
    if lacking is None and requested == "flash_attention_2":
        lacking = _what_flash_attn_lacks()
    if lacking is not None:
        raise UserError(f"attn_implementation: {requested} needs {lacking}; use auto")
    return requested, "as asked"


def _what_flash_lacks(device: torch.device, dtype: torch.dtype, head_dim: int | None) -> str | None:
    """What a Flash Attention kernel needs and does not find, or None if it can run.

    References:
        https://github.com/Dao-AILab/flash-attention#nvidia-cuda-support
    """
    if device.type != "cuda":
        return f"a CUDA device, found {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"a GPU of compute capability 8.0 or more, found {major}.{minor}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"bf16 or fp16, found {str(dtype).removeprefix('torch.')}"
    if head_dim is not None and (head_dim % 8 or head_dim > 256):
        return f"heads whose width is a multiple of 8 and at most 256, found {head_dim}"
    return None


def _what_flash_attn_lacks() -> str | None:
    """What is wrong with the flash-attn package, or None if it can be used."""
    if not is_flash_attn_2_available():  # flash-attn 4 has a package of this name too
        return "the package flash-attn 2, which is not installed"
    try:
        importlib.import_module("flash_attn")
    except (ImportError, OSError) as error:  # for example a wheel that was built for another version of torch
        return f"a flash-attn that this torch can load, found: {error}"
    return None


def use_packed_attention(model: PreTrainedModel, requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """Switch a model to packed attention.

    Args:
        model: modified.
        requested: one of settings.training's ATTN_IMPLEMENTATIONS.
        device: where the model runs.
        dtype: in which it computes: under autocast autocast's, else that of the weights.

    Returns:
        The name of the implementation that was chosen; it is logged too.

    Raises:
        UserError: there is no such implementation, or it cannot run so.
    """
    AttentionInterface.register("varlen", varlen_attention)
    AttentionInterface.register("packed_sdpa", packed_sdpa_attention)
    for name in ("varlen", "packed_sdpa"):
        AttentionMaskInterface.register(name, _mask_for_padded_input)
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    name, reason = choose_attn_implementation(requested, device, dtype, head_dim)
    model.set_attn_implementation(name)
    logger.info("attention: %s (%s)", name, reason)
    return name


def _mask_for_padded_input(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The mask of sdpa for padded input; None for packed input, which has no mask and needs none."""
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
        scaling: factor of the scores; d ** -0.5 by default.
        sliding_window: ModernBERT's: one more than the number of tokens that are seen to each side; None attends to
            the whole row.
        cu_seq_lens_q: (B + 1,) int32, where rows begin and end; None for padded input.
        max_length_q: tokens of the longest row.
        kwargs: passed on to sdpa for padded input.

    Returns:
        The output (1, T, H, d), and None in place of attention weights.
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


@torch.compiler.disable  # the groups are made in NumPy and differ from batch to batch
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
    batch, is_exact = cu_seq_lens_q.cpu().numpy().tobytes(), query.device.type == "cpu"
    groups, biases = _groups(batch, is_exact), _biases(batch, is_exact, sliding_window, query.dtype, query.device)
    rows_of_heads = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, d) each
    if not groups.are_in_place:
        to_slots, to_tokens = groups.to_slots.to(query.device), groups.to_tokens.to(query.device)
        rows_of_heads = (_Reorder.apply(x.reshape(T, H * d), to_slots, to_tokens) for x in rows_of_heads)
    # `split`, since the gradient of each slice would fill and add a whole tensor.
    q, k, v = (x.split([filled.numel() for filled in groups.filled]) for x in rows_of_heads)
    outputs = []
    for filled, bias, *parts in zip(groups.filled, biases, q, k, v, strict=True):
        rows, length = filled.shape
        q_g, k_g, v_g = (x.view(rows, length, H, d).transpose(1, 2) for x in parts)
        if bias is not None and bias.dim() == _DIMENSIONS_OF_BLOCKS:
            out = _blocks(q_g, k_g, v_g, bias, scaling)
        else:
            out = _whole_rows(q_g, k_g, v_g, bias, scaling)
        outputs.append(out.transpose(1, 2).reshape(rows * length, H * d))
    out = torch.cat(outputs)
    if not groups.are_in_place:
        out = _Reorder.apply(out, to_tokens, to_slots)
    return out.view(1, T, H, d), None


def _whole_rows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """Attention over all scores of each row of a dense group.

    Args:
        q: (B, H, L, d).
        k: (B, H, L, d).
        v: (B, H, L, d).
        bias: (B or 1, 1, L or 1, L), added to the scores; None adds nothing.
        scale: factor of the scores; d ** -0.5 by default.

    Returns:
        (B, H, L, d).
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    # The CPU's fused kernel computes in float32. Matrix products in bf16 are twice as fast, provided that only as many
    # heads are computed at a time as have scores that fit into the cache.
    B, H, L, d = q.shape
    q = q * (d**-0.5 if scale is None else scale)
    bias = q.new_zeros(1, 1, 1, L) if bias is None else bias
    bias = bias.expand(B, H, -1, L)
    heads = max(1, _SCORES_IN_CACHE // L**2)
    q_parts, k_parts, v_parts, bias_parts = (x.reshape(B * H, -1, x.shape[-1]).split(heads) for x in (q, k, v, bias))
    outputs = []
    for q_h, k_h, v_h, bias_h in zip(q_parts, k_parts, v_parts, bias_parts, strict=True):
        scores = torch.baddbmm(bias_h, q_h, k_h.transpose(1, 2))  # (heads, L, L)
        outputs.append(torch.softmax(scores, -1) @ v_h)
    return torch.cat(outputs).view(B, H, L, d)


def _blocks(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None) -> Tensor:
    """Attention within a sliding window, in blocks as long as its reach.

    A block of `reach` queries is compared with the keys of its own block, the block before and the block after.

    Args:
        q: (B, H, L, d).
        k: (B, H, L, d).
        v: (B, H, L, d).
        bias: (B, 1, n_blocks, reach, 3 * reach), added to the scores.
        scale: factor of the scores; d ** -0.5 by default.

    Returns:
        (B, H, L, d).
    """
    B, H, L, d = q.shape
    n_blocks, reach = bias.shape[2:4]
    fill = n_blocks * reach - L

    def with_neighbours(x: Tensor) -> Tensor:
        """Each block with both neighbours, (B, H, L, d) -> (B, H, n_blocks, 3 * reach, d).

        It is made of three shifted views, since the gradient of `unfold` is slow on a CPU.
        """
        blocks = pad(x, (0, 0, reach, reach + fill)).reshape(B, H, n_blocks + 2, reach, d)
        return torch.cat([blocks[:, :, :-2], blocks[:, :, 1:-1], blocks[:, :, 2:]], 3)

    q = pad(q, (0, 0, 0, fill)).reshape(B, H, n_blocks, reach, d)
    k, v = with_neighbours(k), with_neighbours(v)
    # These are matrix products and not sdpa, whose fused kernel is slower at this size on a CPU, given a mask.
    scores = (q * (d**-0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    out = torch.softmax(scores + bias, -1) @ v
    return out.reshape(B, H, n_blocks * reach, d)[:, :, :L]


@functools.lru_cache(maxsize=4)
def _biases(
    cu_seq_lens: bytes, is_exact: bool, window: int | None, dtype: torch.dtype, device: torch.device
) -> list[Tensor | None]:
    """What is added to the scores of each dense group: 0, or -inf where a query does not see a key.

    All layers with the same window need the same ones, so they are cached.

    Args:
        cu_seq_lens: of the batch, as for `_groups`.
        is_exact: as for `_groups`.
        window: one more than the tokens that are seen to each side; None to see the whole row.
        dtype: of the scores.
        device: of the scores.

    Returns:
        A tensor for each group, as `_whole_rows` or `_blocks` takes it; None where every query sees every key.
    """
    biases: list[Tensor | None] = []
    for filled in _groups(cu_seq_lens, is_exact).filled:
        if window is not None and filled.shape[1] > _WHOLE_UP_TO_REACHES * (window - 1):
            seen = _seen_in_blocks(filled, window)
        else:
            seen = _seen(filled, window)
        with torch.inference_mode(False):  # as in `_groups`
            hidden = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf")).to(device)
        biases.append(None if bool(seen.all()) else hidden)
    return biases


def _seen(filled: Tensor, window: int | None) -> Tensor:
    """Which keys of a row each query sees, (B or 1, 1, L or 1, L) bool.

    Args:
        filled: (B, L) bool, False where a slot is padding.
        window: as in `_biases`.
    """
    L = filled.shape[1]
    if window is None or window >= L:
        return filled[:, None, None, :]
    position = torch.arange(L)
    band = ((position[:, None] - position).abs() < window)[None, None]
    if bool(filled.all()):
        return band
    # A query that is padding may have no key at all, which would give NaN. It sees itself; its output is not used.
    return filled[:, None, None, :] & band | torch.eye(L, dtype=torch.bool)


def _seen_in_blocks(filled: Tensor, window: int) -> Tensor:
    """Which keys of its own block and of both neighbours each query sees, (B, 1, n_blocks, reach, 3 * reach) bool.

    Args:
        filled: (B, L) bool, False where a slot is padding.
        window: as in `_biases`. Its reach, one less, is a block's length.
    """
    reach = window - 1
    fill = -filled.shape[1] % reach
    keys = pad(filled, (reach, reach + fill)).unfold(1, 3 * reach, reach)  # (B, n_blocks, 3 * reach)
    key_positions = torch.arange(3 * reach)
    distance = key_positions[None] - key_positions[reach : 2 * reach, None]  # (reach, 3 * reach)
    # A query that is padding sees itself, as in `_seen`.
    return keys[:, None, :, None, :] & (distance.abs() <= reach) | (distance == 0)


def _padded(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa, for padded input."""
    return sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=False, **kwargs)


@dataclass(frozen=True)
class _Groups:
    """How the tokens of a batch are gathered into dense groups.

    Slots are the positions of all groups, end to end. A slot holds a token or padding.

    Attributes:
        to_slots: (n_slots,) int64, the index of the token in each slot; T for padding.
        to_tokens: (T,) int64, the slot of each token.
        filled: (rows, length) bool of each group, False where a slot is padding.
        are_in_place: whether each slot holds the token of its own index, so that nothing has to be moved.
    """

    to_slots: Tensor
    to_tokens: Tensor
    filled: list[Tensor]
    are_in_place: bool


@functools.lru_cache(maxsize=4)
def _groups(cu_seq_lens: bytes, is_exact: bool) -> _Groups:
    """Group the rows of a batch by length. All layers need the same groups, so they are cached.

    Args:
        cu_seq_lens: the bytes of the batch's `cu_seq_lens`, an int32 array.
        is_exact: whether the rows of a group are equally long. Such groups have no padding. There are more of them, and
            each costs a CPU little and a GPU several kernels.
    """
    bounds: NDArray[np.int64] = np.frombuffer(cu_seq_lens, np.int32).astype(np.int64)
    starts, lengths, T = bounds[:-1], np.diff(bounds), int(bounds[-1])
    order = np.argsort(-lengths, kind="stable")
    slots, filled, first = [], [], 0
    while first < len(order):
        longest = int(lengths[order[first]])
        shortest = longest if is_exact else longest * _SHORTEST_IN_GROUP - 4
        last = int(np.searchsorted(-lengths[order], -shortest, side="right"))
        rows = order[first : max(last, first + 1)]
        position = np.arange(longest)
        filled.append(position < lengths[rows, None])
        slots.append(np.where(filled[-1], starts[rows, None] + position, T).ravel())
        first += len(rows)
    to_slots = np.concatenate(slots)
    to_tokens = np.empty(T, np.int64)
    is_token = to_slots < T
    to_tokens[to_slots[is_token]] = np.flatnonzero(is_token)
    are_in_place = np.array_equal(to_slots, np.arange(T))
    with torch.inference_mode(False):  # a cached tensor that was made in inference mode would be refused in training
        tensors = torch.from_numpy(to_slots), torch.from_numpy(to_tokens), [*map(torch.from_numpy, filled)]
    return _Groups(*tensors, are_in_place)


class _Reorder(torch.autograd.Function):
    """Rows of x (n, D) in the order of `index`, where the index n stands for a row of zeros.

    Other indices do not repeat. So the gradient is a gather by the inverse of `index`, which is faster than the
    scatter-add that autograd would use.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        """(n, D) float, (m,) int64 and its inverse (n,) int64 -> (m, D)."""
        ctx.save_for_backward(inverse)
        return _take(x, index)

    @staticmethod
    def backward(ctx: BackwardCFunction, grad: Tensor) -> tuple[Tensor, None, None]:
        """(m, D) -> (n, D)."""
        (inverse,) = ctx.saved_tensors
        return _take(grad, inverse), None, None


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (n, D) by index, where the index n gives zeros."""
    return torch.cat([x, x.new_zeros(1, x.shape[1])]).index_select(0, index)
