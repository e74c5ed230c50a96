"""What a recipe costs: parameters against models with weights, work and memory against what is known of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, tiny_modernbert, tiny_tokenizer
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from modernbert_small import plan as module
from modernbert_small.packed.flops import training_flops_per_token
from modernbert_small.plan import (
    corpus_size,
    count_parameters,
    find_gpu,
    format_plan,
    forward_flops_per_token,
    plan,
    teacher_config,
)
from modernbert_small.run.errors import UserError
from modernbert_small.run.recipe import full_recipe


def test_a_small_recipe_against_its_models(tmp_path):
    teacher = tiny_modernbert(tmp_path / "big", tiny_tokenizer(tmp_path / "big"), hidden_size=32)
    student = tiny_modernbert(tmp_path / "student", tiny_tokenizer(tmp_path / "student"))
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
    recipe = {
        "init_model_mlm": {"teacher_name_or_path": str(tmp_path / "big")}
        | {name: getattr(student.config, name) for name in sizes},
        "pre_train": {"max_steps": 10, "tokens_per_batch": 512},
        "create_distil_dataset": {"teacher_name_or_path": str(tmp_path / "big")},
        "distil_train": {"num_train_epochs": 3},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    lengths = np.array([5, 40, 100])
    rows, assumed = plan(full_recipe(tmp_path / "recipe.yaml"), 9000, lengths)
    init, mlm, labels, distil = rows
    assert assumed == []
    assert init["parameters"] == teacher.model.num_parameters() + student.num_parameters()
    assert mlm["parameters"] == student.num_parameters()
    assert distil["parameters"] == student.model.num_parameters()
    optimiser = torch.optim.AdamW(student.parameters())
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    moments = [state[name] for state in optimiser.state.values() for name in ("exp_avg", "exp_avg_sq")]
    held = [*student.parameters(), *(p.grad for p in student.parameters()), *moments]
    assert mlm["bytes"] == sum(tensor.nbytes for tensor in held)
    assert labels["bytes"] == sum(tensor.nbytes for tensor in teacher.model.parameters())
    assert mlm["flops"] == pytest.approx(training_flops_per_token(student.config, lengths, 0.3) * 10 * 512)
    assert distil["flops"] == pytest.approx(training_flops_per_token(student.config, lengths) * 9000 * 3)
    assert labels["flops"] == pytest.approx(training_flops_per_token(teacher.config, lengths) / 3 * 9000)


def test_the_default_recipe_without_the_hub(monkeypatch):
    def unreachable(flag, name):
        raise UserError("no hub")

    monkeypatch.setattr(module, "load_config", unreachable)
    rows, assumed = plan(full_recipe(ROOT / "recipes" / "v2.yaml"), 10**9, np.array([200]))
    assert round(rows[1]["parameters"] / 1e6) == 37
    assert round(rows[2]["parameters"] / 1e6) == 149  # ModernBERT-base
    assert [text.split()[0] for text in assumed] == ["answerdotai/ModernBERT-base", "Alibaba-NLP/gte-modernbert-base"]
    table = format_plan(rows, 1e15).splitlines()
    assert len({len(line) for line in table}) == 1
    hours = rows[3]["flops"] / (1e15 * module.UTILISATION["distil_train"]) / 3600
    assert table[4].endswith(f"{hours:.2f}")


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
    assert (rows, tokens, lengths.mean()) == (40, 1300, 1300 / 40)
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
        ("", ["--rows", "1000"], "--rows and --tokens: expected both"),
    ],
)
def test_what_cannot_be_planned_is_one_line(tmp_path, monkeypatch, text, flags, said):
    (tmp_path / "recipe.yaml").write_text(text)
    monkeypatch.setattr("sys.argv", ["plan", str(tmp_path / "recipe.yaml"), *flags])
    with pytest.raises(UserError, match=said):
        module.main()


def test_names():
    assert find_gpu("NVIDIA H100 PCIe") == ("H100 PCIe", 756e12)
    assert find_gpu("l40s")[0] == "L40S"
    with pytest.raises(UserError, match=r"--gpu TPU: no rate known, expected one of B200"):
        find_gpu("TPU")
    assert teacher_config(str(Path("nowhere")))[1].startswith("nowhere cannot be read here")
