"""The rotation that aligns a student: against a known rotation, SciPy, and the model before it was turned."""

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from transformers import ModernBertConfig, ModernBertModel

from modernbert_small.algebra import mean_free_basis
from modernbert_small.distil.alignment import best_rotation, rotate

D = 16


def random_rotation(seed: int) -> torch.Tensor:
    """Orthogonal and fixing the vector of ones, made without the code under test."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.cat([torch.ones(D, 1), torch.randn(D, D - 1, generator=generator)], 1).double()
    axes = torch.linalg.qr(columns)[0]
    turn = torch.linalg.qr(torch.randn(D - 1, D - 1, generator=generator, dtype=torch.float64))[0]
    return axes @ torch.block_diag(torch.ones(1, 1, dtype=torch.float64), turn) @ axes.T


def tiny_encoder(seed: int = 0) -> ModernBertModel:
    torch.manual_seed(seed)
    config = ModernBertConfig(
        vocab_size=50, hidden_size=D, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24,
        initializer_range=0.3, pad_token_id=0, norm_eps=1e-12, attn_implementation="sdpa",
    )  # fmt: skip
    model = ModernBertModel(config).eval()
    with torch.no_grad():
        for layer in model.layers:
            for norm in (layer.attn_norm, layer.mlp_norm):
                if hasattr(norm, "weight"):
                    norm.weight.uniform_(0.5, 1.5)
    return model


def test_mean_free_basis_is_orthonormal_and_mean_free():
    basis = mean_free_basis(D).numpy()
    np.testing.assert_allclose(basis.T @ basis, np.eye(D - 1), atol=1e-12)
    np.testing.assert_allclose(basis.sum(0), 0, atol=1e-12)


def test_best_rotation_finds_the_turn_there_was():
    Q = random_rotation(1)
    vectors = torch.randn(200, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(best_rotation(vectors, vectors @ Q.T), Q, atol=1e-10, rtol=0)


def test_best_rotation_is_scipys_on_mean_free_vectors():
    rng = np.random.default_rng(3)
    vectors, targets = (rng.standard_normal((100, D)) for _ in range(2))
    vectors -= vectors.mean(1, keepdims=True)
    targets -= targets.mean(1, keepdims=True)
    Q = best_rotation(torch.from_numpy(vectors), torch.from_numpy(targets)).numpy()
    reference, _ = orthogonal_procrustes(vectors, targets)
    np.testing.assert_allclose(vectors @ Q.T, vectors @ reference, atol=1e-10)
    np.testing.assert_allclose(Q @ np.ones(D), 1, atol=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_turned_model_gives_the_same_states_turned(seed):
    model, Q = tiny_encoder(seed), random_rotation(seed)
    ids = torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).last_hidden_state.double()
        rotate(model, Q)
        after = model(input_ids=ids, attention_mask=mask).last_hidden_state.double()
    torch.testing.assert_close(after[mask == 1], (before @ Q.T)[mask == 1], atol=2e-5, rtol=0)
    assert float((after - before).abs().max()) > 0.1
