"""Texts as token ids on disk: tokenised once, in parallel, then memory-mapped.

A store is a folder with two arrays. `tokens.npy` (n_tokens,) holds all rows end to end with their special tokens, as
uint16 if the vocabulary has at most 65,536 entries, else as uint32. `offsets.npy` (n_rows + 1,) int64 says where rows
begin and end: row i is tokens[offsets[i]:offsets[i + 1]]. The folder is `<data folder>.tokens/<split>-<key>`. The key
is a hash of the data, the tokenizer and the length limit, so a changed corpus or tokenizer gets another store. A store
that does not agree with its manifest is made again.
"""

import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from modernbert_small.run.content import content_hash
from modernbert_small.run.durable import publish
from modernbert_small.run.errors import UserError
from modernbert_small.run.manifest import damage, write_manifest
from modernbert_small.run.places import lock_holder
from modernbert_small.run.processes import dealt, from_first, wait_for_all, world_size
from modernbert_small.run.progress import ProgressBar
from modernbert_small.run.records import write_json
from modernbert_small.run.shards import count_rows, read_table, split_files

logger = logging.getLogger(__name__)

_SILENT_SECONDS = 60  # of waiting for another run


@dataclass(frozen=True)
class TokenStore:
    """Rows of token ids, memory-mapped.

    Attributes:
        tokens: (n_tokens,) uint16 or uint32.
        offsets: (n_rows + 1,) int64.
        truncated: number of rows that were longer than the limit.
    """

    tokens: NDArray[np.unsignedinteger]
    offsets: NDArray[np.int64]
    truncated: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(n_rows,) tokens of each row, special tokens included."""
        return np.diff(self.offsets)

    def gather(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The token ids of some rows.

        Args:
            rows: (B,) indices of rows, in any order.

        Returns:
            (T,) ids of the rows, end to end, and (B,) their lengths, which sum to T.
        """
        starts, ends = self.offsets[rows], self.offsets[rows + 1]
        flat = np.concatenate([self.tokens[start:end] for start, end in zip(starts, ends, strict=True)])
        return flat.astype(np.int64), ends - starts


def tokenize_split(
    data: str | Path,
    split: str,
    column: str,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
) -> TokenStore:
    """Open the token store of one split, and make it first if no earlier run did or its files are damaged.

    A special token's name in a text, such as `[MASK]`, is read as ordinary text.

    Args:
        data: folder of Parquet shards.
        split: train or validation.
        column: the text column.
        tokenizer: a fast tokenizer.
        max_seq_length: in tokens. Longer rows are cut at their end; how many is counted and logged.

    Raises:
        UserError: bad Parquet, no rows, or a slow tokenizer.
    """
    files = split_files(data, split)
    encoder = text_tokenizer(tokenizer, max_seq_length)
    folder = _store_folder(data, split, files, column, encoder)
    parts = [_store_folder(data, split, [file], column, encoder) for file in files] if len(files) > 1 else []
    with made_once(folder) as partial:
        if partial is not None:
            if parts and not any(map(damage, parts)):
                _join_stores(partial, parts)
            else:
                _write_store(partial, f"tokenising {split}", files, column, encoder)
            _check_counts(partial, files[0].parent)
    for part in parts:
        shutil.rmtree(part, ignore_errors=True)
    counts = json.loads((folder / "counts.json").read_text(encoding="utf-8"))
    tokens = np.asarray(np.load(folder / "tokens.npy", mmap_mode="r"))  # slices of a plain array take less time
    return TokenStore(tokens, np.load(folder / "offsets.npy"), counts["truncated"])


def tokenize_shares(
    data: str | Path, split: str, column: str, tokenizer: PreTrainedTokenizerBase, max_seq_length: int
) -> None:
    """Tokenise the files of one split, each in one of the processes; `tokenize_split` then only joins them.

    Every process must call this. With one process or one file it does nothing.

    Args:
        data, split, column, tokenizer, max_seq_length: as for `tokenize_split`.
    """
    files = split_files(data, split)
    if world_size() == 1 or len(files) == 1:
        return
    encoder = text_tokenizer(tokenizer, max_seq_length)
    whole = _store_folder(data, split, files, column, encoder)
    if from_first(lambda: whole.exists() and not damage(whole)):
        return
    for number in dealt(len(files)):
        file = files[number]
        with made_once(_store_folder(data, split, [file], column, encoder)) as partial:
            if partial is not None:
                _write_store(partial, f"tokenising {file.name}", [file], column, encoder)
    wait_for_all()


def _store_folder(data: str | Path, split: str, files: Sequence[Path], column: str, encoder: Tokenizer) -> Path:
    """The folder of the store of some files of a split."""
    key = xxhash.xxh3_64_hexdigest("\0".join([*map(content_hash, files), encoder.to_str(), column]).encode())
    return cache_folder(data, f"{split}-{key}")


def cache_folder(data: str | Path, name: str) -> Path:
    """The folder of a token store, or of memory-mapped labels, of a data folder.

    It lies beside the data. If nothing can be written there, and no whole one is there, it lies in the user's cache.

    Args:
        data: folder of Parquet shards.
        name: of the store.
    """
    folder = Path(data).absolute()
    beside = folder.with_name(folder.name + ".tokens")
    is_writable = os.access(beside if beside.exists() else beside.parent, os.W_OK)
    if is_writable or ((beside / name).exists() and not damage(beside / name)):
        return beside / name
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = xxhash.xxh3_64_hexdigest(str(folder.resolve()).encode())
    return home / "modernbert-small" / f"{folder.name}-{key}.tokens" / name


@contextmanager
def made_once(folder: Path) -> Iterator[Path | None]:
    """The folder to write a cache in, or None if the cache is there already.

    The folder that is written gets its final name at the end of this context. Two runs may share their data. The second
    one waits until the first has made the folder, and then finds it.

    Args:
        folder: the cache's final name. A folder of this name that does not agree with its manifest is removed.
    """
    if folder.exists() and not damage(folder):
        yield None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(folder.name + ".lock")):
        if folder.exists():
            if not (found := damage(folder)):
                yield None
                return
            logger.warning("%s is not whole and is made again: %s", folder, "; ".join(found))
            shutil.rmtree(folder)
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        write_manifest(partial)
        publish(partial, folder)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock. A run that waits long for it says for whom, and goes on waiting."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=_SILENT_SECONDS)
    except Timeout:
        logger.warning("waiting for another run, which holds %s: %s", path, lock_holder(path))
        lock.acquire()
    try:
        path.write_text(f"{os.getpid()}\n{socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def _write_store(partial: Path, doing: str, files: Sequence[Path], column: str, encoder: Tokenizer) -> None:
    """Tokenise some shards into a folder.

    Args:
        partial: the folder, empty.
        doing: what the progress bar says.
        files: the shards.
        column: the text column.
        encoder: adds special tokens and cuts.
    """
    dtype = np.dtype(np.uint16 if encoder.get_vocab_size() <= 1 << 16 else np.uint32)
    lengths, truncated = [np.zeros(1, np.int64)], 0
    with (partial / "tokens.bin").open("wb") as stream, ProgressBar(count_rows(files), doing) as bar:
        for table in read_table(files, [column]):
            rows = encoder.encode_batch_fast(table[column].to_pylist())
            truncated += sum(bool(row.overflowing) for row in rows)
            lengths.append(np.array([len(row) for row in rows], np.int64))
            stream.write(np.concatenate([np.array(row.ids, dtype) for row in rows]).tobytes())
            bar.update(len(rows))
    _finish_store(partial, dtype, np.concatenate(lengths), truncated)


def _join_stores(partial: Path, parts: Sequence[Path]) -> None:
    """Write the stores of single files one after the other into a folder."""
    lengths, truncated = [np.zeros(1, np.int64)], 0
    with (partial / "tokens.bin").open("wb") as stream:
        for part in parts:
            tokens = np.load(part / "tokens.npy", mmap_mode="r")
            for start in range(0, len(tokens), 1 << 24):
                stream.write(tokens[start : start + (1 << 24)].tobytes())
            lengths.append(np.diff(np.load(part / "offsets.npy")))
            truncated += json.loads((part / "counts.json").read_text(encoding="utf-8"))["truncated"]
    _finish_store(partial, tokens.dtype, np.concatenate(lengths), truncated)


def _finish_store(partial: Path, dtype: np.dtype, lengths: NDArray[np.int64], truncated: int) -> None:
    """Write what belongs to the tokens.

    Args:
        partial: the folder, with `tokens.bin`.
        dtype: of the tokens.
        lengths: (n_rows + 1,) 0, then the rows' lengths.
        truncated: rows that were cut.
    """
    offsets = np.cumsum(lengths)
    _bin_to_npy(partial / "tokens.bin", dtype, int(offsets[-1]))
    np.save(partial / "offsets.npy", offsets)
    counts = {"rows": len(offsets) - 1, "tokens": int(offsets[-1]), "truncated": truncated}
    write_json(partial / "counts.json", counts)


def _check_counts(partial: Path, data: Path) -> None:
    """Refuse a store without rows, and say how many of its texts were cut."""
    counts = json.loads((partial / "counts.json").read_text(encoding="utf-8"))
    if counts["rows"] == 0:
        raise UserError(f"{data}: found no rows to tokenise, expected at least one text")
    if truncated := counts["truncated"]:
        logger.warning(
            "%d of %d texts are longer than max_seq_length, and are cut at their end", truncated, counts["rows"]
        )


def text_tokenizer(tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> Tokenizer:
    """A copy of a tokenizer for data: it adds special tokens, cuts to the limit and reads `[MASK]` in a text as text.

    Raises:
        UserError: a slow tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        name = getattr(tokenizer, "name_or_path", type(tokenizer).__name__)
        raise UserError(f"tokenizer {name}: expected a fast tokenizer (tokenizer.json)")
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_padding()
    copy.enable_truncation(max_seq_length, direction=tokenizer.truncation_side)
    copy.encode_special_tokens = True
    return copy


def _bin_to_npy(path: Path, dtype: np.dtype, length: int) -> None:
    """Turn a file of `length` raw values into an .npy file, block by block."""
    with path.open("rb") as raw, path.with_suffix(".npy").open("wb") as out:
        np.lib.format.write_array_header_1_0(
            out, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
        )
        shutil.copyfileobj(raw, out, 1 << 24)
    path.unlink()
