"""manifest.json: size and hash of each file in a folder, by which a damaged folder is recognised before it is used.

Caches, spilled texts and checkpoints have one. It is the last file that is written, so a folder without it is not
whole.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modernbert_small.run.content import describe_files, difference
from modernbert_small.run.records import write_json

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Describe all files below a folder in its manifest."""
    write_json(folder / MANIFEST, describe_files(folder, lambda relative: relative == Path(MANIFEST)))


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
    """As `content.difference`, of a file that cannot be read as well."""
    try:
        return difference(folder, name, written)
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
