"""Files that outlast a power cut: their content reaches the disk before their name does.

A rename can reach the disk before the content of the file that it names. If the power fails in between, an empty file
is left under the final name. So a file or folder is synced before it is renamed, and the folder that holds the name is
synced after.
"""

import os
from pathlib import Path


def sync_file(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    # Windows syncs only what is open for writing.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk. Windows cannot sync a folder, so nothing happens there."""
    if os.name != "nt":
        sync_file(folder)


def sync_tree(folder: Path) -> None:
    """Sync all files below a folder, and the folders from the deepest up to this one."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink():
                sync_file(path)
        sync_folder(Path(parent))


def share_file(path: Path) -> None:
    """Give a file the permissions of a new one: safetensors and temporary files leave others no right to read."""
    mask = os.umask(0o022)
    os.umask(mask)
    path.chmod(path.stat().st_mode | (0o666 & ~mask))


def share_tree(folder: Path) -> None:
    """Give all files below a folder the permissions of new ones."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            share_file(path)


def publish(temporary: Path, final: Path) -> None:
    """Give a finished file or folder its final name in the same file system; replaces an existing file.

    Raises:
        OSError: `final` is a folder that holds files.
    """
    if temporary.is_dir():
        sync_tree(temporary)
    else:
        sync_file(temporary)
    os.replace(temporary, final)
    sync_folder(final.parent)
