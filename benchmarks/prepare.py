"""Prepare what all measurements of speed.py run on.

    python -m benchmarks.prepare --folder /tmp/bench --tokenizer <folder> --rows 1000 --most_rows 10000

Out: raw sources, a corpus, labels, a student and a teacher. Weights and labels are random, since speed does not depend
on them. speed.py runs this in a process of its own.
"""

import argparse
import itertools
import json
import logging
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import ModernBertConfig, ModernBertForMaskedLM, ModernBertModel, PreTrainedTokenizerBase

from benchmarks.corpus import parquet_files, text_columns
from benchmarks.workload import MAX_SEQ_LENGTH, ROOT, STUDENT_WIDTH, TEACHER_WIDTH
from modernbert_small.corpus.docstrings import python_files, read_docstrings
from modernbert_small.packed.tokens import text_tokenizer
from modernbert_small.run.errors import UserError
from modernbert_small.run.loading import load_tokenizer
from modernbert_small.run.script import run_script
from modernbert_small.run.shards import read_table, split_files

VOCAB_SIZE = 50_368  # ModernBERT's
logger = logging.getLogger(__name__)


def write_sources(folder: Path, given: list[str] | None, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Write down the sources and how many tokens they have.

    Args:
        folder: gets sources.json and source_tokens.json, and the docstrings if they are the source.
        given: NAME=PATH of each source; None takes this machine's docstrings.
        tokenizer: for counting.

    Returns:
        Paths by name.
    """
    sources = dict(source.split("=", 1) for source in given or ())
    if not sources:
        sources = {"docstrings": str(folder / "source" / "docstrings.parquet")}
        write_docstrings(Path(sources["docstrings"]))
    (folder / "sources.json").write_text(json.dumps(sources), encoding="utf-8")
    tokens = count_source_tokens(sources, tokenizer)
    (folder / "source_tokens.json").write_text(json.dumps(tokens), encoding="utf-8")
    return sources


def write_docstrings(path: Path) -> None:
    """Write this machine's docstrings, as they are in the source files, in the columns `title` and `body`."""
    path.parent.mkdir(parents=True)
    with ProcessPoolExecutor() as pool:
        pairs = [pair for pairs in pool.map(read_docstrings, python_files(), chunksize=64) for pair in pairs or ()]
    # A Python string may hold lone surrogates, which UTF-8 cannot encode.
    titles, bodies = ([text.encode(errors="replace").decode() for text in texts] for texts in zip(*pairs, strict=True))
    pq.write_table(pa.table({"title": titles, "body": bodies}), path)


def count_source_tokens(sources: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> int:
    """Estimate the tokens of all texts of the sources.

    The first 2,000 texts of each column are tokenised; the others are assumed to have as many tokens per character.
    """
    total = 0.0
    backend = text_tokenizer(tokenizer, 1 << 20)
    for path in itertools.chain.from_iterable(map(parquet_files, sources.values())):
        with pq.ParquetFile(path) as file:
            table = file.read(text_columns(file.schema_arrow.names))
        for column in table.columns:
            texts = column.to_pylist()
            sample = texts[:2000]
            tokens = sum(map(len, backend.encode_batch_fast(sample, add_special_tokens=False)))
            total += tokens / max(sum(map(len, sample)), 1) * sum(map(len, texts))
    return round(total)


def build_corpus(folder: Path, sources: dict[str, str], tokenizer: str, max_seq_length: int = MAX_SEQ_LENGTH) -> None:
    """Run phase 1 on the sources."""
    command = [sys.executable, str(ROOT / "mlm" / "create_dataset.py"), "--output_dir", str(folder)]
    command += ["--tokenizer_name_or_path", tokenizer, "--max_seq_length", str(max_seq_length)]
    command += ["--validation_rows", "100", "--sources", *(f"{name}={path}" for name, path in sources.items())]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def take_rows(corpus: Path, least: int, most: int) -> pa.Table:
    """The first rows of a corpus, which phase 1 has shuffled: `most` of them, or all.

    Raises:
        UserError: the corpus has fewer rows than `least`.
    """
    tables: list[pa.Table] = []
    for table in read_table(split_files(corpus, "train", "--corpus"), ("text", "source", "kind")):
        tables.append(table)
        if sum(map(len, tables)) >= most:
            break
    taken = pa.concat_tables(tables).slice(0, most)
    if len(taken) < least:
        raise UserError(
            f"--corpus {corpus}: {len(taken)} rows, but the measurements need {least}; use fewer rows or a larger "
            "corpus"
        )
    return taken


def write_data(folder: Path, texts: pa.Table) -> None:
    """Write rows as phase 1's corpus and, with random labels, as phase 4's data."""
    labels = np.random.default_rng(0).standard_normal((len(texts), STUDENT_WIDTH), np.float32)
    labels /= np.linalg.norm(labels, axis=1, keepdims=True)
    column = pa.FixedSizeListArray.from_arrays(pa.array(labels.astype(np.float16).ravel()), STUDENT_WIDTH)
    sentences = texts["text"].combine_chunks()
    tables = {"corpus": texts, "distil": pa.table({"sentence": sentences, "label": column})}
    for name, table in tables.items():
        (folder / name).mkdir(parents=True)
        pq.write_table(table, folder / name / "train-00000-of-00001.parquet")


def write_models(folder: Path, tokenizer: PreTrainedTokenizerBase, teacher_layers: int, max_seq_length: int) -> None:
    """Write a student and a teacher with random weights.

    Args:
        folder: gets `student`, `encoder` and `teacher`.
        tokenizer: of both models.
        teacher_layers: how many layers of ModernBERT-base's size the teacher has.
        max_seq_length: tokens at which the teacher cuts texts.
    """
    torch.manual_seed(0)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep")}
    special |= {"bos_token_id": special["cls_token_id"], "eos_token_id": special["sep_token_id"]}
    student = ModernBertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=STUDENT_WIDTH,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=768,
        max_position_embeddings=MAX_SEQ_LENGTH,
        **special,
    )
    ModernBertForMaskedLM(student).save_pretrained(folder / "student")
    teacher = ModernBertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=TEACHER_WIDTH,
        num_hidden_layers=teacher_layers,
        num_attention_heads=12,
        intermediate_size=1152,
        **special,
    )
    ModernBertModel(teacher).save_pretrained(folder / "encoder")
    for name in ("student", "encoder"):
        tokenizer.save_pretrained(folder / name)
    encoder = Transformer(str(folder / "encoder"), max_seq_length=max_seq_length)
    SentenceTransformer(modules=[encoder, Pooling(TEACHER_WIDTH, "cls")]).save_pretrained(str(folder / "teacher"))


def main() -> None:
    """Write sources, corpus, data and models into one folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where to write; must not exist")
    parser.add_argument("--tokenizer", required=True, help="folder or hub id")
    parser.add_argument("--rows", type=int, required=True, help="rows that must be there to measure on")
    parser.add_argument("--most_rows", type=int, required=True, help="rows to keep, among which some ways sort")
    parser.add_argument("--max_seq_length", type=int, default=MAX_SEQ_LENGTH, help="tokens at which texts are cut")
    parser.add_argument("--sources", nargs="*", help="NAME=PATH of Parquet, as phase 1 reads it; default: docstrings")
    parser.add_argument("--corpus", type=Path, help="phase 1's output; default: one made of the sources")
    parser.add_argument(
        "--no_sources", action="store_true", help="with --corpus, make no sources; building a corpus cannot be measured"
    )
    parser.add_argument("--teacher_layers", type=int, default=4, help="layers of the teacher; ModernBERT-base has 22")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    tokenizer = load_tokenizer("--tokenizer", args.tokenizer)
    if not args.no_sources or args.corpus is None:
        sources = write_sources(args.folder, args.sources, tokenizer)
    if args.corpus is None:
        build_corpus(args.folder / "whole_corpus", sources, args.tokenizer, args.max_seq_length)
    write_data(
        args.folder, take_rows(args.corpus or args.folder / "whole_corpus", args.rows, max(args.rows, args.most_rows))
    )
    write_models(args.folder, tokenizer, args.teacher_layers, args.max_seq_length)


if __name__ == "__main__":
    run_script(main)
