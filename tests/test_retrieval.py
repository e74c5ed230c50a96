"""Evaluation sets from folders, files and names."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modernbert_small.evaluation.sets import PairSet, RetrievalSet, load_evaluation_sets
from modernbert_small.run.errors import UserError

FLAG = "--eval_datasets"


def write_set(folder, name="Toy", qrels=(("q1", "d1"),)):
    for part, columns in {
        "corpus": {"_id": ["d1", "d2"], "text": ["one", "two"]},
        "queries": {"_id": ["q1", "q2"], "text": ["eins", "zwei"]},
        "qrels": {"query-id": [q for q, _ in qrels], "corpus-id": [d for _, d in qrels]},
    }.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), folder / part / f"{name}-00000-of-00001.parquet")


def test_a_folder_of_sets(tmp_path):
    write_set(tmp_path, "A")
    write_set(tmp_path, "B", [("q1", "d1"), ("q2", "d1"), ("q2", "d2"), ("q3", "d1")])
    (a, b), _ = load_evaluation_sets(FLAG, [str(tmp_path)])
    assert a == RetrievalSet("A", {"q1": "eins"}, {"d1": "one", "d2": "two"}, {"q1": {"d1"}})
    assert b.relevant == {"q1": {"d1"}, "q2": {"d1", "d2"}}


def test_bad_sets_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"nothere: no such folder or file, and not one of NanoBEIR's sets .*msmarco"):
        load_evaluation_sets(FLAG, ["nothere"])
    with pytest.raises(UserError, match="no qrels"):
        load_evaluation_sets(FLAG, [str(tmp_path)])
    write_set(tmp_path, qrels=[("q9", "d1")])
    with pytest.raises(UserError, match="no query of Toy has a relevant document"):
        load_evaluation_sets(FLAG, [str(tmp_path)])
    pq.write_table(pa.table({"id": ["d1"]}), tmp_path / "corpus" / "Toy-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"corpus: .*_id, text"):
        load_evaluation_sets(FLAG, [str(tmp_path)])
    (tmp_path / "corpus" / "Toy-00000-of-00001.parquet").unlink()
    with pytest.raises(UserError, match=r"no corpus/Toy-\*\.parquet"):
        load_evaluation_sets(FLAG, [str(tmp_path)])


def test_sentence_pairs(tmp_path):
    file = tmp_path / "pairs.parquet"
    rows = {"sentence1": ["a", "c"], "sentence2": ["b", "d"], "score": [0.5, 1.0], "more": [1, 2]}
    pq.write_table(pa.table(rows), file)
    assert load_evaluation_sets(FLAG, [str(file)]) == ([], [PairSet("pairs", ["a", "c"], ["b", "d"], [0.5, 1.0])])
    for scores, said in (
        ([1, 1], "do not differ"),
        (["1", "2"], "column score holds string in all rows, expected numbers"),
    ):
        pq.write_table(pa.table(rows | {"score": scores}), file)
        with pytest.raises(UserError, match=said):
            load_evaluation_sets(FLAG, [str(file)])
    pq.write_table(pa.table({"sentence1": ["a"], "sentence2": ["b"], "score": pa.array([None], pa.float64())}), file)
    with pytest.raises(UserError, match=r"pairs.parquet: score is null in row 0"):
        load_evaluation_sets(FLAG, [str(file)])
    file.write_text("sentence1,sentence2")
    with pytest.raises(UserError, match=r"pairs.parquet: cannot be read: ArrowInvalid"):
        load_evaluation_sets(FLAG, [str(file)])


def write_beir(folder):
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": "d1", "title": "One", "text": "the first"}, {"_id": "2", "title": "", "text": "second"}]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "eins"}\n{"_id": "q2", "text": "zwei"}\n')
    rows = [
        ("query-id", "corpus-id", "score"),
        ("q1", "d1", "2"),
        ("q1", "2", "0"),
        ("q2", "2", "1"),
        ("q9", "d1", "1"),
    ]
    (folder / "qrels/test.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))


def test_a_folder_laid_out_like_beir(tmp_path):
    write_beir(tmp_path / "mine")
    ((mine,), _) = load_evaluation_sets(FLAG, [f"{tmp_path / 'mine'}/"])
    queries, corpus = {"q1": "eins", "q2": "zwei"}, {"d1": "One the first", "2": "second"}
    assert mine == RetrievalSet("mine", queries, corpus, {"q1": {"d1"}, "q2": {"2"}}, {("q1", "d1"): 2})


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("queries.jsonl", None, "no queries.jsonl; expected corpus.jsonl, queries.jsonl, qrels/test.tsv as in BEIR"),
        ("queries.jsonl", '{"_id": "q1", "text": null}', "column text holds null in all rows"),
        ("corpus.jsonl", '{"_id": "d1", "text": "a"}\n{"_id": 2, "text": "b"}', "expected values of one type in a"),
        ("corpus.jsonl", '{"_id": "d1", "text": "a"}\n{"_id', "corpus.jsonl: row 1: line 2 is not JSON"),
        ("corpus.jsonl", '{"id": "d1", "text": "a"}', "corpus.jsonl: no column '_id'; found id, text"),
        (
            "qrels/test.tsv",
            "query-id\tcorpus-id\tscore\nq1\td1\tvery\n",
            "qrels/test.tsv: Failed to parse string: 'very'",
        ),
        ("qrels/test.tsv", "q1\td1\t1\n", "no column 'query-id'; found q1, d1, 1"),
    ],
)
def test_what_is_wrong_with_a_folder_like_beir_is_one_line(tmp_path, file, text, said):
    write_beir(tmp_path / "mine")
    (tmp_path / "mine" / file).unlink() if text is None else (tmp_path / "mine" / file).write_text(text)
    with pytest.raises(UserError, match=r"^--eval_datasets [^\n]*$") as refused:
        load_evaluation_sets(FLAG, [str(tmp_path / "mine")])
    assert said in str(refused.value)


def test_tables_of_queries_and_answers(tmp_path):
    """All answers are the documents; a query may have several, in rows or in a list; a score grades them."""
    (tmp_path / "plain.csv").write_text("question;answer;page\nwer?;sie;1\nwo?;hier;2\nwer?;er;3\n")
    (tmp_path / "lists.jsonl").write_text('{"q": "wer?", "a": ["sie", "er"]}\n{"q": "wo?", "a": ["hier"]}\n')
    (tmp_path / "graded.tsv").write_text("query\tpositive\tscore\nwer?\tsie\t2\nwer?\ter\t1\nwer?\thier\t0\n")
    names = [
        str(tmp_path / "plain.csv"),
        f"{tmp_path / 'lists.jsonl'}:query=q,positive=a",
        str(tmp_path / "graded.tsv"),
    ]
    (plain, lists, graded), pairs = load_evaluation_sets(FLAG, names)
    assert pairs == []
    assert plain.queries == {"q0": "wer?", "q1": "wo?"}
    assert (plain.corpus, plain.relevant) == (
        {"d0": "sie", "d1": "hier", "d2": "er"},
        {"q0": {"d0", "d2"}, "q1": {"d1"}},
    )
    assert {q: {lists.corpus[d] for d in found} for q, found in lists.relevant.items()} == {
        "q0": {"sie", "er"},
        "q1": {"hier"},
    }
    assert (plain.name, lists.name, plain.gains) == ("plain", "lists", {})
    assert (graded.relevant, graded.gains) == ({"q0": {"d0", "d1"}}, {("q0", "d0"): 2})
    assert len(graded.corpus) == 3


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "text\none\n", "found columns text; expected sentence1, sentence2, score, or queries: one of text"),
        ("a.docx", "", "found a .docx file; expected .jsonl"),
        ("a.jsonl", '{"query": "a", "positive": "b"}\n{"query": "c", "positive": null}', "positive is null in row 1"),
        ("a.csv", "query,positive,score\na,b,1\na,b,2\n", "row 1 gives query 'q0' and document 'd0' the score 2.0"),
        ("a.csv:query=q", "query,positive\na,b\n", "no column 'q'; found query, positive"),
    ],
)
def test_what_is_wrong_with_a_table_of_queries_is_one_line(tmp_path, name, text, said):
    (tmp_path / name.partition(":")[0]).write_text(text)
    with pytest.raises(UserError, match=r"^--eval_datasets [^\n]*$") as refused:
        load_evaluation_sets(FLAG, [str(tmp_path / name)])
    assert said in str(refused.value)


def test_sentence_pairs_may_be_a_csv_file(tmp_path):
    (tmp_path / "pairs.csv").write_text("sentence1,sentence2,score\na,b,0.5\nc,d,1\n")
    assert load_evaluation_sets(FLAG, [str(tmp_path / "pairs.csv")])[1] == [
        PairSet("pairs", ["a", "c"], ["b", "d"], [0.5, 1.0])
    ]


def test_scores_of_qrels_are_gains_and_0_is_not_relevant(tmp_path):
    write_set(tmp_path)
    rows = {"query-id": ["q1", "q1", "q2", "q2"], "corpus-id": ["d1", "d2", "d1", "d2"], "score": [2, 0, 1, -1]}
    pq.write_table(pa.table(rows), tmp_path / "qrels/Toy-00000-of-00001.parquet")
    ((toy,), _) = load_evaluation_sets(FLAG, [str(tmp_path)])
    assert (toy.relevant, toy.gains) == ({"q1": {"d1"}, "q2": {"d1"}}, {("q1", "d1"): 2})


def test_names_with_dashes_and_without_numbers(tmp_path):
    """`wiki-en` and `wiki-de` are two sets; a set may have several numbered files, or one without a number."""
    for name in ("wiki-en", "wiki-de"):
        write_set(tmp_path, name)
    for part in ("corpus", "queries", "qrels"):
        (tmp_path / part / "wiki-de-00000-of-00001.parquet").rename(tmp_path / part / "wiki-de.parquet")
    corpus = tmp_path / "corpus"
    (corpus / "wiki-en-00000-of-00001.parquet").rename(corpus / "wiki-en-00000-of-00002.parquet")
    pq.write_table(pa.table({"_id": ["d9"], "text": ["nine"]}), corpus / "wiki-en-00001-of-00002.parquet")
    (german, english), _ = load_evaluation_sets(FLAG, [str(tmp_path)])
    assert (german.name, list(german.corpus)) == ("wiki-de", ["d1", "d2"])
    assert (english.name, list(english.corpus)) == ("wiki-en", ["d1", "d2", "d9"])
    (corpus / "wiki-en-00001-of-00002.parquet").unlink()
    with pytest.raises(UserError, match="corpus: 1 of 2 files of wiki-en; copy the missing ones"):
        load_evaluation_sets(FLAG, [str(tmp_path)])


def test_sets_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        write_set(folder)
        pq.write_table(
            pa.table({"sentence1": ["a", "c"], "sentence2": ["b", "d"], "score": [0, 1]}), folder / "p.parquet"
        )
    sets, pairs = load_evaluation_sets(FLAG, [*map(str, folders), *(str(folder / "p.parquet") for folder in folders)])
    assert [one.name for one in sets] == ["first/Toy", "second/Toy"]
    assert [one.name for one in pairs] == ["first/p", "second/p"]
    write_set(tmp_path / "other" / "first")
    for again in (f"{folders[0]}/", tmp_path / "other" / "first"):
        with pytest.raises(UserError, match="2 sets have the name first/Toy, expected a name for each"):
            load_evaluation_sets(FLAG, [str(folders[0]), str(again)])


BAD_PARTS = {
    "null text": (
        "corpus",
        {"_id": ["d1", "d2"], "text": ["one", None]},
        "corpus: text is null in row 1, expected a string",
    ),
    "whole numbers": (
        "queries",
        {"_id": ["q1"], "text": [7]},
        "queries: column text holds int64 in all rows, expected st",
    ),
    "null id": ("corpus", {"_id": [None, "d1"], "text": ["a", "b"]}, "corpus: _id is null in row 0, expected an id"),
    "id twice": (
        "corpus",
        {"_id": ["d1", "d2", "d1"], "text": ["a", "b", "c"]},
        "corpus: row 2 repeats the id 'd1' with a",
    ),
    "null qrel": ("qrels", {"query-id": ["q1"], "corpus-id": [None]}, "qrels: column corpus-id holds null in all rows"),
    "nan score": (
        "qrels",
        {"query-id": ["q1", "q2"], "corpus-id": ["d1", "d1"], "score": [1.0, float("nan")]},
        "qrels: score is nan in row 1, expected a finite number",
    ),
    "text as score": (
        "qrels",
        {"query-id": ["q1"], "corpus-id": ["d1"], "score": ["1"]},
        "qrels: column score holds string",
    ),
    "two scores": (
        "qrels",
        {"query-id": ["q1", "q1"], "corpus-id": ["d1", "d1"], "score": [1, 2]},
        "qrels: row 1 gives query 'q1' and document 'd1' the score 2, but an earlier row 1; expected one score",
    ),
    "only 0": (
        "qrels",
        {"query-id": ["q1"], "corpus-id": ["d1"], "score": [0]},
        "no query of Toy has a relevant document",
    ),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_what_would_spoil_an_evaluation_is_named_with_its_row(tmp_path, case):
    part, columns, said = BAD_PARTS[case]
    write_set(tmp_path)
    pq.write_table(pa.table(columns), tmp_path / part / "Toy-00000-of-00001.parquet")
    with pytest.raises(UserError) as refused:
        load_evaluation_sets(FLAG, [str(tmp_path)])
    assert str(refused.value).startswith(f"{FLAG} {tmp_path}: ")
    assert said in str(refused.value)
    assert "Toy" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_repeated_row_and_whole_numbers_as_ids_do_no_harm(tmp_path):
    write_set(tmp_path)
    pq.write_table(
        pa.table({"_id": [1, 2, 1], "text": ["a", "b", "a"]}), tmp_path / "corpus/Toy-00000-of-00001.parquet"
    )
    qrels = pa.table({"query-id": ["q1", "q1"], "corpus-id": ["1", "1"]})
    pq.write_table(qrels, tmp_path / "qrels/Toy-00000-of-00001.parquet")
    ((toy,), _) = load_evaluation_sets(FLAG, [str(tmp_path)])
    assert (toy.corpus, toy.relevant) == ({"1": "a", "2": "b"}, {"q1": {"1"}})


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"score": [0.1, float("nan")]}, "score is nan in row 1, expected a finite number"),
        ({"score": [float("inf"), 0.1]}, "score is inf in row 0"),
        ({"sentence2": ["b", None]}, "sentence2 is null in row 1, expected a string"),
        ({"sentence1": [1, 2]}, "column sentence1 holds int64 in all rows"),
        ({"sentence1": ["a", "a"], "sentence2": ["b", "b"]}, "all 2 rows hold the same two sentences"),
    ],
)
def test_pairs_that_would_spoil_a_correlation_are_named_with_their_row(tmp_path, columns, said):
    rows = {"sentence1": ["a", "c"], "sentence2": ["b", "d"], "score": [0.5, 1.0]} | columns
    pq.write_table(pa.table(rows), tmp_path / "pairs.parquet")
    with pytest.raises(UserError, match=rf"--eval_datasets .*pairs.parquet: {said}"):
        load_evaluation_sets(FLAG, [str(tmp_path / "pairs.parquet")])


@pytest.mark.parametrize(
    ("name", "hub_id"), [("msmarco", "NanoBEIR-en"), ("nanobeir", "NanoBEIR-en"), ("stsb", "stsb")]
)
def test_without_a_hub_is_one_line(name, hub_id):
    with pytest.raises(
        UserError, match=rf"--eval_datasets \w+: .*{hub_id}: the Hugging Face hub cannot be reached.*local folder"
    ):
        load_evaluation_sets(FLAG, [name])
