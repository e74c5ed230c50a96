"""Thousands of texts and files that no one would write, given to the code that reads them.

This is not part of the test suite; `make soak` runs it.
"""

import string

import pytest
from helpers import tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_hostile import LIMIT, check, hostile, run_phase_1

from modernbert_small.corpus.sources import open_sources
from modernbert_small.corpus.text import Chunker, normalise
from modernbert_small.packed.tokens import text_tokenizer
from modernbert_small.run.errors import UserError

EXAMPLES = 5_000
PIECES = [
    "[MASK]",
    "[SEP]",
    "\x00",
    "\u202e",
    "\ufeff",
    "word ",
    "\n\n",
    "\r",
    "x" * 300,
    "\U0001f600" * 40,
    "\u0301" * 9,
]
TEXTS = st.lists(st.one_of(st.text(st.characters(exclude_categories=())), st.sampled_from(PIECES))).map("".join)
FILES = st.one_of(
    st.binary(max_size=300),
    st.lists(
        st.sampled_from(['{"text": "a"}', '{"text": ', "[1]", '{"text": null}', "text,b", 'a,"b', "", "\ud800"])
    ).map(lambda lines: "\n".join(lines).encode(errors="surrogatepass")),
    st.text(string.printable).map(str.encode),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def squeezed(text):
    return "".join(text.split())


@settings(deadline=None, max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(TEXTS)
def test_text_is_kept_in_chunks_that_fit(tokenizer, text):
    normal = normalise(text)
    assert normalise(normal) == normal
    normal.encode()
    if not normal:
        return
    (chunks,) = Chunker(tokenizer, LIMIT).split([normal])
    assert squeezed("".join(chunks)) == squeezed(normal)
    for encoding in text_tokenizer(tokenizer, 1 << 30).encode_batch(chunks):
        assert len(encoding) <= LIMIT
        assert not set(encoding.ids[1:-1]) & set(tokenizer.all_special_ids)


@settings(deadline=None, max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(FILES, st.sampled_from(["jsonl", "json", "csv.gz", "tsv", "txt", "html", "pdf", "arrow", "parquet"]))
def test_a_file_is_read_or_skipped_or_refused_in_words(tmp_path, content, suffix):
    file = tmp_path / f"own.{suffix}"
    file.write_bytes(content)
    said = str(file)
    try:
        (source,) = open_sources({"own": str(file)})
        for row in source.rows(None, 0):
            assert all(isinstance(text, str) for _, text in row)
        said = source.skipped.first or said
    except UserError as error:
        said = str(error)
    assert str(file) in said
    assert "\n" not in said


def test_hostile_texts_at_size(tmp_path, monkeypatch):
    texts = hostile(10_000_000, 100_000)
    check(tmp_path, run_phase_1(tmp_path, monkeypatch, texts), texts)
