"""A reference for the kernel of `torch.nn.attention.varlen`, in plain products, row by row.

T: tokens of all rows. H: heads. d: width of a head. n: tokens of one row.
"""

import itertools

import torch
from torch.nn.attention import varlen


def register_for_cpu():
    """Let varlen_attn run on a CPU, by the reference, in any dtype and for any width of heads."""
    varlen._varlen_attn.register_kernel("cpu", forward)
    varlen._varlen_attn_backward.register_kernel("cpu", backward)


def forward(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, scale=None, window_size=None, *_unused
):
    """What `_varlen_attn` gives: output (T, H, d), log-sum-exp of the scores (H, T), and a state that nothing reads."""
    outputs, normalisers = [], []
    for q, k, v in _rows(cu_seq_q, query, key, value):
        scores = _scores(q, k, scale, window_size)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
        normalisers.append(scores.logsumexp(-1))
    return torch.cat(outputs).to(query.dtype), torch.cat(normalisers, 1), torch.zeros(2, dtype=torch.uint64)


def backward(
    grad_out, query, key, value, out, lse, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, state, scale=None, window=None
):
    """What `_varlen_attn_backward` gives: the gradients of query, key and value, (T, H, d) each."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    gradients = []
    for q, k, v, g in _rows(cu_seq_q, query, key, value, grad_out):
        weights = _scores(q, k, scale, window).softmax(-1)  # (H, n, n)
        of_weights = g @ v.transpose(1, 2)
        of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * factor
        of_row = (of_scores @ k, of_scores.transpose(1, 2) @ q, weights.transpose(1, 2) @ g)
        gradients.append([gradient.transpose(0, 1) for gradient in of_row])
    return tuple(torch.cat(parts).to(query.dtype) for parts in zip(*gradients, strict=True))


def _rows(bounds, *packed):
    """Each row of packed tensors (T, H, d), as float32 (H, n, d)."""
    bounds = bounds.tolist()
    for first, last in itertools.pairwise(bounds):
        yield [x[first:last].float().transpose(0, 1) for x in packed]


def _scores(q, k, scale, window):
    """(H, n, n), -inf where a query sees no key: more than window[0] tokens before it or window[1] after it."""
    scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    position = torch.arange(q.shape[1])
    offset = position[None] - position[:, None]
    left, right = window or (-1, -1)
    hidden = (offset < -left if left >= 0 else offset < -len(position)) | (offset > right if right >= 0 else False)
    return scores.masked_fill(hidden, float("-inf"))
