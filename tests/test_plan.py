"""What a recipe costs: against real models, torch's own count of their operations, and numbers written by hand."""

import itertools
import json
import re
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, tiny_modernbert, tiny_tokenizer
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, ModernBertForMaskedLM

from modernbert_small import plan as module
from modernbert_small.packed.batches import PackedSampler
from modernbert_small.packed.costs import PhaseCost
from modernbert_small.packed.machine import OF_A_MEASUREMENT, Machine, this_machine
from modernbert_small.plan import (
    ROW_BYTES,
    corpus_size,
    count_parameters,
    format_plan,
    forward_flops_per_token,
    gpu_of,
    memory_problems,
    plan,
    teacher_config,
    unused_processes,
    without_gpu,
)
from modernbert_small.run.errors import UserError
from modernbert_small.settings.whole import full_recipe

V2 = ROOT / "recipes" / "v2.yaml"
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
        "distil_train": {"num_train_epochs": 3, "max_seq_length": 128, "tokens_per_batch": 512},
        "create_distil_dataset": {"teacher_name_or_path": str(tmp_path / "big"), "embedding_dim": 16},
        "pre_train": {"max_steps": 10, "tokens_per_batch": 512, "max_seq_length": 128},
        "init_model_mlm": {"teacher_name_or_path": str(tmp_path / "big")}
        | {name: getattr(models["student"].config, name) for name in sizes},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    whole = full_recipe(tmp_path / "recipe.yaml")
    found, assumed = plan(dict(reversed(whole.items())), 1800, 9000, np.array([LENGTH] * 3))
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


def test_the_cpu_recipes_teacher_is_known_before_it_is_downloaded():
    config, assumed = teacher_config("sentence-transformers/all-MiniLM-L6-v2")
    assert assumed is None
    assert count_parameters(config, False) == 22_713_216  # as its weights have, pooler included


def test_the_default_recipe_without_the_hub(monkeypatch):
    def unreachable(flag, name):
        raise UserError("no hub")

    monkeypatch.setattr(module, "load_config", unreachable)
    costs, assumed = plan(full_recipe(ROOT / "recipes" / "v2.yaml"), 5 * 10**6, 10**9, np.array([200]))
    assert round(costs[2].parameters / 1e6) == 37
    assert round(costs[3].parameters / 1e6) == 149  # ModernBERT-base
    assert [text.split()[0] for text in assumed] == ["answerdotai/ModernBERT-base", "Alibaba-NLP/gte-modernbert-base"]


MACHINE = Machine(
    "a CPU, 2 threads, no GPU", 1e15, {"pre_train": 0.25, "distil_train": 0.2}, bf16=True, memory=25 * 10**9
)
COSTS = [
    PhaseCost("create_dataset", "", 0, 0, 0.0, 60.0, 0.0, 4.5e9),
    PhaseCost("init_model_mlm", "large", 500_000_000, 4, 0.0, 120.0, 0.0, 2e8),
    PhaseCost("pre_train", "student", 10_000_000, 16, 3.6e18, 0.0, 32e9, 1e9),
    PhaseCost("distil_train", "student", 10_000_000, 16, 1.8e18, 0.0, 2e9, 1e9),
]


def test_the_table_by_hand():
    """1.3 GB of each process, 16 bytes a trained parameter, 2 bytes an activation in bf16."""
    assert [line.split() for line in format_plan(COSTS, MACHINE).splitlines()[1:]] == [
        ["create_dataset", "1.3", "1.3", "4.5", "60", "s"],
        ["init_model_mlm", "large", "500.0", "M", "3.3", "3.3", "0.2", "2.0", "min"],
        ["pre_train", "student", "10.0", "M", "65.5", "65.5", "1.0", "3,600.0", "4.0", "h"],
        ["distil_train", "student", "10.0", "M", "5.5", "5.5", "1.0", "1,800.0", "2.5", "h"],
        ["all", "6.7", "5,400.0", "6.5", "h"],
    ]


def test_a_batch_that_does_not_fit_gets_one_that_does():
    recipe = {
        "create_dataset": {},
        "init_model_mlm": {},
        "pre_train": {"tokens_per_batch": 4096, "max_seq_length": 128, "gradient_accumulation_steps": 2},
        "distil_train": {"tokens_per_batch": 4096, "max_seq_length": 128, "gradient_accumulation_steps": 1},
    }
    (said,) = memory_problems(COSTS, recipe, MACHINE)
    assert said.startswith("pre_train: tokens_per_batch 4096 needs some 65 GB, and this machine has 25; use ")
    assert (
        "tokens_per_batch: 1024 and gradient_accumulation_steps: 8, which" in said
    )  # 1.46 + 16 GB fit, 1.46 + 32 do not
    assert not memory_problems(COSTS, recipe, replace(MACHINE, memory=None))
    said = memory_problems(COSTS, recipe, replace(MACHINE, memory=10**9))[0]
    assert (
        "use tokens_per_batch: 128 and gradient_accumulation_steps: 64, which gives the same steps; even that " in said
    )


def test_many_gpus_by_hand():
    """A process has a rate of 1e12 FLOP/s here. Rings: 8 bytes x 25 M parameters x (n - 1) / n."""
    eight = Machine(
        "8 X", 1e13, dict.fromkeys(("pre_train", "create_distil_dataset"), 0.1), bf16=True, gpus=4, machines=2
    )
    corpus = PhaseCost("create_dataset", "", 0, 0, 0.0, dealt_seconds=80.0)
    assert corpus.duration(eight) == 10
    train = PhaseCost(
        *("pre_train", "student", 25_000_000, 16, 8e11, 60.0), steps=10.0, activations=8e9, held=1e9, most_processes=8
    )
    # 0.8 s over 4 processes, 10 exchanges of 150 MB at 100 GB/s; over 8 processes 10 of 175 MB at 12.5 GB/s
    assert train.duration(eight) == pytest.approx(60 + 0.2 + 0.015)
    assert (train.processes(eight), train.machine_memory(eight)) == (4, pytest.approx(4 * 2.3e9))
    assert train.memory(eight) == pytest.approx(1.3e9 + 4e8 + 4e9)
    large = replace(train, flops=8e13)
    assert (large.processes(eight), large.duration(eight)) == (8, pytest.approx(60 + 10 + 0.14))
    assert replace(large, most_processes=2).duration(eight) == pytest.approx(60 + 40 + 0.01)
    assert replace(train, flops=8e8, seconds=0.0).duration(eight) == 0.02  # 2 ms a step at least
    labels = replace(train, phase="create_distil_dataset", steps=0.0, dealt_seconds=0.0, most_processes=0)
    assert labels.duration(eight) == 60  # on the CPU and not dealt, while the GPUs compute for 0.1 s
    assert "pre_train is fastest on 4 of 8 GPUs" in unused_processes([train], full_recipe(V2), eight)[0]


def test_what_a_process_holds_of_each_row():
    rows, offsets = 100_000, 8
    lengths = np.full(rows, 20)
    tracemalloc.start()
    next(iter(PackedSampler(lengths, 1000, seed=0)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert offsets + lengths.itemsize + peak / rows == pytest.approx(ROW_BYTES, abs=4)


BLOCKS = [
    (name, command, output)
    for name in ("scaling.md", "another-size.md")
    for command, output in re.findall(
        r"```console\n\$ python -m modernbert_small.plan (.*?)\n(.*?)\n```",
        (ROOT / "docs" / name).read_text(),
        re.DOTALL,
    )
]


COUNTED = {}


def counted_once(config, has_head):
    """The same models for each size of a corpus, so they are counted once."""
    key = (config.to_json_string(), has_head)
    if key not in COUNTED:
        COUNTED[key] = count_parameters(config, has_head)
    return COUNTED[key]


@pytest.mark.parametrize(("name", "command", "output"), BLOCKS, ids=[command for _, command, _ in BLOCKS])
def test_the_docs_show_what_plan_prints(tmp_path, monkeypatch, capsys, name, command, output):
    def unreachable(flag, name):
        raise UserError("no hub")

    (large,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "scaling.md").read_text(), re.DOTALL)
    (tmp_path / "large.yaml").write_text(large)
    monkeypatch.setattr(module, "load_config", unreachable)
    monkeypatch.setattr(module, "count_parameters", counted_once)
    monkeypatch.setattr(module, "find_recipe", lambda name: (tmp_path if name == "large.yaml" else ROOT) / name)
    monkeypatch.setattr("sys.argv", ["plan", *command.split()])
    module.main()
    assert output in capsys.readouterr().out


def test_days_on_a_cpu_are_said():
    assert (
        "that takes some 2.0 days. Settings for a CPU are those of recipes/cpu.yaml"
        in without_gpu(2 * 86400, MACHINE)[0]
    )
    assert not without_gpu(86400, MACHINE)
    assert not without_gpu(2 * 86400, gpu_of("H100"))


def test_a_phase_with_sizes_for_a_gpu_says_that_there_is_none(tmp_path, monkeypatch, caplog):
    def unreachable(flag, name):
        raise UserError("no hub")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["pre_train.py"])
    monkeypatch.setattr(module, "load_config", unreachable)
    monkeypatch.setattr(module, "this_machine", lambda: replace(MACHINE, flops_per_second=1e9))
    module.note_without_gpu("pre_train", {"tokens_per_batch": 4096, "max_steps": 1000})
    assert not caplog.messages
    module.note_without_gpu("pre_train", {"tokens_per_batch": 65_536, "max_steps": 5})
    memory, time = caplog.messages
    assert memory.startswith(
        "pre_train: tokens_per_batch 65536 needs some 29 GB, and this machine has 25; use tokens_per"
    )
    assert "on this CPU that takes some" in time


@pytest.mark.skipif(torch.cuda.is_available(), reason="its rate is the data sheet's")
def test_this_machine_is_measured(monkeypatch):
    """Its rate is what torch counts of a product, over the half second that each one takes by this clock."""
    readings = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: next(readings) / 2)
    with FlopCounterMode(display=False) as counter:
        machine = this_machine()
    products = next(readings) / 2
    assert machine.utilisation is OF_A_MEASUREMENT
    assert machine.flops_per_second == pytest.approx(counter.get_total_flops() / products / 0.5)
    assert machine.memory > 10**9


def test_a_bert_counts_what_torch_counts():
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, vocab_size=50)
    with FlopCounterMode(display=False) as counter:
        BertModel(config, add_pooling_layer=False)(torch.ones((1, 7), dtype=torch.int64))
    assert forward_flops_per_token(config, np.array([7])) * 7 == pytest.approx(counter.get_total_flops())
    assert count_parameters(config, False) == BertModel(config).num_parameters()


def test_the_corpus_by_record_or_flags_or_sources(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.txt").write_text("x" * 4500)
    settings = {"output_dir": str(tmp_path), "max_seq_length": 100, "max_rows_per_source": None}
    settings["sources"] = [f"own={tmp_path / 'own'}"]
    assert corpus_size(settings, None, None)[:2] == (25, 1000)  # 4.5 bytes a token, 40 tokens a text
    settings |= {"sources": ["npr", "python_docs"], "max_rows_per_source": 10}
    assert corpus_size(settings, None, None)[1] == 10 * 580 + 10 * 85
    parts = [{"rows": 30, "tokens": 300}, {"rows": 10, "tokens": 1000}]
    (tmp_path / "run.json").write_text(json.dumps({"by_source": parts}))
    rows, tokens, lengths, source = corpus_size(settings, None, None)
    assert (rows, tokens, lengths.mean()) == (40, 1300, 32.5)
    assert str(tmp_path) in source
    assert corpus_size(settings, 5, 50)[:3] == (5, 50, 10)
    assert corpus_size(settings, None, 4000)[:3] == (100, 4000, 40)


@pytest.mark.parametrize(
    ("text", "flags", "said"),
    [
        (
            "create_distil_dataset: {embedding_dim: 128}",
            [],
            "has hidden_size 384, the default, and create_distil_dataset has embedding_dim 128",
        ),
        ("", ["--rows", "1000"], "--rows is given with 0 numbers of --tokens; expected one"),
        ("", ["--rows", "9", "--tokens", "1e3", "1e4"], "--rows is given with 2 numbers of --tokens; expected one"),
        ("", ["--machines", "0"], "--machines: 0, expected at least 1"),
        ("", ["--rows", "0", "--tokens", "1e3"], "--rows: 0, expected at least 1"),
        ("", ["--tokens", "nan"], "--tokens: expected numbers such as 4e9"),
        ("", ["--gpus", "2"], "--gpus 2 --machines 1: no GPU is here; name one with --gpu"),
    ],
)
def test_what_cannot_be_planned_is_one_line(tmp_path, monkeypatch, text, flags, said):
    (tmp_path / "recipe.yaml").write_text(text)
    monkeypatch.setattr("sys.argv", ["plan", str(tmp_path / "recipe.yaml"), *flags])
    monkeypatch.setattr(module, "this_machine", lambda: MACHINE)
    with pytest.raises(UserError, match=said):
        module.main()


def test_names():
    assert (gpu_of("NVIDIA H100 PCIe").name, gpu_of("H100 PCIe").flops_per_second) == ("one H100 PCIe", 756e12)
    assert gpu_of("l40s").name == "one L40S"
    with pytest.raises(UserError, match=r"--gpu TPU: its rate is not known; expected one of B200"):
        gpu_of("TPU")
    assert teacher_config(str(Path("nowhere")))[1].startswith("nowhere cannot be read here")
