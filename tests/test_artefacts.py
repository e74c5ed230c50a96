"""Artefact folders: whole or not there, made once, never replaced unasked."""

import json
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modernbert_small.run import artefacts, places
from modernbert_small.run.artefacts import begin, move_leftovers
from modernbert_small.run.content import content_hash, describe_shards
from modernbert_small.run.errors import UserError
from modernbert_small.run.records import read_run, write_json


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


def test_only_a_folder_of_this_phase_is_ever_replaced(tmp_path):
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh" / "id_rsa").write_text("key")
    with pytest.raises(UserError, match="holds files that no run made"):
        make(home, overwrite=True)
    make(tmp_path / "other", phase="another phase")
    with pytest.raises(UserError, match="was made by another phase, not by phase"):
        make(tmp_path / "other", overwrite=True)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("")
    with pytest.raises(UserError, match="nothing was touched"):
        make(tmp_path / "broken", overwrite=True)
    assert (home / ".ssh" / "id_rsa").read_text() == "key"


@pytest.mark.parametrize("name", ["out.partial", "out.replaced", "out.lock.d"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_neighbour_of_the_users_stays(tmp_path, name, overwrite):
    thesis = tmp_path / name / "sub" / "thesis.tex"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work")
    if name == "out.partial":
        with pytest.raises(UserError, match="holds files that no run made"):
            make(tmp_path / "out", overwrite=overwrite)
    else:
        make(tmp_path / "out", overwrite=overwrite)
        make(tmp_path / "out", settings={"seed": 2}, overwrite=True)
    assert thesis.read_text() == "years of work"


def test_an_empty_record_costs_no_checkpoints(tmp_path):
    first = begin("phase", str(tmp_path / "out"), {"seed": 1}, {})
    first.start()
    (first.folder / "checkpoint-1").mkdir()
    (first.folder / "run.json").write_text("")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="nothing was touched"):
            begin("phase", str(tmp_path / "out"), {"seed": 1}, {}, overwrite)
    assert (first.folder / "checkpoint-1").is_dir()


@pytest.mark.parametrize(
    ("output", "given"), [("data", "data"), ("data", "data/sub"), ("data/sub", "data"), ("data/../data", "data/")]
)
def test_an_output_that_overlaps_with_an_input_is_refused(tmp_path, monkeypatch, output, given):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "sub").mkdir(parents=True)
    with pytest.raises(UserError, match="overlaps with the input corpus"):
        begin("phase", output, {}, {"corpus": given}, True)


LIVING = """
import sys, time
from modernbert_small.run import artefacts, places
from modernbert_small.run.artefacts import begin
run = begin("phase", sys.argv[1], {"seed": 1}, {})
run.start()
print("started", flush=True)
time.sleep(60)
"""


def test_a_second_run_is_refused_and_a_dead_ones_lock_is_taken_over(tmp_path):
    command = [sys.executable, "-c", LIVING, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "started\n"
        with pytest.raises(UserError, match=rf"process {first.pid} on .* is writing this folder"):
            begin("phase", str(tmp_path / "out"), {"seed": 1}, {})
        first.kill()
        first.wait()
    make(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_that_was_overtaken_changes_nothing(tmp_path):
    late = begin("phase", str(tmp_path / "out"), {"seed": 2}, {})
    make(tmp_path / "out")
    with pytest.raises(UserError, match="was written by another run meanwhile"):
        late.start()
    assert read_run(tmp_path / "out")["settings"] == {"seed": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_runs_work_in_progress_is_not_taken_for_a_strangers(tmp_path, monkeypatch):
    """The other one starts, or starts and finishes, while this one looks."""

    def begin_other():
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial" / ".run.json.tmp").touch()
        (tmp_path / "out.lock").write_text(f"{os.getppid()}\n{socket.gethostname()}\n")
        return {}

    monkeypatch.setattr(artefacts, "versions", begin_other)
    with pytest.raises(UserError, match=rf"process {os.getppid()} on .* is writing this folder"):
        begin("phase", str(tmp_path / "out"), {"seed": 1}, {})

    def finish_other(folder):
        monkeypatch.undo()
        make(tmp_path / "other")
        return places.own_entries(folder)

    monkeypatch.undo()
    monkeypatch.setattr(artefacts, "own_entries", finish_other)
    with pytest.raises(UserError, match="was written by another run meanwhile; try again"):
        begin("phase", str(tmp_path / "other"), {"seed": 2}, {})


def test_a_lock_is_on_the_disk_before_the_work_begins(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(places, "sync_file", lambda path: synced.append(path.read_text().split()[0]))
    begin("phase", str(tmp_path / "out"), {"seed": 1}, {}).start()
    assert synced == [str(os.getpid())]


def test_a_lock_that_another_run_takes_at_once_stays(tmp_path, monkeypatch):
    run = begin("phase", str(tmp_path / "out"), {"seed": 1}, {})
    run.start()
    release, others = run._lock._lock.release, f"{os.getppid()}\n{socket.gethostname()}\n"

    def release_and_lose():
        release()
        (tmp_path / "out.lock").write_text(others)

    monkeypatch.setattr(run._lock._lock, "release", release_and_lose)
    run.finish({})
    assert (tmp_path / "out.lock").read_text() == others


def test_an_empty_lock_is_waited_for_and_then_taken_over(tmp_path, monkeypatch):
    """Its process is about to write its record, or was killed before it did."""
    lock = tmp_path / "out.lock"
    lock.touch()
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        lock.write_text(f"{os.getppid()}\n{socket.gethostname()}\n")

    monkeypatch.setattr("time.sleep", sleep)
    with pytest.raises(UserError, match=rf"process {os.getppid()} on .* is writing this folder"):
        begin("phase", str(tmp_path / "out"), {"seed": 1}, {})
    assert len(waited) == 1
    monkeypatch.undo()
    lock.write_text("")
    monkeypatch.setattr(places, "_RECORD_SECONDS", 3)
    make(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_killed_while_it_wrote_its_record_leaves_nothing_in_the_way(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / ".run.json.a1b2c3d4").touch()
    run = begin("phase", str(tmp_path / "out"), {"seed": 1}, {})
    run.start()
    (run.folder / "shard").touch()
    (run.folder / ".run.json.a1b2c3d4").touch()
    make(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["out.txt", "run.json", "shard"]


def test_the_record_of_a_folder_is_removed_last(tmp_path, monkeypatch):
    """So that a kill leaves nothing that would be taken for a stranger's files."""
    make(tmp_path / "out")
    make(tmp_path / "out", settings={"seed": 2}, overwrite=True)
    run = begin("phase", str(tmp_path / "half"), {"seed": 1}, {})
    run.start()
    for name in ("a", "z"):
        (run.folder / name).mkdir()
        (run.folder / name / "shard").touch()
    removed, unlink = [], os.unlink
    monkeypatch.setattr("os.unlink", lambda path, **place: (removed.append(Path(path).name), unlink(path, **place)))
    make(tmp_path / "out", settings={"seed": 3}, overwrite=True)
    begin("phase", str(tmp_path / "half"), {"seed": 2}, {}, overwrite=True).start()
    removed = [name for name in removed if not name.endswith(".lock")]
    assert removed == ["out.txt", "run.json", "shard", "shard", "run.json"]


def test_an_old_artefact_is_removed_when_the_new_names_are_on_the_disk(tmp_path, monkeypatch):
    make(tmp_path / "out")
    seen, sync = [], places.sync_folder

    def synced(folder):
        seen.append((tmp_path / "out.partial" / "out.txt").exists() and (tmp_path / "out" / "out.txt").read_text())
        sync(folder)

    monkeypatch.setattr(places, "sync_folder", synced)
    make(tmp_path / "out", "other", settings={"seed": 2}, overwrite=True)
    assert seen[0] == "other"


def test_a_link_to_a_folder_stands_for_it_and_a_dangling_one_is_refused(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    make(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "out.txt").read_text() == "made"
    assert make(tmp_path / "out") is None
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is a link to .*nowhere, which is not there"):
        make(tmp_path / "lost")


def test_a_mount_point_is_written_from_inside(tmp_path, monkeypatch):
    mount = tmp_path / "mount"
    (mount / "lost+found").mkdir(parents=True)
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == mount)
    first = begin("phase", str(mount), {"seed": 1}, {})
    first.start()
    (first.folder / "shard").write_text("half the work")
    assert begin("phase", str(mount), {"seed": 1}, {}).resumed
    make(mount)
    assert sorted(path.name for path in mount.iterdir()) == ["lost+found", "out.txt", "run.json", "shard"]
    assert make(mount) is None
    make(mount, "other", settings={"seed": 2}, overwrite=True)
    assert sorted(path.name for path in mount.iterdir()) == ["lost+found", "out.txt", "run.json"]
    assert (mount / "out.txt").read_text() == "other"


@pytest.mark.parametrize("moves", range(7))
def test_a_kill_while_a_mount_points_files_are_moved_loses_nothing(tmp_path, monkeypatch, moves):
    """Of an artefact that replaces another one, and of one that is repaired: the same command goes on."""
    mount = tmp_path / "mount"
    mount.mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == mount)
    make(mount)
    left = moves

    def counted(move):
        def moved(*args):
            nonlocal left
            counts = args[0].is_relative_to(mount) and ".lock" not in args[0].name
            left -= counts
            if counts and left < 0:
                raise KeyboardInterrupt
            return move(*args)

        return moved

    with monkeypatch.context() as killed:
        for name in ("rename", "unlink"):
            killed.setattr(Path, name, counted(getattr(Path, name)))
        with suppress(KeyboardInterrupt):
            make(mount, "other", settings={"seed": 2}, overwrite=True)
    make(mount, "other", settings={"seed": 2}, overwrite=True)
    assert {path.name: path.read_text() for path in mount.iterdir() if path.suffix == ".txt"} == {"out.txt": "other"}
    (mount / "out.txt").write_text("damaged")
    left = moves
    with monkeypatch.context() as killed:
        killed.setattr(Path, "rename", counted(Path.rename))
        with suppress(KeyboardInterrupt):
            make(mount, "repaired", settings={"seed": 2}, overwrite=True)
    make(mount, "repaired", settings={"seed": 2}, overwrite=True)
    assert (mount / "out.txt").read_text() == "repaired"
    assert make(mount, settings={"seed": 2}) is None


def test_without_an_exchange_of_names_the_old_artefact_is_moved_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "_exchange", lambda first, second: False)
    make(tmp_path / "out")
    make(tmp_path / "out", "other", settings={"seed": 2}, overwrite=True)
    assert (tmp_path / "out" / "out.txt").read_text() == "other"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "damage", [lambda file: file.write_text(""), lambda file: file.write_text("mude"), lambda file: file.unlink()]
)
def test_damaged_outputs_are_named_and_made_again(tmp_path, damage):
    run = make(tmp_path / "out")
    assert run is not None
    (tmp_path / "out" / "checkpoint-1").mkdir()
    damage(tmp_path / "out" / "out.txt")
    with pytest.raises(UserError, match=r"missing or changed since they were made \(out.txt\).*--overwrite"):
        make(tmp_path / "out")
    with pytest.raises(UserError, match=r"missing or changed since they were made \(out.txt\)"):
        begin("phase", str(tmp_path / "next"), {}, {"model": str(tmp_path / "out")})
    again = begin("phase", str(tmp_path / "out"), {"seed": 1}, {}, overwrite=True)
    again.start()
    assert not (again.folder / "out.txt").exists()
    assert (again.folder / "checkpoint-1").is_dir(), "what is whole stays"
    (again.folder / "out.txt").write_text("made")
    again.finish({"rows": 3})
    assert make(tmp_path / "out") is None


def test_many_writers_of_one_file_do_not_meet(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write_json(tmp_path / "run.json", {"number": number}), range(160)))
    assert read_run(tmp_path)["number"] in range(160)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").stat().st_mode & 0o444 == 0o444, "readable by others"


def test_a_run_that_goes_on_says_what_it_ran_with(tmp_path, monkeypatch):
    first = begin("phase", str(tmp_path / "out"), {"seed": 1}, {})
    first.start()
    (first.folder / "shard").touch()
    monkeypatch.setattr(artefacts, "versions", lambda: {"torch": "99"})
    again = begin("phase", str(tmp_path / "out"), {"seed": 1}, {})
    again.start()
    again.note_checkpoint(40)
    assert read_run(again.folder)["sessions"][1]["from_step"] == 40, "it is recorded before this session ends"
    sessions = again.finish({})["sessions"]
    assert [one["from_step"] for one in sessions] == [None, 40]
    assert [one["versions"]["torch"] == "99" for one in sessions] == [False, True]


def test_an_input_that_changes_while_it_is_read_is_recorded(tmp_path, caplog):
    data = tmp_path / "data.txt"
    data.write_text("one")
    run = begin("phase", str(tmp_path / "out"), {"seed": 1}, {"corpus": str(data)})
    run.start()
    data.write_text("another")
    assert run.finish({})["inputs_changed"] == ["corpus"]
    assert "it may have read a mix: corpus" in caplog.text


def finish_training(folder, step, **options):
    """A run with a checkpoint of a step and a log, which are set aside."""
    run = begin("phase", str(folder), options.pop("settings", {"seed": 1}), {}, **options)
    run.aside = ("checkpoint-*", "runs")
    run.start()
    kept = sorted(path.name for path in run.folder.glob("checkpoint-*"))
    for name in (f"checkpoint-{step}", "runs"):
        (run.folder / name).mkdir(exist_ok=True)
        (run.folder / name / "file").write_text(str(step))
    (run.folder / "model").write_text(str(step))
    run.finish({})
    return kept


def test_what_only_training_needs_ends_beside_the_finished_folder(tmp_path):
    out, training = tmp_path / "out", tmp_path / "out.training"
    finish_training(out, 5)
    assert sorted(path.name for path in out.iterdir()) == ["model", "run.json"]
    assert sorted(path.name for path in training.iterdir()) == ["checkpoint-5", "run.json", "runs"]
    assert begin("phase", str(out), {"seed": 1}, {}) is None
    (out / "model").unlink()  # it is made again from its checkpoint
    assert finish_training(out, 6, overwrite=True) == ["checkpoint-5"]
    assert sorted(path.name for path in training.iterdir()) == ["checkpoint-5", "checkpoint-6", "run.json", "runs"]
    assert finish_training(out, 2, settings={"seed": 2}, overwrite=True) == [], "a new run begins without old ones"
    assert sorted(path.name for path in training.iterdir()) == ["checkpoint-2", "run.json", "runs"]


@pytest.mark.parametrize("killed", ["before", "meanwhile", "with a stranger's files there"])
def test_what_a_kill_leaves_in_the_finished_folder_is_moved_later(tmp_path, killed):
    out, training = tmp_path / "out", tmp_path / "out.training"
    finish_training(out, 5)
    (training / "runs").rename(out / "runs")
    if killed != "meanwhile":
        (training / "checkpoint-5").rename(out / "checkpoint-5")
        (training / "run.json").unlink()
    if killed.endswith("there"):
        (training / "notes").write_text("mine")
    move_leftovers("phase", str(out), ("checkpoint-*", "runs"))
    if killed.endswith("there"):
        assert [path.name for path in training.iterdir()] == ["notes"]
        assert sorted(path.name for path in out.iterdir()) == ["checkpoint-5", "model", "run.json", "runs"]
    else:
        assert sorted(path.name for path in training.iterdir()) == ["checkpoint-5", "run.json", "runs"]
        assert sorted(path.name for path in out.iterdir()) == ["model", "run.json"]
        assert (training / "run.json").read_bytes() == (out / "run.json").read_bytes()
    assert begin("phase", str(out), {"seed": 1}, {}) is None


def test_another_runs_checkpoints_are_not_brought_back(tmp_path):
    finish_training(tmp_path / "out", 5)
    finish_training(tmp_path / "other", 7)
    shutil.rmtree(tmp_path / "out.training")
    (tmp_path / "other.training").rename(tmp_path / "out.training")
    (tmp_path / "out" / "model").unlink()
    record = json.loads((tmp_path / "out.training" / "run.json").read_text()) | {"started": "earlier"}
    (tmp_path / "out.training" / "run.json").write_text(json.dumps(record))
    assert finish_training(tmp_path / "out", 6, overwrite=True) == []


def test_a_strangers_folder_is_not_taken_for_checkpoints(tmp_path):
    (tmp_path / "out.training").mkdir()
    (tmp_path / "out.training" / "notes").write_text("mine")
    with pytest.raises(UserError, match=r"out.training holds files that no run made"):
        finish_training(tmp_path / "out", 5)
    assert (tmp_path / "out.training" / "notes").read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_finished_files_can_be_read_by_others(tmp_path):
    run = begin("phase", str(tmp_path / "out"), {"seed": 1}, {})
    run.start()
    (run.folder / "model.safetensors").touch(mode=0o600)
    (run.folder / "tool").touch(mode=0o700)
    mask = os.umask(0o027)
    try:
        run.finish({})
    finally:
        os.umask(mask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes["model.safetensors"] == 0o640
    assert modes["tool"] == 0o740
