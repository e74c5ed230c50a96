"""Exporting: errors and parity; where the extras are installed, the graphs too."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
from helpers import tiny_modernbert, tiny_tokenizer

from modernbert_small import export as module
from modernbert_small.evaluation.sets import PairSet, RetrievalSet
from modernbert_small.export import (
    NEEDED,
    ExportedModel,
    cosines,
    format_check,
    measure,
    parity_texts,
    require_extra,
    require_parity,
)
from modernbert_small.run.errors import UserError
from modernbert_small.run.loading import load_mean_pooled

TEXTS = ["a cat", "the dog lay beside it " * 20, "She reads the paper", "in the mountains it boils sooner " * 3]


def has_extra(name):
    return all(importlib.util.find_spec(package) for package in NEEDED[name])


@pytest.fixture
def student(tmp_path):
    """A random student whose sliding windows are shorter than its longest input."""
    tiny_modernbert(tmp_path / "mlm", tiny_tokenizer(tmp_path / "mlm"))
    return load_mean_pooled("model", str(tmp_path / "mlm"), 64).to("cpu")


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["export", *map(str, words)])
    module.main()


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nncf" else True)
    require_extra("onnx")
    with pytest.raises(UserError, match=r"nncf not installed; install with: pip install -e \.\[openvino"):
        require_extra("openvino")


def test_parity_is_the_lowest_cosine():
    x = np.array([[1.0, 0, 0], [0, 3, 4], [1, 1, 0]], np.float32)
    y = np.array([[2.0, 0, 0], [0, 4, 3], [0, 0, 0]], np.float32)
    np.testing.assert_allclose(cosines(x, y), [1, 0.96, np.nan])
    assert require_parity(np.array([1, 0.9902]), "onnx int8", "int8") == {
        "lowest_cosine": 0.9902,
        "mean_cosine": 0.9951,
    }
    for bad in ([1, 0.9899], [1, np.nan]):
        with pytest.raises(UserError, match=r"onnx int8: the lowest cosine .* expected at least 0\.99; nothing was wr"):
            require_parity(np.array(bad), "onnx int8", "int8")
    with pytest.raises(UserError, match=r"expected at least 0\.9999"):
        require_parity(np.array([1, 0.9998]), "onnx float32", "float32")


def test_texts_are_the_sets_or_docstrings():
    sets = [RetrievalSet("A", {f"q{i}": f"query {i}" for i in range(9)}, {"d": "document"}, {"q0": {"d"}})]
    pairs = [PairSet("P", ["one"], ["two"], [1.0])]
    assert sorted(parity_texts(sets, pairs))[:3] == ["document", "one", "query 0"]
    docstrings = parity_texts([], [])
    assert len(docstrings) == module.PARITY_TEXTS
    assert docstrings == parity_texts([], [])
    assert all(text.strip() for text in docstrings)


def test_a_runtime_takes_the_place_of_the_forward(student):
    """A runtime that is PyTorch: tokenizer, padding, order and batches must come through."""

    def runtime(ids, mask):
        features = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        with torch.inference_mode():
            return student(features)["sentence_embedding"].numpy()

    expected, _ = measure(student, TEXTS)
    found, speed = measure(ExportedModel(student, runtime), TEXTS)
    assert found.shape == (2 * len(TEXTS) + len(TEXTS) + 1, 16)
    assert cosines(found, expected).min() > 0.99999
    assert speed["text_milliseconds"] > 0


def test_a_failed_check_leaves_nothing(student, tmp_path, monkeypatch):
    student.save_pretrained(str(tmp_path / "model"))
    monkeypatch.setattr(module, "require_extra", lambda name: None)
    monkeypatch.setattr(module, "export", lambda model, folder, *_: (folder / "half").mkdir())

    def fail(*_):
        raise UserError("the lowest cosine")

    monkeypatch.setattr(module, "check", fail)
    with pytest.raises(UserError, match="the lowest cosine"):
        run(monkeypatch, tmp_path / "model", "--format", "onnx")
    assert not list(tmp_path.glob("model-*"))


def test_an_interrupted_export_begins_anew(student, tmp_path, monkeypatch):
    student.save_pretrained(str(tmp_path / "model"))
    monkeypatch.setattr(module, "require_extra", lambda name: None)

    def interrupt(model, folder, *_):
        (folder / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "export", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path / "model", "--format", "onnx")
    monkeypatch.setattr(module, "export", lambda model, folder, *_: (folder / "whole").touch())
    speed = {"system": "onnx float32", "megabytes": 1, "text_milliseconds": 1, "texts_per_second": 1}
    record = {"texts": 1, "lowest_cosine": 1, "mean_cosine": 1, "speed": [speed], "ndcg": {}}
    monkeypatch.setattr(module, "check", lambda *_: record)
    run(monkeypatch, tmp_path / "model", "--format", "onnx")
    assert {path.name for path in (tmp_path / "model-onnx-float32").iterdir()} == {"run.json", "whole"}
    assert json.loads((tmp_path / "model-onnx-float32/run.json").read_text())["resumed"] is False


@pytest.mark.parametrize(("name", "dtype"), [("onnx", "float32"), ("onnx", "int8"), ("openvino", "int8")])
def test_a_student_through_the_runtime(student, tmp_path, monkeypatch, capsys, name, dtype):
    from test_retrieval import write_set

    if not has_extra(name):
        pytest.skip(f"needs the extra [{name}]")
    student.save_pretrained(str(tmp_path / "model"))
    write_set(tmp_path / "set")
    run(monkeypatch, tmp_path / "model", "--format", name, "--dtype", dtype, "--datasets", tmp_path / "set")
    folder = tmp_path / f"model-{name}-{dtype}"
    assert (folder / module.FILES[name]).exists()
    assert (folder / "tokenizer.json").exists()
    assert not list(folder.rglob("*.safetensors"))
    shown = capsys.readouterr().out
    assert f"| {name} {dtype} |" in shown
    assert "nDCG@10, " in shown
    run(monkeypatch, tmp_path / "model", "--format", name, "--dtype", dtype, "--datasets", tmp_path / "set")


def test_what_is_shown():
    speed = [{"system": "PyTorch float32", "megabytes": 10, "text_milliseconds": 5, "texts_per_second": 20}]
    record = {"speed": speed, "lowest_cosine": 0.99, "mean_cosine": 1, "texts": 3, "ndcg": {"A": [0.5, 0.49]}}
    assert "| PyTorch float32 | 10.0 | 5.0 | 20 |" in format_check(record)
    assert "nDCG@10, A: 0.5000 -> 0.4900 (-0.0100)" in format_check(record)
