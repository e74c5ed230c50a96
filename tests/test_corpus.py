from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from helpers import tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_durable import WAYS, contents, spoil

from modernbert_small.corpus import build as corpus
from modernbert_small.corpus import spill
from modernbert_small.corpus.build import SpilledCorpus
from modernbert_small.corpus.sources import Part, Source
from modernbert_small.corpus.spill import spill_sources
from modernbert_small.corpus.text import Chunker, normalise
from modernbert_small.run.errors import UserError
from modernbert_small.run.shards import RowStream

SEED = 7


@pytest.fixture(scope="module")
def chunker(tmp_path_factory):
    return Chunker(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")), max_seq_length=64)


def make_source(name, rows):
    return Source(name, None, [Part(lambda _seed: iter(rows))])


def build(folder, sources, chunker, validation_rows=2):
    """Both passes; returns the shards' rows in order, file names, counts and duplicates."""
    opened = [make_source(name, rows) for name, rows in sources.items()]
    counts = spill_sources(opened, folder / "spill", chunker, None, SEED)
    tally = SpilledCorpus(folder / "spill", counts).write(folder, validation_rows)
    files = {path.name: pq.read_metadata(path).num_rows for path in sorted(folder.glob("*.parquet"), reverse=True)}
    files = dict(sorted(files.items(), key=lambda item: (item[0].startswith("train"), item[0])))
    rows = [row for name in files for row in pq.read_table(folder / name).to_pylist()]
    assert tally.rows.total() == len(rows)
    return rows, files, counts, tally.duplicates


def reference(sources):
    """Of equal texts the first source's, a query rather than a document, in the order of the seeded hash."""
    first = {}
    for name, rows in sources.items():
        texts = sorted((pair for row in rows for pair in row), reverse=True)
        for kind, text in texts:
            first.setdefault(normalise(text), {"text": normalise(text), "source": name, "kind": kind})
    return sorted(first.values(), key=lambda row: xxhash.xxh3_64_intdigest(row["text"].encode(), SEED))


TEXTS = st.sampled_from([f"text number {i}" for i in range(30)])
ROWS = st.lists(st.lists(st.tuples(st.sampled_from(["query", "document"]), TEXTS), max_size=3), max_size=20)


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.tuples(ROWS, ROWS))
def test_corpus_equals_the_reference(tmp_path_factory, chunker, both):
    sources = dict(zip(("first", "second"), both, strict=True))
    rows, _, counts, duplicates = build(tmp_path_factory.mktemp("corpus"), sources, chunker)
    assert rows == reference(sources)
    given_texts = sum(len(row) for rows in both for row in rows)
    assert sum(count["spilled"] for count in counts.values()) == given_texts
    assert duplicates.total() == given_texts - len(rows)


def test_size_of_spill_files_and_batches_changes_nothing(tmp_path, chunker, monkeypatch):
    sources = {"a": [[("document", f"text {i % 70}")] for i in range(100)], "b": [[("query", "text 5")]]}
    whole, *_ = build(tmp_path / "whole", sources, chunker)
    monkeypatch.setattr(spill, "_SPILL_BYTES", 100)
    monkeypatch.setattr(spill, "_BATCH_ROWS", 7)
    parts, *_ = build(tmp_path / "parts", sources, chunker)
    assert len(list((tmp_path / "parts/spill/a").glob("*/*.arrow"))) > 5
    assert parts == whole == reference(sources)


def test_shards_are_bounded_and_named_by_their_number(tmp_path, chunker, monkeypatch):
    monkeypatch.setattr(corpus, "_ROWS_PER_SHARD", 40)
    monkeypatch.setattr(corpus, "_ROWS_PER_GROUP", 15)
    (tmp_path / "train-00009-of-00010.parquet").touch()
    rows = [[("document", f"text {i}")] for i in range(100)]
    written, files, *_ = build(tmp_path, {"a": rows}, chunker, validation_rows=10)
    names = [f"train-0000{i}-of-00003.parquet" for i in range(3)]
    assert list(files) == ["validation-00000-of-00001.parquet", *names]
    assert files["validation-00000-of-00001.parquet"] == 10
    assert max(files.values()) < 60
    assert sum(files.values()) == 100
    assert sorted(path.name for path in tmp_path.glob("*.parquet")) == sorted(files)
    assert len({row["text"] for row in written}) == 100
    file = pq.ParquetFile(tmp_path / names[0])
    assert file.schema_arrow.equals(corpus.SCHEMA)
    assert file.num_row_groups == -(-files[names[0]] // 15)


def test_validation_rows_are_in_no_shard(tmp_path, chunker, monkeypatch):
    """The first of as many shards as there are buckets is empty if the validation split takes a bucket and a half."""
    monkeypatch.setattr(corpus, "_ROWS_PER_SHARD", 40)
    rows = [[("document", f"text {i}")] for i in range(320)]
    written, files, *_ = build(tmp_path, {"a": rows}, chunker, validation_rows=60)
    assert files["train-00000-of-00008.parquet"] == 0
    assert [row["text"] for row in written] == [row["text"] for row in reference({"a": rows})]


def test_spilled_files_that_are_not_seen_are_missed(tmp_path, chunker):
    counts = spill_sources([make_source("a", [[("document", "a text")]])], tmp_path, chunker, None, SEED)
    (tmp_path / "a" / "00000" / "00000.arrow").unlink()
    with pytest.raises(UserError, match="0 files of texts are seen here, but 1 were written"):
        SpilledCorpus(tmp_path, counts)


def test_what_is_dropped_and_split_is_counted(tmp_path, chunker):
    long = "The cat sat on the mat. " * 60
    rows = [[("query", " \n"), ("document", "- 1 -")], [("document", long)], [("document", "the dog")]]
    written, _, counts, _ = build(tmp_path, {"a": rows}, chunker)
    count = counts["a"]
    assert (count["rows"], count["texts"], count["empty"], count["too_short"]) == (3, 4, 1, 1)
    assert count["split_texts"] == 1
    assert count["spilled"] == count["chunks"] + 1
    assert {row["kind"] for row in written} == {"document"}


def test_different_texts_of_one_hash_are_both_kept():
    columns = {"text": ["b", "a", "b", "a"], "source": ["x", "x", "y", "y"], "kind": ["query"] * 4, "hash": [1] * 4}
    duplicates = Counter()
    kept = corpus._first_of_equals(pa.table(columns | {"order": [0, 0, 1, 1]}), duplicates).to_pylist()
    assert [(row["text"], row["source"]) for row in kept] == [("a", "x"), ("b", "x")]
    assert duplicates == {"y": 2}


def test_a_source_half_read_is_begun_anew_and_a_whole_one_is_not(tmp_path, chunker):
    rows = [[("document", f"text {i}")] for i in range(10)]
    (tmp_path / "a" / "00000").mkdir(parents=True)
    (tmp_path / "a" / "00000" / "00000.arrow").write_bytes(b"half")
    counts = spill_sources([make_source("a", rows)], tmp_path, chunker, None, SEED)
    assert counts["a"]["spilled"] == 10

    def unreadable(_seed):
        raise AssertionError("read again")

    assert spill_sources([Source("a", None, [Part(unreadable)])], tmp_path, chunker, None, SEED) == counts


def test_more_buckets_and_smaller_units_change_nothing(tmp_path, chunker, monkeypatch):
    rows = [[("document", f"text {i % 70}")] for i in range(200)]
    whole, *_ = build(tmp_path / "whole", {"a": rows}, chunker)
    monkeypatch.setattr(corpus, "_BUCKET_BYTES", 500)
    parts = [Part(lambda _seed, first=first: iter(rows[first : first + 20]), 1 << 20) for first in range(0, 200, 20)]
    counts = spill_sources([Source("a", None, parts)], tmp_path / "spill", chunker, None, SEED)
    assert len(list((tmp_path / "spill" / "a").iterdir())) == 10
    SpilledCorpus(tmp_path / "spill", counts).write(tmp_path, 2)
    names = ("validation-00000-of-00001.parquet", "train-00000-of-00001.parquet")
    assert [row for name in names for row in pq.read_table(tmp_path / name).to_pylist()] == whole


def test_finished_shards_are_not_made_again_and_damaged_ones_are(tmp_path, chunker, monkeypatch):
    monkeypatch.setattr(corpus, "_ROWS_PER_SHARD", 40)
    rows = [[("document", f"text {i}")] for i in range(100)]
    counts = spill_sources([make_source("a", rows)], tmp_path / "spill", chunker, None, SEED)
    spilled = SpilledCorpus(tmp_path / "spill", counts)
    tally = spilled.write(tmp_path, 10)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.parquet")}
    damaged = tmp_path / "train-00001-of-00003.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    made = []
    write_shard = corpus._write_shard
    monkeypatch.setattr(corpus, "_write_shard", lambda *shard: (made.append(shard[1]), write_shard(*shard)))
    again = spilled.write(tmp_path, 10)
    assert {path.name for path in made} == {"validation-00000-of-00001.parquet", damaged.name}
    assert {path: path.read_bytes() for path in before} == before
    assert again.as_json() == tally.as_json()


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", ["00000.arrow", "00001.arrow", "counts.json", "manifest.json"])
def test_a_damaged_spill_is_named_and_its_source_is_read_again(tmp_path, chunker, monkeypatch, caplog, name, how):
    monkeypatch.setattr(spill, "_SPILL_BYTES", 100)
    monkeypatch.setattr(spill, "_BATCH_ROWS", 7)
    sources = {name: [[("document", f"text {i} of {name}")] for i in range(14)] for name in ("a", "b")}
    rows, *_ = build(tmp_path, sources, chunker)
    before = contents(tmp_path / "spill")
    spoil(tmp_path / "spill" / "b" / "00000" / name, how)
    read = []

    def watched(source):
        yield from (read.append(source) or row for row in sources[source])

    again, *_ = build(tmp_path, {source: watched(source) for source in sources}, chunker)
    assert set(read) == {"b"}
    assert again == rows
    assert contents(tmp_path / "spill") == before
    (said,) = [message for message in caplog.messages if "is read again" in message]
    assert said.startswith("b: ")
    assert name in said


def test_copies_in_masses_are_never_held_together(tmp_path, chunker, monkeypatch):
    """All of them are in one bucket; the second pass holds one of them a file."""
    monkeypatch.setattr(spill, "_BATCH_ROWS", 100)
    monkeypatch.setattr(spill, "_SPILL_BYTES", 1000)
    held, first_of_equals = [], corpus._first_of_equals

    def counted(table, duplicates):
        held.append(table.num_rows)
        return first_of_equals(table, duplicates)

    monkeypatch.setattr(corpus, "_first_of_equals", counted)
    sources = {
        "a": [[("document", "the same text")]] * 1500 + [[("document", f"text {i}")] for i in range(300)],
        "b": [[("query", "the same text")]] * 600,
    }
    rows, _, counts, duplicates = build(tmp_path, sources, chunker)
    files = len(list((tmp_path / "spill").rglob("*.arrow")))
    assert files > 20
    assert max(held) <= 100 + files
    assert rows == reference(sources)
    assert duplicates == {"a": 1499, "b": 600}
    assert counts["a"]["spilled"] == 1800


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 9), max_size=8), st.integers(1, 7))
def test_row_stream_cuts_tables_as_one(sizes, step):
    total = sum(sizes)
    whole = pa.table({name: [str(i) for i in range(total)] for name in corpus.SCHEMA.names}, corpus.SCHEMA)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    stream = RowStream(whole.slice(start, size) for start, size in zip(starts, sizes, strict=True))
    taken = []
    while (table := stream.take(step)) is not None:
        taken.append(table)
    assert all(table.num_rows == step for table in taken[:-1])
    assert pa.concat_tables([whole.slice(0, 0), *taken]).equals(whole)
