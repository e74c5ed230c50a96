"""What a recipe costs: against real models, torch's own count of their operations, and numbers written by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, tiny_modernbert, tiny_tokenizer
from modernbert_small.run.recipe import full_recipe
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, ModernBertForMaskedLM

from modernbert_small import plan as module
from modernbert_small.plan import (
    PhaseCost,
    corpus_size,
    count_parameters,
    format_plan,
    forward_flops_per_token,
    plan,
    rate_of,
    teacher_config,
)
from modernbert_small.run.errors import UserError

LENGTH = 5  # within the tiny models' sliding windows, since torch counts dense attention


@pytest.fixture
def models(tmp_path):
    """A teacher and a student whose attention torch can count, by the names of their folders."""
    tiny_modernbert(tmp_path / "big", tiny_tokenizer(tmp_path / "big"), hidden_size=32)
    tiny_modernbert(tmp_path / "student", tiny_tokenizer(tmp_path / "student"))
    return {
        name: ModernBertForMaskedLM.from_pretrained(tmp_path / name, attn_implementation="eager")
        for name in ("big", "student")
    }


@pytest.fixture
def costs(tmp_path, models):
    """The plan of a recipe with these models, on a corpus of 9,000 tokens."""
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
    recipe = {
        "distil_train": {"num_train_epochs": 3},
        "create_distil_dataset": {"teacher_name_or_path": str(tmp_path / "big")},
        "pre_train": {"max_steps": 10, "tokens_per_batch": 512},
        "init_model_mlm": {"teacher_name_or_path": str(tmp_path / "big")}
        | {name: getattr(models["student"].config, name) for name in sizes},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    whole = full_recipe(tmp_path / "recipe.yaml")
    found, assumed = plan(dict(reversed(whole.items())), 9000, np.array([LENGTH] * 3))
    assert assumed == []
    return {cost.phase: cost for cost in found}


def operations(run):
    """What torch counts in a forward and a backward pass over LENGTH tokens, and in the forward pass alone."""
    with FlopCounterMode(display=False) as counter:
        loss = run(torch.arange(LENGTH)[None]).sum()
        forward = counter.get_total_flops()
        loss.backward()
    return counter.get_total_flops(), forward


def test_parameters_and_memory_are_those_of_the_models(models, costs):
    teacher, student = models["big"], models["student"]
    assert costs["init_model_mlm"].parameters == teacher.model.num_parameters() + student.num_parameters()
    assert costs["pre_train"].parameters == student.num_parameters()
    assert costs["distil_train"].parameters == student.model.num_parameters()
    optimiser = torch.optim.AdamW(student.parameters())
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    moments = [state[name] for state in optimiser.state.values() for name in ("exp_avg", "exp_avg_sq")]
    held = [*student.parameters(), *(p.grad for p in student.parameters()), *moments]
    assert costs["pre_train"].bytes == sum(tensor.nbytes for tensor in held)
    assert costs["create_distil_dataset"].bytes == sum(tensor.nbytes for tensor in teacher.model.parameters())


def test_the_work_is_what_torch_counts(models, costs):
    teacher, student = models["big"], models["student"]
    encoder, _ = operations(lambda ids: student.model(ids).last_hidden_state)
    with_head, _ = operations(lambda ids: student(ids).logits)
    _, forward = operations(lambda ids: teacher.model(ids).last_hidden_state)
    masked = encoder + 0.3 * (with_head - encoder)  # logits are computed for masked tokens, 30 % of all
    assert costs["pre_train"].flops == pytest.approx(masked * 10 * 512 / LENGTH)
    assert costs["distil_train"].flops == pytest.approx(encoder * 3 * 9000 / LENGTH)
    assert costs["create_distil_dataset"].flops == pytest.approx(forward * 9000 / LENGTH)


def test_the_default_recipe_without_the_hub(monkeypatch):
    def unreachable(flag, name):
        raise UserError("no hub")

    monkeypatch.setattr(module, "load_config", unreachable)
    costs, assumed = plan(full_recipe(ROOT / "recipes" / "v2.yaml"), 10**9, np.array([200]))
    assert round(costs[1].parameters / 1e6) == 37
    assert round(costs[2].parameters / 1e6) == 149  # ModernBERT-base
    assert [text.split()[0] for text in assumed] == ["answerdotai/ModernBERT-base", "Alibaba-NLP/gte-modernbert-base"]


def test_the_table_by_hand(monkeypatch):
    monkeypatch.setattr(module, "UTILISATION", {"pre_train": 0.25, "distil_train": 0.2})
    costs = [
        PhaseCost("init_model_mlm", "large", 500_000_000, 4, 0),
        PhaseCost("pre_train", "student", 10_000_000, 16, 3.6e18),
        PhaseCost("distil_train", "student", 10_000_000, 16, 1.8e18),
    ]
    assert [line.split() for line in format_plan(costs, 1e15).splitlines()[1:]] == [
        ["init_model_mlm", "large", "500.0", "M", "2.00"],
        ["pre_train", "student", "10.0", "M", "0.16", "3,600.0", "4.00"],
        ["distil_train", "student", "10.0", "M", "0.16", "1,800.0", "2.50"],
        ["all", "5,400.0", "6.50"],
    ]


def test_a_bert_counts_what_torch_counts():
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, vocab_size=50)
    with FlopCounterMode(display=False) as counter:
        BertModel(config, add_pooling_layer=False)(torch.ones((1, 7), dtype=torch.int64))
    assert forward_flops_per_token(config, np.array([7])) * 7 == pytest.approx(counter.get_total_flops())
    assert count_parameters(config, False) == BertModel(config).num_parameters()


def test_the_corpus_by_record_or_flags(tmp_path):
    with pytest.raises(UserError, match=r"run phase 1 first, or pass --rows and --tokens"):
        corpus_size(str(tmp_path), 10, None)
    parts = [{"rows": 30, "tokens": 300}, {"rows": 10, "tokens": 1000}]
    (tmp_path / "run.json").write_text(json.dumps({"by_source": parts}))
    rows, tokens, lengths, source = corpus_size(str(tmp_path), None, None)
    assert (rows, tokens, lengths.mean()) == (40, 1300, 32.5)
    assert str(tmp_path) in source
    assert corpus_size(str(tmp_path), 5, 50)[:3] == (5, 50, 10)


@pytest.mark.parametrize(
    ("text", "flags", "said"),
    [
        (
            "create_distil_dataset: {embedding_dim: 128}",
            [],
            "has hidden_size 384, create_distil_dataset embedding_dim 128",
        ),
        ("", ["--rows", "1000"], "--rows is given without --tokens; expected both"),
    ],
)
def test_what_cannot_be_planned_is_one_line(tmp_path, monkeypatch, text, flags, said):
    (tmp_path / "recipe.yaml").write_text(text)
    monkeypatch.setattr("sys.argv", ["plan", str(tmp_path / "recipe.yaml"), *flags])
    with pytest.raises(UserError, match=said):
        module.main()


def test_names():
    assert rate_of("NVIDIA H100 PCIe") == ("H100 PCIe", 756e12)
    assert rate_of("l40s")[0] == "L40S"
    with pytest.raises(UserError, match=r"--gpu TPU: its rate is not known; expected one of B200"):
        rate_of("TPU")
    assert teacher_config(str(Path("nowhere")))[1].startswith("nowhere cannot be read here")
