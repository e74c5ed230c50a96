"""The power is cut at random moments: the phase is killed, and what it had not synced is lost. Then it is run again.

Two disks are attacked. The first one is real: an ext4 file system on a loop device, whose image is copied when the
phase has been killed. The image lacks what only the kernel's memory held. Mounted again, it shows the files of the
last commit of its journal, and empty files where only the name was committed. Mount options keep renames and timers
from writing anything early. This needs root, and is left out without it.

The second one is a model, and worse than ext4. The phase's process notes each sync: of a file its size and time of
change, of a folder its names. After the kill, a file that was changed since its last sync stays, is cut to nothing or
to its half, or is filled with zeros. A name that was not among those of its folder's last sync stays or is lost; if it
came by a rename, its earlier name, and the file that it replaced, come back. What the model lacks are files that were
removed and come back, which the real disk has.
"""

import filecmp
import json
import os
import random
import shutil
import stat
import subprocess
from functools import partial

import pytest
from soak_jobs import (
    JOBS,
    Tally,
    assert_same,
    forget,
    inputs,  # noqa: F401, a fixture
    remove,
    run_as_told,
    started,
    undisturbed,
)

CUTS = 20  # of each phase and disk
OPTIONS = "loop,noauto_da_alloc,commit=300,noinit_itable"


class RealDisk:
    """An ext4 file system on a loop device, with a copy of the inputs."""

    prepare = None  # nothing has to be done in the phase's process

    def __init__(self, inputs, place):  # noqa: F811
        self._place, self.folder = place, place / "disk"
        self._image, self._first = place / "disk.img", place / "first.img"
        self.folder.mkdir(parents=True)
        with self._image.open("wb") as image:
            image.truncate(64 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", self._image], check=True)
        self._mount()
        for path in inputs.iterdir():
            if not path.name.startswith(("whole", "disk", "cut", "log")) and path.suffix != ".tokens":
                (shutil.copytree if path.is_dir() else shutil.copy)(path, self.folder / path.name)
        self._unmount()
        self._image.rename(self._first)

    def _mount(self):
        subprocess.run(["mount", "-o", OPTIONS, self._image, self.folder], check=True)

    def _unmount(self):
        subprocess.run(["umount", "--lazy", self.folder], check=True)

    def _copy(self, image):
        """Put a copy of an image into the disk's place. One that was written to while it was copied is copied again."""
        copy = self._place / "copy.img"
        while True:
            subprocess.run(["cp", "--sparse=always", image, copy], check=True)
            if filecmp.cmp(image, copy, shallow=False):
                break
        if os.path.ismount(self.folder):
            self._unmount()
        copy.replace(self._image)
        self._mount()

    def fresh(self):
        """As it was before the phase ran."""
        self._copy(self._first)

    def cut(self, chance):
        """Lose what the disk does not hold."""
        self._copy(self._image)

    def close(self):
        """Unmount it."""
        if os.path.ismount(self.folder):
            self._unmount()


class ModelDisk:
    """The inputs' own folder, where the phase's syncs are noted."""

    def __init__(self, inputs, place):  # noqa: F811
        self.folder, self._notes, self._replaced = inputs, place / "notes.jsonl", place / "replaced"
        self._replaced.mkdir(parents=True)

    @property
    def prepare(self):
        """What makes the phase's process note its syncs."""
        return partial(note_syncs, self._notes, self._replaced)

    def fresh(self):
        """As it was before the phase ran."""
        forget(self.folder)
        self._forget_notes()

    def _forget_notes(self):
        self._notes.write_text("")
        for path in self._replaced.iterdir():
            path.unlink()

    def cut(self, chance):
        """Lose what was not synced; what is left is what the disk holds from now on."""
        notes = [json.loads(line) for line in self._notes.read_text().splitlines()]
        names = {note["folder"]: note["names"] for note in notes if "folder" in note}
        contents = {tuple(note["file"]) for note in notes if "file" in note}
        written = [path for path in (self.folder / "cut", *self.folder.glob("*.tokens")) if path.exists()]
        for top in written:
            self._lose(top, names, contents, chance)
        self._forget_notes()
        for top in written:
            for path in (top, *top.rglob("*")):
                note(self._notes, path)

    def _lose(self, folder, names, contents, chance):
        """Lose names and contents of a folder and of those below."""
        self._lose_names(folder, names.get(folder.stat().st_ino, {}), chance)
        for path in sorted(folder.iterdir()):
            if path.is_dir():
                self._lose(path, names, contents, chance)
            elif _content(path.stat()) not in contents:
                lose_content(path, chance)

    def _lose_names(self, folder, synced, chance):
        """Undo changes of a folder's names since its last sync, when it had the names `synced` (name -> inode)."""
        before = {inode: name for name, inode in synced.items()}
        for path in sorted(folder.iterdir()):
            inode = path.lstat().st_ino
            if synced.get(path.name) == inode or chance.random() < 0.5:
                continue
            earlier = folder / before.get(inode, path.name)
            if earlier.exists():
                remove(path)
            else:
                path.rename(earlier)
            old = self._replaced / str(synced.get(path.name))
            if old.exists():
                os.link(old, path)

    def close(self):
        """Nothing to do."""


def note_syncs(notes, replaced):
    """Note in a file what this process syncs, and keep the files that a rename replaces."""
    sync = os.fsync

    def noted_sync(descriptor):
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        note(notes, number)
        sync(number)

    def keeping(rename):
        def renamed(source, target, **places):
            if os.path.isfile(target) and not places:
                kept = replaced / str(os.stat(target).st_ino)
                kept.unlink(missing_ok=True)
                os.link(target, kept)
            rename(source, target, **places)

        return renamed

    os.fsync, os.rename, os.replace = noted_sync, keeping(os.rename), keeping(os.replace)


def note(notes, file):
    """Note that a file or folder, a path or a descriptor, is on the disk as it is now."""
    status = os.stat(file)
    if stat.S_ISDIR(status.st_mode):
        entry = {"folder": status.st_ino, "names": {one.name: one.inode() for one in os.scandir(file)}}
    else:
        entry = {"file": _content(status)}
    with open(notes, "a") as stream:
        stream.write(json.dumps(entry) + "\n")


def _content(status):
    """What is taken for a file's content."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def lose_content(path, chance):
    """Leave of a file nothing, its first half, zeros or all."""
    size = path.stat().st_size
    kept = path.read_bytes()
    path.write_bytes(chance.choice([b"", kept[: size // 2], bytes(size), kept]))


@pytest.mark.parametrize("kind", [RealDisk, ModelDisk])
@pytest.mark.parametrize("phase", JOBS)
def test_power_cut_and_run_again(inputs, tmp_path, phase, kind, capsys):  # noqa: F811
    if kind is RealDisk and (os.geteuid() or not shutil.which("mkfs.ext4")):
        pytest.skip("a loop device needs root and mkfs.ext4")
    job, chance, tally = JOBS[phase], random.Random(phase), Tally()
    whole = tmp_path / "whole"
    seconds = undisturbed(inputs, job, whole)
    disk = kind(inputs, inputs / f"disk-{phase}-{kind.__name__}")
    try:
        rounds = 0
        while tally.tried < CUTS:
            disk.fresh()
            with tally.attack(f"round {rounds}", times=0):
                for _ in range(chance.randint(1, 3)):
                    process = started(disk.folder, job, prepare=disk.prepare)
                    process.join(chance.uniform(0, 1.1 * seconds))
                    is_killed = process.exitcode is None
                    process.kill()
                    process.join()
                    disk.cut(chance)
                    tally.tried += 1
                    if not is_killed:  # it has finished, or refused to go on
                        break
                run_as_told(disk.folder, job)
                assert_same(whole, disk.folder / "cut", to_the_byte=phase != "labels")
            rounds += 1
    finally:
        disk.close()
    tally.report(f"{phase}, power cut, {kind.__name__}", capsys, f"; {rounds} runs of {seconds:.1f} s")
