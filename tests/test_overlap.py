"""Training texts that equal reported queries, counted by set."""

import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq

from modernbert_small.evaluation.overlap import texts_in_training, warn_of_own_overlap
from modernbert_small.evaluation.sets import PairSet, RetrievalSet


def test_equal_texts_are_counted_whatever_their_case_and_blanks(tmp_path):
    shards = [
        ["What is  a\nquasar?", "nothing", "a man eats"],
        ["what is a quasar? no", "WHAT IS A QUASAR?", "a man eats"],
    ]
    files = []
    for index, texts in enumerate(shards):
        files.append(tmp_path / f"{index}.parquet")
        pq.write_table(pa.table({"sentence": texts}), files[-1])
    asked = RetrievalSet("Asked", {"1": "what is a quasar?", "2": "unheard of"}, {"d": "nothing"}, {"1": {"d"}})
    other = RetrievalSet("Other", {"1": "unheard of"}, {"d": "nothing"}, {"1": {"d"}})
    pairs = PairSet("Pairs", ["a man sleeps"], ["A man eats"], [0.1])
    assert texts_in_training(files, "sentence", [asked, other], [pairs]) == {"Asked": 2, "Pairs": 2}


def test_what_a_student_was_trained_on_is_found_by_its_record(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for folder, phase, inputs in (
        ("model", "distil_train", {"labels": {"path": str(tmp_path / "labels")}}),
        ("labels", "create_distil_dataset", {}),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "run.json").write_text(json.dumps({"phase": phase, "inputs": inputs}))
    texts = pa.table({"sentence": ["What is a quasar?", "nothing"]})
    pq.write_table(texts, tmp_path / "labels/train-00000-of-00001.parquet")
    asked = RetrievalSet("Asked", {"1": "what is a quasar?"}, {"d": "nothing"}, {"1": {"d"}})
    warn_of_own_overlap(str(tmp_path / "model"), [asked], [])
    assert "1 training text equals a query of Asked, so its score will be too high" in caplog.text
    caplog.clear()
    warn_of_own_overlap("some/student", [asked], [])
    assert "some/student: what it was trained on was not found, so it is not known" in caplog.text
