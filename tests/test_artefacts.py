"""Artefact folders: whole or not there, made once, never replaced unasked."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modernbert_small.run.artefacts import begin
from modernbert_small.run.content import content_hash, describe_shards
from modernbert_small.run.errors import UserError
from modernbert_small.run.records import read_run


def make(folder, text="made", settings=None, inputs=None, overwrite=False, phase="phase"):
    """A phase that writes one file."""
    run = begin(phase, str(folder), settings or {"seed": 1}, inputs or {}, overwrite)
    if run is not None:
        run.start()
        (run.folder / "out.txt").write_text(text)
        run.finish({"rows": 3})
    return run


def test_a_folder_has_its_name_when_it_is_whole(tmp_path):
    out = tmp_path / "a" / "out"
    run = begin("phase", str(out), {"seed": 1}, {})
    assert list(tmp_path.iterdir()) == []
    run.start()
    assert not out.exists()
    run.finish({"rows": 3, "nested": {"loss": [0.5]}})
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    record = read_run(out)
    assert record["rows"] == 3
    assert record["settings"] == {"seed": 1}
    assert {"python", "torch", "transformers"} <= set(record["versions"])
    assert record["wall_seconds"] >= 0


def test_the_same_again_does_nothing(tmp_path):
    make(tmp_path / "out")
    assert make(tmp_path / "out", "again") is None
    assert (tmp_path / "out" / "out.txt").read_text() == "made"


def test_overwrite_leaves_what_is_the_same(tmp_path):
    make(tmp_path / "out")
    assert make(tmp_path / "out", "again", overwrite=True) is None
    begin("phase", str(tmp_path / "half"), {"seed": 1}, {}).start()
    assert not begin("phase", str(tmp_path / "half"), {"seed": 1}, {}, overwrite=True).resumed, "nothing was saved yet"
    begin("phase", str(tmp_path / "half"), {"seed": 2}, {})  # so other settings are no conflict
    (tmp_path / "half.partial" / "checkpoint-1").mkdir()
    assert begin("phase", str(tmp_path / "half"), {"seed": 1}, {}, overwrite=True).resumed


def test_a_path_is_the_same_however_it_is_spelled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(Path("data"))
    make(Path("out"), settings={"train_file": "data"}, inputs={"corpus": "data"})
    assert make(Path("out"), settings={"train_file": "./data/"}, inputs={"corpus": str(tmp_path / "data")}) is None
    with pytest.raises(UserError, match="expected a folder with a name of its own"):
        begin("phase", ".", {}, {})


def test_what_only_shows_is_not_compared(tmp_path):
    make(tmp_path / "out", settings={"seed": 1, "logging_steps": 5})
    assert make(tmp_path / "out", settings={"seed": 1, "logging_steps": 50}) is None


@pytest.mark.parametrize("change", [{"settings": {"seed": 2}}, {"inputs": {"corpus": "some/hub-id"}}])
def test_other_settings_or_inputs_are_refused_until_overwrite(tmp_path, change):
    make(tmp_path / "out")
    with pytest.raises(UserError, match=r"seed: 1 -> 2|corpus: None -> .*some/hub-id.*--overwrite"):
        make(tmp_path / "out", "other", **change)
    assert (tmp_path / "out" / "out.txt").read_text() == "made"
    make(tmp_path / "out", "other", **change, overwrite=True)
    assert (tmp_path / "out" / "out.txt").read_text() == "other"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_changed_input_is_noticed(tmp_path):
    data = tmp_path / "data.txt"
    data.write_text("one")
    make(tmp_path / "out", inputs={"corpus": str(data)})
    assert make(tmp_path / "out", inputs={"corpus": str(data)}) is None
    data.write_text("two")
    with pytest.raises(UserError, match="corpus:"):
        make(tmp_path / "out", inputs={"corpus": str(data)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "train-00001-of-00002.parquet").unlink(), "missing: train-00001-of-00002.parquet"),
        (
            lambda folder: shutil.copy(folder / "train-00000-of-00002.parquet", folder / "train-9.parquet"),
            "not of this run: train-9.parquet",
        ),
        (
            lambda folder: shutil.copy(
                folder / "train-00000-of-00002.parquet", folder / "train-00001-of-00002.parquet"
            ),
            "changed: train-00001-of-00002.parquet",
        ),
    ],
)
def test_a_mix_of_two_runs_is_refused(tmp_path, change, said):
    data = tmp_path / "data"
    run = begin("create_dataset", str(data), {}, {})
    run.start()
    for index in range(2):
        pq.write_table(pa.table({"text": [f"text {index}"] * 3}), run.folder / f"train-0000{index}-of-00002.parquet")
    run.finish({"files": describe_shards(run.folder)})
    assert {name: file["rows"] for name, file in read_run(data)["files"].items()} == {
        "train-00000-of-00002.parquet": 3,
        "train-00001-of-00002.parquet": 3,
    }
    make(tmp_path / "out", inputs={"corpus": str(data)})
    change(data)
    with pytest.raises(UserError, match=said):
        begin("pre_train", str(tmp_path / "other"), {}, {"corpus": str(data)})
    assert not (tmp_path / "other.partial").exists()
    (data / "run.json").unlink()  # somebody's own files
    assert begin("pre_train", str(tmp_path / "other"), {}, {"corpus": str(data)}) is not None


def test_a_phase_for_one_process_refuses_two(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="create_dataset is work for one process, found 2; start it with python"):
        begin("create_dataset", str(tmp_path / "out"), {}, {}, one_process=True)


def test_foreign_files_are_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds files that no run made"):
        make(tmp_path / "out")
    with pytest.raises(UserError, match="is a file, expected a folder"):
        make(tmp_path / "out" / "thesis.tex")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_an_interrupted_run_goes_on_and_another_one_is_refused(tmp_path):
    first = begin("phase", str(tmp_path / "out"), {"seed": 1}, {})
    first.start()
    (first.folder / "shard").write_text("half the work")
    again = begin("phase", str(tmp_path / "out"), {"seed": 1}, {})
    assert again.resumed
    again.start()
    assert (again.folder / "shard").read_text() == "half the work"
    with pytest.raises(UserError, match="seed: 1 -> 2"):
        begin("phase", str(tmp_path / "out"), {"seed": 2}, {})
    fresh = begin("phase", str(tmp_path / "out"), {"seed": 2}, {}, overwrite=True)
    fresh.start()
    assert [path.name for path in fresh.folder.iterdir()] == ["run.json"]


def test_a_measurement_that_is_not_finite_is_refused(tmp_path):
    run = begin("phase", str(tmp_path / "out"), {}, {})
    run.start()
    with pytest.raises(ValueError, match=r"measurement history\[1\].loss is nan"):
        run.finish({"history": [{"loss": 1.0}, {"loss": float("nan")}]})
    assert not (tmp_path / "out").exists()


def test_a_run_file_that_is_not_ours_is_one_line(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json"):
        read_run(tmp_path)


def test_content_hash_sees_names_and_bytes_but_no_by_products(tmp_path):
    (tmp_path / "a").write_text("1")
    before = content_hash(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"wall_seconds": 1}))
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "state").write_text("x")
    assert content_hash(tmp_path) == before
    (tmp_path / "a").rename(tmp_path / "b")
    assert content_hash(tmp_path) != before
