"""What the demo shows at its end, and that its questions have their answers on every machine."""

import re
import shutil
import sys

import numpy as np
from helpers import tiny_sentence_transformer
from records import fixture

from modernbert_small import demo
from modernbert_small.corpus.docstrings import PACKAGES, python_files
from modernbert_small.evaluation.own_sets import Parts, write_set


def test_every_question_has_its_answer_in_the_corpus(monkeypatch):
    starts = [right[:30].encode() for right in demo.SEARCHES.values()]
    files = [path for path in python_files(PACKAGES) if any(start in path.read_bytes() for start in starts)]
    monkeypatch.setattr(demo, "python_files", lambda _packages: files)
    assert set(demo.SEARCHES.values()) <= demo.read_summaries().keys()


def test_summaries_come_from_docstrings_that_say_more(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text('"""Open a file."""\ndef f():\n    """Close it.\n\n    Flush first.\n    """\n')
    (tmp_path / "b.py").write_text('"""Close it.\n\nAgain.\n"""\n')
    (tmp_path / "bad.py").write_text("def")
    monkeypatch.setattr(demo, "python_files", lambda _packages: sorted(tmp_path.iterdir()))
    assert demo.read_summaries() == {"Close it.": "a.py"}


def test_searches_show_rank_and_verdict_of_both_models(monkeypatch, capsys):
    """The first model finds both answers; the second ranks one of them last. Control characters become escapes."""
    monkeypatch.setattr(demo, "SEARCHES", {"close?": "Close it.", "sort?": "Sort it."})
    summaries = {"Close it.": "io.py", "Sort it.": "heap.py", "Read \x1b[31mit.": "re.py"}
    right = {"query": np.eye(3)[:2], "document": np.eye(3)}
    wrong = {"query": np.array([[0.1, 0.5, 0.9], [0, 1, 0]]), "document": np.eye(3)}
    models = {"teacher": lambda _texts, kind, _: right[kind], "student": lambda _texts, kind, _: wrong[kind]}
    demo.show_searches(models, summaries)
    lines = [line.split(maxsplit=5) for line in capsys.readouterr().out.splitlines()[4:]]
    assert [" ".join(line) for line in lines] == [
        "close? teacher rank 1 right io.py: Close it.",
        "student rank 3 wrong re.py: Read \\x1b[31mit.",
        "sort? teacher rank 1 right heap.py: Sort it.",
        "student rank 1 right heap.py: Sort it.",
    ]


def test_the_end_of_the_demo(tmp_path, monkeypatch, capsys):
    """Searches, size and speed of both models, and how to use the student, after the phases of its recipe."""
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path / "demo/corpus/heldout", "heldout", Parts({"q": "a query"}, {"d": "a text"}, {("q", "d"): 1.0}))
    (tmp_path / "demo/model").mkdir()
    shutil.copy(fixture("checkpoints/model"), tmp_path / "demo/model/run.json")
    model, phases = tiny_sentence_transformer(tmp_path, "bert"), []
    monkeypatch.setattr(demo, "link_teacher", lambda _link: None)
    monkeypatch.setattr(demo, "run_phase", lambda section, _recipe: phases.append(section))
    monkeypatch.setattr(demo, "load_sentence_transformer", lambda _flag, _folder: model)
    monkeypatch.setattr(demo, "read_summaries", lambda: dict.fromkeys(demo.SEARCHES.values(), "file.py"))
    monkeypatch.setattr(sys, "argv", ["demo"])
    demo.main()
    assert phases == ["create_dataset", "init_model_mlm", "create_distil_dataset", "distil_train"]
    out = capsys.readouterr().out
    assert all(query in out for query in demo.SEARCHES)
    assert re.search(r"threads: 1 +parameters +MB +texts/s +ms a query\n", out)
    assert "SentenceTransformer('demo/model')" in out
