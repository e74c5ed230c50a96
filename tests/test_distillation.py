"""Phase 5: labels against the Parquet, the loss in float64 and the alignment against a known rotation."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import SENTENCES, load_script, run_in_process, tiny_modernbert, tiny_sentence_transformer, tiny_tokenizer
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MSELoss

from modernbert_small.algebra import unit_vectors
from modernbert_small.distil.alignment import align
from modernbert_small.distil.labels import DistillationDataset, load_labels
from modernbert_small.distil.static import start_static, token_shares, write_static
from modernbert_small.distil.trainer import DistillationTrainer
from modernbert_small.evaluation import account
from modernbert_small.packed.attention import use_packed_attention
from modernbert_small.packed.batches import PackedSampler
from modernbert_small.packed.tokens import tokenize_split
from modernbert_small.packed.trainer import note_if_worse, worse_notice
from modernbert_small.run import devices
from modernbert_small.run.errors import UserError
from modernbert_small.run.loading import load_pooled

D = 16
N = 50


def write_data(folder, labels, texts=None, split="train"):
    """A split as phase 4 writes it."""
    texts = texts or [" ".join(SENTENCES[i % 4].split()[: 1 + i % 9]) + f" {i}" for i in range(len(labels))]
    folder.mkdir(exist_ok=True)
    column = pa.FixedSizeListArray.from_arrays(pa.array(labels.astype(np.float16).ravel()), labels.shape[1])
    pq.write_table(pa.table({"sentence": texts, "label": column}), folder / f"{split}-00000-of-00001.parquet")


@pytest.fixture
def setting(tmp_path, monkeypatch):
    """A student and a data set of unit labels."""
    monkeypatch.setattr(devices, "has_bf16", lambda device: False)
    tiny_modernbert(tmp_path / "mlm", tiny_tokenizer(tmp_path / "mlm"), hidden_size=D)
    write_data(tmp_path / "distil", unit_vectors(np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)))
    student = load_pooled("model", str(tmp_path / "mlm"), 64)
    use_packed_attention(student[0].auto_model, "auto", torch.device("cpu"), torch.float32)
    store = tokenize_split(tmp_path / "distil", "train", "sentence", student.tokenizer, 64)
    return student, DistillationDataset(store, load_labels(tmp_path / "distil", "train"))


def test_labels_are_mapped_as_written(setting, tmp_path):
    written = pq.read_table(tmp_path / "distil" / "train-00000-of-00001.parquet")["label"].to_pylist()
    labels = setting[1].labels
    assert isinstance(labels, np.memmap)
    assert labels.dtype == np.float16
    np.testing.assert_array_equal(labels, np.array(written, np.float16))


@pytest.mark.parametrize(
    ("row", "said"), [(np.full(D, np.nan), "label of row 2 has length nan"), (np.full(D, 1.0), "length 4.0, expected")]
)
def test_a_label_that_is_not_of_unit_length_is_refused(tmp_path, row, said):
    labels = unit_vectors(np.random.default_rng(0).normal(size=(4, D)).astype(np.float32))
    labels[2] = row
    write_data(tmp_path / "distil", labels)
    with pytest.raises(UserError, match=said):
        load_labels(tmp_path / "distil", "train")


def test_labels_without_rows_are_refused(tmp_path):
    write_data(tmp_path / "distil", np.zeros((0, D), np.float32), [])
    with pytest.raises(UserError, match="found no rows, expected labels"):
        load_labels(tmp_path / "distil", "train")


def trainer(student, dataset, folder, **arguments):
    args = SentenceTransformerTrainingArguments(
        str(folder), use_cpu=True, report_to="none", learning_rate=1e-12, logging_steps=1, **arguments
    )
    args.tokens_per_batch = args.tokens_per_process = 64
    return DistillationTrainer(
        model=student, args=args, train_dataset=dataset, eval_dataset=dataset, loss=MSELoss(student)
    )


def test_every_row_weighs_the_same_whatever_its_batch(setting, tmp_path):
    """The mean of the batches' losses is the mean of |e - y|^2 over all rows, which is computed in float64."""
    student, dataset = setting
    texts = pq.read_table(tmp_path / "distil" / "train-00000-of-00001.parquet")["sentence"].to_pylist()
    embeddings = student.encode(texts).astype(np.float64)
    expected = ((embeddings - dataset.labels.astype(np.float64)) ** 2).sum(1).mean()
    result = trainer(student, dataset, tmp_path / "out", num_train_epochs=1).train()
    assert len(PackedSampler(dataset.store.lengths, 64, 0)) > 5
    assert result.training_loss == pytest.approx(expected, rel=1e-5)


def test_similarity_is_the_mean_cosine_to_the_labels(setting, tmp_path):
    student, dataset = setting
    texts = pq.read_table(tmp_path / "distil" / "train-00000-of-00001.parquet")["sentence"].to_pylist()
    expected = (student.encode(texts) * unit_vectors(dataset.labels.astype(np.float32))).sum(1).mean()
    metrics = trainer(student, dataset, tmp_path / "out").evaluate()
    assert metrics["eval_similarity"] == pytest.approx(float(expected), abs=2e-3)  # labels are float16


def test_align_turns_a_student_to_its_labels(setting, tmp_path):
    """Labels that are the student's own vectors, rotated: alignment finds the rotation again."""
    student, dataset = setting
    axes = np.linalg.qr(np.c_[np.ones(D), np.random.default_rng(1).normal(size=(D, D - 1))])[0]
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(D - 1, D - 1)))[0]
    rotation = axes @ np.block([[np.ones((1, 1)), np.zeros((1, D - 1))], [np.zeros((D - 1, 1)), turn]]) @ axes.T
    texts = pq.read_table(tmp_path / "distil" / "train-00000-of-00001.parquet")["sentence"].to_pylist()
    before = student.encode(texts)
    rotated = DistillationDataset(dataset.store, (before @ rotation).astype(np.float16))
    similarity = align(student, rotated, rotated, 64)
    assert similarity["before"] < 0.9
    assert similarity["after"] > 0.999
    np.testing.assert_allclose(student.encode(texts), before @ rotation, atol=2e-3)


def test_a_student_that_is_at_its_labels_already_is_not_turned(setting, tmp_path):
    """Labels that are the student's own vectors, with weights of the final norm that a rotation would drop."""
    student, dataset = setting
    with torch.no_grad():
        student[0].auto_model.final_norm.weight.uniform_(0.2, 3)
    texts = pq.read_table(tmp_path / "distil" / "train-00000-of-00001.parquet")["sentence"].to_pylist()
    own = DistillationDataset(dataset.store, student.encode(texts).astype(np.float16))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    similarity = align(student, own, own, 64)
    assert similarity["before"] == pytest.approx(1, abs=1e-3)
    assert similarity["after"] < similarity["before"]
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_rotation_that_fits_only_its_sample_is_not_used(setting):
    """Labels without any relation to the texts: fifty of them can be fitted, and other ones cannot."""
    student, dataset = setting
    labels = [np.random.default_rng(seed).normal(size=(len(dataset), D)).astype(np.float16) for seed in range(2)]
    sample, heldout = (DistillationDataset(dataset.store, one) for one in labels)
    assert abs(align(student, sample, heldout, 64)["after"]) < 0.25
    assert align(student, sample, sample, 64)["after"] > 0.3


def test_align_reports_the_cosines_that_a_user_would_measure(setting, tmp_path):
    student, dataset = setting
    student[0].auto_model.final_norm.weight.data.uniform_(0.5, 1.5)
    texts = pq.read_table(tmp_path / "distil" / "train-00000-of-00001.parquet")["sentence"].to_pylist()
    targets = unit_vectors(dataset.labels.astype(np.float32))
    before = (student.encode(texts) * targets).sum(1).mean()
    similarity = align(student, dataset, dataset, 64)
    after = (student.encode(texts) * targets).sum(1).mean()
    assert similarity == pytest.approx({"before": float(before), "after": float(after)}, abs=2e-4)
    assert similarity["after"] > similarity["before"] + 0.05


def test_rows_and_labels_must_match(setting):
    with pytest.raises(ValueError, match="50 rows of tokens but 49 labels"):
        DistillationDataset(setting[1].store, setting[1].labels[:49])


def test_batches_of_equal_lengths_that_alignment_met_are_trained_on(tmp_path, monkeypatch):
    """All texts are cut at 16 tokens, so every batch has the same row lengths, in alignment and in training."""
    monkeypatch.setattr(devices, "has_bf16", lambda device: False)
    tiny_modernbert(tmp_path / "mlm", tiny_tokenizer(tmp_path / "mlm"), hidden_size=D)
    labels = unit_vectors(np.random.default_rng(0).normal(size=(N, D)).astype(np.float32))
    write_data(tmp_path / "distil", labels, [f"{i} {SENTENCES[i % 4]}" * 3 for i in range(N)])
    student = load_pooled("model", str(tmp_path / "mlm"), 16)
    use_packed_attention(student[0].auto_model, "auto", torch.device("cpu"), torch.float32)
    store = tokenize_split(tmp_path / "distil", "train", "sentence", student.tokenizer, 16)
    assert set(store.lengths.tolist()) == {16}
    dataset = DistillationDataset(store, load_labels(tmp_path / "distil", "train"))
    align(student, dataset, dataset, 64)
    assert np.isfinite(trainer(student, dataset, tmp_path / "out", max_steps=3).train().training_loss)


FLAGS = (
    *("--model_name_or_path", "mlm", "--teacher_name_or_path", "teacher", "--train_file", "distil"),
    *("--output_dir", "out", "--eval_datasets", "evaluation", "--max_seq_length", "64", "--tokens_per_batch", "512"),
    *("--max_steps", "3", "--report_to", "none"),
)


@pytest.fixture
def phase5(tmp_path, capsys):
    """Runs phase 5 on a tiny student, a teacher, its labels, and an evaluation set; more flags may be given."""
    from test_retrieval import write_set

    teacher = tiny_sentence_transformer(tmp_path, "bert", width=D)
    tiny_modernbert(tmp_path / "mlm", teacher.tokenizer, hidden_size=D)
    teacher.tokenizer.save_pretrained(tmp_path / "mlm")
    texts = [" ".join(SENTENCES[i % 4].split()[: 1 + i % 9]) + f" {i}" for i in range(N)]
    for split in ("train", "validation"):
        write_data(tmp_path / "distil", unit_vectors(teacher.encode(texts)), texts, split)
    write_set(tmp_path / "evaluation")
    return lambda *flags: run_in_process("distil_train.py", tmp_path, capsys, *FLAGS, *flags)


def test_a_failed_evaluation_loses_no_training(phase5, tmp_path, monkeypatch):
    """The model is finished, with an account that says what failed, and can be compared afterwards."""

    def fail(*arguments, **named):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(account, "account", fail)
    result = phase5()
    assert result.returncode == 0, result.stderr
    assert "THE COMPARISON WITH THE TEACHER FAILED (RuntimeError: CUDA out of memory)" in result.stderr
    assert "python -m modernbert_small.evaluate out teacher --datasets evaluation" in result.stderr
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["account"]["failed"] == "RuntimeError: CUDA out of memory"
    assert record["inputs"]["eval_datasets evaluation"]["path"] == "evaluation"
    assert "The comparison with the teacher failed: RuntimeError" in (tmp_path / "out/README.md").read_text()
    assert SentenceTransformer(str(tmp_path / "out"), device="cpu").encode("a text").shape == (D,)


def test_stopped_while_it_evaluates_phase_5_goes_on_with_what_was_trained(phase5, tmp_path, monkeypatch):
    def stop(*arguments, **named):
        assert (tmp_path / "out.partial/model.safetensors").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(account, "account", stop)
    assert phase5().returncode == 130
    monkeypatch.undo()
    monkeypatch.setattr(DistillationTrainer, "training_step", lambda *given: pytest.fail("it was trained already"))
    result = phase5()
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert (record["steps"], record["resumed"]) == (3, True)
    assert record["account"]["retrieval"]


def test_an_edited_evaluation_set_is_another_input(phase5, tmp_path):
    from test_retrieval import write_set

    assert phase5().returncode == 0
    assert "nothing to do" in phase5().stderr
    write_set(tmp_path / "evaluation", qrels=[("q1", "d2")])
    result = phase5()
    assert result.returncode == 2
    assert "eval_datasets evaluation" in result.stderr


def test_a_set_that_would_spoil_the_evaluation_is_refused_before_training(phase5, tmp_path):
    rows = {"sentence1": ["a", "c"], "sentence2": ["b", "d"], "score": [0.5, float("nan")]}
    pq.write_table(pa.table(rows), tmp_path / "pairs.parquet")
    result = phase5("--eval_datasets", "pairs.parquet")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == (
        "error: --eval_datasets pairs.parquet: score is nan in row 1, expected a finite number"
    )
    assert not (tmp_path / "out.partial").exists()


def test_a_model_that_ends_worse_than_it_began_says_so(phase5, tmp_path):
    labels = unit_vectors(np.random.default_rng(0).normal(size=(N, D)).astype(np.float32))
    for split in ("train", "validation"):
        write_data(tmp_path / "distil", labels, split=split)
    result = phase5("--learning_rate", "10", "--load_best_model_at_end", "false")
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "out/run.json").read_text())
    worse = record["ended_worse"]
    assert worse["measure"] == "held-out cosine to the labels"
    assert worse["ended"] == pytest.approx(record["heldout_similarity"], abs=1e-5)
    assert worse["began"] == pytest.approx(max(record["alignment_similarity"].values()), abs=1e-5)
    assert worse["ended"] < worse["began"]
    assert "TRAINING MADE THE MODEL WORSE: its held-out cosine to the labels was" in result.stderr
    assert "THE MODEL ENDED WORSE THAN IT BEGAN" in result.stderr.splitlines()[-1]


def test_the_first_held_out_loss_is_compared_with_the_one_of_the_model_that_is_kept(phase5, tmp_path, monkeypatch):
    """The last one is measured after the training if its last step was not evaluated."""
    ended = {"eval_loss": 9.0, "eval_similarity": 1.0}
    monkeypatch.setattr(load_script("distil_train.py"), "last_evaluation", lambda trainer: ended)
    result = phase5("--eval_steps", "2")
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "out/run.json").read_text())
    first = next(entry["eval_loss"] for entry in record["history"] if "eval_loss" in entry)
    assert record["ended_worse"] == {"measure": "held-out loss", "began": pytest.approx(first, abs=1e-6), "ended": 9.0}
    assert result.stderr.count("TRAINING MADE THE MODEL WORSE") == 1


def test_a_held_out_loss_that_rises_is_worse(caplog):
    assert note_if_worse("held-out loss", 4.0, 3.9, greater_is_better=False) == {}
    assert note_if_worse("cosine", 0.5, 0.5) == {}
    worse = note_if_worse("held-out loss", 4.0, 7.5, greater_is_better=False)
    assert worse == {"ended_worse": {"measure": "held-out loss", "began": 4.0, "ended": 7.5}}
    assert "its held-out loss was 4.0000 at the beginning and is 7.5000" in caplog.text
    assert worse_notice(worse).startswith("THE MODEL ENDED WORSE THAN IT BEGAN, held-out loss 4.0000 -> 7.5000")
    assert worse_notice({}) == ""


def test_a_texts_vector_is_the_mean_of_its_tokens(setting):
    store = setting[1].store
    values = np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32)
    expected = [values[store.gather(np.array([row]))[0]].mean(0) for row in range(N)]
    np.testing.assert_allclose(token_shares(store, N, 400) @ values, expected, atol=1e-6)
    np.testing.assert_allclose(token_shares(store, 7, 400) @ values, expected[:7], atol=1e-6)


def test_the_student_computes_the_static_model(setting):
    student, dataset = setting
    encoder = student[0].auto_model
    rng = np.random.default_rng(3)
    static = rng.normal(size=(encoder.config.vocab_size, D)).astype(np.float32)
    static *= rng.uniform(0.1, 1, (len(static), 1)).astype(np.float32)
    labels = rng.normal(size=(9, D)).astype(np.float32) * np.where(np.isin(np.arange(D), [4, 11]), 0.1, 1)
    static[:, [4, 11]] = 0
    needed = np.square(static).sum(1) + static.sum(1) ** 2 / 2
    write_static(encoder, static, labels, occurrences=needed == needed.max())  # so that no row is shortened
    expected = unit_vectors(token_shares(dataset.store, N, len(static)) @ static)
    texts = [student.tokenizer.decode(dataset.store.gather(np.array([row]))[0][1:-1]) for row in range(N)]
    np.testing.assert_allclose(student.encode(texts), expected, atol=1e-3)


def test_another_tokenizer_and_another_pooling_are_refused(setting, tmp_path):
    student, dataset = setting
    tiny_modernbert(tmp_path / "other", tiny_tokenizer(tmp_path / "other", 300), hidden_size=D)
    with pytest.raises(UserError, match="found another one; make the student with phase 4's teacher"):
        start_static(student, SentenceTransformer(str(tmp_path / "other"), device="cpu"), dataset, dataset, 64)
    student[1].pooling_mode = "cls"
    with pytest.raises(UserError, match="needs mean pooling, found cls; use --pooling mean"):
        start_static(student, student, dataset, dataset, 64)
