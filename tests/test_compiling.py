"""Compiled layers: no graph break, no recompilation after the first batches, and the results of plain layers."""

from functools import partial

import numpy as np
import pytest
import torch
import varlen_reference
from torch._dynamo.utils import counters
from transformers import ModernBertConfig, ModernBertForMaskedLM

from modernbert_small.packed import arguments, attention
from modernbert_small.packed.arguments import PackedTrainingArguments
from modernbert_small.packed.attention import use_packed_attention
from modernbert_small.packed.batches import packed_features
from modernbert_small.packed.compiling import compile_layers
from modernbert_small.pretrain.loss import predict_masked


@pytest.fixture(autouse=True)
def _as_on_cuda(monkeypatch):
    """The kernel's reference, and layers that are traced, but not translated."""
    varlen_reference.register_for_cpu()
    monkeypatch.setattr(attention, "_what_flash_lacks", lambda *args: None)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def small_model():
    torch.manual_seed(0)
    ids = dict.fromkeys([f"{name}_token_id" for name in ("bos", "eos", "cls", "sep", "pad")], 0)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "num_hidden_layers": 3}
    model = ModernBertForMaskedLM(ModernBertConfig(vocab_size=100, initializer_range=0.2, **sizes, **ids))
    assert use_packed_attention(model, "auto", torch.device("cpu"), torch.float32) == "varlen"
    return model


def batch(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 90, rng.integers(3, 9))
    features = packed_features(rng.integers(1, 100, lengths.sum()), lengths)
    masked = torch.from_numpy(np.flatnonzero(rng.random(lengths.sum()) < 0.3))
    return {**features, "labels": features["input_ids"], "masked": masked}


def loss_and_gradients(model, features, compiled):
    loss = predict_masked(model, **features, compiled=compiled).loss
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


def test_training_is_compiled_once_for_all_batches():
    plain, model = small_model(), small_model()
    compile_layers(model.model)
    for seed in range(2):
        loss_and_gradients(model, batch(seed), compiled=True)
    kinds = 3  # the first layer, which has no norm; layers with a window; the cross-entropy
    assert counters["stats"]["unique_graphs"] == kinds
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(2, 4):
            features = batch(seed)
            expected = loss_and_gradients(plain, features, compiled=False)
            torch.testing.assert_close(loss_and_gradients(model, features, compiled=True), expected)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == kinds


def test_padded_input_is_not_compiled():
    model = small_model().eval()
    compile_layers(model.model)
    with torch.no_grad():
        model(input_ids=torch.ones(2, 5, dtype=torch.int64))
    assert not counters["stats"]


def test_compilation_is_the_default_where_kernels_can_be_made_and_left_to_us(monkeypatch, tmp_path):
    def given(**settings):
        return PackedTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings)

    assert given().torch_compile is False
    assert given(torch_compile_mode="default").torch_compile is True
    monkeypatch.setattr(arguments, "can_compile", lambda device: True)
    assert given().torch_compile is True
    assert given(torch_compile=False).torch_compile is False
    asked = given(torch_compile_mode="reduce-overhead")
    assert asked.torch_compile_mode == "reduce-overhead"
    assert asked.torch_compile_backend is None  # else the Trainer would compile the whole model
