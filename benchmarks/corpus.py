"""Building the corpus, the usual way and ours.

This is a module of its own, so that the usual way's peak memory does not count torch, which it does not need.
"""

import functools
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.workload import Measurement, Workload, load_script
from modernbert_small.run.errors import UserError

# The columns of text that phase 1 knows.
LAYOUTS = (("text",), ("query", "positive", "negative", "text_chunk"), ("title", "body"))


def usual(workload: Workload) -> Measurement:
    """Flatten every text column with datasets.map, shuffle, split and write, without cleaning or deduplicating."""
    return _usual(workload, chunk=False)


def usual_with_chunks(workload: Workload) -> Measurement:
    """The same, with long texts cut where the tokenizer's windows end, since phase 3 needs short texts."""
    return _usual(workload, chunk=True)


def _usual(workload: Workload, chunk: bool) -> Measurement:
    """The usual way, with or without cutting long texts."""
    from datasets import concatenate_datasets, load_dataset  # ours does without datasets

    tokenizer = AutoTokenizer.from_pretrained(workload.folder / "student") if chunk else None
    began = time.perf_counter()
    parts = []
    for path in workload.sources.values():
        rows = load_dataset("parquet", data_files=parquet_files(path), split="train")
        flatten = functools.partial(_flatten, text_columns(rows.column_names))
        parts.append(rows.map(flatten, batched=True, remove_columns=rows.column_names))
    whole = concatenate_datasets(parts)
    if tokenizer is not None:
        whole = whole.map(functools.partial(_chunk, tokenizer, workload.max_seq_length), batched=True)
    splits = whole.shuffle(seed=42).train_test_split(test_size=1000, seed=42)
    for name, split in splits.items():
        split.to_parquet(workload.scratch / f"{name}.parquet")
    return Measurement(_source_tokens(workload), time.perf_counter() - began)


def _flatten(columns: list[str], batch: dict[str, list[str]]) -> dict[str, list[str]]:
    """All texts of a batch in one column."""
    return {"text": [text for column in columns for text in batch[column]]}


def _chunk(
    tokenizer: PreTrainedTokenizerBase, max_seq_length: int, batch: dict[str, list[str]]
) -> dict[str, list[str]]:
    """The texts of a batch, cut to so many tokens."""
    texts = batch["text"]
    windows = tokenizer(
        texts,
        truncation=True,
        max_length=max_seq_length,
        add_special_tokens=False,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    spans = zip(windows["overflow_to_sample_mapping"], windows["offset_mapping"], strict=True)
    return {"text": [texts[row][offsets[0][0] : offsets[-1][1]] for row, offsets in spans if offsets]}


def ours(workload: Workload) -> Measurement:
    """Phase 1, which also cleans, cuts and deduplicates texts."""
    phase = load_script("mlm/create_dataset.py")
    sys.argv = ["create_dataset.py", "--output_dir", str(workload.scratch / "corpus"), "--validation_rows", "1000"]
    sys.argv += ["--tokenizer_name_or_path", str(workload.folder / "student")]
    sys.argv += ["--max_seq_length", str(workload.max_seq_length), "--sources"]
    sys.argv += [f"{name}={path}" for name, path in workload.sources.items()]
    began = time.perf_counter()
    phase.main()
    return Measurement(_source_tokens(workload), time.perf_counter() - began)


def text_columns(columns: Sequence[str]) -> list[str]:
    """The columns of a source that hold text."""
    for layout in LAYOUTS:
        if found := [column for column in layout if column in columns]:
            return found
    raise UserError(f"columns {', '.join(columns)}; expected some of {', '.join(itertools.chain(*LAYOUTS))}")


def parquet_files(path: str) -> list[str]:
    """The Parquet files of a source, which is a file or a folder."""
    return [path] if path.endswith(".parquet") else sorted(map(str, Path(path).rglob("*.parquet")))


def _source_tokens(workload: Workload) -> int:
    """Tokens of the sources, as prepare.py counted them."""
    return json.loads((workload.folder / "source_tokens.json").read_text(encoding="utf-8"))


ours_with_chunks = ours  # phase 1 always cuts long texts
