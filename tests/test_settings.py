"""Settings: default < recipe < command line, and how a script ends."""

import dataclasses
import errno
import logging
import os
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import ROOT, SCRIPTS, load_script, run_in_process
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from modernbert_small.corpus.sources import source_locations
from modernbert_small.run.errors import UserError
from modernbert_small.run.readers import READERS
from modernbert_small.run.script import next_command, run_script
from modernbert_small.run.tables import aligned, markdown_table
from modernbert_small.settings.parse import check_command_line, parse_settings, require_inputs
from modernbert_small.settings.parser import declared_settings
from modernbert_small.settings.pre_train import PreTrainSettings
from modernbert_small.settings.recipe import read_recipe
from modernbert_small.settings.sections import SECTIONS, Section
from modernbert_small.settings.whole import full_recipe, missing_paths

CLASSES = dict(
    zip(
        SECTIONS,
        (
            "CreateDatasetArguments",
            "InitModelArguments",
            "PreTrainArguments",
            "DistilDatasetArguments",
            "DistilTrainArguments",
        ),
        strict=True,
    )
)


@dataclass
class Toy(PreTrainSettings):
    """Settings of no script."""

    names: list[str] = field(default_factory=lambda: ["a"])
    seed: int = 42

    def problems(self):
        return [*([] if self.seed >= 0 else [f"seed: {self.seed}, expected 0 or more"]), *super().problems()]


@pytest.fixture
def toy(monkeypatch):
    """Toy in the place of phase 3's settings."""
    monkeypatch.setitem(SECTIONS, "pre_train", Section("mlm/pre_train.py", Toy))


@pytest.fixture
def handler():
    """run_script installs signal handlers; put the earlier ones back."""
    earlier = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, installed in earlier.items():
        signal.signal(number, installed)


def parse(*argv):
    return parse_settings(Toy, "pre_train", "A toy.", list(argv))


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_a_recipe_can_empty_a_list(toy, tmp_path):
    (tmp_path / "recipe.yaml").write_text("pre_train:\n  names: []\n")
    recipe = ["--config", str(tmp_path / "recipe.yaml")]
    assert parse_settings(Toy, "pre_train", None, recipe).names == []
    assert parse_settings(Toy, "pre_train", None, [*recipe, "--names", "b"]).names == ["b"]


def test_a_recipe_can_say_none_where_none_is_a_value(tmp_path):
    arguments = load_script("distil_train.py").DistilTrainArguments
    found = parse_settings(
        arguments, "distil_train", None, ["--config", recipe(tmp_path, "distil_train: {save_total_limit: null}")]
    )
    assert found.save_total_limit is None
    with pytest.raises(UserError, match="learning_rate has no value; leave the line out"):
        parse_settings(
            arguments, "distil_train", None, ["--config", recipe(tmp_path, "distil_train: {learning_rate: null}")]
        )


def test_the_best_checkpoint_by_loss_has_the_least():
    arguments = load_script("distil_train.py").DistilTrainArguments
    for metric, greater in (("eval_similarity", True), ("eval_loss", False)):
        found = parse_settings(arguments, "distil_train", None, ["--metric_for_best_model", metric])
        assert found.greater_is_better is greater


def test_command_line_beats_recipe_beats_default(toy, tmp_path):
    path = recipe(
        tmp_path, "pre_train:\n  seed: 1\n  learning_rate: 5e-4\n  names: [x, y]\ncreate_dataset: {seed: 9}\n"
    )
    assert parse() == Toy()
    assert parse("--config", path) == Toy(names=["x", "y"], learning_rate=5e-4, seed=1)
    assert parse(f"--config={path}", "--seed", "2", "--names", "z") == Toy(names=["z"], learning_rate=5e-4, seed=2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pre_train: {sed: 1}", "pre_train: unknown key 'sed'; did you mean 'seed'?"),
        ("pre_train: {config: other.yaml}", "unknown key 'config'"),
        ("pre_train: {seed: many}", "recipe.yaml: pre_train: seed: invalid int value: 'many'"),
        ("pretrain: {seed: 1}", "unknown section 'pretrain'; sections are create_dataset,"),
        ("pre_train: 3", "pre_train: expected `key: value` lines, found 3"),
        ("- 1", "expected sections create_dataset,"),
        ("a: [", "not YAML"),
        (
            "pre_train:\n  seed: 1\n  names: [a]\n  seed: 2",
            "line 4: seed is here a second time; expected each key once",
        ),
        ("pre_train: {seed: 1}\npre_train: {names: [a]}", "line 2: pre_train is here a second time"),
        ("pre_train: {[1]: 2}", "not YAML"),
        (
            "init_model_mlm: {hidden_size: 256}\ncreate_distil_dataset: {embedding_dim: 384}",
            "init_model_mlm has hidden_size 256, and create_distil_dataset has embedding_dim 384; expected the same",
        ),
        (
            "pre_train: {seed: -1, learning_rate: 0}",
            "seed: -1, expected 0 or more; pre_train: learning_rate: 0.0",
        ),
    ],
)
def test_a_bad_recipe_is_one_line_that_names_the_key(toy, tmp_path, text, said):
    with pytest.raises(UserError) as error:
        parse("--config", recipe(tmp_path, text))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "init_model_mlm: {num_layers: 6}",
            "init_model_mlm: unknown key 'num_layers'; did you mean 'num_hidden_la",
        ),
        ("pre_train: {max_steps: sixty}", "pre_train: max_steps: invalid int value: 'sixty'"),
        ("distil_train: {max_grad_norm: much}", "distil_train: max_grad_norm: invalid float value: 'much'"),
        (
            "distil_train: {router_maping: x}",
            "distil_train: unknown key 'router_maping'; did you mean 'router_map",
        ),
        (
            "pre_train: {per_device_train_batch_size: 8}",
            "pre_train: per_device_train_batch_size: batches are",
        ),
        ("distil_train: {eval_strategy: often}", "distil_train: eval_strategy: invalid choice: 'often'"),
        (
            "create_dataset: {seed: -1}\ndistil_train: {learning_rate: 0}",
            "create_dataset: seed: -1; use at least 0; di",
        ),
        (
            "init_model_mlm: {hidden_size: 128, num_attention_heads: 2}",
            "init_model_mlm has hidden_size 128, and create_distil_dataset has embedding_dim 384, the default; expe",
        ),
        (
            "init_model_mlm: {max_position_embeddings: 512}\npre_train: {max_seq_length: 256}",
            "distil_train has max_seq_length 1024, the default, but init_model_mlm has max_position_embeddings 512;",
        ),
        (
            "create_dataset: {output_dir: mine/corpus}\npre_train: {train_file: mine/corpus/}",
            "init_model_mlm: train_file is data/corpus, the default, but create_dataset writes mine/corpus; add "
            "train_file: mine/corpus; create_distil_dataset: train_file is data/corpus",
        ),
        (
            "pre_train: {seed: 1}\ndistil_train: {model_name_or_path: checkpoints/mml}",
            "distil_train: model_name_or_path is checkpoints/mml, which is not there, but pre_train writes check",
        ),
    ],
)
@pytest.mark.parametrize("section", ["create_dataset", "create_distil_dataset"])
def test_every_script_checks_every_section(tmp_path, section, text, said):
    """The classes of phases 1 and 4 know nothing of the Trainer."""
    with pytest.raises(UserError) as error:
        parse_settings(SECTIONS[section].settings, section, None, ["--config", recipe(tmp_path, text)])
    assert f"recipe.yaml: {said}" in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "distil_train: {model_name_or_path: answerdotai/ModernBERT-base}",  # no phase of this recipe makes a student
        "create_dataset: {seed: 1}\npre_train: {train_file: .}",  # another corpus, which is there
        # nothing of phase 3 has to agree where it is left out
        "init_model_mlm: {output_dir: a, max_position_embeddings: 512}\n"
        "distil_train: {model_name_or_path: a, max_seq_length: 512, start: static}",
        "distil_train: {seed: 3, prompts: a}",  # the seed is the Trainer's, prompts are sentence-transformers'
    ],
)
def test_a_recipe_may_read_what_no_phase_writes(tmp_path, text):
    assert list(full_recipe(Path(recipe(tmp_path, text)))) == list(SECTIONS)


def test_help_and_mistakes_wait_for_no_library(tmp_path):
    """What a script does before its slow imports, in a process that has none of them."""
    code = """
import sys
from modernbert_small.settings.parse import check_command_line

for section in sys.argv.pop().split():
    try:
        check_command_line(section, "A script.")
    except SystemExit as end:
        print(section, end.code, {"torch", "transformers", "datasets", "pandas", "scipy"} & set(sys.modules))
"""
    mistake = ["--config", recipe(tmp_path, "init_model_mlm: {num_layers: 6}")]
    for flags, status, said in ((["--help"], 0, "A script."), (mistake, 2, "unknown key 'num_layers'")):
        words = [sys.executable, "-c", code, *flags, " ".join(SECTIONS)]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith(tuple(SECTIONS))]
        assert lines == [f"{section} {status} set()" for section in SECTIONS], done.stderr
        assert (done.stdout + done.stderr).count(said) == len(SECTIONS)


def test_what_is_missing_names_the_phase_and_command_that_make_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["distil_train.py", "--config", recipe(tmp_path, "distil_train: {seed: 1}")])
    args = SECTIONS["distil_train"].settings()
    with pytest.raises(UserError) as error:
        require_inputs("distil_train", args)
    assert str(error.value).split("; --")[0] == (
        f"--model_name_or_path checkpoints/mlm: no such folder; looked at {tmp_path}/checkpoints/mlm; phase 3 makes "
        f"it: python {ROOT}/mlm/pre_train.py --config {tmp_path}/recipe.yaml"
    )
    args.model_name_or_path = "some/encoder"  # perhaps the hub's
    args.train_file = "labels"
    args.teacher_name_or_path = str(tmp_path)
    with pytest.raises(UserError, match=rf"--train_file labels: .* phase 4 makes it: python {ROOT}/create_distil_da"):
        require_inputs("distil_train", args)


@pytest.mark.parametrize(
    ("section", "flags", "said"),
    [
        (
            "init_model_mlm",
            ["--hidden_size", "128", "--num_attention_heads", "2"],
            "hidden_size 128, by its flag, and cr",
        ),
        ("create_distil_dataset", ["--embedding_dim=128"], "embedding_dim 128, by its flag; expected the same"),
        (
            "distil_train",
            ["--max_seq_length", "2048"],
            "max_seq_length 2048, by its flag, but init_model_mlm has max_p",
        ),
    ],
)
def test_sections_must_agree_with_the_flags_in_place(tmp_path, section, flags, said):
    text = "init_model_mlm: {hidden_size: 192, num_attention_heads: 3}\ncreate_distil_dataset: {embedding_dim: 192}"
    config = ["--config", recipe(tmp_path, text)]
    parse_settings(SECTIONS[section].settings, section, None, [*config, "--output_dir", "elsewhere"])
    with pytest.raises(UserError) as error:
        parse_settings(SECTIONS[section].settings, section, None, [*config, *flags])
    assert said in str(error.value)


def test_a_flag_may_put_right_what_does_not_agree(tmp_path):
    config = ["--config", recipe(tmp_path, "init_model_mlm: {hidden_size: 128, num_attention_heads: 5}")]
    flags = ["--hidden_size", "384", "--num_attention_heads", "6"]
    own = SECTIONS["init_model_mlm"].settings
    assert parse_settings(own, "init_model_mlm", None, [*config, *flags]).hidden_size == 384


@pytest.mark.parametrize("name", [f"some.{known[1:]}" for known in READERS] + ["~x/y", "./x", "/x", "a/b/c", "texts"])
def test_what_looks_like_a_path_must_be_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    phase_1 = {"create_dataset": {"sources": [f"own={name}:text=a"], "eval_datasets": ["msmarco"], "output_dir": "c"}}
    (problem,) = missing_paths(phase_1, ["create_dataset"])
    assert problem.startswith(f"create_dataset: sources own={name}:text=a: no such file or folder; looked at ")
    for maybe in ("org/name", "org/name.v2"):
        phase_1["create_dataset"]["sources"] = [f"own={maybe}", "npr"]
        assert missing_paths(phase_1, ["create_dataset"]) == []


def test_a_script_names_what_is_missing_of_its_own_section(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = recipe(tmp_path, "create_dataset: {sources: [own=a.csv]}\ninit_model_mlm: {teacher_name_or_path: ./big}")
    for section, said in (
        ("create_dataset", f"error: --sources own=a.csv: no such file or folder; looked at {tmp_path}/a.csv; check"),
        ("init_model_mlm", f"error: --teacher_name_or_path ./big: no such file or folder; looked at {tmp_path}/big;"),
    ):
        monkeypatch.setattr(sys, "argv", ["script.py", "--config", config])
        with pytest.raises(SystemExit):
            check_command_line(section, None)
        assert capsys.readouterr().err.startswith(said)


def test_the_next_command_is_right_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["create_dataset.py"])
    monkeypatch.chdir(ROOT)
    assert next_command("mlm/pre_train.py") == "python mlm/pre_train.py"
    monkeypatch.chdir(tmp_path)
    assert next_command("mlm/pre_train.py") == f"python {ROOT}/mlm/pre_train.py"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--sed", "1"], "unknown setting '--sed'; did you mean 'seed'?"),
        (["--see", "1"], "unknown setting '--see'"),
        (["--hub_tokn=hf_secret"], "unknown setting '--hub_tokn'"),
        (["--seed"], "expected one argument"),
        (["--config"], "--config"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: No such file"),
    ],
)
def test_a_bad_flag_is_one_line(flags, said):
    with pytest.raises(UserError) as error:
        parse(*flags)
    assert said in str(error.value)
    assert "hf_secret" not in str(error.value)


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (UserError("found 3, expected 4"), 2, "error: found 3, expected 4\n"),
        (KeyboardInterrupt(), 130, "stopped; go on with: python"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 1, "No space left on device: x; free some space"),
        (torch.OutOfMemoryError("CUDA out of memory."), 1, "out of memory (CUDA out of memory.); smaller batches need"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 1, "halve --tokens_per_batch"),
        (None, 0, ""),
    ],
)
def test_exit_status(raised, status, said, capsys, handler):
    def main():
        if raised:
            raise raised

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert stop.value.code == status
    assert said in capsys.readouterr().err


WRITERS = {
    "a file": lambda path: path.write_bytes(bytes(5000)),
    "parquet": lambda path: pq.write_table(pa.table({"x": np.random.default_rng(0).random(5000)}), path),
    "safetensors": lambda path: save_file({"x": torch.zeros(5000)}, path),
    "torch.save": lambda path: torch.save({"x": torch.zeros(5000)}, path),
    "numpy": lambda path: np.save(path, np.zeros(5000)),
    "a tokenizer": lambda path: Tokenizer(models.WordLevel({str(i): i for i in range(999)}, unk_token="0")).save(
        str(path)
    ),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_one_line(write, tmp_path, capsys, handler):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(SystemExit) as stop:
            run_script(lambda: write(tmp_path / "out.npy"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "free some space, then go on with: python " in line


@pytest.mark.parametrize("flag", [["--hub_token", "hf_secret"], ["--hub_token=hf_secret"]])
def test_the_command_to_go_on_with_holds_no_token(flag, capsys, handler, monkeypatch):
    def main():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["script.py", *flag, "--seed", "1"])
    with pytest.raises(SystemExit):
        run_script(main)
    said = capsys.readouterr().err
    assert "hf_secret" not in said
    assert said.replace("=", " ").endswith("script.py --hub_token $HF_TOKEN --seed 1\n")


def test_control_characters_do_not_reach_the_terminal(tmp_path, capsys):
    name = "own\x1b[2J\n\u202e.jsonl"
    (tmp_path / name).write_text('{"col\\u001b[31mumn": 1}')
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.jsonl").write_text('{"text": "a"}')
    (tmp_path / "folder" / "b.\x1b[31m\x9b").touch()
    for source, shown in (
        (name, "error: own\\x1b[2J\\n\\u202e.jsonl: found columns col\\x1b[31mumn;"),
        ("folder", "1 file of other kinds not read: .\\x1b[31m\\x9b"),
    ):
        flags = ["--sources", f"own={source}", "--tokenizer_name_or_path", "nowhere"]
        said = run_in_process(SCRIPTS[0], tmp_path, capsys, *flags).stderr
        assert shown in said
        assert not {"\x1b", "\x9b", "\u202e"} & set(said)


def test_tables_hold_no_control_characters():
    rows = [["set", "score"], ["\x1b[31mred\x07", "1\n2"]]
    assert aligned(rows) == "set              score\n\\x1b[31mred\\x07   1\\n2"
    assert markdown_table(rows).splitlines()[-1] == "| \\x1b[31mred\\x07 | 1\\n2 |"


@pytest.mark.parametrize("given", ["recipe", "flag"])
def test_the_home_folder_is_found_without_a_shell(toy, tmp_path, monkeypatch, given):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "recipe.yaml").write_text("pre_train: {names: [~/a, b~]}")
    flags = {"recipe": ["--config=~/recipe.yaml"], "flag": ["--names", "~/a", "b~"]}[given]
    assert parse(*flags).names == [str(tmp_path / "home" / "a"), "b~"]


def test_a_source_in_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert source_locations(["own=~/texts"]) == {"own": str(tmp_path / "texts")}


def test_sigterm_ends_with_143(capsys, handler):
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert stop.value.code == 143
    assert "go on with" in capsys.readouterr().err


def test_a_defect_keeps_its_traceback(handler):
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_each_script(script, tmp_path, capsys):
    result = run_in_process(script, tmp_path, capsys, "--help")
    assert result.returncode == 0, result.stderr
    assert "--config RECIPE.yaml" in result.stdout
    assert "--overwrite" in result.stdout
    assert "python " + script in result.stdout
    assert "--per_device_train_batch_size" not in result.stdout, "inherited settings are a link"
    assert "SUPPRESS" not in result.stdout
    assert "<lambda>" not in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_impossible_value_ends_with_2_and_one_line(script, tmp_path, capsys):
    result = run_in_process(script, tmp_path, capsys, "--seed", "many")
    assert result.returncode == 2
    assert result.stderr == "error: argument --seed: invalid int value: 'many' (see --help)\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda path: path.name)
@pytest.mark.parametrize(("section", "script"), list(zip(SECTIONS, SCRIPTS, strict=True)))
def test_every_recipe_parses(path, section, script):
    arguments = getattr(load_script(script), CLASSES[section])
    assert parse_settings(arguments, section, None, ["--config", str(path)])


@pytest.mark.parametrize(("section", "script"), list(zip(SECTIONS, SCRIPTS, strict=True)))
def test_v2_is_the_defaults_and_names_each_setting(section, script):
    arguments = getattr(load_script(script), CLASSES[section])
    path = ROOT / "recipes" / "v2.yaml"
    own = set(declared_settings(arguments)) - {"overwrite", "trust_remote_code"}
    assert set(read_recipe(path)[section]) == own
    settings = [parse_settings(arguments, section, None, argv) for argv in ([], ["--config", str(path)])]
    default, from_recipe = (
        {f.name: getattr(s, f.name) for f in dataclasses.fields(s) if f.name != "logging_dir"} for s in settings
    )
    if section == "create_distil_dataset":  # sets to show the ceiling on need a hub or a path
        assert (default.pop("eval_datasets"), from_recipe.pop("eval_datasets")) == ([], ["msmarco", "hotpotqa"])
    assert default == from_recipe


def test_the_traceback_behind_an_error_is_kept_for_who_asks(tmp_path, capsys, caplog):
    flags = ["--teacher_name_or_path", "nowhere/model"]
    logging.getLogger("modernbert_small").setLevel(logging.NOTSET)
    quiet = run_in_process(SCRIPTS[1], tmp_path, capsys, *flags)
    assert quiet.returncode == 2
    assert "Traceback" not in quiet.stderr
    try:
        debug = run_in_process(SCRIPTS[1], tmp_path, capsys, *flags, "--log_level", "debug")
    finally:
        logging.getLogger("modernbert_small").setLevel(logging.NOTSET)
    assert debug.returncode == 2
    assert "Traceback" in debug.stderr
    assert quiet.stderr.splitlines()[-1] == debug.stderr.splitlines()[-1]
