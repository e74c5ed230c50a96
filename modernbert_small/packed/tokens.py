"""Text as flat token ids on disk: tokenised once, in parallel, then memory-mapped.

A store is a folder of two arrays: `tokens.npy` (n_tokens,), uint16 where the vocabulary allows, else uint32,
all rows end to end with their special tokens; `offsets.npy` (n_rows + 1,) int64, row i being
tokens[offsets[i]:offsets[i + 1]]. It lies in `<data folder>.tokens/<key>`, the key being a hash of the data,
the tokenizer and the length limit, so a changed corpus or tokenizer never meets an old store.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from filelock import FileLock
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from modernbert_small.run.artefacts import content_hash, write_json
from modernbert_small.run.errors import UserError
from modernbert_small.run.progress import ProgressBar
from modernbert_small.run.shards import count_rows, read_table, split_files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenStore:
    """Rows of token ids, memory-mapped.

    Attributes:
        tokens: (n_tokens,) uint16 or uint32.
        offsets: (n_rows + 1,) int64.
        truncated: rows that were longer than the limit.
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
        """Token ids of some rows, end to end, and the rows' lengths."""
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
    """The token store of one split, made now or found where an earlier run left it.

    Special tokens written in the text (`[MASK]`) stay text.

    Args:
        data: folder of Parquet shards.
        split: train or validation.
        column: the text column.
        tokenizer: a fast tokenizer.
        max_seq_length: longer rows lose their end; counted and logged.

    Raises:
        UserError: bad Parquet, or a slow tokenizer.
    """
    files = split_files(data, split)
    encoder = text_tokenizer(tokenizer, max_seq_length)
    key = xxhash.xxh3_64_hexdigest("\0".join([*map(content_hash, files), encoder.to_str(), column]).encode())
    folder = cache_folder(data) / f"{split}-{key}"
    with made_once(folder) as is_missing:
        if is_missing:
            _write_store(folder, files, column, encoder)
    counts = json.loads((folder / "counts.json").read_text(encoding="utf-8"))
    return TokenStore(
        np.load(folder / "tokens.npy", mmap_mode="r"), np.load(folder / "offsets.npy"), counts["truncated"]
    )


def cache_folder(data: str | Path) -> Path:
    """Where what was made of a data folder lies: beside it."""
    folder = Path(data).absolute()
    return folder.with_name(folder.name + ".tokens")


@contextmanager
def made_once(path: Path) -> Iterator[bool]:
    """Whether a path is still missing, and nobody else makes it meanwhile: two runs may share their data."""
    if path.exists():
        yield False
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(path.name + ".lock")):
        yield not path.exists()


def _write_store(folder: Path, files: Sequence[Path], column: str, encoder: Tokenizer) -> None:
    """Tokenise into a folder aside, then rename it."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    dtype = np.dtype(np.uint16 if encoder.get_vocab_size() <= 1 << 16 else np.uint32)
    lengths, truncated = [np.zeros(1, np.int64)], 0
    with (
        (partial / "tokens.bin").open("wb") as stream,
        ProgressBar(count_rows(files), f"tokenising {folder.name.split('-')[0]}") as bar,
    ):
        for table in read_table(files, [column]):
            rows = encoder.encode_batch_fast(table[column].to_pylist())
            truncated += sum(bool(row.overflowing) for row in rows)
            lengths.append(np.array([len(row) for row in rows], np.int64))
            stream.write(np.concatenate([np.array(row.ids, dtype) for row in rows]).tobytes())
            bar.update(len(rows))
    offsets = np.cumsum(np.concatenate(lengths))
    if len(offsets) == 1:
        raise UserError(f"{files[0].parent}: no rows to tokenise")
    _bin_to_npy(partial / "tokens.bin", dtype, int(offsets[-1]))
    np.save(partial / "offsets.npy", offsets)
    write_json(
        partial / "counts.json",
        {"rows": len(offsets) - 1, "tokens": int(offsets[-1]), "truncated": truncated},
    )
    partial.rename(folder)
    if truncated:
        logger.warning("%d of %d texts are longer than max_seq_length and lose their end", truncated, len(offsets) - 1)


def text_tokenizer(tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> Tokenizer:
    """A tokenizer for data: adds special tokens, cuts to the limit, reads `[MASK]` in a text as text.

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
    """Give raw values an .npy header, without holding them."""
    with path.open("rb") as raw, path.with_suffix(".npy").open("wb") as out:
        np.lib.format.write_array_header_1_0(
            out, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
        )
        shutil.copyfileobj(raw, out, 1 << 24)
    path.unlink()
