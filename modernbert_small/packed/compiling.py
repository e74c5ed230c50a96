"""torch.compile by region: an encoder's layers are compiled one by one, for any number of tokens.

Without it a GPU reads and writes each intermediate result once for every operation. Layers of one kind share their
compiled code, so compiling takes as long for 22 layers as for four. Padded input, as `encode` makes it, runs as it is:
evaluations have batches of many shapes, with and without a mask, and each kind would be compiled again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def compile_layers(encoder: PreTrainedModel, mode: str | None = None) -> None:
    """Let an encoder's layers be compiled when they are first called with packed rows.

    Args:
        encoder: a ModernBERT without a head; modified.
        mode: of `torch.compile`.
    """
    for layer in encoder.layers:
        layer.forward = partial(_forward, layer.forward, torch.compile(layer.forward, dynamic=True, mode=mode))


def _forward(plain: Callable[..., Tensor], compiled: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """A layer's output: compiled for packed rows, plain for padded ones."""
    return (plain if kwargs.get("cu_seq_lens_q") is None else compiled)(*args, **kwargs)
