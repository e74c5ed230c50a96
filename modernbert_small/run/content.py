"""Content hashes: of files, of folders, and of the shards that a run.json names."""

import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import xxhash

from modernbert_small.run.errors import UserError
from modernbert_small.run.records import RUN_FILE, read_run


def content_hash(path: Path) -> str:
    """The xxh3-128 hash of a file, or of a folder's file names and contents.

    Of an artefact's folder, records, reports, logs and checkpoints are left out; hidden files always are.
    """
    if path.is_file():
        status = path.stat()
        return _file_hash(path, status.st_size, status.st_mtime_ns)
    digest = xxhash.xxh3_128()
    is_artefact = (path / RUN_FILE).exists()
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        is_hidden = any(part.startswith(".") for part in relative.parts)
        if file.is_file() and not is_hidden and not (is_artefact and _is_by_product(relative)):
            digest.update(f"{relative.as_posix()}\0{content_hash(file)}\0".encode())
    return digest.hexdigest()


@cache
def _file_hash(path: Path, size: int, modified_ns: int) -> str:
    """The hash of a file, which is read once although shards are checked, recorded and the key of cached tokens."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()


def _is_by_product(relative: Path) -> bool:
    """Whether a file of an artefact is a record, a report, a log or part of a checkpoint."""
    return relative.name in (RUN_FILE, "report.html") or any(
        part.startswith("checkpoint-") or part in ("runs", "eval") for part in relative.parts
    )


def describe_input(path_or_id: str) -> dict[str, str]:
    """A local path with its content hash, or a hub id.

    Raises:
        UserError: an artefact is not as its run.json says.
    """
    path = Path(path_or_id)
    if (path / RUN_FILE).is_file():
        check_shards(path)
        if damaged := damaged_outputs(path):
            raise UserError(
                f"{path}: files are missing or changed since they were made ({', '.join(damaged)}); make them again "
                f"with --overwrite, or remove its {RUN_FILE} if the changes are yours"
            )
    return {"path": str(path_or_id), "hash": content_hash(path)} if path.exists() else {"hub_id": path_or_id}


def describe_files(folder: Path, is_left_out: Callable[[Path], bool]) -> dict[str, dict[str, Any]]:
    """Size and hash of the files below a folder, by relative path; what is left out is not read."""
    files = {file.relative_to(folder): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {
        relative.as_posix(): {"bytes": file.stat().st_size, "hash": content_hash(file)}
        for relative, file in files.items()
        if not is_left_out(relative)
    }


def difference(folder: Path, name: str, written: Mapping[str, Any]) -> str:
    """How a file differs from what `describe_files` said of it, an empty text if it does not.

    Raises:
        OSError: the file is there and cannot be read.
    """
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size != written["bytes"]:
        return f"{name} has {size:,} bytes, expected {written['bytes']:,}"
    return "" if content_hash(path) == written["hash"] else f"{name} has another content than was written"


def describe_outputs(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of each file of an artefact, for run.json; without by-products, and the card that people edit."""
    return describe_files(folder, lambda relative: _is_by_product(relative) or relative.name == "README.md")


def damaged_outputs(folder: Path) -> list[str]:
    """The files of an artefact that are missing, or other than when they were made; none of one without a list."""
    outputs = read_run(folder).get("outputs", {})
    return [name for name, written in outputs.items() if difference(folder, name, written)]


def describe_shards(folder: Path) -> dict[str, dict[str, Any]]:
    """The number of rows and the content hash of each Parquet file in a folder, for run.json."""
    return {
        file.name: {"rows": pq.read_metadata(file).num_rows, "hash": content_hash(file)}
        for file in sorted(folder.glob("*.parquet"))
    }


def check_shards(folder: Path) -> None:
    """Refuse a data folder whose shards are not those that its run.json names.

    Raises:
        UserError: shards are missing, were added or have changed; all of them are named.
    """
    files = read_run(folder).get("files")
    written = files if isinstance(files, dict) else {}
    found = {file.name: file for file in folder.glob("*.parquet")} if written else {}
    wrong = {
        "missing": sorted(written.keys() - found.keys()),
        "not of this run": sorted(found.keys() - written.keys()),
        "changed": sorted(
            name for name in written.keys() & found.keys() if content_hash(found[name]) != written[name]["hash"]
        ),
    }
    if any(wrong.values()):
        listed = "; ".join(f"{what}: {', '.join(names)}" for what, names in wrong.items() if names)
        raise UserError(
            f"{folder}: its shards are not those that {RUN_FILE} names ({listed}); expected one run's output, whole; "
            "make it again with --overwrite"
        )
