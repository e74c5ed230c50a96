"""GUIDE's projections against matrices written out entry by entry."""

import itertools

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, ModernBertConfig, ModernBertForMaskedLM

from modernbert_small.initialise.guide import (
    principal_basis,
    project_attention,
    project_mlp,
    project_norm,
    select_uniformly,
    student_config,
    transfer_embeddings,
    transfer_first_layer,
)
from modernbert_small.initialise.transfer import transfer, usable_init
from modernbert_small.run.errors import UserError


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(rows: int, columns: int) -> torch.Tensor:
    return torch.linalg.qr(random(rows, columns, seed=9))[0]


def tiny_model(
    hidden_size: int, layers: int = 2, heads: int = 2, neurons: int = 12, seed: int = 0
) -> ModernBertForMaskedLM:
    torch.manual_seed(seed)
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "pad_token_id"), 0)
    config = ModernBertConfig(
        vocab_size=50,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=neurons,
        initializer_range=0.3,
        **special,
    )
    model = ModernBertForMaskedLM(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name or "bias" in name:
                value.add_(0.3 * torch.randn(value.shape))
    return model


def test_principal_basis_is_the_svd_of_the_centred_vectors() -> None:
    vectors = random(200, 12) @ torch.diag(torch.linspace(3, 0.1, 12, dtype=torch.float64)) + 5
    basis, explained = principal_basis(vectors, 5)
    centred = vectors.numpy() - vectors.numpy().mean(0)
    _, values, directions = np.linalg.svd(centred)
    np.testing.assert_allclose(np.abs(np.diag(directions[:5] @ basis.numpy())), 1, atol=1e-9)
    np.testing.assert_allclose(explained.numpy(), values[:5] ** 2 / (centred**2).sum(), atol=1e-9)
    torch.testing.assert_close(basis.T @ basis, torch.eye(5, dtype=torch.float64))
    assert all(column[column.abs().argmax()] > 0 for column in basis.T)


def test_principal_basis_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="cannot take 13"):
        principal_basis(random(20, 12), 13)
    with pytest.raises(ValueError, match="NaN"):
        principal_basis(torch.full((20, 4), torch.nan), 2)


def test_select_uniformly_spreads() -> None:
    assert select_uniformly(12, 6) == [0, 2, 4, 6, 8, 10]
    assert select_uniformly(5, 5) == [0, 1, 2, 3, 4]
    kept = select_uniformly(1152, 768)
    assert len(set(kept)) == 768
    assert set(np.diff(kept)) == {1, 2}
    with pytest.raises(ValueError, match="cannot select 7 of 6"):
        select_uniformly(6, 7)


def test_project_attention_entry_by_entry() -> None:
    d, heads, D_T = 2, 4, 8
    kept, D_S = [2, 0], 4
    Wqkv, Wo, basis = random(3 * D_T, D_T), random(D_T, D_T, seed=1), orthonormal(D_T, D_S)
    read, write = project_attention(Wqkv, Wo, basis, kept, d)
    for part in range(3):
        for place, head in enumerate(kept):
            for channel in range(d):
                for column in range(D_S):
                    row = part * heads * d + head * d + channel
                    expected = sum(Wqkv[row, k] * basis[k, column] for k in range(D_T))
                    got = read[part * len(kept) * d + place * d + channel, column]
                    assert got.item() == pytest.approx(expected.item())
    for row in range(D_S):
        for place, head in enumerate(kept):
            for channel in range(d):
                expected = sum(basis[k, row] * Wo[k, head * d + channel] for k in range(D_T))
                assert write[row, place * d + channel].item() == pytest.approx(expected.item())


@pytest.mark.parametrize(("kept", "message"), [([0], "1 heads x 2"), ([0, 0], "distinct"), ([0, 4], "distinct")])
def test_project_attention_refuses(kept: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        project_attention(random(24, 8), random(8, 8), orthonormal(8, 4), kept, 2)


def test_project_mlp_keeps_pairs() -> None:
    D_T, I_T, kept = 6, 5, [3, 1]
    Wi, Wo, basis = random(2 * I_T, D_T), random(D_T, I_T, seed=1), orthonormal(D_T, 4)
    read, write = project_mlp(Wi, Wo, basis, kept)
    h = random(4, seed=2)
    # In the full space, with the stream on the basis: the kept neurons' inputs, gates and outputs.
    full_input, full_gate = (Wi @ (basis @ h)).chunk(2)
    torch.testing.assert_close(read @ h, torch.cat([full_input[kept], full_gate[kept]]))
    activations = random(2, seed=3)
    torch.testing.assert_close(write @ activations, basis.T @ (Wo[:, kept] @ activations))


def test_project_norm_is_the_best_diagonal() -> None:
    weight, basis = random(6), orthonormal(6, 3)
    matrix = np.zeros((3, 3))
    for i, j, k in itertools.product(range(3), range(3), range(6)):
        matrix[i, j] += basis[k, i].item() * weight[k].item() * basis[k, j].item()
    # One column for each entry of the diagonal: the diagonal matrix that has a one there, flattened.
    diagonals = np.stack([np.diag(row).ravel() for row in np.eye(3)], 1)
    best = np.linalg.lstsq(diagonals, matrix.ravel(), rcond=None)[0]
    np.testing.assert_allclose(project_norm(weight, basis).numpy(), best, atol=1e-12)


def test_embeddings_on_eight_dimensions_keep_their_distances() -> None:
    teacher, student = tiny_model(16), tiny_model(8, seed=1)
    with torch.no_grad():
        teacher.get_input_embeddings().weight.copy_(random(50, 8) @ random(8, 16, seed=1) + 3)
    embeddings = teacher.get_input_embeddings().weight.detach()
    basis, _ = principal_basis(embeddings, 8)
    transfer_embeddings(student, embeddings, basis)
    got = student.get_input_embeddings().weight.detach()
    for i, j in itertools.combinations(range(50), 2):
        before, after = (float((table[i] - table[j]).norm()) for table in (embeddings, got))
        assert after == pytest.approx(before, rel=1e-4)
    assert student.decoder.weight is student.get_input_embeddings().weight
    np.testing.assert_allclose(got.mean(0).numpy(), 0, atol=1e-5)


def test_with_a_permutation_of_the_width_the_student_is_the_teacher() -> None:
    """The norms, GELU and all inner products treat the dimensions alike, so their order makes no difference."""
    teacher, student = tiny_model(8, layers=1), tiny_model(8, layers=1, seed=1)
    basis = torch.eye(8, dtype=torch.float64)[:, [3, 7, 0, 5, 1, 6, 2, 4]]  # its inverse is another permutation
    names = transfer_first_layer(student, teacher, basis)
    with torch.no_grad():
        student.get_input_embeddings().weight.copy_(teacher.get_input_embeddings().weight.double() @ basis)
        # Folded into their readers, these start at one.
        student.model.layers[0].mlp_norm.weight.fill_(1)
        student.model.final_norm.weight.fill_(1)
        tokens = torch.arange(20)[None]
        torch.testing.assert_close(student(tokens).logits, teacher(tokens).logits, atol=1e-5, rtol=1e-5)
    assert "model.layers.0.attn.Wqkv.weight" in names
    assert "decoder.bias" in names


def test_another_head_dim_is_refused() -> None:
    with pytest.raises(ValueError, match="head_dim"):
        transfer_first_layer(tiny_model(8, heads=1), tiny_model(8, heads=2), torch.eye(8, dtype=torch.float64))


def test_student_config_inherits_all_but_sizes() -> None:
    teacher = ModernBertConfig(local_attention=64, norm_eps=1e-6)
    config = student_config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=768,
        max_position_embeddings=1024,
        vocab_size=50368,
        special_ids={"pad_token_id": 50283},
        teacher=teacher,
    )
    assert (config.local_attention, config.norm_eps, config.hidden_size) == (64, 1e-6, 384)
    assert config.rope_parameters == teacher.rope_parameters
    assert config.layer_types[:4] == ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]


def test_a_teacher_that_is_no_modernbert_gives_its_embeddings_alone() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertForMaskedLM(BertConfig(vocab_size=50, **sizes))
    assert [usable_init(name, bert) for name in ("guide", "embeddings", "random")] == [
        "embeddings",
        "embeddings",
        "random",
    ]
    with pytest.raises(UserError, match=r"all_layers needs a ModernBERT, found a Bert.*; use --init embeddings, which"):
        usable_init("all_layers", bert)
    assert usable_init("guide", tiny_model(16)) == "guide"
    student = tiny_model(8)
    before = {name: value.clone() for name, value in student.named_parameters()}
    names = transfer("embeddings", student, bert).names
    changed = [name for name, value in student.named_parameters() if not torch.equal(value, before[name])]
    assert names == changed == ["model.embeddings.tok_embeddings.weight"]
