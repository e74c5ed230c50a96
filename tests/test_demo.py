"""The retrieval set that the demo makes, and its searches."""

import pyarrow as pa
import pyarrow.parquet as pq
from helpers import tiny_sentence_transformer

from modernbert_small import demo
from modernbert_small.evaluation.sets import RetrievalSet, load_evaluation_sets


def test_held_out_summaries_are_asked_among_all_bodies(tmp_path, monkeypatch):
    """A query that is held out without its body, and a document that is one, are no queries; bodies are kept once."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    rows = {"text": ["Close the file.", "Sort a list.", "No body.", "A body."], "kind": [demo.QUERY] * 3 + ["document"]}
    pq.write_table(pa.table(rows), corpus / "validation-00000-of-00001.parquet")
    pairs = [
        ("Trained on.", "It trains."),
        ("Close the file.", "Flush it first."),
        ("Sort a list.", "In place."),
        ("Close the file.", "In place."),
        (None, "A body."),
    ]
    monkeypatch.setattr(demo, "read_pairs", lambda folder: iter(pairs))
    demo.write_retrieval_set(corpus, tmp_path / "set", "Docs")
    assert load_evaluation_sets("--datasets", [str(tmp_path / "set")]) == (
        [
            RetrievalSet(
                "Docs",
                {"q0": "Close the file.", "q1": "Sort a list."},
                {"d0": "It trains.", "d1": "Flush it first.", "d2": "In place.", "d3": "A body."},
                {"q0": {"d1", "d2"}, "q1": {"d2"}},
            )
        ],
        [],
    )


def test_what_searches_find_is_printed_without_control_characters(tmp_path, monkeypatch, capsys):
    (tmp_path / "corpus").mkdir()
    pq.write_table(pa.table({"text": ["a \x1b[31mred text"]}), tmp_path / "corpus" / "Docs-00000-of-00001.parquet")
    teacher = tiny_sentence_transformer(tmp_path, "bert")
    monkeypatch.setattr(demo, "SentenceTransformer", lambda folder: teacher)
    demo.show_searches("model", tmp_path, "Docs")
    out = capsys.readouterr().out
    assert out.count("a \\x1b[31mred text") == len(demo.SEARCHES)
    assert "\x1b" not in out
