import random
import unicodedata

import pytest
from helpers import SENTENCES, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from modernbert_small.corpus.text import Chunker, _pieces, is_trivial, normalise

BOTH = settings(deadline=None, max_examples=150)
AWKWARD = st.sampled_from(
    [" ", "  ", "\t", "\n", "\r\n", "\r", "\x00", "\x0b", "\u00a0", "\u2028", "\ufeff", "\ud800", "e", "\u0301", "a"]
)
TEXTS = st.one_of(st.text(), st.lists(AWKWARD | st.characters(), max_size=40).map("".join))
WORDS = st.sampled_from(
    [*" ".join(SENTENCES).split(), "[MASK]", "[SEP]", "[PAD]", "👩‍👩‍👧", "數學", "x" * 90, "e\u0301"]
)
LONG_TEXTS = st.lists(st.tuples(WORDS, st.sampled_from([" ", ". ", "\n", "\n\n"])), min_size=1, max_size=120)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def chunker(tokenizer):
    return Chunker(tokenizer, max_seq_length=16)


def normalise_by_character(text: str) -> str:
    """The rules one after another, no regular expression: what `normalise` has to equal."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    kept = [c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs")]
    text = unicodedata.normalize("NFC", "".join(c for c in kept if c not in "\ufeff\ufffe\uffff"))
    lines = [" ".join(line.split()) for line in text.split("\n")]
    kept_lines = [line for i, line in enumerate(lines) if line or (i and lines[i - 1])]
    return "\n".join(kept_lines).strip("\n")


@BOTH
@given(TEXTS)
def test_normalise_equals_the_rules_applied_one_by_one(text):
    assert normalise(text) == normalise_by_character(text)


@BOTH
@given(TEXTS)
def test_normalise_is_idempotent_and_encodable(text):
    once = normalise(text)
    assert normalise(once) == once
    assert unicodedata.is_normalized("NFC", once)
    once.encode()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cafe\u0301", "café"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("  a \t b\u00a0c  ", "a b c"),
        ("a\n \n\t\n\nb", "a\n\nb"),
        ("    indented\n    code", "indented\ncode"),
        ("nul\x00 and \ud83dsurrogate", "nul and surrogate"),
        (" \n\t ", ""),
    ],
)
def test_normalise_examples(text, expected):
    assert normalise(text) == expected


@BOTH
@given(st.text(alphabet="ab1é數 .,-_\n", max_size=8))
def test_trivial_means_fewer_than_three_letters_or_digits(text):
    assert is_trivial(text) == (sum(character.isalnum() for character in text) < 3)


@settings(deadline=None, max_examples=60)
@given(LONG_TEXTS)
def test_chunks_keep_every_word_in_order_and_fit(chunker, tokenizer, parts):
    text = normalise("".join(word + separator for word, separator in parts))
    (chunks,) = chunker.split([text])
    assert "".join("".join(chunks).split()) == "".join(text.split())
    for chunk in chunks:
        assert chunk == normalise(chunk)
        assert len(tokenizer(chunk, split_special_tokens=True).input_ids) <= 16
        assert len(tokenizer(chunk).input_ids) <= 16
    fits = len(tokenizer(text, split_special_tokens=True).input_ids) <= 16
    assert (chunks == [text]) == fits


def test_texts_are_split_at_paragraphs_before_sentences(chunker):
    text = f"{SENTENCES[0]}\n\nThe cat sat. The dog lay.\n\n{SENTENCES[3]}"
    (chunks,) = chunker.split([text])
    assert "The cat sat. The dog lay." in chunks
    whole = Chunker.split(chunker, ["The mat.", "The dog."])
    assert whole == [["The mat."], ["The dog."]]


def test_special_tokens_in_a_text_count_as_text(chunker, tokenizer):
    text = "the [MASK] sat on [SEP] [PAD]"
    expected = len(tokenizer(text, split_special_tokens=True, add_special_tokens=False).input_ids)
    assert chunker.count([text]) == [expected]
    assert expected > len(tokenizer(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("text", ["x" * 20_000, "😀" * 3000, "ab1," * 4000], ids=["letters", "emoji", "mixed"])
def test_a_text_without_spaces_is_split_and_kept(chunker, text):
    (chunks,) = chunker.split([text])
    assert "".join(chunks) == text
    assert max(chunker.count(chunks)) <= 14


@pytest.mark.parametrize("boundary", ["\n\n", "\n", " ", ""])
def test_pieces_end_at_the_best_boundary_in_reach(boundary):
    text = boundary.join("word" * 5 for _ in range(200))
    pieces = list(_pieces(text, 300))
    assert "".join(pieces) == text
    assert all(len(piece) <= 300 for piece in pieces)
    assert all(piece.lstrip().startswith("word") for piece in pieces)


@pytest.mark.parametrize("normalizer", [normalizers.NFC(), normalizers.BertNormalizer()], ids=["NFC", "BERT"])
def test_normalisers_make_no_more_code_points_than_bytes(normalizer):
    """Why a text with fewer bytes than the limit need not be tokenised."""
    planes = [*range(0x20, 0xD800), *range(0xE000, 0x20000)]
    for code_point in random.Random(0).sample(planes, 20_000):
        character = unicodedata.normalize("NFC", chr(code_point))
        made = normalizer.normalize_str(character).replace(" ", "")
        assert len(made) <= len(character.encode()), hex(code_point)
