"""Where an artefact is written: its final folder, the folder to write in, its lock, and how it gets its name.

The folder to write in lies beside the final one, so that a rename makes it final. A mount point cannot be renamed or
replaced; there it lies inside, and its files are moved up, run.json last.

What only training needed, its checkpoints and logs, ends in another folder beside the final one.
"""

import ctypes
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from filelock import SoftFileLock, Timeout

from modernbert_small.run.durable import sync_file, sync_folder, sync_tree
from modernbert_small.run.errors import UserError
from modernbert_small.run.records import RUN_FILE, read_run, temporary_files

_PARTIAL, _LOCK, _TRAINING = ".partial", ".lock", ".training"
_NOT_OURS_BUT_EMPTY = {_PARTIAL, _LOCK, _TRAINING, "lost+found"}  # what an unused mount point may hold
# Of Linux' renameat2: paths relative to the working folder; exchange two names at once.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_RECORD_SECONDS = 5  # in which a process that has made a lock writes its record


def output_folder(output_dir: str, flag: str) -> Path:
    """The final folder of an artefact. A symbolic link to a folder stands for that folder.

    Raises:
        UserError: no name of its own, a file, or a link that leads nowhere.
    """
    final = Path(output_dir)
    if not final.name:
        raise UserError(f"{flag} {output_dir}: expected a folder with a name of its own, such as data/corpus")
    if final.is_symlink():
        if not final.exists():
            raise UserError(f"{flag} {final}: is a link to {os.readlink(final)}, which is not there; make that folder")
        final = final.resolve()
    if final.is_file():
        raise UserError(f"{flag} {final}: is a file, expected a folder")
    return final


def working_folder(final: Path) -> Path:
    """The folder to write in."""
    return _beside(final, _PARTIAL)


def training_folder(final: Path) -> Path:
    """The folder for what only training needed."""
    return _beside(final, _TRAINING)


def _beside(final: Path, ending: str) -> Path:
    return final / ending if os.path.ismount(final) else final.with_name(final.name + ending)


def own_entries(folder: Path) -> list[Path]:
    """What a folder holds, without what an empty mount point may hold; nothing if there is no such folder.

    A run.json that was still under its temporary name when its run was killed doesn't count either.
    """
    if not folder.is_dir():
        return []
    unnamed = temporary_files(folder, RUN_FILE)
    return [path for path in folder.iterdir() if path.name not in _NOT_OURS_BUT_EMPTY and path not in unnamed]


def remove_artefact(folder: Path) -> None:
    """Remove a folder if it is there. Its run.json goes last, so that what a kill leaves is known as an artefact's."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name != RUN_FILE:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        shutil.rmtree(folder)


def overlap(first: str | Path, second: str | Path) -> bool:
    """Whether two paths are the same, or one lies inside the other."""
    a, b = Path(first).resolve(), Path(second).resolve()
    return a == b or a in b.parents or b in a.parents


def require_apart(final: Path, inputs: Mapping[str, str], flag: str) -> None:
    """Refuse an output that would replace an input, or change one by lying inside it.

    Raises:
        UserError: with the input's name.
    """
    for name, value in inputs.items():
        if Path(value).exists() and overlap(final, value):
            raise UserError(
                f"{flag} {final}: overlaps with the input {name}, {value}; name a folder that neither holds it nor "
                "lies in it"
            )


def lock_holder(path: Path) -> str:
    """Who holds a lock, by a file with the number of a process and the name of its host, a line each."""
    try:
        process, host = path.read_text(encoding="utf-8").split("\n")[:2]
    except (OSError, ValueError):
        return "an unknown process"
    return f"process {process} on {host}"


class OutputLock:
    """Keeps two runs from writing one artefact.

    The lock is a file with the writer's host and process, made where no such file is, which works on every file system
    that creates files atomically. The lock of a process of this host that is gone is taken over.
    """

    def __init__(self, final: Path) -> None:
        self._path = _beside(final, _LOCK)
        self._lock = SoftFileLock(self._path)

    def take(self, flag: str) -> None:
        """Take the lock; no wait.

        Raises:
            UserError: another process holds it.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._acquire()
        except Timeout as error:
            if self._lock.is_lock_held_by_us:  # of an earlier try in this process, which an error ended
                return
            raise UserError(
                f"{flag}: {lock_holder(self._path)} is writing this folder; wait until it ends, or, if it runs no "
                f"more, remove {self._path}"
            ) from error
        sync_file(self._path)  # after a power cut an empty lock would not tell whether its process is gone

    def _acquire(self) -> None:
        """Take the lock, also an empty one that stays empty: its process was killed before it wrote its record.

        filelock takes over no empty file, but one whose record cannot be read and does not change for 2 s. The text
        written here is shorter than any record, which would replace it.
        """
        with suppress(Timeout):
            self._lock.acquire(timeout=0)
            return
        deadline = time.monotonic() + _RECORD_SECONDS
        while (is_empty := self._is_empty()) and time.monotonic() < deadline:
            time.sleep(0.05)
        if is_empty:
            with suppress(FileNotFoundError), self._path.open("r+") as stream:
                stream.write("?\n")
        self._lock.acquire(timeout=_RECORD_SECONDS if is_empty else 0)

    def _is_empty(self) -> bool:
        try:
            return self._path.stat().st_size == 0
        except FileNotFoundError:
            return False

    def check(self, flag: str) -> None:
        """Refuse if another process holds the lock; nothing is written.

        Raises:
            UserError: another process holds it.
        """
        if self._path.exists():
            self.take(flag)
            self.release()

    def release(self) -> None:
        """Let others write. A lock that an earlier try in this process took is removed, but not one of another run."""
        self._lock.release()
        if self._lock.is_lock_held_by_us:
            self._path.unlink(missing_ok=True)


def publish_folder(folder: Path, final: Path) -> None:
    """Make a finished folder the final one, in place of an earlier artefact. Readers see the old one or the new.

    Args:
        folder: of `working_folder`, synced.
        final: of `output_folder`.
    """
    if folder.parent == final:
        _move_up(folder, final)
        return
    if not final.exists():
        folder.rename(final)
    elif _exchange(folder, final):
        sync_folder(final.parent)  # else, after a power cut, the final name could be that of the folder removed here
        remove_artefact(folder)
    else:
        aside = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
        final.rename(aside / final.name)
        folder.rename(final)
        shutil.rmtree(aside)
    sync_folder(final.parent)


def set_aside(final: Path, patterns: Sequence[str]) -> None:
    """Move what only training needed out of a finished folder, beside a copy of its run.json.

    An earlier run's such folder is replaced. What a kill leaves in the finished folder, `move_leftovers` moves later.

    Args:
        final: the finished folder.
        patterns: of the names of files and folders in it.
    """
    found = [path for pattern in patterns for path in final.glob(pattern)]
    if found:
        beside = training_folder(final)
        if not _are_of_one_run(beside, final):
            remove_artefact(beside)
            beside.mkdir()
            shutil.copyfile(final / RUN_FILE, beside / RUN_FILE)
            sync_tree(beside)  # without this file the folder would be taken for a stranger's
            sync_folder(beside.parent)
        for path in found:
            path.rename(beside / path.name)
        sync_folder(beside)
        sync_folder(final)


def bring_back(final: Path, folder: Path) -> None:
    """Move what `set_aside` took out of a finished folder into the folder where it is repaired.

    Args:
        final: the finished folder.
        folder: where it is now. Nothing is moved into it if another run's files were set aside.
    """
    beside = training_folder(final)
    if _are_of_one_run(beside, folder):
        for path in beside.iterdir():
            if path.name != RUN_FILE and not (folder / path.name).exists():
                path.rename(folder / path.name)
        remove_artefact(beside)


def _are_of_one_run(beside: Path, folder: Path) -> bool:
    """Whether a folder of what only training needed belongs to a finished folder."""
    return (beside / RUN_FILE).is_file() and (beside / RUN_FILE).read_bytes() == (folder / RUN_FILE).read_bytes()


def _move_up(folder: Path, final: Path) -> None:
    """Replace a mount point's files by those of a folder inside it.

    The old run.json is removed last and the new one is moved last. So files without a run.json are new, and
    `complete_move` can go on after a kill.
    """
    for path in sorted(own_entries(final), key=_is_record):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    _move_entries(folder, final)


def _move_entries(folder: Path, final: Path) -> None:
    """Move all that a folder holds to a mount point, run.json last, and remove the folder."""
    for path in sorted(folder.iterdir(), key=_is_record):
        path.rename(final / path.name)
    folder.rmdir()
    sync_folder(final)


def _is_record(path: Path) -> bool:
    return path.name == RUN_FILE


def complete_move(final: Path) -> None:
    """Go on with a move of a finished folder's files up to its mount point, which a kill has broken off."""
    folder = working_folder(final)
    if folder.parent != final or (final / RUN_FILE).exists() or not (folder / RUN_FILE).exists():
        return
    if "outputs" in read_run(folder):  # else it is not finished
        _move_entries(folder, final)


def reopen(final: Path, folder: Path) -> None:
    """Make a finished folder, or what a mount point holds, the folder to write in."""
    if folder.parent != final:
        final.rename(folder)
        return
    folder.mkdir()
    for path in sorted(own_entries(final), key=_is_record, reverse=True):  # as `complete_move` expects after a kill
        path.rename(folder / path.name)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names at once, where the system can."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0
