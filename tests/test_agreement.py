"""Agreement by layer: moments against whole matrices, CKA against Gram matrices, a model against itself."""

import numpy as np
import pytest
import torch
from helpers import tiny_modernbert, tiny_tokenizer
from transformers import BertConfig, BertForMaskedLM

from modernbert_small.initialise.agreement import Moments, evenly_matched_layers, layer_agreement
from modernbert_small.packed.tokens import TokenStore
from modernbert_small.pretrain.masking import MaskedLMDataset, padded_batches


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def dataset(tmp_path):
    lengths = np.random.default_rng(0).integers(4, 40, 30)
    tokens = np.random.default_rng(1).integers(5, 300, lengths.sum()).astype(np.uint16)
    store = TokenStore(tokens, np.concatenate([[0], np.cumsum(lengths)]), 0)
    return MaskedLMDataset(store, tiny_tokenizer(tmp_path), 0.3)


def moments_of(x, y):
    moments = Moments()
    for first in range(0, len(x), 7):
        moments.add(x[first : first + 7], y[first : first + 7])
    return moments


def test_moments_are_those_of_the_whole():
    x, y = torch.randn(40, 6) + 3, torch.randn(40, 9)
    expected = np.cov(np.hstack([x, y]).T.astype(np.float64), bias=True) * 40
    got = moments_of(x, y).covariances()
    for part, block in zip(got, (expected[:6, :6], expected[6:, 6:], expected[:6, 6:]), strict=True):
        np.testing.assert_allclose(part, block, rtol=1e-5, atol=1e-4)


def test_cka_is_that_of_the_gram_matrices():
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randn(40, 9, dtype=torch.float64)
    centre = torch.eye(40, dtype=torch.float64) - 1 / 40
    K, L = (centre @ z @ z.T @ centre for z in (x, y))
    assert moments_of(x, y).cka() == pytest.approx(float((K * L).sum() / (K.norm() * L.norm())))
    rotated = 3 * x @ torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0] + 1
    assert moments_of(x, rotated).cka() == pytest.approx(1)


def test_a_model_agrees_with_itself(dataset, tmp_path):
    model = tiny_modernbert(tmp_path, tiny_tokenizer(tmp_path))
    whole = layer_agreement(model, model, dataset, 400, 0, projection=torch.eye(16))
    assert whole == {"teacher_layers": [0, 1, 2, 3], "explained_variance": [1.0] * 4, "cka": [1.0] * 4}
    directions = torch.linalg.qr(torch.randn(16, 16))[0].T
    half, rest = directions[:8], directions[8:]
    part = layer_agreement(model, model, dataset, 400, 0, projection=half)
    other = layer_agreement(model, model, dataset, 400, 0, projection=rest)
    np.testing.assert_allclose(np.add(part["explained_variance"], other["explained_variance"]), 1, atol=2e-4)


def test_explained_variance_is_that_of_the_projected_states(dataset, tmp_path):
    model = tiny_modernbert(tmp_path, tiny_tokenizer(tmp_path))
    P = torch.linalg.qr(torch.randn(16, 5))[0].T
    states = [[] for _ in range(4)]
    with torch.no_grad():
        for input_ids, attention_mask, _ in padded_batches(dataset, 400, 0, ""):
            outputs = model.model(input_ids, attention_mask=attention_mask, output_hidden_states=True)
            for kept, h in zip(states, outputs.hidden_states[1:], strict=True):
                kept += h[attention_mask.bool()].double().numpy().tolist()
    expected = []
    for layer in states:
        h = np.array(layer)
        h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5)
        expected.append((h @ P.double().numpy().T).var(0).sum() / h.var(0).sum())
    report = layer_agreement(model, model, dataset, 400, 0, projection=P)
    np.testing.assert_allclose(report["explained_variance"], expected, atol=1e-4)


def test_any_architecture_is_compared_by_depth(dataset, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    teacher = BertForMaskedLM(BertConfig(vocab_size=400, **sizes))
    report = layer_agreement(tiny_modernbert(tmp_path, tiny_tokenizer(tmp_path)), teacher, dataset, 400, 0)
    assert report["teacher_layers"] == [0, 0, 1, 1]
    assert report["explained_variance"] is None
    assert all(0 < value < 1 for value in report["cka"])


def test_depths_are_matched_evenly():
    assert evenly_matched_layers(6, 12) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert evenly_matched_layers(22, 12)[::11] == [0, 21]
    assert evenly_matched_layers(5, 1) == [0]
