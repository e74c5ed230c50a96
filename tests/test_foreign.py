"""A corpus and labels that were made elsewhere, in the forms in which other libraries write them."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import SENTENCES, run_in_process, tiny_modernbert, tiny_sentence_transformer
from test_retrieval import write_set

from modernbert_small.distil.labels import load_labels
from modernbert_small.run.errors import UserError
from modernbert_small.run.shards import check_splits, read_table, split_files

ROWS = {"train": 60, "validation": 20}
WIDTH = 16


def rows(split, names):
    """Texts and labels as Python lists."""
    rng = np.random.default_rng(len(split))
    labels = rng.normal(size=(ROWS[split], WIDTH))
    labels /= np.linalg.norm(labels, axis=1, keepdims=True)
    texts = [f"{SENTENCES[index % 4]} {split} {index}" for index in range(ROWS[split])]
    columns = {"text": texts, "sentence": texts, "kind": ["query", "document"] * (ROWS[split] // 2)}
    return {name: columns.get(name, labels.tolist()) for name in names}


def with_datasets(path, columns):
    from datasets import Dataset

    Dataset.from_dict(columns).to_parquet(str(path))


def with_polars(path, columns):
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame(columns)
    if "label" in columns:
        frame = frame.with_columns(polars.col("label").cast(polars.Array(polars.Float32, WIDTH)))
    if "kind" in columns:
        frame = frame.with_columns(polars.col("kind").cast(polars.Categorical))
    frame.write_parquet(path)


def with_duckdb(path, columns):
    duckdb = pytest.importorskip("duckdb")
    table = pa.table(columns)  # which duckdb finds by its name
    duckdb.connect().execute(f"COPY (SELECT * FROM table) TO '{path}' (FORMAT parquet)".replace("table", '"table"'))
    assert table.num_rows


def with_arrow(path, columns):
    """In the types in which Spark, polars and pandas have them."""
    kinds = {"text": pa.large_string(), "sentence": pa.large_string(), "label": pa.large_list(pa.float64())}
    table = {name: pa.array(values, kinds.get(name)) for name, values in columns.items()}
    if "kind" in table:
        table["kind"] = table["kind"].dictionary_encode()
    pq.write_table(pa.table(table), path)


WRITERS = [with_datasets, with_polars, with_duckdb, with_arrow]
PLACES = ["train.parquet", "train-00000-of-00001.parquet", "train/part-0.snappy.parquet"]


def write(folder, writer, place, names):
    """Both splits in one library's form."""
    for split in ROWS:
        path = folder / place.replace("train", split)
        path.parent.mkdir(parents=True, exist_ok=True)
        writer(path, rows(split, names))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_corpus_is_read_as_its_rows(tmp_path, caplog, writer, place):
    write(tmp_path / "corpus", writer, place, ["text", "kind"])
    with caplog.at_level("INFO"):
        check_splits(tmp_path / "corpus", ["text", "source", "kind"])
    (said,) = caplog.messages
    assert said.endswith("made elsewhere: 60 train and 20 validation rows; no column source: each is 'unknown'")
    table = pa.concat_tables(read_table(split_files(tmp_path / "corpus", "train"), ["text", "source", "kind"]))
    assert table.to_pydict() == rows("train", ["text", "kind"]) | {"source": ["unknown"] * 60}
    assert {str(field.type) for field in table.schema} == {"string"}


@pytest.mark.parametrize("name", ["sentence", "text"])
@pytest.mark.parametrize("writer", WRITERS)
def test_labels_are_read_as_their_numbers(tmp_path, writer, name):
    write(tmp_path / "labels", writer, PLACES[0], [name, "label"])
    check_splits(tmp_path / "labels", ["sentence", "label"])
    expected = rows("train", ["sentence", "label"])
    np.testing.assert_allclose(load_labels(tmp_path / "labels", "train"), expected["label"], atol=1e-3)
    (table,) = read_table(split_files(tmp_path / "labels", "train"), ["sentence"])
    assert table["sentence"].to_pylist() == expected["sentence"]


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ([[1.0, 0.0], [1.0]], "labels of 1 and 2 values; expected lists of one width"),
        ([[1.0, None], [1.0, 0.0]], "1 nulls within labels; expected numbers"),
        ([[1.0, 0.0], None], "column 'label' is null in row 1"),
        ([[1, 0], [0, 1]], "expected lists of one width, of floating-point numbers"),
        ([[3.0, 4.0], [1.0, 0.0]], "row 0 has length 5.0, expected 1"),
    ],
)
def test_bad_labels_are_refused(tmp_path, label, said):
    pq.write_table(pa.table({"text": ["a", "b"], "label": label}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=said):
        load_labels(tmp_path, "train")


def test_data_in_one_split_are_refused_with_what_is_missing(tmp_path):
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"no validation-\*.parquet in it, nor validation/\*.parquet; expected"):
        check_splits(tmp_path, ["text"])


def test_phases_3_to_5_take_them(tmp_path, capsys):
    """Phase 3 and 4 a corpus without kinds, phase 5 labels under the name `text`; no run.json anywhere."""
    teacher = tiny_sentence_transformer(tmp_path / "small", "bert", width=24)
    tiny_modernbert(tmp_path / "init", teacher.tokenizer)
    teacher.tokenizer.save_pretrained(tmp_path / "init")
    write_set(tmp_path / "evaluation")
    write(tmp_path / "corpus", with_arrow, PLACES[2], ["text"])
    write(tmp_path / "labels", with_arrow, PLACES[0], ["text", "label"])
    training = ["--max_seq_length", "64", "--tokens_per_batch", "512", "--max_steps", "2", "--report_to", "none"]
    phase_3 = ["--model_name_or_path", "init", "--train_file", "corpus", "--output_dir", "mlm", *training]
    phase_4 = ["--teacher_name_or_path", "small/teacher", "--train_file", "corpus", "--embedding_dim", "16"]
    phase_4 += ["--teacher_output_dir", "teacher", "--output_dir", "distil"]
    phase_5 = ["--model_name_or_path", "init", "--teacher_name_or_path", "teacher", "--train_file", "labels"]
    phase_5 += ["--eval_datasets", "evaluation", "--output_dir", "model", *training]
    for script, flags in (
        ("mlm/pre_train.py", phase_3),
        ("create_distil_dataset.py", phase_4),
        ("distil_train.py", phase_5),
    ):
        done = run_in_process(script, tmp_path, capsys, *flags)
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "model" / "run.json").read_text())["rows"] == ROWS
    assert set(pq.read_table(sorted((tmp_path / "distil").glob("train-*"))[0])["kind"].to_pylist()) == {"document"}
    shutil.rmtree(tmp_path / "corpus.tokens")
