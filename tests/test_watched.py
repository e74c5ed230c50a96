"""Evaluations while a model trains, against sentence-transformers' own evaluator."""

import numpy as np
import pytest
import torch
from helpers import SENTENCES, tiny_modernbert, tiny_tokenizer
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from modernbert_small.evaluation.sets import RetrievalSet
from modernbert_small.evaluation.watched import PackedEvaluator
from modernbert_small.packed.attention import use_packed_attention
from modernbert_small.run.loading import load_pooled

WORDS = sorted({word for sentence in SENTENCES for word in sentence.split()})


@pytest.fixture
def student(tmp_path):
    tiny_modernbert(tmp_path, tiny_tokenizer(tmp_path))
    student = load_pooled("model", str(tmp_path), 64, "cpu")
    use_packed_attention(student[0].auto_model, "auto", torch.device("cpu"), torch.float32)
    return student


def random_set(name, documents, queries, seed):
    """Texts of up to 60 words, of which the longest are cut; no two are equal, whose order would be luck."""
    rng = np.random.default_rng(seed)
    corpus = {f"d{i}": " ".join(rng.choice(WORDS, rng.integers(4, 60))) for i in range(documents)}
    asked = {f"q{i}": " ".join(rng.choice(WORDS, rng.integers(1, 8))) for i in range(queries)}
    found = {query: {f"d{i}" for i in rng.integers(0, documents, rng.integers(1, 15))} for query in asked}
    return RetrievalSet(name, asked, corpus, found)


def test_scores_are_those_of_sentence_transformers(student):
    sets = [random_set("First", 150, 20, seed=0), random_set("Second", 40, 30, seed=1)]
    got = PackedEvaluator(sets, student.tokenizer, 64, 256)(student)
    for one in sets:
        theirs = InformationRetrievalEvaluator(one.queries, one.corpus, one.relevant, name=one.name, write_csv=False)
        name = f"{one.name}_cosine_ndcg@10"
        assert got.pop(name) == pytest.approx(theirs(student)[name], abs=1e-4)
    assert got == {}


def test_texts_are_tokenised_once_and_each_token_is_computed_once(student, monkeypatch):
    one = random_set("Set", 60, 10, seed=0)
    watched = PackedEvaluator([one], student.tokenizer, 64, 256)
    monkeypatch.setattr(type(student), "tokenize", lambda *given: pytest.fail("tokenised again"))
    monkeypatch.setattr(type(student), "preprocess", lambda *given: pytest.fail("tokenised again"))
    batches = []
    student.register_forward_pre_hook(lambda module, args: batches.append(args[0]["input_ids"].numel()))
    watched(student)
    texts = [*one.queries.values(), *one.corpus.values()]
    expected = student.tokenizer(texts, truncation=True, max_length=64)["input_ids"]
    assert sum(batches) == sum(map(len, expected))
    assert max(batches) < 256 + 2 * 64


@pytest.mark.parametrize("right", ["a", "b"])
def test_scores_are_float32_under_autocast(student, right):
    """Two documents closer than bf16 tells apart are still ranked, whichever would win a tie."""

    class Lookup(SentenceTransformer):
        """The longest text is the query, and the shortest the right document."""

        def forward(self, features):
            near = torch.tensor([[1.0, 0.02], [1.0, 0.0], [1.0, 0.01]])
            return {"sentence_embedding": near}

    texts = {right: "cat", "ab".replace(right, ""): "cat cat"}
    dataset = RetrievalSet("Close", {"q": "cat cat cat"}, dict(sorted(texts.items())), {"q": {right}})
    watched = PackedEvaluator([dataset], student.tokenizer, 64, 256)
    with torch.autocast("cpu", torch.bfloat16):
        assert watched(Lookup(modules=[torch.nn.Identity()], device="cpu")) == {"Close_cosine_ndcg@10": 1}
