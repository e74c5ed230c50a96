"""Exporting: errors and parity; where the extras are installed, the graphs too."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
from helpers import tiny_modernbert, tiny_sentence_transformer, tiny_tokenizer
from sentence_transformers import SentenceTransformer

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
from modernbert_small.label.teacher import with_projection
from modernbert_small.run.errors import UserError
from modernbert_small.run.loading import load_pooled

TEXTS = ["a cat", "the dog lay beside it " * 20, "She reads the paper", "in the mountains it boils sooner " * 3]


def has_extra(name):
    return all(importlib.util.find_spec(package) for package in NEEDED[name])


@pytest.fixture
def student(tmp_path):
    """A random student whose sliding windows are shorter than its longest input."""
    tiny_modernbert(tmp_path / "mlm", tiny_tokenizer(tmp_path / "mlm"))
    return load_pooled("model", str(tmp_path / "mlm"), 64).to("cpu")


@pytest.fixture
def wide_student(tmp_path):
    """A random student that is wide enough for int8: of 16 values, the rounding would be seen in the vectors."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "initializer_range": 0.05}
    tiny_modernbert(tmp_path / "mlm", tiny_tokenizer(tmp_path / "mlm"), **sizes)
    return load_pooled("model", str(tmp_path / "mlm"), 64).to("cpu")


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["export", *map(str, words)])
    module.main()


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nncf" else True)
    require_extra("onnx")
    with pytest.raises(UserError, match=r"nncf not installed; install with: pip install -e \.\[openvino"):
        require_extra("openvino")


def test_cosines_of_rows():
    x = np.array([[1.0, 0, 0], [0, 3, 4], [1, 1, 0]], np.float32)
    y = np.array([[2.0, 0, 0], [0, 4, 3], [0, 0, 0]], np.float32)
    np.testing.assert_allclose(cosines(x, y), [1, 0.96, np.nan])


def test_int8_is_judged_by_a_percentile_and_the_mean_and_float32_by_the_worst():
    one_bad = np.array([0.9, *[0.995] * 99])  # one unusual text
    parity = require_parity(one_bad, "onnx int8", "int8")
    assert parity == {"lowest_cosine": 0.9, "percentile_5_cosine": 0.995, "mean_cosine": 0.99405}
    many_bad = np.array([*[0.98] * 10, *[1.0] * 90])
    far = np.full(100, 0.989)
    for bad in (many_bad, far, np.array([np.nan, *[1.0] * 99])):
        with pytest.raises(
            UserError, match=r"onnx int8: the 5th percentile .* at least 0\.985 and 0\.99; nothing was wr"
        ):
            require_parity(bad, "onnx int8", "int8")
    with pytest.raises(UserError, match=r"the lowest cosine to PyTorch's vectors is 0\.99980 .* at least 0\.9999"):
        require_parity(np.array([0.9998, *[1.0] * 99]), "onnx float32", "float32")


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
    speed = {"system": "onnx float32", "megabytes": 1, "text_milliseconds": 1, "texts_per_second": 1, "ndcg": {}}
    record = {"texts": 1, "systems": [speed]}
    monkeypatch.setattr(module, "check", lambda *_: record)
    run(monkeypatch, tmp_path / "model", "--format", "onnx")
    assert {path.name for path in (tmp_path / "model-onnx").iterdir()} == {"run.json", "whole"}
    assert json.loads((tmp_path / "model-onnx/run.json").read_text())["resumed"] is False


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_a_student_through_the_runtime(wide_student, tmp_path, monkeypatch, capsys, name):
    from test_retrieval import write_set

    if not has_extra(name):
        pytest.skip(f"needs the extra [{name}]")
    wide_student.save_pretrained(str(tmp_path / "model"))
    write_set(tmp_path / "set")
    words = (tmp_path / "model", "--format", name, "--datasets", tmp_path / "set")
    run(monkeypatch, *words)
    folder = tmp_path / f"model-{name}"
    for file in module.FILES[name].values():
        assert (folder / file).exists()
    assert (folder / "tokenizer.json").exists()
    assert json.loads((folder / "special_tokens_map.json").read_text())["pad_token"] == "[PAD]"
    assert not list(folder.rglob("*.safetensors"))
    shown = capsys.readouterr().out
    assert f"\n{name} float32  " in shown
    assert f"\n{name} int8  " in shown
    assert "     mean  " in shown
    run(monkeypatch, *words)


def test_one_graph_alone(student, tmp_path, monkeypatch):
    if not has_extra("onnx"):
        pytest.skip("needs the extra [onnx]")
    files = module.export(student, tmp_path, "onnx", ["int8"])
    assert files == {"int8": tmp_path / "onnx/model_quantized.onnx"}
    assert [path.name for path in (tmp_path / "onnx").iterdir()] == ["model_quantized.onnx"]


def test_what_is_shown():
    pytorch = {"system": "PyTorch float32", "megabytes": 10, "text_milliseconds": 5, "texts_per_second": 20}
    graph = pytorch | {"system": "onnx int8", "lowest_cosine": 0.98, "percentile_5_cosine": 0.99, "mean_cosine": 0.995}
    shown = format_check({"texts": 3, "systems": [pytorch | {"ndcg": {"A": 0.5}}, graph | {"ndcg": {"A": 0.49}}]})
    lines = [line.split() for line in shown.splitlines()]
    assert ["PyTorch", "float32", "10.0", "5.0", "20", "0.5000"] in lines
    assert ["onnx", "int8", "10.0", "5.0", "20", "0.98000", "0.99000", "0.99500", "0.4900"] in lines
    assert "of 3 texts" in shown


def test_student_and_teacher_in_one_folder(student, tmp_path, monkeypatch, capsys):
    from test_retrieval import write_set

    teacher = with_projection(tiny_sentence_transformer(tmp_path, "bert"), np.eye(24)[:, :16]).to("cpu")
    teacher.prompts |= {"document": "passage: ", "query": "question: "}
    student.save_pretrained(str(tmp_path / "model"))
    teacher.save_pretrained(str(tmp_path / "reduced"))
    write_set(tmp_path / "set")
    words = (tmp_path / "model", "--format", "router", "--datasets", tmp_path / "set", "--teacher")
    run(monkeypatch, *words, tmp_path / "reduced")
    assert "\nstudent's queries, teacher's documents  " in capsys.readouterr().out
    joined = SentenceTransformer(str(tmp_path / "model-router"), device="cpu")
    np.testing.assert_allclose(joined.encode_query(TEXTS), student.encode(TEXTS), atol=1e-6)
    for vectors in (joined.encode_document(TEXTS), joined.encode(TEXTS)):
        np.testing.assert_allclose(vectors, teacher.encode(TEXTS, prompt="passage: "), atol=1e-6)
    with pytest.raises(UserError, match=r"--teacher: its vectors have 24 dimensions, the student's 16; expected"):
        run(monkeypatch, *words, tmp_path / "teacher", "--overwrite")
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "model", "--format", "router")
    assert "belong together" in capsys.readouterr().err
