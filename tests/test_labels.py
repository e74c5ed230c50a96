"""Labels against SentenceTransformer.encode, for packed and padded teachers, prompts and any budget."""

import numpy as np
import pytest
import torch
from helpers import SENTENCES, tiny_sentence_transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from modernbert_small.label.labeller import Labeller
from modernbert_small.label.sample import Sample
from modernbert_small.run import devices
from modernbert_small.run.errors import UserError

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
