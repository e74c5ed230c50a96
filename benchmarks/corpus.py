"""Building the corpus, both ways.

Apart from the others, so that the usual way's peak memory does not count torch, which it doesn't need.
"""

import json
import sys
import time
from pathlib import Path

from datasets import concatenate_datasets, load_dataset

from benchmarks.workload import MAX_SEQ_LENGTH, Measurement, Workload, load_script

TEXT_COLUMNS = ("text", "query", "positive", "negative", "title", "body")


def usual(workload: Workload) -> Measurement:
    """Every text column flattened by datasets.map, shuffled, split, written; nothing is cleaned or deduplicated."""
    began = time.perf_counter()
    parts = []
    for path in workload.sources.values():
        rows = load_dataset("parquet", data_files=parquet_files(path), split="train")
        columns = [column for column in TEXT_COLUMNS if column in rows.column_names]
        texts = rows.map(
            lambda batch, columns=columns: {"text": [text for column in columns for text in batch[column]]},
            batched=True,
            remove_columns=rows.column_names,
        )
        parts.append(texts)
    whole = concatenate_datasets(parts).shuffle(seed=42)
    splits = whole.train_test_split(test_size=1000, seed=42)
    for name, split in splits.items():
        split.to_parquet(workload.scratch / f"{name}.parquet")
    return Measurement(_source_tokens(workload), time.perf_counter() - began)


def ours(workload: Workload) -> Measurement:
    """Phase 1: the same, and cleaned, chunked and deduplicated."""
    phase = load_script("mlm/create_dataset.py")
    sys.argv = ["create_dataset.py", "--output_dir", str(workload.scratch / "corpus"), "--validation_rows", "1000"]
    sys.argv += ["--tokenizer_name_or_path", str(workload.folder / "student")]
    sys.argv += ["--max_seq_length", str(MAX_SEQ_LENGTH), "--sources"]
    sys.argv += [f"{name}={path}" for name, path in workload.sources.items()]
    began = time.perf_counter()
    phase.main()
    return Measurement(_source_tokens(workload), time.perf_counter() - began)


def parquet_files(path: str) -> list[str]:
    """The Parquet files of a source: itself, or those below a folder."""
    return [path] if path.endswith(".parquet") else sorted(map(str, Path(path).rglob("*.parquet")))


def _source_tokens(workload: Workload) -> int:
    return json.loads((workload.folder / "source_tokens.json").read_text(encoding="utf-8"))
