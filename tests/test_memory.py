"""Peak memory at the recipe's sizes, counted on tensors without values.

Phase 5 is not here: it is phase 3 with a quarter of the tokens and without logits.
"""

import weakref

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import ModernBertConfig, ModernBertForMaskedLM
from transformers.initialization import no_init_weights

from modernbert_small.packed import attention
from modernbert_small.packed.attention import use_packed_attention
from modernbert_small.packed.batches import packed_features
from modernbert_small.pretrain import loss as loss_module
from modernbert_small.pretrain.loss import predict_masked

GIB = 1 << 30
STUDENT = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 768, "num_hidden_layers": 12}
TEACHER = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 1152, "num_hidden_layers": 22}


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all storages that live at the same time."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage):
        if storage not in self.known:
            self.known[storage] = size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.free, size)

    def free(self, size):
        self.live -= size


def rows(tokens):
    """Lengths of rows of up to 1,024 tokens that sum to `tokens`."""
    lengths = np.minimum(np.random.default_rng(0).geometric(1 / 200, tokens), 1024)
    lengths = lengths[: np.searchsorted(np.cumsum(lengths), tokens) + 1]
    lengths[-1] -= lengths.sum() - tokens
    return lengths


def peak(monkeypatch, sizes, tokens, run):
    """Peak bytes of one call of run(model, features, tokens)."""
    monkeypatch.setattr(attention, "_what_flash_lacks", lambda *args: None)
    monkeypatch.setitem(loss_module._LOGITS_AT_A_TIME, "cpu", loss_module._LOGITS_AT_A_TIME["cuda"])
    ids = dict.fromkeys([f"{name}_token_id" for name in ("bos", "eos", "cls", "sep", "pad")], 0)
    features = packed_features(np.zeros(tokens, np.int64), rows(tokens))
    with FakeTensorMode(allow_non_fake_inputs=True), PeakMemory() as memory:
        with no_init_weights():
            model = ModernBertForMaskedLM(ModernBertConfig(vocab_size=50_368, **sizes, **ids))
        use_packed_attention(model, "auto", torch.device("cpu"), torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            run(model, features, tokens)
    return memory.peak


def pretrain(model, features, tokens):
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    masked = torch.arange(0, tokens * 3 // 10)
    predict_masked(model, masked, features["input_ids"].clone(), **features).loss.backward()
    optimizer.step()


@torch.no_grad()
def label(model, features, tokens):
    model.model(**features)


@pytest.mark.parametrize(
    ("sizes", "tokens", "run", "least"),
    [
        (STUDENT, 65_536, pretrain, 0.55 + 2 * 1.84),  # 16 bytes a parameter; logits of 30 % in bf16, their gradient
        (TEACHER, 65_536, label, 0.55),  # 4 bytes a parameter
    ],
)
def test_the_recipe_fits_into_20_gib(monkeypatch, sizes, tokens, run, least):
    found = peak(monkeypatch, sizes, tokens, run)
    assert least * GIB < found < 20 * GIB
