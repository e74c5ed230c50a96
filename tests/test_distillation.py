"""Phase 5: labels against the Parquet, the loss in float64 and the alignment against a known rotation."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import SENTENCES, tiny_modernbert, tiny_tokenizer
from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MSELoss

from modernbert_small.algebra import unit_vectors
from modernbert_small.distil.alignment import align
from modernbert_small.distil.labels import DistillationDataset, load_labels
from modernbert_small.distil.trainer import DistillationTrainer
from modernbert_small.packed.attention import use_packed_attention
from modernbert_small.packed.batches import PackedSampler
from modernbert_small.packed.tokens import tokenize_split
from modernbert_small.run import devices
from modernbert_small.run.errors import UserError
from modernbert_small.run.loading import load_mean_pooled

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
    student = load_mean_pooled("model", str(tmp_path / "mlm"), 64)
    use_packed_attention(student[0].auto_model, "auto", torch.device("cpu"))
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
    args.tokens_per_batch = 64
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
    similarity = align(student, rotated, 64)
    assert similarity["before"] < 0.9
    assert similarity["after"] > 0.999
    np.testing.assert_allclose(student.encode(texts), before @ rotation, atol=2e-3)


def test_rows_and_labels_must_match(setting):
    with pytest.raises(ValueError, match="50 rows of tokens but 49 labels"):
        DistillationDataset(setting[1].store, setting[1].labels[:49])


def test_batches_of_equal_lengths_that_alignment_met_are_trained_on(tmp_path, monkeypatch):
    """All texts are cut at 16 tokens, so every batch has the same row lengths, in alignment and in training."""
    monkeypatch.setattr(devices, "has_bf16", lambda device: False)
    tiny_modernbert(tmp_path / "mlm", tiny_tokenizer(tmp_path / "mlm"), hidden_size=D)
    labels = unit_vectors(np.random.default_rng(0).normal(size=(N, D)).astype(np.float32))
    write_data(tmp_path / "distil", labels, [f"{i} {SENTENCES[i % 4]}" * 3 for i in range(N)])
    student = load_mean_pooled("model", str(tmp_path / "mlm"), 16)
    use_packed_attention(student[0].auto_model, "auto", torch.device("cpu"))
    store = tokenize_split(tmp_path / "distil", "train", "sentence", student.tokenizer, 16)
    assert set(store.lengths.tolist()) == {16}
    dataset = DistillationDataset(store, load_labels(tmp_path / "distil", "train"))
    align(student, dataset, 64)
    assert np.isfinite(trainer(student, dataset, tmp_path / "out", max_steps=3).train().training_loss)
