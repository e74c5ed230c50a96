"""The floating-point operations (FLOPs) of training a ModernBERT, and the rates at which GPUs compute them."""

import re

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import ModernBertConfig

# Dense bf16 tensor-core rates from NVIDIA's data sheets, in FLOP/s. The first name whose words a GPU's name contains
# counts, so a longer name stands before a shorter one that it contains: "H100 PCIe" before "H100".
PEAK_RATES = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "A10G": 70e12,
    "L4": 121e12,
}
# With one of these words in its name a GPU computes at another rate than the one it is named after.
_OTHER_RATE = {"d", "laptop", "max-q", "mig", "nvl", "super", "ti"}


def training_flops_per_token(
    config: ModernBertConfig, lengths: NDArray[np.int64], predicted_share: float = 0.0
) -> float:
    """FLOPs of the matrix products of forward and backward for one token, the mean over the tokens of a corpus.

    A product of (m, k) and (k, n) counts as 2 m k n, and backward as twice forward. Padding, norms, activations and
    the optimiser are not counted, as is usual for model FLOPs utilisation (PaLM, https://arxiv.org/abs/2204.02311).

    Args:
        config: the model's.
        lengths: (N,) tokens of each row; the FLOPs of attention depend on them.
        predicted_share: share of the tokens whose logits are computed; 0 without a masked-LM head.
    """
    D, V = config.hidden_size, config.vocab_size
    linear = 2 * (4 * D * D + 3 * D * config.intermediate_size)  # attention's Wqkv and Wo; the MLP's Wi and Wo
    n_global = sum(kind == "full_attention" for kind in config.layer_types)
    n_sliding = config.num_hidden_layers - n_global
    keys = np.square(lengths, dtype=np.float64)
    reach = np.minimum(config.local_attention // 2, np.maximum(lengths - 1, 0))
    keys_in_reach = lengths * (2 * reach + 1.0) - reach * (reach + 1.0)  # tokens near a row's ends see fewer keys
    attention = 4 * D * (n_global * keys.sum() + n_sliding * keys_in_reach.sum()) / lengths.sum()
    head = predicted_share * 2 * (D * D + D * V)
    return float(3 * (config.num_hidden_layers * linear + attention + head))


def peak_flops_per_second(device: torch.device) -> float | None:
    """A GPU's bf16 rate in FLOP/s by its data sheet, or None for a device that PEAK_RATES does not hold."""
    if device.type != "cuda":
        return None
    known = find_gpu(torch.cuda.get_device_name(device))
    return None if known is None else PEAK_RATES[known]


def find_gpu(name: str) -> str | None:
    """The key of PEAK_RATES that a GPU's name means, or None. Upper and lower case are the same.

    Whole words count: an "L40" is no "L4", an "RTX A1000" no "A100", and a slice of an "A100" ("MIG 1g.5gb") no "A100".
    """
    if _OTHER_RATE & set(name.lower().split()):
        return None
    return next((known for known in PEAK_RATES if re.search(rf"(?i)\b{re.escape(known)}\b", name)), None)
