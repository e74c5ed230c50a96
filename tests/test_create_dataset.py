import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from helpers import load_script, run_in_process, tiny_tokenizer

from modernbert_small.corpus import build as corpus
from modernbert_small.corpus import spill
from modernbert_small.evaluation.sets import load_evaluation_sets
from modernbert_small.run.errors import UserError

SCRIPT = "mlm/create_dataset.py"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Calls the script's main with its own sources, in a folder of its own."""
    tiny_tokenizer(tmp_path / "tokenizer")
    triplets = {
        "query": [f"what is number {i}" for i in range(60)],
        "positive": [f"number {i} is the one after {i - 1}" for i in range(60)],
        "negative": [f"number {i} is the one after {i - 1}" for i in range(1, 61)],
    }
    pq.write_table(pa.table(triplets), tmp_path / "triplets.parquet")
    articles = [f"Article {i}.\n\n" + "The cat sat on the mat. " * i for i in range(40)]
    (tmp_path / "articles.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in articles))
    monkeypatch.chdir(tmp_path)

    def call(output="out", *flags):
        defaults = ["--sources", "triplets=triplets.parquet", "articles=articles.jsonl"]
        defaults += ["--tokenizer_name_or_path", "tokenizer", "--max_seq_length", "64", "--validation_rows", "20"]
        monkeypatch.setattr(sys, "argv", [SCRIPT, *defaults, "--output_dir", output, *flags])
        load_script(SCRIPT).main()
        return tmp_path / output

    return call


def parquet_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def folder_bytes(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.parquet")}


def parquet_texts(folder):
    return set(pq.ParquetDataset(sorted(folder.glob("*.parquet"))).read()["text"].to_pylist())


def test_corpus_and_its_record(run, tmp_path, capsys):
    out = run()
    data = load_dataset("parquet", data_dir=str(out), cache_dir=str(tmp_path / "cache"))
    assert data["train"].column_names == ["text", "source", "kind"]
    assert data["validation"].num_rows == 20
    texts = data["train"]["text"][:] + data["validation"]["text"][:]
    assert len(set(texts)) == len(texts)

    record = json.loads((out / "run.json").read_text())
    assert record["rows"] == {"train": data["train"].num_rows, "validation": 20}
    assert record["dropped"]["triplets"] == {"empty": 0, "too_short": 0, "duplicate": 59, "contaminated": 0}
    assert record["split"]["articles"]["split_texts"] > 0
    kinds = {(e["source"], e["kind"]): e for e in record["by_source"]}
    assert list(kinds) == [("triplets", "document"), ("triplets", "query"), ("articles", "document")]
    assert kinds["triplets", "query"]["rows"] == 60
    assert sum(entry["characters"] for entry in kinds.values()) == sum(map(len, texts))
    # Fewer texts than the sample: the estimate is a count.
    tokenizer = tiny_tokenizer(tmp_path / "again")
    assert record["tokens"] == sum(map(len, tokenizer(texts, add_special_tokens=False).input_ids))
    assert sorted(path.name for path in out.iterdir()) == sorted([*record["files"], "run.json"])

    table = capsys.readouterr().out
    assert "tokens ≈" in table
    assert "duplicate" in table


def test_evaluation_queries_are_kept_out(run, tmp_path):
    from test_retrieval import write_set

    write_set(tmp_path / "evaluation")
    queries = {"_id": ["q1", "q2"], "text": ["What is number 3?", "unheard of"]}
    pq.write_table(pa.table(queries), tmp_path / "evaluation" / "queries" / "Toy-00000-of-00001.parquet")
    before, after, kept = (
        run(name, *flags)
        for name, flags in (
            ("before", ()),
            ("after", ("--eval_datasets", "evaluation")),
            ("kept", ("--eval_datasets", "evaluation", "--decontaminate", "no")),
        )
    )
    assert parquet_texts(before) - parquet_texts(after) == {"what is number 3"}
    assert json.loads((after / "run.json").read_text())["dropped"]["triplets"]["contaminated"] == 1
    assert parquet_bytes(kept) == parquet_bytes(before)


def test_skipped_rows_are_counted_in_the_record_and_shown(run, tmp_path, capsys, caplog):
    articles = tmp_path / "articles.jsonl"
    articles.write_text('{"text": null}\nnot JSON\n' + articles.read_text())
    record = json.loads((run() / "run.json").read_text())
    first = "articles.jsonl: row 1, column 'text': null; expected a string"
    assert record["skipped"] == {"articles": {"rows": 2, "first": first}}
    assert record["read"]["articles"]["rows"] == 40
    assert f"articles: rows skipped: 2; the first: {first}" in capsys.readouterr().out
    assert f"articles: rows skipped: 2; the first: {first}" in caplog.text
    with pytest.raises(UserError, match="row 1, column 'text': null"):
        run("strict", "--strict")
    assert not (tmp_path / "strict").exists()


def test_pairs_are_held_out_of_the_corpus_as_an_evaluation_set(run, tmp_path):
    before, out = (parquet_texts(run(*flags)) for flags in (("before",), ("out", "--eval_datasets", "heldout")))
    ((heldout,), _) = load_evaluation_sets("--eval_datasets", [str(tmp_path / "out" / "heldout")])
    assert heldout.name == "heldout"
    assert len(heldout.queries) == 6  # a tenth of the pairs
    assert len(heldout.corpus) == 60
    for query, documents in heldout.relevant.items():
        number = heldout.queries[query].removeprefix("what is number ")
        assert [heldout.corpus[document] for document in documents] == [
            f"number {number} is the one after {int(number) - 1}"
        ]
    relevant = {heldout.corpus[document] for documents in heldout.relevant.values() for document in documents}
    assert before - out == set(heldout.queries.values()) | relevant
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["evaluation_sets_kept_out"] == ["heldout"]
    assert record["dropped"]["triplets"]["contaminated"] == 12
    assert run("again", "--eval_datasets", "heldout")
    assert folder_bytes(tmp_path / "again" / "heldout") == folder_bytes(tmp_path / "out" / "heldout")
    with pytest.raises(UserError, match="eval_datasets heldout: no source has queries with their documents"):
        run("none", "--sources", "articles=articles.jsonl", "--eval_datasets", "heldout")
    with pytest.raises(UserError, match="decontaminate: no, but eval_datasets has heldout"):
        run("no", "--eval_datasets", "heldout", "--decontaminate", "no")


def test_few_queries_with_many_documents_each_stay_in_the_corpus(run, tmp_path):
    """Triplets repeat a query and its answer for each negative: a tenth of the queries is held out, not all."""
    triplets = {name: [f"{name} {i}" for i in range(20) for _ in range(20)] for name in ("query", "positive")}
    triplets["negative"] = [f"negative {i}" for i in range(400)]
    pq.write_table(pa.table(triplets), tmp_path / "triplets.parquet")
    ((heldout,), _) = load_evaluation_sets("x", [str(run("out", "--eval_datasets", "heldout") / "heldout")])
    assert len(heldout.queries) == 2


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(run):
    first = run("first", "--max_rows_per_source", "30")
    assert parquet_bytes(run("second", "--max_rows_per_source", "30")) == parquet_bytes(first)
    assert parquet_bytes(run("third", "--max_rows_per_source", "30", "--seed", "1")) != parquet_bytes(first)


def test_default_evaluation_sets_that_cannot_be_had_are_said(run, caplog):
    record = json.loads((run() / "run.json").read_text())
    assert record["settings"]["eval_datasets"] == ["msmarco", "hotpotqa"]
    assert record["evaluation_sets_kept_out"] == []
    assert "no evaluation set is kept out of this corpus: scores on msmarco and hotpotqa" in caplog.text
    with pytest.raises(
        UserError, match=r"--eval_datasets msmarco: .*NanoBEIR-en: the Hugging Face hub cannot be reached"
    ):
        run("asked", "--eval_datasets", "msmarco")  # by name, so they are wanted
    assert json.loads((run("none", "--eval_datasets") / "run.json").read_text())["evaluation_sets_kept_out"] == []


def test_a_finished_corpus_is_left_alone(run, monkeypatch):
    before = parquet_bytes(run())
    monkeypatch.setattr(spill, "_chunked", None)
    assert parquet_bytes(run()) == before
    with pytest.raises(UserError, match=r"seed: 42 -> 43"):
        run("out", "--seed", "43")


def stop(*_arguments, **_flags):
    raise KeyboardInterrupt


def stop_at_articles(rows, counts, name, original=spill._batches):
    return stop() if name == "articles" else original(rows, counts, name)


def stop_half_discarded(folder):
    folder.rename(folder.with_name("spill.discarded"))
    next(folder.with_name("spill.discarded").rglob("*.arrow")).unlink()
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("where", "name", "interrupt"),
    [
        (spill, "_batches", stop_at_articles),
        (corpus, "_first_of_equals", stop),
        (load_script(SCRIPT), "discard_spill", stop),
        (load_script(SCRIPT), "discard_spill", stop_half_discarded),
        (load_script(SCRIPT), "measure", stop),
    ],
    ids=["second source", "merge", "before discarding", "while discarding", "before run.json"],
)
def test_an_interrupted_run_goes_on_and_ends_the_same(run, tmp_path, monkeypatch, where, name, interrupt):
    whole = parquet_bytes(run("whole"))
    with monkeypatch.context() as patched:
        patched.setattr(where, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run("cut")
    assert not (tmp_path / "cut").exists()
    assert parquet_bytes(run("cut")) == whole
    assert not (tmp_path / "cut.partial").exists()
    assert not list((tmp_path / "cut").glob("spill*"))


def test_a_validation_split_of_half_of_the_corpus_shrinks_to_a_tenth_and_says_so(run, caplog):
    asked = run("asked", "--validation_rows", "5000")
    rows = json.loads((asked / "run.json").read_text())["rows"]
    assert rows["validation"] == sum(rows.values()) // 10
    assert f"validation_rows: 5000 is half of the corpus's {sum(rows.values())} texts or more" in caplog.text
    assert f"has {rows['validation']} texts" in caplog.text
    directly = run("directly", "--validation_rows", str(rows["validation"]))
    assert parquet_bytes(asked) == parquet_bytes(directly)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_seq_length", "8", "--validation_rows", "0"], "max_seq_length: 8; use at least 16; validation_rows: 0"),
        (
            ["--tokenizer_name_or_path", "nowhere/tokenizer"],
            "--tokenizer_name_or_path nowhere/tokenizer: no such folder",
        ),
        (["--sources", "triplets=triplets.parquet", "other=articles.csv"], "other=articles.csv"),
    ],
)
def test_bad_settings_write_nothing(run, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        run("out", *flags)
    assert not list(tmp_path.glob("out*"))


def test_without_a_hub_the_recipe_ends_in_one_line(tmp_path, capsys):
    done = run_in_process(SCRIPT, tmp_path, capsys)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if " settings: " not in line]
    assert "sentence-transformers/msmarco-msmarco-MiniLM-L6-v3" in line
    assert "--sources msmarco=<local path>" in line
    assert not list(tmp_path.iterdir())
