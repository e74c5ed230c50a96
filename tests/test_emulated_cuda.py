"""Phases 2 to 5 on an emulated GPU, with their default settings, against the same phases on a CPU.

The GPU of emulated_cuda.py refuses to mix devices, and its attention kernel takes what Flash Attention takes.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import ROOT, tiny_modernbert, tiny_sentence_transformer
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from test_processes import write_corpus
from test_retrieval import write_set

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is needed, for the part of the GPU in C++")

TRAINING = ["--max_seq_length", "64", "--tokens_per_batch", "512", "--num_train_epochs", "1", "--logging_steps", "2"]
TRAINING += ["--eval_steps", "100", "--save_steps", "100", "--report_to", "none", "--learning_rate", "1e-2"]
PHASE_2 = ["--teacher_name_or_path", "large", "--train_file", "corpus", "--max_position_embeddings", "64"]
PHASE_2 += ["--hidden_size", "16", "--num_attention_heads", "1", "--intermediate_size", "24"]
PHASE_2 += ["--num_hidden_layers", "4", "--init", "all_layers", "--output_dir", "init"]
PHASE_3 = ["--train_file", "corpus", "--model_name_or_path", "init", *TRAINING]
PHASE_4 = ["--teacher_name_or_path", "small/teacher", "--train_file", "corpus", "--embedding_dim", "16"]
PHASE_4 += ["--pca_sample_size", "50", "--output_dir", "distil", "--teacher_output_dir", "teacher"]
PHASE_5 = ["--train_file", "distil", "--model_name_or_path", "mlm", "--teacher_name_or_path", "teacher"]
PHASE_5 += ["--eval_datasets", "evaluation", *TRAINING]
ON_CPU = ["--use_cpu", "true", "--bf16", "true"]
FLOAT32 = ["--bf16", "false", "--output_dir", "float32", "--max_steps", "1"]
JOBS = {
    "phase 2": ("mlm/init_model_mlm.py", PHASE_2),
    "phase 3": ("mlm/pre_train.py", [*PHASE_3, "--output_dir", "mlm"]),
    "phase 4": ("create_distil_dataset.py", PHASE_4),
    "phase 5": ("distil_train.py", [*PHASE_5, "--output_dir", "model"]),
    "phase 3, CPU": ("mlm/pre_train.py", [*PHASE_3, *ON_CPU, "--output_dir", "cpu/mlm"]),
    "phase 5, CPU": ("distil_train.py", [*PHASE_5, *ON_CPU, "--output_dir", "cpu/model", "--max_steps", "2"]),
    "float32": ("mlm/pre_train.py", [*PHASE_3, *FLOAT32]),
    "float32, varlen": ("mlm/pre_train.py", [*PHASE_3, *FLOAT32, "--attn_implementation", "varlen"]),
}


@pytest.fixture(scope="module")
def device(request):
    """The compiled part of the GPU; compiling it takes seconds, so it is kept between runs."""
    source, torch_folder = ROOT / "tests" / "emulated_cuda.cpp", Path(torch.__file__).parent
    key = hashlib.sha256(source.read_bytes() + torch.__version__.encode() + str(torch_folder).encode()).hexdigest()[:16]
    library = Path(request.config.cache.mkdir("emulated_cuda"), f"{key}.so")
    if not library.exists():
        lib, partial = torch_folder / "lib", library.with_suffix(f".{os.getpid()}")
        command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", "-I", torch_folder / "include", source, "-L", lib]
        command += [f"-Wl,-rpath,{lib}", "-lc10", "-ltorch_cpu", "-o", partial]
        subprocess.run(command, check=True)
        partial.rename(library)
    return library


@pytest.fixture(scope="module")
def ran(device, tmp_path_factory):
    """The folder that all jobs ran in, and their reports by name."""
    folder = tmp_path_factory.mktemp("cuda")
    teacher = tiny_sentence_transformer(folder / "small", "modernbert", width=32)
    tiny_modernbert(folder / "large", teacher.tokenizer, hidden_size=32)
    teacher.tokenizer.save_pretrained(folder / "large")
    write_set(folder / "evaluation")
    write_corpus(folder)
    (folder / "jobs.json").write_text(json.dumps(list(JOBS.values())))
    command = [sys.executable, ROOT / "tests" / "launch_on_cuda.py", device, "jobs.json", "report.json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    reports = json.loads((folder / "report.json").read_text())
    return folder, dict(zip(JOBS, reports, strict=True))


def losses(folder):
    record = json.loads((folder / "run.json").read_text())
    return [entry["loss"] for entry in record["history"] if "loss" in entry]


@pytest.mark.parametrize("phase", ["phase 3", "phase 4", "phase 5"])
def test_models_attend_in_bf16_by_the_kernel(ran, phase):
    report = ran[1][phase]
    assert report["error"] is None
    assert list(report["attended"]) == ["torch.bfloat16"]


def test_training_is_as_on_a_cpu_to_the_rounding_of_bf16(ran):
    folder, reports = ran
    for phase, name, logged in (("phase 3", "mlm", 2), ("phase 5", "model", 1)):
        on_gpu, on_cpu = losses(folder / name), losses(folder / "cpu" / name)
        assert len(on_gpu) == 2  # of two steps each
        assert on_gpu[:logged] == pytest.approx(on_cpu, rel=0.005)
        assert reports[phase]["operations"] > 1000
        assert reports[f"{phase}, CPU"]["operations"] == 0  # --use_cpu leaves no model on the GPU
    assert losses(folder / "mlm")[1] < losses(folder / "mlm")[0] - 0.3


def test_labels_are_computed_in_bf16_and_the_teacher_is_saved_in_float32(ran):
    folder, _ = ran
    assert {value.dtype for value in load_file(folder / "teacher" / "model.safetensors").values()} == {torch.float32}
    table = pq.read_table(folder / "distil" / "validation-00000-of-00001.parquet")
    labels = np.array(table["label"].to_pylist(), np.float32)
    exact = SentenceTransformer(str(folder / "teacher"), device="cpu").encode(table["sentence"].to_pylist())
    cosines = (labels * exact).sum(1) / np.linalg.norm(exact, axis=1)
    assert cosines.mean() > 0.999
    assert cosines.min() < 0.999999, "bf16 was not used"


@pytest.mark.parametrize("phase", ["phase 3", "phase 5"])
def test_a_step_waits_for_the_gpu_at_most_twice(ran, phase):
    report = ran[1][phase]
    assert len(report["waits"]) == 4  # the first step gets the model ready too, and the third follows a line in the log
    assert 1 <= report["waits"][1] <= 2, report["where"]
    assert 1 <= report["waits"][3] <= 2, report["where"]


def test_float32_runs_without_the_kernel_and_a_request_for_it_is_one_line(ran):
    reports = ran[1]
    assert reports["phase 2"]["attended"] == reports["float32"]["attended"] == {}
    assert reports["phase 2"]["operations"] > 1000
    assert reports["float32"]["error"] is None
    said = "attn_implementation: varlen needs bf16 or fp16, found float32; use auto"
    assert reports["float32, varlen"]["error"] == said
    assert reports["float32, varlen"]["operations"] == 0
