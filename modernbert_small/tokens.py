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
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from filelock import FileLock
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from modernbert_small.artefacts import content_hash, write_json
from modernbert_small.progress import ProgressBar
from modernbert_small.settings import UserError

logger = logging.getLogger(__name__)

LEAST_VALIDATION_ROWS = 3  # two have one cosine, and no correlation
_ROWS_PER_READ = 16_384
_TEXT_COLUMNS = ("text", "sentence", "source", "kind")


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


def split_files(data: str | Path, split: str, flag: str = "--train_file") -> list[Path]:
    """The Parquet shards of one split of a corpus or of distillation data.

    Raises:
        UserError: no such folder, no shards, or some of the `-of-000NN` shards are missing.
    """
    folder = Path(data)
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: no such folder; expected the output of an earlier phase")
    files = sorted(folder.glob(f"{split}-*-of-*.parquet"))
    if not files:
        raise UserError(f"{flag} {folder}: no {split}-*.parquet in it; expected the output of an earlier phase")
    expected = int(files[0].stem.rsplit("-", 1)[1])
    if len(files) != expected:
        raise UserError(f"{flag} {folder}: {len(files)} {split} shards, expected {expected} by their names")
    return files


def check_splits(data: str | Path, least_rows: int = 1, flag: str = "--train_file") -> None:
    """See that a data folder has both splits, whole and not empty, before anything is loaded.

    Args:
        data: folder of Parquet shards.
        least_rows: of the train split.
        flag: named in errors.

    Raises:
        UserError: what `split_files` finds, a file that is not whole Parquet, or a split with too few rows.
    """
    for split, least in (("train", least_rows), ("validation", LEAST_VALIDATION_ROWS)):
        rows = count_rows(split_files(data, split, flag))
        if rows < least:
            raise UserError(f"{flag} {data}: its {split} split has {rows} rows, expected at least {least}")


def read_table(files: Sequence[Path], columns: Sequence[str], rows: int = _ROWS_PER_READ) -> Iterator[pa.Table]:
    """Some columns of Parquet files, some rows at a time.

    Raises:
        UserError: a file that is not whole Parquet, a missing column, text that is not of strings, or a null.
    """
    for file in files:
        with _explained(file), pq.ParquetFile(file) as parquet:
            schema, position = parquet.schema_arrow, 0
            for column in columns:
                if column not in schema.names:
                    raise UserError(f"{file}: no column {column!r}; found {', '.join(schema.names)}")
                kind = schema.field(column).type
                if column in _TEXT_COLUMNS and not is_text(kind):
                    raise UserError(f"{file}: column {column!r} is of {kind}, expected string")
            for batch in parquet.iter_batches(rows, columns=list(columns)):
                for column in columns:
                    if batch[column].null_count:
                        first = position + batch[column].is_null().index(True).as_py()
                        raise UserError(f"{file}: column {column!r} is null in row {first}; expected a value")
                position += len(batch)
                yield pa.Table.from_batches([batch])


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds strings."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def count_rows(files: Sequence[Path]) -> int:
    """Rows of Parquet files, from their footers."""
    rows = 0
    for file in files:
        with _explained(file):
            rows += pq.read_metadata(file).num_rows
    return rows


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    """Say of a broken Parquet file which it is."""
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: not a whole Parquet file ({reason}); make it again") from error


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
    copy.enable_truncation(max_seq_length)
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
