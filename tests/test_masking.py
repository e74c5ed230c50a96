"""Masking: the right share of tokens, never special tokens, labels for masked tokens alone; and the loss."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import ModernBertConfig, ModernBertForMaskedLM

from modernbert_small.packed.attention import use_packed_attention
from modernbert_small.packed.batches import packed_features
from modernbert_small.pretrain import loss as loss_module
from modernbert_small.pretrain.loss import masked_cross_entropy, predict_masked
from modernbert_small.pretrain.masking import IGNORED, mask_tokens

SPECIAL, MASK, VOCABULARY = np.array([0, 1, 2, 3]), 3, 1000


@settings(deadline=None)
@given(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=200), st.integers(0, 10_000))
def test_masked_tokens_have_labels_and_others_stay_as_they_are(tokens: list[int], seed: int) -> None:
    before = np.array(tokens)
    input_ids, labels = mask_tokens(before.copy(), SPECIAL, MASK, VOCABULARY, 0.3, np.random.default_rng(seed))
    masked = labels != IGNORED
    assert (labels[masked] == before[masked]).all()
    assert (input_ids[~masked] == before[~masked]).all()
    assert not np.isin(before[masked], SPECIAL).any()
    assert masked.any() == (~np.isin(before, SPECIAL)).any()


def test_shares() -> None:
    tokens = np.random.default_rng(0).integers(4, VOCABULARY, 200_000)
    input_ids, labels = mask_tokens(tokens, SPECIAL, MASK, VOCABULARY, 0.3, np.random.default_rng(1))
    masked = labels != IGNORED
    assert abs(masked.mean() - 0.3) < 0.005
    assert abs((input_ids[masked] == MASK).mean() - 0.8) < 0.01
    assert abs((input_ids[masked] == tokens[masked]).mean() - 0.1) < 0.01
    is_random = masked & (input_ids != MASK) & (input_ids != tokens)
    assert abs(is_random.sum() / masked.sum() - 0.1) < 0.01
    tenths = np.histogram(input_ids[is_random], 10, (0, VOCABULARY))[0] / is_random.sum()
    assert abs(tenths - 0.1).max() < 0.02  # random tokens come from the whole vocabulary


def test_the_same_seed_masks_the_same_tokens() -> None:
    tokens = np.arange(4, 204)
    first, second = (mask_tokens(tokens, SPECIAL, MASK, 1000, 0.3, np.random.default_rng((4, 0, 2))) for _ in range(2))
    assert (first[0] == second[0]).all()
    assert (first[1] == second[1]).all()


def test_the_masking_of_a_token_does_not_depend_on_its_batch() -> None:
    tokens = np.random.default_rng(0).integers(0, 1000, 300)

    def masked(first: int, last: int) -> np.ndarray:
        rng = np.random.Generator(np.random.PCG64((4, 0, 1)).advance(first))
        return np.stack(mask_tokens(tokens[first:last], SPECIAL, MASK, VOCABULARY, 0.3, rng))

    parts = np.concatenate([masked(0, 70), masked(70, 71 + 100), masked(171, 300)], axis=1)
    assert (parts == masked(0, 300)).all()


@pytest.mark.parametrize("at_a_time", [1, 40, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_are_torchs(monkeypatch, at_a_time, dtype) -> None:
    monkeypatch.setitem(loss_module._LOGITS_AT_A_TIME, "cpu", at_a_time)
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(7, 20, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, 20, (7,), generator=generator)
    reference = torch.nn.functional.cross_entropy(logits.double(), labels)
    (expected,) = torch.autograd.grad(reference, logits)
    loss = masked_cross_entropy(logits, labels, 20)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), reference, rtol=1e-6, atol=0)
    (got,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(
        got, expected, **({"rtol": 1e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-4})
    )
    half = masked_cross_entropy(logits, labels, 20, num_items_in_batch=14)
    torch.testing.assert_close(half, loss / 2)


def test_the_loss_of_a_packed_batch_is_that_of_transformers_on_each_row() -> None:
    rng, ids = np.random.default_rng(0), dict.fromkeys(("bos", "eos", "cls", "sep", "pad"), 0)
    ids = {f"{name}_token_id": value for name, value in ids.items()}
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 4}
    model = ModernBertForMaskedLM(ModernBertConfig(vocab_size=50, initializer_range=0.3, **sizes, **ids))
    lengths = np.array([3, 9, 1, 5])
    tokens = rng.integers(4, 50, lengths.sum())
    labels = np.where(rng.random(len(tokens)) < 0.5, rng.integers(4, 50, len(tokens)), IGNORED)
    rows = zip(np.split(tokens, np.cumsum(lengths)[:-1]), np.split(labels, np.cumsum(lengths)[:-1]), strict=True)
    whole = torch.zeros(())
    for row, of_row in rows:
        logits = model(input_ids=torch.from_numpy(row)[None]).logits[0]
        whole = whole + cross_entropy(logits, torch.from_numpy(of_row), ignore_index=IGNORED, reduction="sum")
    masked = np.flatnonzero(labels != IGNORED)
    whole = whole / len(masked)
    expected = torch.autograd.grad(whole, list(model.parameters()))
    use_packed_attention(model, "auto", torch.device("cpu"), torch.float32)
    features = packed_features(tokens, lengths)
    output = predict_masked(model, torch.from_numpy(masked), torch.from_numpy(labels)[None], **features)
    assert list(output) == ["loss"]
    torch.testing.assert_close(output.loss, whole)
    for got, want in zip(torch.autograd.grad(output.loss, list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)
