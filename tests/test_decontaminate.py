"""Contaminated texts are found, and only those: against a plain search over word lists."""

import re
from collections import Counter

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from modernbert_small.corpus.decontaminate import Contamination, evaluation_texts
from modernbert_small.evaluation.sets import PairSet, RetrievalSet

WORDS = st.lists(st.sampled_from(["a", "b", "c", "é"]), max_size=30)


def words(text):
    return re.findall(r"\w+", text.casefold())


def is_contaminated(text, evaluation):
    """By comparing lists of words."""
    ours = words(text)
    for other in map(words, evaluation):
        if ours and ours == other:
            return True
        theirs = {tuple(other[i : i + 13]) for i in range(len(other) - 12)}
        if any(tuple(ours[i : i + 13]) in theirs for i in range(len(ours) - 12)):
            return True
    return False


@given(st.lists(WORDS, max_size=4), WORDS)
def test_found_is_what_a_plain_search_finds(evaluation, text):
    evaluation = [" ".join(one) for one in evaluation]
    assert Contamination(evaluation).found_in(" ".join(text)) == is_contaminated(" ".join(text), evaluation)


def test_case_and_punctuation_do_not_hide_a_text():
    found = Contamination(["What is a cat?", "one two three four five six seven eight nine ten eleven twelve thirteen"])
    assert found.found_in("what is - a CAT")
    assert not found.found_in("what is a cat like")
    run = "One, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve"
    assert found.found_in(f"Count: {run}, thirteen! Done.")
    assert not found.found_in(f"Count: {run}; done.")
    assert not Contamination([]).found_in("anything")


def test_rows_are_dropped_and_counted_by_source():
    table = pa.table({"text": ["What is a cat", "a dog", "a mat"], "source": ["x", "x", "y"]})
    counts = Counter()
    left = Contamination(["what is a cat?", "A mat."]).drop(table, counts)
    assert left["text"].to_pylist() == ["a dog"]
    assert counts == {"x": 1, "y": 1}


def test_which_texts_of_a_set_count():
    sets = [RetrievalSet("s", {"q": "query"}, {"d": "document"}, {"q": {"d"}})], [PairSet("p", ["a"], ["b"], [1.0])]
    assert list(evaluation_texts(*sets, documents=False)) == ["query", "a", "b"]
    assert list(evaluation_texts(*sets, documents=True)) == ["query", "document", "a", "b"]
