"""What is published was synced before, and a folder that does not agree with its manifest is recognised."""

import os
from pathlib import Path

import pytest

from modernbert_small.run import durable
from modernbert_small.run.durable import publish
from modernbert_small.run.manifest import MANIFEST, damage, write_manifest

WAYS = ("truncate", "zero", "delete")


def spoil(path, how):
    """Damage a file as a power cut or a failing disk does.

    It gets a later time of change. Within one tick of the clock it would keep its old one, and not be hashed again.
    """
    status = path.stat()
    if how == "delete":
        path.unlink()
        return
    if how == "truncate":
        os.truncate(path, status.st_size // 2)
    if how == "zero":
        path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


def contents(folder):
    """All files below a folder, with their bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def events(monkeypatch):
    """What is synced and renamed, in order."""
    seen = []
    sync, replace = durable.sync_file, os.replace

    def synced(path):
        seen.append(("sync", Path(path)))
        sync(path)

    def replaced(before, after):
        seen.append(("rename", Path(after)))
        replace(before, after)

    monkeypatch.setattr(durable, "sync_file", synced)
    monkeypatch.setattr(os, "replace", replaced)
    return seen


def tree(folder):
    """A folder with a file, and with another one in a folder below."""
    (folder / "below").mkdir(parents=True)
    (folder / "a").write_text("one")
    (folder / "below" / "b").write_text("two")
    return folder


def test_a_tree_is_synced_from_the_deepest_up_then_renamed_then_its_parent_is_synced(tmp_path, events):
    old, new = tree(tmp_path / "out.partial"), tmp_path / "out"
    publish(old, new)
    places = ["below/b", "below", "a", "."]
    assert events == [*(("sync", old / place) for place in places), ("rename", new), ("sync", tmp_path)]
    assert (new / "below" / "b").read_text() == "two"


def test_a_file_replaces_another_one(tmp_path, events):
    (tmp_path / "new").write_text("new")
    (tmp_path / "file").write_text("old")
    publish(tmp_path / "new", tmp_path / "file")
    assert events == [("sync", tmp_path / "new"), ("rename", tmp_path / "file"), ("sync", tmp_path)]
    assert (tmp_path / "file").read_text() == "new"


def test_links_that_lead_nowhere_are_left_alone(tmp_path):
    (tree(tmp_path / "old") / "link").symlink_to("nowhere")
    publish(tmp_path / "old", tmp_path / "new")
    assert (tmp_path / "new" / "link").is_symlink()


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", ["a", "below/b", MANIFEST])
def test_each_damaged_file_is_named(tmp_path, name, how):
    folder = tree(tmp_path / "folder")
    write_manifest(folder)
    assert damage(folder) == []
    spoil(folder / name, how)
    (words,) = damage(folder)
    assert words.startswith(name)


def test_a_folder_without_a_manifest_is_not_whole(tmp_path):
    assert damage(tree(tmp_path / "folder")) == [f"{MANIFEST} is missing"]
    (tmp_path / "folder" / MANIFEST).write_text("[]")
    assert damage(tmp_path / "folder") == [f"{MANIFEST} cannot be read"]
