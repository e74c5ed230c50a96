"""Training texts that equal reported queries, counted by set."""

import pyarrow as pa
import pyarrow.parquet as pq

from modernbert_small.evaluation.overlap import texts_in_training
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
