"""The attention of CUDA, on a CPU: a reference stands in for the kernel, and all else is what runs on a GPU."""

import numpy as np
import pytest
import torch
import varlen_reference
from test_attention import LENGTHS, padded, random_rows, small_model

from modernbert_small.packed import attention
from modernbert_small.packed.attention import use_packed_attention
from modernbert_small.packed.batches import packed_features

CPU = torch.device("cpu")
WEIGHTS = torch.randn(32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _varlen_runs_here(monkeypatch):
    varlen_reference.register_for_cpu()
    monkeypatch.setattr(attention, "_what_flash_lacks", lambda *args: None)


def packed(model, rows):
    assert use_packed_attention(model, "auto", CPU, torch.float32) == "varlen"
    features = packed_features(torch.cat(rows).numpy(), np.array([len(row) for row in rows]))
    return list(model(**features).last_hidden_state[0].split([len(row) for row in rows]))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_hidden_states_and_gradients_equal_padded_sdpa(lengths):
    rows, results = random_rows(lengths), []
    for run in (padded, packed):
        model = small_model()
        states = run(model, rows)
        sum((row @ WEIGHTS).tanh().sum() for row in states).backward()
        gradients = [parameter.grad / parameter.grad.abs().max() for parameter in model.parameters()]
        results.append([*states, *gradients])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_padded_input_is_left_to_sdpa():
    model, rows = small_model(), random_rows([5, 90])
    with torch.no_grad():
        expected = padded(model, rows)
        use_packed_attention(model, "auto", CPU, torch.float32)
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = (torch.arange(90) < torch.tensor([[5], [90]])).long()
        hidden = model(input_ids=input_ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(hidden[0, :5], expected[0], atol=1e-5, rtol=1e-5)
