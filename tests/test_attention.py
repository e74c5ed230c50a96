"""Packed attention against transformers' own padded sdpa forward, row by row."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ModernBertConfig, ModernBertModel

from modernbert_small.packed import attention
from modernbert_small.packed.attention import use_packed_attention
from modernbert_small.packed.batches import packed_features

VOCABULARY = 100
LENGTHS = [
    [1, 7, 512, 300, 2, 1024, 30, 200],
    [63, 64, 65, 66, 127, 128, 129, 130, 191, 192, 193],  # around the window's reach and its multiples
    [255, 256, 257, 258, 320, 321],  # sliding windows are a band in rows of up to 256 tokens, blocks in longer ones
    [256, 256],
    [1],
    [1, 1, 1],
    [1024],
    [40] * 9,
]


def small_model(seed: int = 0) -> ModernBertModel:
    torch.manual_seed(seed)
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "pad_token_id"), 0)
    config = ModernBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,  # full, sliding, sliding, full
        num_attention_heads=2,
        initializer_range=0.2,  # far from the linear regime
        **special,
    )
    return ModernBertModel(config).eval()


def padded(model: ModernBertModel, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    model.set_attn_implementation("sdpa")
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    hidden = model(input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device)).last_hidden_state
    return [states[: len(row)] for states, row in zip(hidden, rows, strict=True)]


def packed(model: ModernBertModel, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    dtype = torch.bfloat16 if torch.is_autocast_enabled(model.device.type) else torch.float32
    use_packed_attention(model, "auto", model.device, dtype)
    features = packed_features(torch.cat(rows).numpy(), np.array([len(row) for row in rows]))
    features = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in features.items()}
    return list(model(**features).last_hidden_state[0].split([len(row) for row in rows]))


def random_rows(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_hidden_states_and_gradients_equal_padded_sdpa(lengths: list[int]) -> None:
    rows = random_rows(lengths)
    gradients = []
    states = []
    for forward in (padded, packed):
        model = small_model()
        outputs = forward(model, rows)
        # The loss weights every coordinate differently, so that errors do not cancel out.
        weights = torch.randn(32, generator=torch.Generator().manual_seed(1))
        sum((output @ weights).tanh().sum() for output in outputs).backward()
        states.append(outputs)
        gradients.append({name: value.grad for name, value in model.named_parameters()})
    for expected, got in zip(*states, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for name, expected in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], expected, atol=1e-5 * expected.abs().max().item() + 1e-6, rtol=1e-4
        )


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]
)
def test_bf16_is_as_near_to_float32_as_padded_sdpa_is(device: str) -> None:
    rows = random_rows([1, 7, 512, 300, 2, 1024, 30, 200, 190])
    weights = torch.randn(32, generator=torch.Generator().manual_seed(1))

    def run(forward, bf16: bool) -> list[torch.Tensor]:
        """Hidden states of all rows and every parameter's gradient."""
        model = small_model().to(device)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            states = torch.cat(forward(model, rows)).float()
        (states @ weights.to(device)).sum().backward()
        return [states.detach(), *(parameter.grad for parameter in model.parameters())]

    reference, usual, ours = run(padded, False), run(padded, True), run(packed, True)
    for exact, expected, got in zip(reference, usual, ours, strict=True):
        assert (got - exact).norm() < 1.2 * (expected - exact).norm()


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=10), st.integers(0, 1000))
def test_any_lengths_equal_padded_sdpa(lengths: list[int], seed: int) -> None:
    model, rows = small_model(), random_rows(lengths, seed)
    with torch.no_grad():
        for expected, got in zip(padded(model, rows), packed(model, rows), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_groups_of_similar_rows_as_on_a_gpu_equal_padded_sdpa(monkeypatch) -> None:
    groups = attention._groups
    monkeypatch.setattr(attention, "_groups", lambda batch, is_exact: groups(batch, False))
    attention._biases.cache_clear()
    model, rows = small_model(), random_rows(LENGTHS[1])
    for expected, got in zip(padded(model, rows), packed(model, rows), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    attention._biases.cache_clear()


def test_sorted_rows_are_not_moved(monkeypatch) -> None:
    monkeypatch.setattr(attention, "_Reorder", None)
    model, rows = small_model(), random_rows([300, 70, 70, 5, 1, 1])
    with torch.no_grad():
        for expected, got in zip(padded(model, rows), packed(model, rows), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_row_does_not_see_its_neighbours() -> None:
    model, rows = small_model(), random_rows([30, 200, 5])
    with torch.no_grad():
        before = packed(model, rows)[1]
        rows[0], rows[2] = rows[0].flip(0), random_rows([90], seed=7)[0]
        torch.testing.assert_close(packed(model, rows)[1], before, atol=1e-6, rtol=1e-5)


def test_padded_input_keeps_its_mask() -> None:
    model, rows = small_model(), random_rows([5, 90])
    with torch.no_grad():
        expected = padded(model, rows)
        use_packed_attention(model, "auto", torch.device("cpu"), torch.float32)
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = (torch.arange(90) < torch.tensor([[5], [90]])).long()
        hidden = model(input_ids=input_ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(hidden[0, :5], expected[0], atol=1e-5, rtol=1e-5)


def test_groups_that_were_made_in_inference_mode_serve_training() -> None:
    model, rows = small_model(), random_rows([5, 3, 7])
    attention._groups.cache_clear()
    with torch.inference_mode():
        before = packed(model, rows)
    after = packed(model, rows)
    assert attention._groups.cache_info().misses == 1
    torch.testing.assert_close(torch.cat(after), torch.cat(before))
    torch.cat(after).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
