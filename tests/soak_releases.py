"""What this project saves is loaded by older releases of transformers and sentence-transformers: the same vectors.

This is not part of the test suite; `make soak` runs it. Each pair of releases gets an environment of its own, which
stays in .soak/ for the next time. Installing it needs PyPI, or a local index with the same packages. Compared are the
student, with RoPE's thetas and a pattern of layers that are not the defaults, a reduced teacher in each form of
tests/test_teachers.py, and a Router of the student and such a teacher.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, tiny_modernbert, tiny_tokenizer
from test_teachers import FORMS, TEXTS, tokenizers, write_teacher  # noqa: F401, a fixture

from modernbert_small.distil.router import join
from modernbert_small.label.teacher import with_projection
from modernbert_small.run.loading import load_pooled, load_sentence_transformer
from modernbert_small.run.saving import save_embedding_model

RELEASES = {
    "transformers 4.48": ["transformers==4.48.3", "sentence-transformers==3.4.1"],
    "transformers 4.57": ["transformers==4.57.6", "sentence-transformers==5.1.2"],
    "the newest before 6": ["transformers==4.57.6", "sentence-transformers==5.7.0"],
}
# Reads folders and texts from a file; writes the vectors of each folder's texts, or what went wrong.
LOAD = """
import json, sys
from sentence_transformers import SentenceTransformer

jobs, out = json.load(open(sys.argv[1])), {}
for name, job in jobs.items():
    try:
        model = SentenceTransformer(job["folder"], device="cpu")
        vectors = {}
        for kind, prompt in job["prompts"].items():
            route = {"task": kind} if name == "router" else {}
            vectors[kind] = model.encode(job["texts"], prompt=prompt, **route)
        out[name] = {kind: rows.tolist() for kind, rows in vectors.items()}
    except Exception as error:
        out[name] = f"{type(error).__name__}: {error}"
json.dump(out, open(sys.argv[2], "w"))
"""


def environment(name):
    """The interpreter of an environment with these releases, which is made if it is not there."""
    folder = ROOT / ".soak" / name.replace(" ", "-")
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        torch_release = f"torch=={torch.__version__.partition('+')[0]}"
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", torch_release, *RELEASES[name]], check=True)
        (folder / "complete").touch()
    return python


def odd_student(folder):
    """A student whose RoPE, layers and epsilon are not ModernBERT's defaults, which an older release would assume."""
    rope = {
        kind: {"rope_theta": theta, "rope_type": "default"}
        for kind, theta in (("full_attention", 500.0), ("sliding_attention", 30.0))
    }
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    odd = {"rope_parameters": rope, "layer_types": kinds, "num_hidden_layers": 5, "norm_eps": 1e-2}
    tiny_modernbert(folder, tiny_tokenizer(folder), **odd)
    return load_pooled("model", str(folder), 64)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizers):  # noqa: F811
    """By name: the folder of a saved model, its texts, its prompts, and the vectors of the running releases."""
    root = tmp_path_factory.mktemp("models")
    models = {"student": odd_student(root / "mlm")}
    for form, (options, _) in FORMS.items():
        folder = write_teacher(root / f"original {len(models)}", tokenizers, **options)
        teacher = load_sentence_transformer("--teacher_name_or_path", str(folder), "cpu")
        basis = np.linalg.qr(np.random.default_rng(0).normal(size=(teacher.get_embedding_dimension(), 16)))[0]
        models[form] = with_projection(teacher, basis)
    models["router"] = join(models["student"].to("cpu"), models["LaBSE"].to("cpu"))
    jobs = {}
    for name, model in models.items():
        folder = root / f"saved {len(jobs)}"
        save_embedding_model(model.to("cpu"), folder)
        prompts = {kind: model.prompts.get(kind, "") for kind in ("query", "document")}
        texts = [text.strip() for text in TEXTS]  # sentence-transformers before 6 strips texts by itself
        vectors = {kind: model.encode(texts, prompt=prompt, task=kind) for kind, prompt in prompts.items()}
        jobs[name] = {"folder": str(folder), "texts": texts, "prompts": prompts, "expected": vectors}
    return jobs


@pytest.mark.parametrize("release", RELEASES)
def test_older_releases_compute_the_same_vectors(saved, tmp_path, release):
    jobs = {name: {key: value for key, value in job.items() if key != "expected"} for name, job in saved.items()}
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    files = [str(tmp_path / "jobs.json"), str(tmp_path / "vectors.json")]
    without_ours = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([environment(release), "-c", LOAD, *files], check=True, env=without_ours)
    found = json.loads((tmp_path / "vectors.json").read_text())
    wrong = {}
    if release == "transformers 4.48":  # sentence-transformers has Routers since version 5
        assert "Router" in found.pop("router")
    for name, job in saved.items():
        if name not in found:
            continue
        if isinstance(found[name], str):
            if "does not recognize this architecture" not in found[name]:  # such as Qwen 3 before transformers 4.51
                wrong[name] = found[name]
            continue
        for kind, expected in job["expected"].items():
            lowest = (np.array(found[name][kind]) * expected).sum(1).min()
            if lowest < 0.999999:
                wrong[f"{name}, {kind}"] = f"cosine {lowest:.6f}"
    assert not wrong
