"""python -m modernbert_small.run: what it says before it starts, which phases it starts, and how it stops."""

import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import tiny_modernbert, tiny_sentence_transformer

from modernbert_small import pipeline
from modernbert_small.run.errors import Terminated, UserError, raise_stop
from modernbert_small.settings.pre_train import PreTrainSettings
from modernbert_small.settings.recipe import find_recipe
from modernbert_small.settings.sections import SECTIONS, Section

RECIPE = """
create_dataset: {sources: [own=own.txt], tokenizer_name_or_path: big, max_seq_length: 64}
init_model_mlm: {teacher_name_or_path: big, hidden_size: 16, num_attention_heads: 2, num_hidden_layers: 2, init: random}
pre_train: {max_steps: 6, tokens_per_batch: 1024}
create_distil_dataset: {teacher_name_or_path: teacher, embedding_dim: 16}
distil_train: {eval_datasets: [], tokens_per_batch: 100000000}
"""


PHASE = """
import signal, sys, time
from pathlib import Path

def save(number, frame):
    time.sleep(0.5)
    Path("saved").touch()
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
Path("started").touch()
time.sleep(60)
"""


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_a_stopped_run_lets_its_phase_save(tmp_path, monkeypatch, number, raised):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "ROOT", tmp_path)
    monkeypatch.setitem(SECTIONS, "pre_train", Section("phase.py", PreTrainSettings))
    (tmp_path / "phase.py").write_text(PHASE)

    def stop_when_started():
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    earlier = signal.signal(number, raise_stop)
    try:
        threading.Thread(target=stop_when_started, daemon=True).start()
        with pytest.raises(raised):
            pipeline.run_phase("pre_train", tmp_path / "recipe.yaml")
    finally:
        signal.signal(number, earlier)
    assert (tmp_path / "saved").exists()


@pytest.fixture
def started(tmp_path, monkeypatch):
    """A folder with a recipe and its teachers; phases are noted instead of run."""
    monkeypatch.chdir(tmp_path)
    teacher = tiny_sentence_transformer(tmp_path, "bert")
    tiny_modernbert(tmp_path / "big", teacher.tokenizer)
    Path("my.yaml").write_text(RECIPE)
    Path("own.txt").write_text("word " * 900)
    phases = []
    monkeypatch.setattr(pipeline, "run_phase", lambda section, recipe, flags: phases.append((section, *flags)))
    monkeypatch.setattr(pipeline, "finish", lambda model, show_table: phases.append((model, show_table)))
    return phases


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["run", *flags])
    pipeline.main()


def test_a_dry_run_says_what_each_phase_does_and_starts_none(started, monkeypatch, capsys):
    Path("checkpoints/mlm.partial").mkdir(parents=True)
    Path("checkpoints/mlm.partial/run.json").write_text("{}")
    run(monkeypatch, "my.yaml", "--dry_run")
    out = capsys.readouterr().out
    assert started == []
    assert "some 38 texts with 1,000 tokens" in out  # 4,500 bytes, 26 tokens a text
    for lines in (
        "create_dataset.py: to do\n    reads   own=own.txt, big, msmarco, hotpotqa\n    writes  data/corpus\n",
        "pre_train.py: goes on\n    reads   data/corpus, checkpoints/init\n    writes  checkpoints/mlm\n",
        "    reads   teacher, data/corpus\n    writes  data/distil, checkpoints/teacher\n    takes   some ",
        "Note: distil_train: tokens_per_batch 100000000 needs some",
    ):
        assert lines in out


def test_all_phases_or_those_from_one(started, monkeypatch):
    run(monkeypatch, "my.yaml")
    assert started == [*((section,) for section in SECTIONS), ("checkpoints/ModernBERT-small-v2", False)]
    started.clear()
    with pytest.raises(UserError, match=r"--train_file data/corpus: no such folder; .* phase 1 makes it: python "):
        run(monkeypatch, "my.yaml", "--from", "create_distil_dataset")
    for folder in ("data/corpus", "data/distil"):
        Path(folder).mkdir(parents=True)
    run(monkeypatch, "my.yaml", "--from", "create_distil_dataset", "--overwrite")
    assert started == [
        ("create_distil_dataset", "--overwrite"),
        ("distil_train", "--overwrite"),
        ("checkpoints/ModernBERT-small-v2", False),
    ]


def test_a_student_of_an_embedding_model_needs_no_phase_3(started, monkeypatch, capsys):
    """Its recipe has phase 5 start from what phase 2 writes."""
    recipe = RECIPE.replace("pre_train: {max_steps: 6, tokens_per_batch: 1024}\n", "")
    Path("my.yaml").write_text(
        recipe.replace("distil_train: {", "distil_train: {model_name_or_path: checkpoints/init, ")
    )
    run(monkeypatch, "my.yaml")
    assert [phase for phase, *_ in started[:-1]] == [section for section in SECTIONS if section != "pre_train"]
    assert "pre_train.py" not in capsys.readouterr().out


def test_the_command_has_the_shelfs_name(started, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run", "nowhere.yaml"])
    earlier = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as stop:
            runpy.run_module("modernbert_small.run", run_name="__main__", alter_sys=False)
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
    assert stop.value.code == 2


def test_recipes_that_come_along_have_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("cpu").is_file()
    Path("cpu").write_text("")
    assert find_recipe("cpu") == Path("cpu")
