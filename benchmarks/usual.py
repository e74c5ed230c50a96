"""The usual way: transformers, sentence-transformers and datasets, as their guides show them.

Pre-training pads batches of random rows to the longest row, uses gradient checkpointing, and computes logits at every
position. Labels come from `encode` over blocks of `datasets.map`. Distillation uses SentenceTransformerTrainer on a
column of sentences, which its collator tokenises, and a list column of labels. The precision is the same as in `ours`:
bf16 autocast where the hardware has it, else float32.

References:
    https://huggingface.co/docs/transformers/tasks/masked_language_modeling
    https://sbert.net/examples/sentence_transformer/training/distillation/README.html
"""

import time
from typing import Any

import torch
from datasets import Dataset, load_dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.losses import MSELoss
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from benchmarks.training import QUIET, Stopwatch, bf16, device, synchronise
from benchmarks.workload import (
    DISTILLATION_ROWS_PER_BATCH,
    ENCODE_ROWS_PER_BATCH,
    MLM_PROBABILITY,
    MLM_ROWS_PER_BATCH,
    Measurement,
    Positions,
    Workload,
)

MAP_ROWS = 1000  # rows in a block of datasets.map, its default; `encode` sorts a block by length


def mlm(workload: Workload) -> Measurement:
    """Masked language modelling on rows of token ids, which the collator pads and masks."""
    tokenizer = AutoTokenizer.from_pretrained(workload.folder / "student")
    model = AutoModelForMaskedLM.from_pretrained(workload.folder / "student")
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MLM_PROBABILITY)
    positions = Positions(model)
    args = TrainingArguments(
        output_dir=str(workload.scratch),
        per_device_train_batch_size=MLM_ROWS_PER_BATCH,
        gradient_checkpointing=True,
        num_train_epochs=1,
        learning_rate=1e-3,
        bf16=bf16(),
        **QUIET,
    )

    def train(warm_up: bool) -> float:
        tokenized = tokenize(_rows(workload, "corpus", warm_up), "text", tokenizer, workload.max_seq_length)
        positions.reset()
        trainer = Trainer(model=model, args=args, train_dataset=tokenized, data_collator=collator)
        return Stopwatch.train(trainer)

    train(warm_up=True)
    seconds = train(warm_up=False)
    return Measurement(positions.tokens, seconds, positions.positions)


def labels(workload: Workload) -> Measurement:
    """The teacher's embeddings of all texts, by `encode` in `datasets.map`."""
    teacher = SentenceTransformer(str(workload.folder / "teacher"), device=str(device()))
    positions = Positions(teacher[0].auto_model)

    def embed(batch: dict[str, list[Any]]) -> dict[str, Any]:
        with torch.autocast(device().type, torch.bfloat16, enabled=bf16()):
            return {"label": teacher.encode(batch["text"], batch_size=ENCODE_ROWS_PER_BATCH)}

    def encode(warm_up: bool) -> float:
        rows = _rows(workload, "corpus", warm_up)
        positions.reset()
        began = time.perf_counter()
        rows.map(embed, batched=True, batch_size=MAP_ROWS)
        synchronise()
        return time.perf_counter() - began

    encode(warm_up=True)
    seconds = encode(warm_up=False)
    return Measurement(positions.tokens, seconds, positions.positions)


def distillation(workload: Workload) -> Measurement:
    """Training on the mean squared error to the labels with sentence-transformers' own trainer."""
    student = new_student(workload)
    positions = Positions(student[0].auto_model)

    def train(warm_up: bool) -> float:
        positions.reset()
        return Stopwatch.train(_distillation_trainer(workload, student, warm_up))

    train(warm_up=True)
    seconds = train(warm_up=False)
    return Measurement(positions.tokens, seconds, positions.positions)


def load(workload: Workload, data: str) -> Dataset:
    """All rows of a data folder."""
    return load_dataset("parquet", data_files=str(workload.folder / data / "train-*.parquet"), split="train")


def _rows(workload: Workload, data: str, warm_up: bool) -> Dataset:
    """The rows of a data folder that are measured."""
    return load(workload, data).select(range(*workload.slice(warm_up)))


def tokenize(rows: Dataset, column: str, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> Dataset:
    """The token ids of a column's texts, which are cut at `max_seq_length`."""
    return rows.map(
        lambda batch: tokenizer(batch[column], truncation=True, max_length=max_seq_length),
        batched=True,
        remove_columns=rows.column_names,
    )


def new_student(workload: Workload, **kwargs: Any) -> SentenceTransformer:
    """The student with mean pooling and Normalize; `kwargs` are those of its Transformer."""
    transformer = Transformer(str(workload.folder / "student"), max_seq_length=workload.max_seq_length, **kwargs)
    pooling = Pooling(transformer.get_embedding_dimension(), "mean")
    return SentenceTransformer(modules=[transformer, pooling, Normalize()], device=str(device()))


def _distillation_trainer(
    workload: Workload, student: SentenceTransformer, warm_up: bool
) -> SentenceTransformerTrainer:
    """The trainer of the guide, on the rows that are measured."""
    args = SentenceTransformerTrainingArguments(
        output_dir=str(workload.scratch),
        per_device_train_batch_size=DISTILLATION_ROWS_PER_BATCH,
        num_train_epochs=1,
        learning_rate=5e-4,
        bf16=bf16(),
        **QUIET,
    )
    rows = _rows(workload, "distil", warm_up).select_columns(["sentence", "label"])
    return SentenceTransformerTrainer(model=student, args=args, train_dataset=rows, loss=MSELoss(student))
