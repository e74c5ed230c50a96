"""python -m modernbert_small.run: what it says before it starts, which phases it starts, and how it stops."""

import json
import os
import runpy
import signal
import subprocess
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
    monkeypatch.setattr(pipeline, "finish", lambda model, before: phases.append((model, before)))
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
    assert "some 1,000 tokens of text" in out  # 4,500 bytes
    assert "Note: 1,000 tokens of text are few, so expect a poor model; the demo has 630,000" in out
    for lines in (
        "create_dataset.py: to do\n    reads   own=own.txt, big, msmarco, hotpotqa\n    writes  data/corpus\n",
        "pre_train.py: goes on, but create_dataset makes again what it read; if that comes out different, the run",
        "    reads   data/corpus, checkpoints/init\n    writes  checkpoints/mlm\n",
        "    reads   teacher, data/corpus\n    writes  data/distil, checkpoints/teacher\n    takes   some ",
        "Note: distil_train: tokens_per_batch 100000000 needs some",
    ):
        assert lines in out


def record(folder, **settings):
    Path(folder).mkdir(parents=True)
    by_source = [{"source": "own", "kind": "document", "rows": 40, "tokens": 900}]
    Path(folder, "run.json").write_text(json.dumps({"settings": settings, "by_source": by_source}))


def test_a_finished_phase_of_other_settings_is_said_with_what_will_happen(started, monkeypatch, capsys):
    record("data/corpus", max_seq_length=64, sources=["own=own.txt"], seed=42, output_dir="elsewhere", strict=False)
    record("checkpoints/init", seed=42, hidden_size=32)
    record("checkpoints/mlm", bf16=True, max_steps=6, learning_rate=1e-3)
    run(monkeypatch, "my.yaml", "--dry_run")
    out = capsys.readouterr().out
    assert "create_dataset.py: finished\n" in out
    changed = "init_model_mlm.py: finished with other settings (hidden_size: 32 -> 16); "
    assert f"{changed}the run stops here unless you pass --overwrite or name other folders\n" in out
    assert "pre_train.py: finished, but init_model_mlm makes again what it read; if that comes out different, th" in out
    assert "distil_dataset.py: to do\n" in out
    run(monkeypatch, "my.yaml", "--dry_run", "--overwrite")
    assert f"{changed}it is made again\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "own=own.txt",
            "own=fag.csv",
            "create_dataset: sources own=fag.csv: no such file or folder; looked at {}/fag.csv",
        ),
        ("own=own.txt", "'own=data/foo.parquet:text=a'", "looked at {}/data/foo.parquet"),
        (
            "path: big",
            "path: ./bgi",
            "create_dataset: tokenizer_name_or_path, init_model_mlm: teacher_name_or_path ./bgi: no such file",
        ),
        (
            "path: teacher",
            "path: my/models/teacher",
            "create_distil_dataset: teacher_name_or_path my/models/teacher: no",
        ),
        ("eval_datasets: []", "eval_datasets: [s.csv]", "distil_train: eval_datasets s.csv: no such file or folder"),
        ("eval_datasets: []", "eval_datasets: [hotpotqu]", "--eval_datasets hotpotqu: no such folder or file, and not"),
        ("eval_datasets: []", "eval_datasets: [pairs.csv]", "--eval_datasets pairs.csv: found columns ask, reply; exp"),
        (
            "_length: 64}",
            "_length: 64, eval_datasets: [heldout]}",
            "heldout: no source has queries with their documents; name another",
        ),
        ("own=own.txt", "'own=pairs.csv:query=aks,positive=reply'", "pairs.csv: no column 'aks'; found ask, reply"),
    ],
)
def test_what_is_not_there_or_has_other_columns_is_found_before_anything_starts(started, monkeypatch, old, new, said):
    Path("pairs.csv").write_text("ask,reply\nwho,me\n")
    assert old in RECIPE
    Path("my.yaml").write_text(RECIPE.replace(old, new))
    with pytest.raises(UserError) as error:
        run(monkeypatch, "my.yaml", "--dry_run")
    assert said.format(Path.cwd()) in str(error.value)
    assert not started


def test_what_the_recipe_writes_need_not_be_there_and_the_hub_is_said(started, monkeypatch, capsys):
    heldout = "eval_datasets: [data/corpus/sub/heldout]"
    Path("my.yaml").write_text(RECIPE.replace("eval_datasets: []", heldout).replace("own=own.txt", "own=my/texts"))
    run(monkeypatch, "my.yaml", "--dry_run")
    assert "reads   own=my/texts (not here, so from the Hugging Face hub), big, msmarco" in capsys.readouterr().out


KILLED = """
import threading
from pathlib import Path
from modernbert_small import pipeline
from modernbert_small.settings.sections import SECTIONS, Section

for _ in range(8):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
pipeline.ROOT = Path.cwd()
SECTIONS["pre_train"] = Section("phase.py", None)
pipeline.run_phase("pre_train", Path("recipe.yaml"))
"""
ITS_PHASE = """
import signal, time
from pathlib import Path
from modernbert_small.run.script import run_script

def main():
    signal.signal(signal.SIGTERM, lambda *_: Path("told").open("a").write("once "))
    Path("started").touch()
    while not Path("told").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    Path("saved").touch()

run_script(main)
"""


def test_a_killed_run_tells_its_phase_to_stop_once(tmp_path):
    (tmp_path / "phase.py").write_text(ITS_PHASE)
    running = subprocess.Popen([sys.executable, "-c", KILLED], cwd=tmp_path)
    for name in ("started", "saved"):
        end = time.monotonic() + 60
        while not (tmp_path / name).exists():
            assert time.monotonic() < end, name
            time.sleep(0.01)
        running.kill()
    running.wait()
    assert (tmp_path / "told").read_text() == "once "


def test_all_phases_or_those_from_one(started, monkeypatch):
    run(monkeypatch, "my.yaml")
    assert started == [*((section,) for section in SECTIONS), ("checkpoints/ModernBERT-small-v2", None)]
    started.clear()
    with pytest.raises(UserError, match=r"--train_file data/corpus: no such folder; .* phase 1 makes it: python "):
        run(monkeypatch, "my.yaml", "--from", "create_distil_dataset")
    for folder in ("data/corpus", "data/distil"):
        Path(folder).mkdir(parents=True)
    run(monkeypatch, "my.yaml", "--from", "create_distil_dataset", "--overwrite")
    assert started == [
        ("create_distil_dataset", "--overwrite"),
        ("distil_train", "--overwrite"),
        ("checkpoints/ModernBERT-small-v2", None),
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
