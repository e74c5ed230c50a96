"""The strongest way that needs nothing but transformers, sentence-transformers and datasets, and a user who tunes them.

Batches of training hold texts of similar length, as many as fit into the same number of tokens as ours. There is no
gradient checkpointing, and logits are computed only for masked tokens. `encode` gets all texts at once, which it sorts
by length. On CUDA with flash-attn, sentence-transformers leaves out the padding. The precision is that of `usual`.

Texts of similar length need many texts to choose from. So batches are made of the whole prepared corpus, and every
n-th of them is run, such that about as many rows are run as the other ways run. Sorting only the measured rows would
be unfair: 64 docstrings in batches of 4,096 tokens are padded to 52 %, 8,192 of them to 2 %.
"""

import random
import time
from collections.abc import Sequence

import numpy as np
import torch
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MSELoss
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)
from transformers.utils import is_flash_attn_2_available

from benchmarks.training import QUIET, Stopwatch, bf16, device, synchronise
from benchmarks.usual import load, new_student, tokenize
from benchmarks.workload import ENCODE_ROWS_PER_BATCH, MLM_PROBABILITY, Measurement, Positions, Workload

FLASH = {"model_kwargs": {"attn_implementation": "flash_attention_2"}} if is_flash_attn_2_available() else {}


def batches_of_similar_length(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Rows sorted by length, cut into batches that hold at most so many tokens, padding included."""
    batches: list[list[int]] = [[]]
    for row in np.argsort(lengths, kind="stable").tolist():
        if batches[-1] and (len(batches[-1]) + 1) * lengths[row] > tokens_per_batch:
            batches.append([])
        batches[-1].append(row)
    return batches


def every_nth(batches: Sequence[list[int]], workload: Workload, warm_up: bool) -> list[list[int]]:
    """Batches evenly spread over all lengths, in random order: of the corpus, the share that a measurement runs."""
    rows = workload.warm_up_rows if warm_up else workload.rows
    count = max(1, round(len(batches) * rows / sum(map(len, batches))))
    dice = random.Random(workload.first + warm_up)
    first = dice.random()
    chosen = [batches[int((index + first) * len(batches) / count)] for index in range(count)]
    return dice.sample(chosen, count)


class LengthSortedTrainer(Trainer):
    """transformers' Trainer on given batches.

    Attributes:
        batches: the rows of each batch.
    """

    batches: list[list[int]]

    def get_train_dataloader(self) -> DataLoader:
        """The given batches, collated as the Trainer does it."""
        loader = DataLoader(self.train_dataset, batch_sampler=self.batches, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)


def mlm(workload: Workload) -> Measurement:
    """Masked language modelling on length-sorted batches, with logits of the masked tokens alone."""
    tokenizer = AutoTokenizer.from_pretrained(workload.folder / "student")
    model = AutoModelForMaskedLM.from_pretrained(workload.folder / "student", sparse_prediction=True)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MLM_PROBABILITY)
    positions = Positions(model)
    rows = tokenize(load(workload, "corpus"), "text", tokenizer, workload.max_seq_length)
    batches = batches_of_similar_length(list(map(len, rows["input_ids"])), workload.tokens_per_batch)
    args = TrainingArguments(
        output_dir=str(workload.scratch), num_train_epochs=1, learning_rate=1e-3, bf16=bf16(), **QUIET
    )

    def train(warm_up: bool) -> float:
        positions.reset()
        trainer = LengthSortedTrainer(model=model, args=args, train_dataset=rows, data_collator=collator)
        trainer.batches = every_nth(batches, workload, warm_up)
        return Stopwatch.train(trainer)

    train(warm_up=True)
    seconds = train(warm_up=False)
    return Measurement(positions.tokens, seconds, positions.positions)


def labels(workload: Workload) -> Measurement:
    """The teacher's embeddings of all texts in one call of `encode`."""
    teacher = SentenceTransformer(str(workload.folder / "teacher"), device=str(device()), **FLASH)
    positions = Positions(teacher[0].auto_model)
    texts = load(workload, "corpus")["text"]
    rows_per_batch = max(ENCODE_ROWS_PER_BATCH, workload.tokens_per_batch // workload.max_seq_length)
    order = np.argsort(list(map(len, texts)), kind="stable").tolist()  # as `encode` sorts them
    batches = [order[first : first + rows_per_batch] for first in range(0, len(order), rows_per_batch)]

    def encode(warm_up: bool) -> float:
        chosen = [texts[row] for batch in every_nth(batches, workload, warm_up) for row in batch]
        positions.reset()
        began = time.perf_counter()
        with torch.autocast(device().type, torch.bfloat16, enabled=bf16()):
            teacher.encode(chosen, batch_size=rows_per_batch)
        synchronise()
        return time.perf_counter() - began

    encode(warm_up=True)
    seconds = encode(warm_up=False)
    return Measurement(positions.tokens, seconds, positions.positions)


def distillation(workload: Workload) -> Measurement:
    """sentence-transformers' own trainer on length-sorted batches."""
    student = new_student(workload, **FLASH)
    positions = Positions(student[0].auto_model)
    rows = load(workload, "distil").select_columns(["sentence", "label"])
    tokenized = tokenize(rows, "sentence", student.tokenizer, workload.max_seq_length)
    lengths = list(map(len, tokenized["input_ids"]))
    batches = batches_of_similar_length(lengths, workload.distillation_tokens_per_batch)

    def train(warm_up: bool) -> float:
        args = SentenceTransformerTrainingArguments(
            output_dir=str(workload.scratch),
            batch_sampler=lambda dataset, **_: every_nth(batches, workload, warm_up),
            num_train_epochs=1,
            learning_rate=5e-4,
            bf16=bf16(),
            **QUIET,
        )
        positions.reset()
        return Stopwatch.train(
            SentenceTransformerTrainer(model=student, args=args, train_dataset=rows, loss=MSELoss(student))
        )

    train(warm_up=True)
    seconds = train(warm_up=False)
    return Measurement(positions.tokens, seconds, positions.positions)
