"""The files of a source, without those that lie elsewhere."""

import logging
from collections.abc import Iterable
from pathlib import Path

from modernbert_small.run.errors import UserError
from modernbert_small.run.readers import KNOWN_ENDINGS, ending
from modernbert_small.run.tables import counted

logger = logging.getLogger(__name__)


def find_files(name: str, path: Path) -> list[Path]:
    """The files of a folder that can be read, or the one file.

    Args:
        name: of the source, for messages.
        path: a file or a folder. Files in hidden folders are left out, others of unknown kinds are logged.

    Raises:
        UserError: there is no file of a known kind, or a symbolic link leads out of the folder.
    """
    if path.is_file():
        if ending(path) is None:
            raise UserError(
                f"--sources {name}={path}: found a {path.suffix or 'nameless'} file; expected {KNOWN_ENDINGS}"
            )
        return [path]
    visible = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    files = [file for file in visible if ending(file)]
    others = sorted({file.suffix or file.name for file in visible if file not in set(files)})
    if not files:
        found = ", ".join(others) or "no files"
        raise UserError(f"--sources {name}={path}: found {found} in the folder; expected {KNOWN_ENDINGS}")
    require_inside(name, path, files)
    if others:
        left = counted(len(visible) - len(files), "file")
        logger.info("%s: %s of other kinds not read: %s", name, left, ", ".join(others))
    return files


def require_inside(name: str, folder: Path, files: Iterable[Path]) -> None:
    """Refuse files outside a source's folder, which nobody named and which its hash does not cover.

    A snapshot in the hub's cache consists of links to the repository's `blobs`, which belong to it.

    Raises:
        UserError: with the first such file.
    """
    top = folder.resolve()
    if top.parent.name == "snapshots":
        top = top.parents[1]
    for file in files:
        if not file.resolve().is_relative_to(top):
            raise UserError(
                f"--sources {name}={folder}: {file} leads to {file.resolve()}, outside this folder; expected only "
                "files in it: name the other place as a source of its own"
            )
