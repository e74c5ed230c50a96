"""Labels against SentenceTransformer.encode, for packed and padded teachers, prompts and any budget; damaged ones."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import SENTENCES, load_script, tiny_sentence_transformer
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from test_durable import WAYS, contents, spoil

from modernbert_small.distil.labels import load_labels
from modernbert_small.label import shards
from modernbert_small.label.labeller import Labeller
from modernbert_small.label.sample import Sample
from modernbert_small.label.shards import label_split
from modernbert_small.run import devices
from modernbert_small.run.errors import UserError
from modernbert_small.run.shards import read_table

CPU = torch.device("cpu")
TEXTS = [*SENTENCES, "", "a", " ".join(SENTENCES * 3), "[MASK] stays text"]


@pytest.fixture(autouse=True)
def _float32(monkeypatch):
    monkeypatch.setattr(devices, "has_bf16", lambda device: False)


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
@pytest.mark.parametrize("tokens_per_batch", [1, 80, 10_000])
def test_labels_are_what_encode_gives(tmp_path, architecture, tokens_per_batch):
    teacher = tiny_sentence_transformer(tmp_path, architecture, max_seq_length=48)
    plain = [text for text in TEXTS if "[" not in text]
    expected = teacher.encode(plain, normalize_embeddings=False)
    labeller = Labeller(teacher, CPU, tokens_per_batch, "auto")
    got = labeller.embed(labeller.tokenize(plain, ["document"] * len(plain)))
    np.testing.assert_allclose(got, expected, atol=2e-6)
    padded = architecture == "bert" and tokens_per_batch > 1
    assert (labeller.speed["padding_share"] > 0) == padded
    assert labeller.speed["tokens_per_second"] > 0


@pytest.mark.parametrize("known_rows", [[], [0, 3], [4, 6, 9, 11], list(range(5, 11))])
def test_what_the_sample_has_is_not_embedded_again(tmp_path, known_rows):
    teacher = tiny_sentence_transformer(tmp_path, "bert")
    labeller = Labeller(teacher, CPU, 100, "auto")
    first, rows = 5, labeller.tokenize(TEXTS[:6], ["document"] * 6)
    expected = labeller.embed(rows)
    marked = np.full((len(known_rows), expected.shape[1]), 7, np.float32)
    Sample(np.array(known_rows, np.int64), marked).save(tmp_path / "sample.npz")
    known = Sample.load(tmp_path / "sample.npz", expected.shape[1]).within(first, len(rows))
    tokens_before = labeller.tokens
    got = labeller.embed_rest(rows, known)
    inside = np.isin(np.arange(first, first + len(rows)), known_rows)
    np.testing.assert_array_equal(got[inside], 7)
    np.testing.assert_allclose(got[~inside], expected[~inside], atol=2e-6)
    embedded = sum(len(row) for row, is_known in zip(rows, inside, strict=True) if not is_known)
    assert labeller.tokens - tokens_before == embedded


def test_special_tokens_in_a_text_are_not_special(tmp_path):
    teacher = tiny_sentence_transformer(tmp_path, "bert")
    (row,) = Labeller(teacher, CPU, 100, "auto").tokenize(TEXTS[-1:], ["query"])
    assert teacher.tokenizer.mask_token_id not in row


def test_queries_get_the_query_prompt_and_documents_theirs(tmp_path):
    teacher = tiny_sentence_transformer(tmp_path, "bert")
    teacher.prompts = {"query": "find: ", "passage": "text: "}
    labeller = Labeller(teacher, CPU, 1000, "auto")
    got = labeller.embed(labeller.tokenize(SENTENCES[:2], ["query", "document"]))
    expected = teacher.encode(["find: " + SENTENCES[0], "text: " + SENTENCES[1]], prompt="")
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_a_pooling_without_the_prompt_is_refused(tmp_path):
    teacher = tiny_sentence_transformer(tmp_path, "bert")
    teacher.prompts = {"query": "find: "}
    next(module for module in teacher if isinstance(module, Pooling)).include_prompt = False
    with pytest.raises(UserError, match="pooling leaves its prompt out"):
        Labeller(teacher, CPU, 1000, "auto")


def test_texts_longer_than_the_teacher_reads_are_counted(tmp_path):
    teacher = tiny_sentence_transformer(tmp_path, "bert", max_seq_length=12)
    texts = ["a", " ".join(SENTENCES), "b", " ".join(SENTENCES)]
    labeller = Labeller(teacher, CPU, 100, "auto")
    rows = labeller.tokenize(texts, ["document"] * 4)
    assert labeller.truncated == 2
    assert [len(row) == 12 for row in rows] == [False, True, False, True]


@pytest.fixture
def label(tmp_path, monkeypatch):
    """Labels a corpus of seven texts, three to a shard, into tmp_path / "distil"."""
    monkeypatch.setattr(shards, "ROWS_PER_SHARD", 3)
    texts = [f"{text} {index}" for index, text in enumerate(TEXTS[:7])]
    (tmp_path / "corpus").mkdir()
    corpus = pa.table({"text": texts, "source": ["own"] * 7, "kind": ["query", *["document"] * 6]})
    pq.write_table(corpus, tmp_path / "corpus" / "train-00000-of-00001.parquet")
    teacher = tiny_sentence_transformer(tmp_path, "bert")
    (tmp_path / "distil").mkdir()

    def call():
        labeller = Labeller(teacher, CPU, 100, "auto")
        label_split(str(tmp_path / "corpus"), "train", labeller, Sample.none(24), tmp_path / "distil")
        return labeller.tokens

    return call


@pytest.mark.parametrize(("rows", "size"), [(100, 1024), (65_000, 1024), (100_000, 1563), (10_000_000, 32_768)])
def test_a_small_split_has_small_shards_that_processes_can_share(rows, size):
    assert shards.rows_per_shard(rows) == size


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=3), st.integers(1, 7), st.integers(1, 9), st.data())
def test_a_split_is_read_from_any_row_on(tmp_path_factory, sizes, group, step, data):
    folder, total = tmp_path_factory.mktemp("split"), sum(sizes)
    files = [folder / f"{index}.parquet" for index in range(len(sizes))]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    for file, start, size in zip(files, starts, sizes, strict=True):
        texts = pa.array(map(str, range(start, start + size)), pa.string())
        pq.write_table(pa.table({"text": texts}), file, row_group_size=group)
    first = data.draw(st.integers(0, total))
    found = [text for table in read_table(files, ["text"], step, first) for text in table["text"].to_pylist()]
    assert found == [str(row) for row in range(first, total)]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("index", range(3))
def test_a_damaged_shard_is_named_and_made_again(label, tmp_path, caplog, index, how):
    everything = label()
    assert label() == 0
    before = contents(tmp_path / "distil")
    shard = tmp_path / "distil" / f"train-0000{index}-of-00003.parquet"
    spoil(shard, how)
    assert 0 < label() < everything
    assert contents(tmp_path / "distil") == before
    named = [message for message in caplog.messages if f"{shard} is damaged and is made again" in message]
    assert len(named) == (how != "delete")


@pytest.mark.parametrize("what", ["label", "sentence", "metadata"])
def test_a_whole_shard_with_other_content_is_made_again(label, tmp_path, what):
    label()
    before = contents(tmp_path / "distil")
    shard = tmp_path / "distil" / "train-00001-of-00003.parquet"
    table = pq.read_table(shard)
    if what == "metadata":
        changed = table.replace_schema_metadata({"tokens": "9", "truncated_rows": "0"})
    else:
        place = table.schema.get_field_index(what)
        changed = table.set_column(place, table.schema.field(what), table[what].take(pa.array([1, 0, 2])))
    pq.write_table(changed, shard)
    assert label() > 0
    assert contents(tmp_path / "distil") == before


@pytest.mark.parametrize("how", [*WAYS, "flip"])
def test_a_damaged_sample_is_named_and_not_used(tmp_path, caplog, how):
    path = tmp_path / "sample.npz"
    vectors = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    Sample(np.arange(9), vectors).save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["sample.npz"]
    np.testing.assert_array_equal(Sample.load(path, 4).vectors, vectors)
    if how == "flip":
        content = bytearray(path.read_bytes())
        content[content.index(vectors.tobytes()) + 7] ^= 1
        path.write_bytes(content)
    else:
        spoil(path, how)
    assert Sample.load(path, 4).vectors.shape == (0, 4)
    assert len([message for message in caplog.messages if f"{path} is damaged" in message]) == (how != "delete")


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", ["labels.npy", "manifest.json"])
def test_a_damaged_copy_of_labels_is_named_and_made_again(tmp_path, caplog, name, how):
    labels = np.eye(5, 8, dtype=np.float16)
    column = pa.FixedSizeListArray.from_arrays(pa.array(labels.ravel()), 8)
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"label": column}), tmp_path / "data" / "train-00000-of-00001.parquet")
    np.testing.assert_array_equal(load_labels(tmp_path / "data", "train"), labels)
    (made,) = (path for path in (tmp_path / "data.tokens").iterdir() if path.is_dir())
    before = contents(made)
    spoil(made / name, how)
    np.testing.assert_array_equal(load_labels(tmp_path / "data", "train"), labels)
    assert contents(made) == before
    (said,) = [message for message in caplog.messages if "is made again" in message]
    assert name in said


def test_the_card_of_the_reduced_teacher_embeds_nothing(tmp_path, monkeypatch):
    """On a GPU the reduced teacher may have been given kernels that do not compute in float32, as a card's examples do.

    save_pretrained of sentence-transformers writes such a card; the teacher has one of its own.
    """
    phase, teacher = load_script("create_distil_dataset.py"), tiny_sentence_transformer(tmp_path, "modernbert")
    monkeypatch.setattr(SentenceTransformer, "encode", None)  # a call would be a TypeError
    record = {"inputs": {"teacher": {"hub_id": "somebody/teacher"}}}
    run = SimpleNamespace(folder=tmp_path / "reduced", finish=lambda measurements: None, record=record)
    args = phase.DistilDatasetArguments(embedding_dim=24)
    phase.save_reduced_teacher(run, teacher, args, tmp_path / "sample.npz")
    assert (tmp_path / "reduced" / "README.md").exists()
