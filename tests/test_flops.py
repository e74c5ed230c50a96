"""Counted FLOPs against torch's own counter on the real forward and backward."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import ModernBertConfig, ModernBertForMaskedLM

from modernbert_small.packed.flops import PEAK_RATES, peak_flops_per_second, training_flops_per_token


def config(**changes):
    sizes = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 40}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "pad_token_id"), 0)
    return ModernBertConfig(**(sizes | {"vocab_size": 64, "local_attention": 8} | ids | changes))


def test_a_row_within_the_window_is_what_torch_counts():
    """The row is so short that sliding layers see all of it, as torch's dense products do."""
    length = 5
    model = ModernBertForMaskedLM(config(attn_implementation="eager", local_attention=16))
    tokens = torch.arange(length)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    # The embeddings are trained, so even the first product, Wqkv of layer 0, needs the gradient of its input.
    expected = training_flops_per_token(model.config, np.array([length]), predicted_share=1.0) * length
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-9)


def test_sliding_layers_count_the_keys_in_reach():
    lengths = np.array([1, 3, 9, 50])
    only_global, mixed = config(global_attn_every_n_layers=1), config(global_attn_every_n_layers=3)
    pairs_out_of_reach = sum(abs(i - j) > 4 for length in lengths for i in range(length) for j in range(length))
    difference = training_flops_per_token(only_global, lengths) - training_flops_per_token(mixed, lengths)
    # A pair costs two products of 32 values in forward (score, weighted sum), 2 FLOPs a value, and twice that backward.
    flops_per_pair = 3 * (2 * 32 + 2 * 32)
    sliding_layers = 4  # of 6: every third is global
    assert difference * lengths.sum() == pytest.approx(sliding_layers * pairs_out_of_reach * flops_per_pair)


def test_a_cpu_has_no_known_peak_rate():
    assert peak_flops_per_second(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", None),  # slower than an H100 SXM
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA B200", "B200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),  # a seventh of an A100
        ("NVIDIA RTX A1000", None),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A10", None),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40", None),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("Tesla T4", None),
    ],
)
def test_a_gpus_rate_is_its_own_and_not_that_of_one_with_a_similar_name(monkeypatch, name, known):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops_per_second(torch.device("cuda")) == PEAK_RATES.get(known)
