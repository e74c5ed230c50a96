"""Our way: the classes of the phases themselves, on the same rows as in `usual`."""

import time
from collections.abc import Callable

import numpy as np
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedTokenizerBase

from benchmarks.training import QUIET, Stopwatch, busy_seconds, device, synchronise
from benchmarks.workload import (
    MLM_PROBABILITY,
    STUDENT_WIDTH,
    Measurement,
    Positions,
    Workload,
    load_script,
)
from modernbert_small.distil.labels import DistillationDataset, load_labels
from modernbert_small.label.labeller import Labeller
from modernbert_small.packed.attention import use_packed_attention
from modernbert_small.packed.compiling import compile_layers
from modernbert_small.packed.flops import training_flops_per_token
from modernbert_small.packed.tokens import TokenStore, tokenize_split
from modernbert_small.pretrain.masking import MaskedLMDataset
from modernbert_small.run.devices import can_compile
from modernbert_small.run.loading import load_pooled
from modernbert_small.run.shards import read_table, split_files


def mlm(workload: Workload) -> Measurement:
    """Phase 3: packed, masked batches, and logits of the masked tokens alone."""
    phase = load_script("mlm/pre_train.py")
    args = phase.PreTrainArguments(
        model_name_or_path=str(workload.folder / "student"),
        output_dir=str(workload.scratch),
        tokens_per_batch=workload.tokens_per_batch,
        torch_compile=workload.torch_compile,
        **QUIET,
    )
    student, tokenizer = phase.load_student(args)
    store = tokenize_split(workload.folder / "corpus", "train", "text", tokenizer, workload.max_seq_length)
    positions = Positions(student)

    def train(warm_up: bool) -> float:
        rows = MaskedLMDataset(_rows(store, workload, warm_up), tokenizer, MLM_PROBABILITY)
        positions.reset()
        return Stopwatch.train(phase.MaskedLMTrainer(model=student, args=args, train_dataset=rows))

    flops = training_flops_per_token(student.config, _rows(store, workload, False).lengths, MLM_PROBABILITY)
    return _measured(workload, positions, train, flops)


def labels(workload: Workload) -> Measurement:
    """Phase 4: texts are tokenised, then embedded in batches of similar length that hold about equally many tokens."""
    teacher = SentenceTransformer(str(workload.folder / "teacher"))
    compiled = can_compile(device()) if workload.torch_compile is None else workload.torch_compile
    labeller = Labeller(teacher, device(), workload.tokens_per_batch, "auto", compiled)
    encoder = teacher[0].auto_model
    positions = Positions(encoder)
    table = next(read_table(split_files(workload.folder / "corpus", "train"), ("text", "kind"), rows=1 << 20))

    def embed(warm_up: bool) -> float:
        first, last = workload.slice(warm_up)
        rows = table.slice(first, last - first)
        positions.reset()
        began = time.perf_counter()
        labeller.embed(labeller.tokenize(rows["text"].to_pylist(), rows["kind"].to_pylist()))
        synchronise()
        return time.perf_counter() - began

    first, last = workload.slice()
    rows = table.slice(first, last - first)
    lengths = map(len, labeller.tokenize(rows["text"].to_pylist(), rows["kind"].to_pylist()))
    flops = training_flops_per_token(encoder.config, np.fromiter(lengths, np.int64)) / 3  # backward is twice forward
    return _measured(workload, positions, embed, flops)


def distillation(workload: Workload) -> Measurement:
    """Phase 5: packed batches and memory-mapped labels."""
    phase = load_script("distil_train.py")
    args = phase.DistilTrainArguments(
        output_dir=str(workload.scratch),
        tokens_per_batch=workload.distillation_tokens_per_batch,
        load_best_model_at_end=False,
        num_train_epochs=1,
        torch_compile=workload.torch_compile,
        **QUIET,
    )
    student = load_pooled("model", str(workload.folder / "student"), workload.max_seq_length)
    use_packed_attention(student[0].auto_model, args.attn_implementation, args.device, args.compute_dtype)
    if args.torch_compile:
        compile_layers(student[0].auto_model)
    positions = Positions(student[0].auto_model)

    def train(warm_up: bool) -> float:
        rows = _distillation_rows(workload, student.tokenizer, warm_up)
        positions.reset()
        return Stopwatch.train(phase.new_trainer(args, student, rows, rows, []))

    lengths = _distillation_rows(workload, student.tokenizer, warm_up=False).store.lengths
    return _measured(workload, positions, train, training_flops_per_token(student[0].auto_model.config, lengths))


def _measured(
    workload: Workload, positions: Positions, run: Callable[[bool], float], flops_per_token: float
) -> Measurement:
    """Run the warm-up, then what is timed, then the warm-up's rows once more if the device's work is asked for.

    Args:
        workload: what is run on.
        positions: of the model.
        run: whether it is the warm-up -> seconds.
        flops_per_token: of what is timed.
    """
    run(True)
    seconds = run(False)
    measurement = Measurement(positions.tokens, seconds, positions.positions, flops_per_token=flops_per_token)
    if workload.profile and workload.cuda:
        busy = busy_seconds(lambda: run(True))
        measurement.busy_seconds_per_token = busy / positions.tokens
    return measurement


def _rows(store: TokenStore, workload: Workload, warm_up: bool) -> TokenStore:
    """The rows of a store that are measured, memory-mapped like the whole store."""
    first, last = workload.slice(warm_up)
    offsets = store.offsets[first : last + 1]
    return TokenStore(store.tokens[offsets[0] : offsets[-1]], offsets - offsets[0], 0)


def _distillation_rows(workload: Workload, tokenizer: PreTrainedTokenizerBase, warm_up: bool) -> DistillationDataset:
    """The texts that are measured, with their labels."""
    store = tokenize_split(workload.folder / "distil", "train", "sentence", tokenizer, workload.max_seq_length)
    first, last = workload.slice(warm_up)
    vectors = load_labels(workload.folder / "distil", "train")[first:last]
    assert vectors.dtype == np.float16
    assert vectors.shape[1] == STUDENT_WIDTH
    return DistillationDataset(_rows(store, workload, warm_up), vectors)
