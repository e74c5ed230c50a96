"""The five scripts as users run them: five processes, another working folder, no hub."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from forked import run_forked
from helpers import ROOT, SCRIPTS, SENTENCES, run_in_process, tiny_modernbert, tiny_sentence_transformer
from records import FOLDERS, fixture, names
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoTokenizer, ModernBertForMaskedLM

from modernbert_small import pipeline
from modernbert_small.settings.sections import SECTIONS
from modernbert_small.settings.whole import full_recipe

ARTEFACTS = ("data/corpus", "checkpoints/init", "checkpoints/mlm", "data/distil", "checkpoints/model")
TINY = {
    "create_dataset": {
        "sources": ["own=texts.jsonl", "pairs=pairs.csv"],
        "tokenizer_name_or_path": "big",
        "max_seq_length": 64,
        "validation_rows": 20,
    },
    "init_model_mlm": {
        "teacher_name_or_path": "big",
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
    },
    "pre_train": {
        "max_seq_length": 64,
        "tokens_per_batch": 512,
        "max_steps": 6,
        "eval_steps": 3,
        "report_to": "none",
    },
    "create_distil_dataset": {
        "teacher_name_or_path": "small/teacher",
        "embedding_dim": 16,
        "pca_sample_size": 50,
        "eval_datasets": ["evaluation"],
        "tokens_per_batch": 512,
    },
    "distil_train": {
        "eval_datasets": ["evaluation"],
        "output_dir": "checkpoints/model",
        "max_seq_length": 64,
        "tokens_per_batch": 512,
        "eval_steps": 5,
        "save_steps": 5,
        "num_train_epochs": 1,
        "learning_rate": 3e-3,
        "report_to": "none",
    },
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which all five phases ran."""
    from test_retrieval import write_set

    folder = tmp_path_factory.mktemp("work")
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, rng.integers(4, 40))) for _ in range(200)]
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts[:150]))
    (folder / "pairs.csv").write_text(
        "query,positive\n" + "\n".join(f'"{a}","{b}"' for a, b in zip(texts[150:175], texts[175:], strict=True))
    )
    teacher = tiny_sentence_transformer(folder / "small", "bert", width=24)
    tiny_modernbert(folder / "big", teacher.tokenizer, hidden_size=32, num_hidden_layers=6, num_attention_heads=4)
    teacher.tokenizer.save_pretrained(folder / "big")
    write_set(folder / "evaluation")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    said = tmp_path_factory.mktemp("said")
    results = [run_forked(script, folder, said, "--config", "tiny.yaml") for script in SCRIPTS]
    for script, result in zip(SCRIPTS, results, strict=True):
        assert result.returncode == 0, f"{script}: {result.stdout}{result.stderr}"
    return folder, results


def test_corpus(finished):
    folder, _ = finished
    for split in ("train", "validation"):
        table = pq.read_table(folder / "data/corpus" / f"{split}-00000-of-00001.parquet")
        assert table.column_names == ["text", "source", "kind"]
        assert set(table["kind"].to_pylist()) <= {"query", "document"}


def test_checkpoints_load(finished):
    folder, _ = finished
    for name in ("init", "mlm"):
        model = ModernBertForMaskedLM.from_pretrained(folder / "checkpoints" / name)
        assert model.config.hidden_size == 16
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert len(AutoTokenizer.from_pretrained(folder / "checkpoints" / name)) == model.config.vocab_size
    report = json.loads((folder / "checkpoints/init/run.json").read_text())
    assert set(report["heldout_mlm_loss"]) == {"teacher", "student", "random student"}
    assert any(name.startswith("model.layers.0.") for name in report["transferred"])
    assert report["init_used"] == "guide"
    assert len(report["layers"]["cka"]) == len(report["layers"]["explained_variance"]) == 4


def test_all_layers_transfer(finished, capsys):
    folder, _ = finished
    flags = ["--config", "tiny.yaml", "--init", "all_layers", "--output_dir", "checkpoints/all_layers"]
    result = run_in_process(SCRIPTS[1], folder, capsys, *flags)
    assert result.returncode == 0, result.stderr
    report = json.loads((folder / "checkpoints/all_layers/run.json").read_text())
    assert report["layers"]["teacher_layers"][0] == 0
    assert len(report["layers"]["cka"]) == len(report["layers"]["explained_variance"]) == 4
    assert "layer  3 and the teacher's" in result.stderr
    assert ModernBertForMaskedLM.from_pretrained(folder / "checkpoints/all_layers").config.num_hidden_layers == 4

    missing = run_in_process(SCRIPTS[1], folder, capsys, *flags[:-1], "checkpoints/x", "--train_file", "nowhere")
    assert missing.returncode == 2
    assert (
        f"--train_file nowhere: no such folder; looked at {folder}/nowhere; phase 1 makes it: python " in missing.stderr
    )


def test_all_layers_of_an_embedding_model(finished, capsys):
    """Phase 5 takes the start as it is. With a head from a second model, phase 3 does too."""
    folder, _ = finished
    sizes = ["--num_hidden_layers", "2", "--teacher_name_or_path", "checkpoints/model", "--init", "all_layers"]
    for name, more in (("bare", ()), ("headed", ("--mlm_head_name_or_path", "checkpoints/mlm"))):
        flags = ["--config", "tiny.yaml", *sizes, *more, "--output_dir", f"checkpoints/{name}"]
        done = run_in_process(SCRIPTS[1], folder, capsys, *flags)
        assert done.returncode == 0, done.stderr
        assert json.loads((folder / "checkpoints" / name / "run.json").read_text())["pooling"] == "mean"
    assert "without a masked-LM head, so phase 3 is left out" not in done.stderr
    assert ModernBertForMaskedLM.from_pretrained(folder / "checkpoints/headed").config.num_hidden_layers == 2

    bare = ["--config", "tiny.yaml", "--model_name_or_path", "checkpoints/bare", "--max_steps", "2"]
    refused = run_in_process(SCRIPTS[2], folder, capsys, *bare, "--output_dir", "checkpoints/x")
    assert refused.returncode == 2
    assert "has no weights for" in refused.stderr
    done = run_in_process(SCRIPTS[4], folder, capsys, *bare, "--output_dir", "checkpoints/from_teacher")
    assert done.returncode == 0, done.stderr
    aligned = json.loads((folder / "checkpoints/from_teacher/run.json").read_text())["alignment_similarity"]
    assert max(aligned.values()) > 0.5

    other = ["--config", "tiny.yaml", *sizes, "--mlm_head_name_or_path", "big", "--output_dir", "checkpoints/x"]
    other += ["--init", "guide"]
    refused = run_in_process(SCRIPTS[1], folder, capsys, *other)
    assert refused.returncode == 2
    assert "mlm_head_name_or_path: is for --init all_layers alone, found --init guide" in refused.stderr


def test_labels_are_the_reduced_teachers(finished):
    folder, results = finished
    ceiling = json.loads((folder / "data/distil/run.json").read_text())["ceiling"]
    assert [row["system"] for row in ceiling["retrieval"]] == ["teacher", "teacher, projected"]
    assert "\nteacher, projected  " in results[3].stdout
    projection = json.loads((folder / "checkpoints/teacher/run.json").read_text())["projection"]
    assert list(projection["quality"]) == ["16"]
    table = pq.read_table(folder / "data/distil/train-00000-of-00001.parquet")
    assert table.column_names == ["sentence", "label", "source", "kind"]
    corpus = pq.read_table(folder / "data/corpus/train-00000-of-00001.parquet")
    assert table["sentence"].to_pylist() == corpus["text"].to_pylist()
    assert str(table["label"].type).startswith("fixed_size_list<element: halffloat")
    labels = np.array(table["label"].to_pylist(), np.float32)
    np.testing.assert_allclose(np.linalg.norm(labels, axis=1), 1, atol=2e-3)
    record = json.loads((folder / "data/distil/run.json").read_text())
    teacher = SentenceTransformer(str(folder / "checkpoints/teacher"), device="cpu")
    tokens = sum(len(teacher.tokenizer(text)["input_ids"]) for text in table["sentence"].to_pylist())
    assert record["counts"]["train"] == {"rows": len(table), "tokens": tokens, "truncated_rows": 0}
    assert 0 <= record["padding_share"] < 1
    cosines = (teacher.encode(table["sentence"].to_pylist()) * labels).sum(1)
    assert cosines.min() > 0.999  # bf16 where the processor has it


def test_the_model_loads_and_learned(finished):
    folder, _ = finished
    model = SentenceTransformer(str(folder / "checkpoints/model"), device="cpu")
    assert [type(module) for module in model] == [Transformer, Pooling, Normalize]
    vectors = model.encode(["short", "a longer text " * 9])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    record = json.loads((folder / "checkpoints/model/run.json").read_text())
    assert record["heldout_similarity"] > record["alignment_similarity"]["before"]
    assert {"teacher", "teacher, projected", "student"} < {row["system"] for row in record["account"]["retrieval"]}
    card = (folder / "checkpoints/model/README.md").read_text()
    assert "# model\n" in card
    assert "| nDCG@10 | Toy |" in card


def test_the_finished_folder_holds_what_is_shipped_and_all_can_read_it(finished):
    model = finished[0] / "checkpoints/model"
    assert not [path for path in model.rglob("*") if path.name.startswith(("checkpoint-", "runs", "eval"))]
    assert list((model.parent / "model.training").glob("checkpoint-*"))
    files = list((finished[0] / "checkpoints").rglob("*.safetensors"))
    assert {path.parent.name for path in files} >= {"init", "mlm", "teacher", "model"}
    assert {path.stat().st_mode for path in files} == {(model / "README.md").stat().st_mode}


def test_the_report_knows_all_phases(finished):
    folder, results = finished
    text = (folder / "checkpoints/model/report.html").read_text()
    assert "look at checkpoints/model/report.html" in results[-1].stderr
    assert "No record was found" not in text
    assert len(re.findall("<h2>", text)) == 11
    assert "<h3>eins " in text  # a search


def test_pairs_that_phase_1_holds_out_are_measured_by_phases_4_and_5(finished, capsys):
    folder, _ = finished
    texts = [json.loads(line)["text"] for line in (folder / "texts.jsonl").read_text().splitlines()[:30]]
    queries = [" ".join(reversed(text.split())) for text in texts]
    rows = [json.dumps({"query": query, "positive": f"{query} indeed"}) for query in queries]
    (folder / "easy.jsonl").write_text("\n".join(rows))  # which a random teacher can tell apart
    sources = ["--sources", "own=texts.jsonl", "easy=easy.jsonl"]
    heldout = ["--eval_datasets", "heldout"]
    labels = ["--train_file", "other/corpus", "--teacher_output_dir", "other/teacher", "--output_dir", "other/distil"]
    model = ["--train_file", "other/distil", "--teacher_name_or_path", "other/teacher", "--max_steps", "1"]
    phases = {
        SCRIPTS[0]: [*sources, "--output_dir", "other/corpus", *heldout],
        SCRIPTS[3]: [*labels, *heldout],
        SCRIPTS[4]: [*model, "--output_dir", "other/model", *heldout],
    }
    for script, flags in phases.items():
        result = run_in_process(script, folder, capsys, "--config", "tiny.yaml", *flags)
        assert result.returncode == 0, result.stderr
    record = json.loads((folder / "other/model/run.json").read_text())
    assert record["inputs"]["eval_datasets heldout"]["path"] == "other/distil/heldout"
    assert record["reported_texts_in_training"] == {}
    (student,) = [row for row in record["account"]["retrieval"] if row["system"] == "student"]
    assert list(student["scores"]) == ["heldout"]
    for script, data in ((SCRIPTS[3], "data/corpus"), (SCRIPTS[4], "data/distil")):
        result = run_in_process(script, folder, capsys, "--config", "tiny.yaml", *heldout, "--output_dir", "other/x")
        assert f"error: --eval_datasets heldout: no {data}/heldout; make it with" in result.stderr


@pytest.mark.parametrize(("artefact", "script"), list(zip(ARTEFACTS, SCRIPTS, strict=True)))
def test_run_json_says_what_was_made_from_what(finished, artefact, script):
    folder, _ = finished
    record = json.loads((folder / artefact / "run.json").read_text())
    assert record["phase"] == script.split("/")[-1].removesuffix(".py")
    assert record["wall_seconds"] > 0
    assert record["inputs"]
    assert {"settings", "versions", "git_commit", "started"} <= set(record)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_kept_records_have_the_names_of_a_real_run(finished, folder):
    root, _ = finished  # if this fails: python tests/records.py FOLDER
    real = json.loads((root / folder / "run.json").read_text())
    assert names(real) == names(json.loads(fixture(folder).read_text()))


def test_the_command_for_all_phases_ends_with_the_table_and_the_report(finished, monkeypatch, capsys):
    folder, results = finished
    monkeypatch.chdir(folder)
    pipeline.finish("checkpoints/model", pipeline.finished_record("checkpoints/model"))
    table, after = capsys.readouterr().out.split("\nThe report is ")
    assert table.strip() in results[-1].stdout
    assert after.startswith("checkpoints/model/report.html.")


def test_the_command_for_all_phases_knows_what_a_recipe_has_made(finished, monkeypatch):
    monkeypatch.chdir(finished[0])
    recipe = full_recipe(Path("tiny.yaml"))
    assert pipeline.states(recipe, list(SECTIONS), overwrite=False) == dict.fromkeys(SECTIONS, "finished")
    recipe["distil_train"]["learning_rate"] = 1e-3
    found = pipeline.states(recipe, list(SECTIONS), overwrite=False)
    assert found["distil_train"].startswith("finished with other settings (learning_rate: 0.003 -> 0.001); the run st")


def test_nothing_is_left_half_written_or_pickled(finished):
    folder, _ = finished
    files = [path for path in folder.rglob("*") if "checkpoint-" not in str(path.relative_to(folder))]
    assert not [path for path in files if path.name.endswith((".partial", ".tmp", ".bin", ".pt", ".pth", ".pkl"))]


def test_each_phase_names_the_next_command(finished):
    _, results = finished
    for result, following in zip(results, SCRIPTS[1:], strict=False):
        assert f"next: python {ROOT / following} --config tiny.yaml" in result.stderr
    assert 'SentenceTransformer("checkpoints/model")' in results[-1].stderr
    assert "  mean  " in results[-1].stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_again_does_nothing_and_other_settings_are_refused(finished, script, capsys):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    again = run_in_process(script, folder, capsys, "--config", "tiny.yaml")
    assert (again.returncode, "nothing to do" in again.stderr) == (0, True), again.stderr
    other = run_in_process(script, folder, capsys, "--config", "tiny.yaml", "--seed", "7")
    assert other.returncode == 2
    assert "error: " in other.stderr
    assert "seed: 42 -> 7" in other.stderr
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize(
    ("script", "named"),
    [
        (SCRIPTS[0], ("sentence-transformers/msmarco-msmarco-MiniLM-L6-v3", "--sources msmarco=<local path>")),
        (SCRIPTS[1], ("answerdotai/ModernBERT-base", "--teacher_name_or_path")),
        (SCRIPTS[2], ("data/corpus", "--train_file")),
        (SCRIPTS[3], ("data/corpus", "--train_file")),
        (SCRIPTS[4], ("data/distil", "--train_file")),
    ],
)
def test_the_default_recipe_without_a_hub_is_one_line(script, named, tmp_path, capsys):
    result = run_in_process(script, tmp_path, capsys)
    assert result.returncode == 2
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    for words in named:
        assert words in error
    assert not list(tmp_path.iterdir())


def test_an_unreachable_tokenizer_and_teacher_are_named(finished, tmp_path, capsys):
    folder, _ = finished
    corpus = run_in_process(SCRIPTS[0], tmp_path, capsys, "--sources", f"own={folder / 'texts.jsonl'}")
    assert corpus.returncode == 2
    assert "answerdotai/ModernBERT-base" in corpus.stderr
    assert "--tokenizer_name_or_path" in corpus.stderr
    small = ["--embedding_dim", "16", "--train_file", str(folder / "data/corpus")]
    labels = run_in_process(SCRIPTS[3], tmp_path, capsys, *small)
    assert labels.returncode == 2
    assert "Alibaba-NLP/gte-modernbert-base" in labels.stderr
    assert "--teacher_name_or_path" in labels.stderr
