"""The report: what it finds, what it says, what it leaves out; that no text is markup, and nothing is loaded."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import Browser
from helpers import ROOT
from records import edit, lengthen_history, write_records

from modernbert_small.report import build, write_report
from modernbert_small.reporting import plots
from modernbert_small.run.errors import UserError
from modernbert_small.run.records import find_records

EVIL = "<script>alert('&$x$\"')</script>"
TITLES = ["Student and teacher", "Searches", "Smaller vectors", "Size and speed", "Corpus", "Initialisation",
          "Pre-training", "Projection", "Labels", "Distillation", "Provenance"]  # fmt: skip
VOID = ("meta", "link", "br")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Checks that tags close as they opened; collects tags, ids, links and texts."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.texts = [], set(), [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.open += [] if tag in VOID else [tag]
        self.ids += [value for name, value in attributes if name == "id"]
        self.links += [value for name, value in attributes if name in ("href", "src", "xlink:href", "srcset", "data")]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(" ".join(data.split()))


@pytest.fixture
def model(tmp_path, monkeypatch):
    """The folder of a finished model, seen from where it was made; its training curves are long."""
    monkeypatch.chdir(tmp_path)
    folder = Path(write_records(tmp_path))
    for trained in ("checkpoints/mlm", folder):
        edit(trained, lengthen_history)
    return folder


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr(plots, "_svg", lambda *_: "<svg></svg>")  # drawing takes most of the time


def read(folder):
    return json.loads((Path(folder) / "run.json").read_text())


def headings(text):
    return re.findall("<h2>(.*?)</h2>", text)


def test_the_page_stands_alone(model):
    text = write_report(str(model)).read_text()
    page = Page(text)
    assert headings(text) == TITLES
    assert "script" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    for link in page.links:
        assert link == "data:," or link.removeprefix("#") in page.ids, link
    assert set(re.findall(r"url\((.)|@import", text)) == {"#"}
    assert page.tags >= {"svg", "table", "details"}
    assert not re.search("#0102|font-family: '|None", text)


def test_what_was_measured_is_there(model):
    edit("data/distil", lambda record: record.update(wall_seconds=2874.2, gpu_joules=6.3e6))  # of a GPU
    page = Page(write_report(str(model)).read_text())
    init, distil = read("checkpoints/init"), read(model)
    account, cost = distil["account"], distil["account"]["cost"]["student"]
    assert account["retrieval"][2]["interval"] == [1.585, 1.585]
    assert init["settings"]["init"] == "guide"
    corpus = ("Training texts", "180", "5.57 k", "4,177", "28", "Contaminated", "own")
    phases = (
        "guide",
        "Random student",
        f"{init['heldout_mlm_loss']['random student']:.3f}",
        "Nats per masked token",
        f"{read('checkpoints/mlm')['train_tokens_per_second']:,}",
        f"{100 * read('checkpoints/teacher')['projection']['explained_energy']:.1f} %",
        "5.33 k",
        f"{distil['heldout_similarity']:.4f}",
    )
    quality = ("158.5 %", "of the teacher’s (158.5 – 158.5 %, 1 query)", "Student's queries, teacher's documents")
    size = ("64 bytes", "2 bytes", "14.8 k", "0.49 × the teacher’s", f"{cost['query_milliseconds']:.1f}")
    score = account["searches"][0]["results"]["student"][0]["score"]
    search = ("eins", "✓ relevant", f"rank 1, cosine {score:.2f}", ": first relevant document at rank 1")
    origin = ("47.9 min, 1,750 Wh drawn by GPUs", distil["inputs"]["labels"]["hash"], distil["versions"]["numpy"])
    for words in (*corpus, *phases, *quality, *size, *search, *origin):
        assert words in page.texts, words
    assert "learning_rate" in page.texts
    for name in ("weight_decay", "adam_beta2", "deepspeed", "do_eval", "lr_scheduler_type"):  # as by default
        assert name not in page.texts, name


@pytest.mark.parametrize(("used", "shown"), [("embeddings", True), ("guide", False), (None, False)])
def test_another_initialisation_than_was_asked_for_is_said(model, used, shown, no_plots):
    edit("checkpoints/init", lambda record: record.pop("init_used", None))  # as in older records
    if used:
        edit("checkpoints/init", lambda record: record.update(init_used=used))
    page = Page(write_report(str(model)).read_text())
    assert (used or "guide") in page.texts
    assert ("used in place of guide" in page.texts) is shown


def test_the_losses_before_training_have_a_comment(model, no_plots):
    for student, said in (
        (6.5, "no better than one with random weights. Before any training that says"),
        (3.0, "2.90 "),
    ):
        losses = {"teacher": 2.0, "student": student, "random student": 5.9}
        edit("checkpoints/init", lambda record, losses=losses: record.update(heldout_mlm_loss=losses))
        assert f"The student starts {said}" in write_report(str(model)).read_text()
    edit("checkpoints/init", lambda record: record.update(heldout_mlm_loss={"teacher": 2.0}))
    assert "The student starts" not in write_report(str(model)).read_text()


def test_a_model_that_ended_worse_is_said_first(model, no_plots):
    worse = {"measure": "held-out similarity", "began": 0.71, "ended": -0.02}
    edit(model, lambda record: record.update(ended_worse=worse))
    said = "made the model worse: its held-out similarity was 0.7100 at the beginning and -0.0200"
    assert said in write_report(str(model)).read_text()


def test_a_set_that_was_left_out_is_named(model, no_plots):
    edit(model, lambda record: record["account"].update(left_out=["Hard"]))
    assert (
        "The teacher finds nothing in these sets, so they are left out: Hard." in write_report(str(model)).read_text()
    )


def test_every_text_is_escaped(model):
    evil = json.dumps(EVIL)
    for record in find_records([str(model)]).values():
        path = Path(record["folder"]) / "run.json"
        text = path.read_text().replace("Toy", evil[1:-1])
        version = record["versions"]["numpy"]
        for name in ("own", "eins", "two", "big", "guide", "random student", "student, int8", "learning_rate", version):
            text = text.replace(f'"{name}"', evil)
        path.write_text(text)
    text = write_report(str(model)).read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert "<script" not in text
    assert sum(EVIL in text for text in page.texts) > 15
    assert EVIL in page.texts


def test_a_missing_phase_is_said_and_left_out(model, no_plots):
    shutil.rmtree("checkpoints/mlm")
    text = write_report(str(model)).read_text()
    assert "of these phases: Phase 2, first weights; Phase 3, masked language modelling. Their measurements" in text
    assert headings(text) == [title for title in TITLES if title not in ("Initialisation", "Pre-training")]


def test_from_a_recipe_before_the_last_phase(model, no_plots):
    shutil.rmtree(model)
    shutil.rmtree("data/distil")
    Path("recipe.yaml").write_text("pre_train: {output_dir: checkpoints/mlm}\n")  # the other folders are the default's
    path = write_report("recipe.yaml")
    assert path == Path("report.html")
    text = path.read_text()
    assert headings(text) == ["Corpus", "Initialisation", "Pre-training", "Projection", "Provenance"]
    assert "Phase 4, labels; Phase 5, distillation" in text


@pytest.mark.parametrize("found", ["data", "empty.yaml", "nothing.yaml"])
def test_nothing_to_report_is_one_line(tmp_path, monkeypatch, found):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("empty.yaml").write_text("distil_train: {output_dir: nowhere}\n")
    with pytest.raises(UserError, match=r"no such file|no run\.json of a finished phase"):
        write_report(found)


def test_another_students_phases_are_not_this_ones(model):
    other = "other/model"
    write_records(Path("other").absolute())
    edit("checkpoints/teacher", lambda record: record["inputs"].update(teacher={"path": other}))
    edit(model, lambda record: record["inputs"].update(model={"path": "elsewhere"}))
    records = find_records([str(model)])
    assert "pre_train" not in records
    assert {record["folder"].split("/")[0] for record in records.values()} == {"checkpoints", "data"}


@pytest.mark.parametrize(
    "phase",
    ["create_dataset", "init_model_mlm", "pre_train", "reduced_teacher", "create_distil_dataset", "distil_train"],
)
def test_what_a_record_lacks_is_left_out(model, phase, no_plots):
    record = find_records([str(model)])[phase]
    always = {"phase", "settings", "inputs", "folder"}
    parts = [key for key in record if key not in always]
    for left_out in ([], *([key] for key in parts), parts):
        text = build({phase: {key: value for key, value in record.items() if key not in left_out}})
        assert headings(text)[-1] == "Provenance"
        assert "None" not in text


def test_an_account_without_searches_and_grid(model, no_plots):
    edit(model, lambda record: [record["account"].pop(name) for name in ("grid", "searches", "pairs", "cost")])
    assert not {"Smaller vectors", "Searches", "Size and speed"} & set(headings(write_report(str(model)).read_text()))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_in_a_browser(model, tmp_path):
    """Nothing on the console, nothing asked for, no page wider than its screen; screenshots are kept to look at."""
    url = write_report(str(model)).absolute().as_uri()
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='https://example.org/x.png'><script>console.error('no')</script><p style='width:3000px'>x")
    shots = ROOT / "screenshots"
    shots.mkdir(exist_ok=True)
    with Browser(CHROMIUM, tmp_path / "profile") as browser:
        for width, scheme, media in (
            (390, "light", "screen"),
            (768, "dark", "screen"),
            (1280, "light", "screen"),
            (717, "light", "print"),  # what is left of A4's width
        ):
            visit = browser.visit(url, width, scheme, media)
            (shots / f"report-{width}-{scheme}.png").write_bytes(visit.png)
            assert (visit.complaints, visit.requests, visit.width) == ([], [url], width)
            assert width < 480 or len(set(visit.nav)) == 1, visit.nav  # a phone has no scrollbars
        visit = browser.visit(bad.as_uri(), 390)  # the checks see what they are for
        assert any("no" in complaint for complaint in visit.complaints)
        assert "https://example.org/x.png" in visit.requests
        assert visit.width > 390
