"""manifest.json: size and hash of each file in a folder, by which a damaged folder is recognised before it is used.

Caches, spilled texts and checkpoints have one. It is the last file that is written, so a folder without it is not
whole.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modernbert_small.run.content import content_hash
from modernbert_small.run.records import write_json

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Describe all files below a folder in its manifest."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    described = {
        name: {"bytes": path.stat().st_size, "hash": content_hash(path)}
        for name, path in files.items()
        if name != MANIFEST
    }
    write_json(folder / MANIFEST, described)


def damage(folder: Path) -> list[str]:
    """What is wrong with a folder, a few words for each damaged file; empty if it agrees with its manifest.

    Sizes are compared at every call. An unchanged file is hashed once in a process.
    """
    try:
        described = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (OSError, ValueError):
        return [f"{MANIFEST} cannot be read"]
    if not isinstance(described, dict):
        return [f"{MANIFEST} cannot be read"]
    found = [_difference(folder, name, written) for name, written in described.items()]
    return [words for words in found if words]


def _difference(folder: Path, name: str, written: Mapping[str, Any]) -> str:
    """How a file differs from its description, an empty text if it does not."""
    path = folder / name
    try:
        size = path.stat().st_size
        if size != written["bytes"]:
            return f"{name} has {size:,} bytes, expected {written['bytes']:,}"
        return "" if content_hash(path) == written["hash"] else f"{name} has another content than was written"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
