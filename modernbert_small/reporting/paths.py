"""Paths without what is private in them: the folders of a machine, and the name of its user.

Records hold paths as the scripts were given them. The report and the model card are published with the model.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PATH = re.compile(r"(?<![\w.:/])/[\w.-]+(?:/[\w.-]+)+")
_WITH_PATHS = ("settings", "inputs", "folder")  # of a record


def public_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of a phase whose settings, inputs and folder name no private path."""
    return {name: _public(value) if name in _WITH_PATHS else value for name, value in record.items()}


def public_text(text: str) -> str:
    """A setting without a private path.

    Absolute paths, and relative ones that lead out of the working folder, are made public, also behind a name and an
    equals sign: `own=/home/me/texts` becomes `own=texts`. Everything else, such as a hub id, stays as it is.
    """
    name, equals, path = text.partition("=")
    if _is_private(text):
        return _public_path(text)
    return f"{name}={_public_path(path)}" if equals and _is_private(path) else text


def without_paths(text: str) -> str:
    """A text, such as an error's, with every absolute path in it made public."""
    return _PATH.sub(lambda match: _public_path(match[0]), text)


def _public(value: object) -> object:
    """A JSON value, all strings in it made public."""
    if isinstance(value, str):
        return public_text(value)
    if isinstance(value, Mapping):
        return {key: _public(item) for key, item in value.items()}
    return [_public(item) for item in value] if isinstance(value, list) else value


def _is_private(text: str) -> bool:
    return os.path.isabs(text) or Path(os.path.normpath(text)).parts[:1] == ("..",)


def _public_path(path: str) -> str:
    """A path from the working folder on, or else its last two parts, and none before or with a user's name."""
    absolute, here = Path(os.path.abspath(path)), Path.cwd()
    is_below = absolute.is_relative_to(here)
    parts = absolute.relative_to(here).parts if is_below else absolute.parts[1:]
    user = Path(os.path.expanduser("~")).name
    users = [
        index
        for index, part in enumerate(parts)
        if part == user or (index > 0 and parts[index - 1] in ("home", "Users"))
    ]
    if not is_below or users:
        parts = parts[max(users, default=-1) + 1 :][-2:]
    return "/".join(parts) or "."
