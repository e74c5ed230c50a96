"""What users get wrong: exit 2, one line that says found, where and expected, nothing written that was not there."""

import ctypes
import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import SCRIPTS, SENTENCES, run_in_process, tiny_modernbert, tiny_sentence_transformer
from safetensors.torch import load_file, save_file
from test_retrieval import write_set

PHASE_1, PHASE_2, PHASE_3, PHASE_4, PHASE_5 = SCRIPTS
TEXTS = [f"{SENTENCES[i % 4]} {i}" for i in range(40)]
FLAGS = {
    PHASE_1: ["--sources", "own=own.parquet", "--tokenizer_name_or_path", "init", "--max_seq_length", "64"],
    PHASE_2: [
        *("--teacher_name_or_path", "init", "--hidden_size", "16", "--num_attention_heads", "2"),
        *("--num_hidden_layers", "2", "--intermediate_size", "24", "--train_file", "corpus"),
    ],
    PHASE_3: ["--model_name_or_path", "init", "--train_file", "corpus", "--max_seq_length", "64", "--max_steps", "1"],
    PHASE_4: ["--teacher_name_or_path", "small/teacher", "--train_file", "corpus", "--embedding_dim", "16"],
    PHASE_5: [
        *("--model_name_or_path", "init", "--teacher_name_or_path", "wide16/teacher", "--train_file", "distil"),
        *("--max_seq_length", "64", "--eval_datasets", "evaluation", "--max_steps", "1"),
    ],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Inputs of all phases, sound."""
    folder = tmp_path_factory.mktemp("inputs")
    teacher = tiny_sentence_transformer(folder / "small", "bert", width=24)
    tiny_sentence_transformer(folder / "wide16", "bert", width=16)
    tiny_modernbert(folder / "init", teacher.tokenizer)
    teacher.tokenizer.save_pretrained(folder / "init")
    labels = np.random.default_rng(0).normal(size=(40, 16))
    labels = (labels / np.linalg.norm(labels, axis=1, keepdims=True)).astype(np.float16)
    for name, rows in (("train", slice(0, 30)), ("validation", slice(30, 40))):
        count = len(TEXTS[rows])
        rest = {"source": ["own"] * count, "kind": ["document"] * count}
        column = pa.FixedSizeListArray.from_arrays(pa.array(labels[rows].ravel()), 16)
        write(folder, "corpus", name, {"text": TEXTS[rows], **rest})
        write(folder, "distil", name, {"sentence": TEXTS[rows], "label": column, **rest})
    pq.write_table(pa.table({"text": TEXTS}), folder / "own.parquet")
    write_set(folder / "evaluation")
    return folder


def write(folder, data, split, columns):
    (folder / data).mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / data / f"{split}-00000-of-00001.parquet")


def shard(data, **columns):
    """Replaces columns of a training shard; None removes one."""

    def change(folder):
        path = folder / data / "train-00000-of-00001.parquet"
        table = pq.read_table(path)
        for name, values in columns.items():
            table = table.drop_columns(name)
            if values is not None:
                table = table.append_column(name, values(len(table)))
        pq.write_table(table, path)

    return change


def cut(path):
    """Leaves half of a file."""
    return lambda folder: os.truncate(folder / path, (folder / path).stat().st_size // 2)


def remove(path):
    return lambda folder: shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()


def spoil(path):
    """Puts a NaN into weights."""

    def change(folder):
        weights = load_file(folder / path)
        next(iter(weights.values())).view(-1)[0] = torch.nan
        save_file(weights, folder / path, {"format": "pt"})

    return change


def pickled(path):
    """Leaves weights only in torch's pickled form."""

    def change(folder):
        torch.save(load_file(folder / path / "model.safetensors"), folder / path / "pytorch_model.bin")
        (folder / path / "model.safetensors").unlink()

    return change


def half_null(count):
    return pa.array([None if i == 7 else f"text {i}" for i in range(count)])


def labels(width, value):
    return lambda count: pa.FixedSizeListArray.from_arrays(pa.array(np.full(count * width, value, np.float16)), width)


def numbers(count):
    return pa.array(range(count))


def no_rows(data, split="validation"):
    def change(folder):
        path = folder / data / f"{split}-00000-of-00001.parquet"
        pq.write_table(pq.read_table(path).slice(0, 0), path)

    return change


def small_vocabulary(folder):
    config = json.loads((folder / "init/config.json").read_text())
    (folder / "init/config.json").write_text(json.dumps(config | {"vocab_size": 50}))


OWN_CODE = """
from pathlib import Path

Path("was_run").touch()
"""


def own_code(path):
    """Gives a model an architecture and a tokenizer of its own, in the form of a repository with code."""

    def change(folder):
        (folder / path / "own.py").write_text(OWN_CODE)
        classes = {"AutoConfig": "own.Config", "AutoModel": "own.Model", "AutoModelForMaskedLM": "own.Model"}
        for name, changes in (
            ("config.json", {"model_type": "own", "auto_map": classes}),
            (
                "tokenizer_config.json",
                {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}},
            ),
        ):
            content = json.loads((folder / path / name).read_text())
            (folder / path / name).write_text(json.dumps(content | changes))

    return change


def texts(*found):
    return lambda folder: pq.write_table(pa.table({"text": found}), folder / "own.parquet")


CASES = [
    # Phase 1
    (PHASE_1, own_code("init"), [], "--tokenizer_name_or_path init: brings code of its own, which is not run"),
    (PHASE_1, texts(*["the same text"] * 500), [], "own=own.parquet: give only 1 different texts"),
    (PHASE_1, texts(*["", " ", "\x00"] * 20), [], "give only 0 different texts that are not empty or too short"),
    (PHASE_1, texts("one row"), [], "give only 1 different texts that are not empty or too short; expected at least 7"),
    (PHASE_1, None, ["--sources", "own=nowhere.parquet"], "own=nowhere.parquet: no such file"),
    (PHASE_1, None, ["--sources", "own"], "own: not a known source"),
    (PHASE_1, cut("own.parquet"), [], "own.parquet: cannot be read"),
    (
        PHASE_1,
        lambda folder: pq.write_table(pa.table({"words": TEXTS}), folder / "own.parquet"),
        [],
        "found columns words",
    ),
    (
        PHASE_1,
        lambda folder: pq.write_table(pa.table({"text": numbers(9)}), folder / "own.parquet"),
        [],
        "int 0; expected",
    ),
    (
        PHASE_1,
        lambda folder: pq.write_table(pa.table({"text": half_null(40)}), folder / "own.parquet"),
        ["--strict"],
        "row 8, column 'text': null; expected a string",
    ),
    (PHASE_1, remove("init/tokenizer.json"), [], "--tokenizer_name_or_path init"),
    (PHASE_1, None, ["--max_seq_length", "ten"], "invalid int value: 'ten'"),
    (
        PHASE_1,
        None,
        ["--seed", "-1", "--validation_rows", "0"],
        "seed: -1; use at least 0; validation_rows: 0; use at least 3",
    ),
    # Phase 2
    (PHASE_2, own_code("init"), [], "--teacher_name_or_path init: brings code of its own, which is not run"),
    (PHASE_2, remove("init/config.json"), [], "--teacher_name_or_path init"),
    (PHASE_2, cut("init/model.safetensors"), [], "--teacher_name_or_path init: cannot be loaded"),
    (PHASE_2, spoil("init/model.safetensors"), [], "holds NaN or infinity, expected finite"),
    (PHASE_2, pickled("init"), [], "--teacher_name_or_path init: holds pickled weights alone"),
    (PHASE_2, None, ["--hidden_size", "32", "--num_attention_heads", "4"], "hidden_size: 32 is wider than"),
    (PHASE_2, None, ["--num_attention_heads", "4"], "use 2 heads and hidden_size "),
    (PHASE_2, None, ["--init", "magic"], "magic"),
    # Phase 3
    (PHASE_3, own_code("init"), [], "--model_name_or_path init: brings code of its own, which is not run"),
    (PHASE_3, remove("corpus"), [], "--train_file corpus: no such folder"),
    (PHASE_3, remove("corpus/validation-00000-of-00001.parquet"), [], "no validation-*.parquet in it"),
    (PHASE_3, cut("corpus/train-00000-of-00001.parquet"), [], "train-00000-of-00001.parquet: not a whole Parquet"),
    (PHASE_3, no_rows("corpus"), [], "its validation split has 0 rows, expected at least 3"),
    (PHASE_3, shard("corpus", text=None), [], "no column 'text'; found source, kind"),
    (PHASE_3, shard("corpus", text=numbers), [], "column 'text' is of int64, expected string"),
    (PHASE_3, shard("corpus", text=half_null), [], "column 'text' is null in row 7; expected a value"),
    (PHASE_3, remove("init"), [], "--model_name_or_path init: no such folder here"),
    (PHASE_3, cut("init/model.safetensors"), [], "--model_name_or_path init: cannot be loaded"),
    (PHASE_3, spoil("init/model.safetensors"), [], "holds NaN or infinity"),
    (PHASE_3, pickled("init"), [], "--model_name_or_path init: holds pickled weights alone"),
    (PHASE_3, small_vocabulary, [], "--model_name_or_path init"),
    (PHASE_3, None, ["--max_seq_length", "4096"], "more than the model's max_position_embeddings; use at most 128"),
    (PHASE_3, None, ["--learning_rate", "-1", "--num_train_epochs", "0", "--max_steps", "-1"], "; learning_rate"),
    (PHASE_3, None, ["--report_to", "tensorbord"], "report_to: tensorbord is not supported, only"),
    (PHASE_3, None, ["--per_device_eval_batch_size", "4"], "batches are counted in tokens here; use tokens_per_batch"),
    (PHASE_3, None, ["--resume_from_checkpoint", "x"], "resume_from_checkpoint: a killed run goes on by itself"),
    # Phase 4
    (PHASE_4, own_code("small/teacher"), [], "--teacher_name_or_path small/teacher: brings code of its own"),
    (PHASE_4, None, ["--teacher_name_or_path", "nowhere"], "--teacher_name_or_path nowhere: no such folder here"),
    (PHASE_4, None, ["--embedding_dim", "25"], "embedding_dim: 25 is wider than the teacher's 24"),
    (PHASE_4, None, ["--embedding_dim", "24", "--pca_sample_size", "9"], "9 texts are too few for 24 directions"),
    (PHASE_4, spoil("small/teacher/model.safetensors"), [], "holds NaN or infinity"),
    (PHASE_4, shard("corpus", kind=numbers), [], "column 'kind' is of int64, expected string"),
    (PHASE_4, shard("corpus", kind=lambda count: pa.array(["essay"] * count)), [], "found 'essay', expected query or"),
    (PHASE_4, shard("corpus", text=half_null), [], "is null in row 7"),
    (PHASE_4, no_rows("corpus", "train"), [], "its train split has 0 rows, expected at least 16"),
    # Phase 5
    (PHASE_5, own_code("wide16/teacher"), [], "--teacher_name_or_path wide16/teacher: brings code of its own"),
    (PHASE_5, own_code("init"), [], "--model_name_or_path init: brings code of its own, which is not run"),
    (PHASE_5, None, ["--eval_datasets", "nowhere.csv"], "nowhere.csv: no such"),
    (PHASE_5, remove("distil"), [], "--train_file distil: no such folder"),
    (PHASE_5, remove("wide16"), [], "--teacher_name_or_path wide16/teacher"),
    (
        PHASE_5,
        lambda folder: (folder / "distil/run.json").write_text('{"reduced_teacher": "0123"}'),
        [],
        "not the reduced teacher that made the labels",
    ),
    (PHASE_5, None, ["--teacher_name_or_path", "small/teacher"], "16 wide, but the teacher's vectors are 24"),
    (
        PHASE_5,
        None,
        ["--metric_for_best_model", "eval_luck"],
        "metric_for_best_model: luck, expected similarity or loss",
    ),
    (PHASE_5, pickled("init"), [], "--model_name_or_path init"),
    (PHASE_5, shard("distil", label=None), [], "no column 'label'"),
    (PHASE_5, shard("distil", label=labels(8, 0.3536)), [], "labels are 8 wide"),
    (PHASE_5, shard("distil", label=labels(16, np.nan)), [], "row 0 has length nan"),
    (PHASE_5, shard("distil", label=numbers), [], "label is int64; expected lists of one width"),
]


@pytest.mark.parametrize(("script", "change", "flags", "said"), CASES)
def test_bad_input_is_one_line(whole, tmp_path, capsys, monkeypatch, script, change, flags, said):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # a yes on stdin must not run anybody's code
    folder = tmp_path / "work"
    shutil.copytree(whole, folder)
    if change is not None:
        change(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = run_in_process(script, folder, capsys, *FLAGS[script], "--output_dir", "out", *flags)
    assert result.returncode == 2, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert said in line
    assert result.stderr.splitlines()[-1] == line
    assert "Traceback" not in result.stderr
    assert not (folder / "out").exists()
    assert not (folder / "was_run").exists()
    assert before == {path: path.read_bytes() for path in before}


class _Capabilities(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


@pytest.fixture
def rights_count():
    """Makes rights count for root too: without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, bits 1 and 2."""
    libc, header = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0)
    asked = (_Capabilities * 2)()
    libc.capget(header, asked)
    before = asked[0].effective
    asked[0].effective &= ~0b110
    libc.capset(header, asked)
    yield
    asked[0].effective = before
    libc.capset(header, asked)


DENIED = [
    (PHASE_1, "own.parquet", [], "own.parquet"),
    (PHASE_1, "texts.jsonl", ["--sources", "own=texts.jsonl"], "texts.jsonl"),
    (PHASE_1, "corpus", ["--sources", "own=corpus"], "corpus"),
    (PHASE_1, "init", [], "init"),
    (PHASE_1, "init/tokenizer.json", [], "tokenizer.json"),
    (PHASE_2, "init/config.json", [], "init"),
    (PHASE_2, "init/model.safetensors", [], "init"),
    (PHASE_3, "corpus/train-00000-of-00001.parquet", [], "corpus/train-00000-of-00001.parquet"),
    (PHASE_3, "corpus", [], "corpus"),
    (PHASE_3, "init", [], "init"),
    (PHASE_4, "small/teacher/model.safetensors", [], "small/teacher"),
    (PHASE_4, "small/teacher/modules.json", [], "small/teacher"),
    (PHASE_5, "distil/validation-00000-of-00001.parquet", [], "distil/validation-00000-of-00001.parquet"),
    *((PHASE_5, folder, [], folder) for folder in ("evaluation", "evaluation/qrels", "evaluation/corpus")),
    *((script, None, ["--output_dir", "locked/out"], "locked") for script in SCRIPTS),
]


@pytest.mark.parametrize(("script", "unreadable", "flags", "named"), DENIED)
def test_a_denied_permission_is_one_line(whole, tmp_path, capsys, rights_count, script, unreadable, flags, named):
    folder = tmp_path / "work"
    shutil.copytree(whole, folder)
    (folder / "texts.jsonl").write_text('{"text": "a"}\n')
    (folder / "locked").mkdir(mode=0o555)
    if unreadable is not None:
        (folder / unreadable).chmod(0)
    result = run_in_process(script, folder, capsys, *FLAGS[script], "--output_dir", "out", *flags)
    if unreadable is not None:
        (folder / unreadable).chmod(0o755)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert named in line
    assert "ermission denied" in line
    assert not (folder / "out").exists()
