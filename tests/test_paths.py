"""The report and the card of phases that were given absolute paths show neither the machine's folders nor its user."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from records import FOLDERS, write_records

from modernbert_small.report import write_report
from modernbert_small.reporting import plots
from modernbert_small.reporting.card import write_model_card
from modernbert_small.reporting.paths import public_record, public_text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/srv/x/me/work/data/corpus", "data/corpus"),
        ("/srv/x/me/corpus", "corpus"),
        ("/srv/x/me", "."),
        ("/home/she/corpus", "corpus"),
        ("own=/Users/she/a/b/texts.jsonl", "own=b/texts.jsonl"),
        ("../../home/she/x/corpus", "x/corpus"),
        ("own=../texts.jsonl", "own=one/texts.jsonl"),
        ("{here}/data/corpus", "data/corpus"),
        ("own={here}/texts.jsonl", "own=texts.jsonl"),
        ("{here}/home/she/corpus", "corpus"),
        ("{here}", "."),
        ("data/corpus", "data/corpus"),
        ("answerdotai/ModernBERT-base", "answerdotai/ModernBERT-base"),
        ("own=texts.jsonl", "own=texts.jsonl"),
        ("https://example.org/a=b", "https://example.org/a=b"),
        ("guide", "guide"),
        ("", ""),
    ],
)
def test_a_path_without_what_is_private(text, shown, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/srv/x/me")
    here = tmp_path / "one" / "two"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    assert public_text(text.format(here=here)) == shown


def test_paths_are_found_wherever_settings_hold_them():
    settings = {"sources": ["own=/home/she/a/b"], "kwargs": {"config": "/home/she/ds.json"}, "seed": 42, "bf16": None}
    record = public_record({"settings": settings, "account": {"searches": [{"query": "/home/she"}]}})
    assert record["settings"] == {"sources": ["own=a/b"], "kwargs": {"config": "ds.json"}, "seed": 42, "bf16": None}
    assert record["account"]["searches"][0]["query"] == "/home/she"  # a text of an evaluation set


@pytest.fixture
def work(tmp_path):
    """The folder of a user whose phases were given absolute paths alone."""
    work = tmp_path / "home" / "somebody" / "work"
    write_records(work)
    for folder in FOLDERS:
        path = work / folder / "run.json"
        text = path.read_text()
        for relative in ("data/", "checkpoints/", "big", "small/", "evaluation", "texts.jsonl", "pairs.csv"):
            text = text.replace(f'"{relative}', f'"{work}/{relative}').replace(f"={relative}", f"={work}/{relative}")
        path.write_text(text)
    return work


@pytest.mark.parametrize("is_here", [True, False])
def test_the_report_and_the_card_show_no_private_path(work, tmp_path, monkeypatch, is_here):
    monkeypatch.setattr(plots, "_svg", lambda *_: "<svg></svg>")  # most of the time
    monkeypatch.chdir(work if is_here else tmp_path)
    model = work / FOLDERS[-1]
    record = json.loads((model / "run.json").read_text())
    assert record["settings"]["train_file"] == f"{work}/data/distil"
    record["account"]["retrieval"][3]["retention"] = 9  # of the teacher's documents: the card names it
    write_model_card(model, SimpleNamespace(**record["settings"]), record, width=16)
    report, card = write_report(str(model)).read_text(), (model / "README.md").read_text()
    for text in (report, card):
        for private in (str(work), str(tmp_path), "somebody", str(Path.home())):
            assert private not in text
        assert "checkpoints/teacher" in text
        assert ("own=texts.jsonl" if is_here else "own=work/texts.jsonl") in text
    assert "No record was found" not in report
    assert "| own | local files | 150 |" in card
