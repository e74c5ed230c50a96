"""How much phase 2's initialisations help, measured with a trained teacher: a table and a plot.

    python -m benchmarks.guide_ablation --corpus data/corpus
    python -m benchmarks.guide_ablation                                # on this machine's docstrings, offline

A ModernBERT teacher is pre-trained on the corpus with phase 3, which takes about half an hour on two CPU cores.
Students of half its width and depth start from it in each way and train on the same batches at a constant learning
rate. Random students train REACH times as long: their loss curve tells how many tokens of training another start saves.
Each way runs with three seeds, which choose the sample, the weights that stay random, the order of the rows and the
masks. Teacher and runs are kept in --work, so a killed benchmark goes on where it was. It writes guide_ablation.md and
guide_ablation.svg into --output_dir.
"""

import argparse
import json
import logging
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import kl_div, layer_norm, log_softmax
from transformers import (
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from benchmarks.prepare import build_corpus, write_docstrings
from benchmarks.speed import demo_tokenizer, machine
from benchmarks.training import QUIET, device
from benchmarks.workload import MLM_PROBABILITY, ROOT, load_script
from modernbert_small.initialise.agreement import layer_agreement
from modernbert_small.initialise.all_layers import (
    Batches,
    TeacherMoments,
    choose_layers,
    cut,
    fit_head,
    heal,
    select_by_output,
    stream_basis,
)
from modernbert_small.initialise.guide import select_uniformly, student_config
from modernbert_small.initialise.transfer import Init, transfer
from modernbert_small.packed.attention import use_packed_attention
from modernbert_small.packed.tokens import tokenize_split
from modernbert_small.pretrain.loss import masked_cross_entropy, masked_lm_loss
from modernbert_small.pretrain.masking import MaskedLMDataset, sample_batches
from modernbert_small.run.loading import load_tokenizer
from modernbert_small.run.records import write_json
from modernbert_small.run.shards import read_table, split_files
from modernbert_small.run.tables import markdown_table

SEEDS = (1, 2, 3)
REACH = 4  # how much longer the random student trains
MAX_SEQ_LENGTH = 256
HELDOUT_TOKENS = 16_384
SAMPLE_TOKENS = 32_768
SPECIAL_TOKENS = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the teacher, and of both trainings in steps and in tokens a batch.

    A student has half of its teacher's width, heads and depth, and two thirds of the neurons.
    """

    vocab_size: int
    width: int
    layers: int
    teacher_steps: int
    teacher_batch: int
    student_steps: int
    student_batch: int


CPU = Sizes(8192, 256, 7, 2400, 4096, 128, 4096)
CUDA = Sizes(16384, 512, 12, 12_000, 32_768, 2000, 16_384)


@dataclass(frozen=True)
class Variant:
    """A way to start a student and to train it.

    init: `--init` of phase 2.
    without: the part of all_layers that is left out, none if empty. axes: those of the token embeddings stand in for
        the stream's. selection: heads and neurons are spread evenly. healing: no weight is refitted.
    soft: pre-train with the teacher's logits as well.
    """

    init: Init
    without: Literal["", "axes", "selection", "healing"] = ""
    soft: bool = False


VARIANTS = {
    "random": Variant("random"),
    "embeddings": Variant("embeddings"),
    "guide": Variant("guide"),
    "all_layers": Variant("all_layers"),
    "all_layers, axes of the embeddings": Variant("all_layers", without="axes"),
    "all_layers, heads and neurons evenly": Variant("all_layers", without="selection"),
    "all_layers, not healed": Variant("all_layers", without="healing"),
    "all_layers, with soft targets": Variant("all_layers", soft=True),
}


def train_tokenizer(folder: Path, corpus: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer like ModernBERT's, with fewer entries, or the decoder would dominate a small model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = (table["text"].to_pylist() for table in read_table(split_files(corpus, "train"), ["text"]))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.save_pretrained(folder)
    return fast


def make_teacher(work: Path, corpus: Path, sizes: Sizes) -> Path:
    """Pre-train a ModernBERT with phase 3, which resumes if it was killed and does nothing if it is done."""
    start, trained = work / "random_teacher", work / "teacher"
    if not start.exists():
        tokenizer = train_tokenizer(work / "tokenizer", corpus, sizes.vocab_size)
        torch.manual_seed(0)
        config = student_config(
            hidden_size=sizes.width,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.width // 64,
            intermediate_size=3 * sizes.width // 2,
            max_position_embeddings=MAX_SEQ_LENGTH,
            vocab_size=sizes.vocab_size,
            special_ids={
                f"{name}_token_id": getattr(tokenizer, f"{special}_token_id")
                for name, special in (("pad", "pad"), ("cls", "cls"), ("sep", "sep"), ("bos", "cls"), ("eos", "sep"))
            },
            teacher=ModernBertConfig(),
        )
        ModernBertForMaskedLM(config).save_pretrained(work / "partial")
        tokenizer.save_pretrained(work / "partial")
        (work / "partial").rename(start)
    flags = {
        "model_name_or_path": start,
        "train_file": corpus,
        "output_dir": trained,
        "max_seq_length": MAX_SEQ_LENGTH,
        "tokens_per_batch": sizes.teacher_batch,
        "max_steps": sizes.teacher_steps,
        "learning_rate": 2e-3,
        "eval_steps": sizes.teacher_steps // 8,
        "save_steps": sizes.teacher_steps // 8,
        "save_total_limit": 1,
        "report_to": "none",
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    subprocess.run([sys.executable, str(ROOT / "mlm" / "pre_train.py"), *words], check=True)
    return trained


@torch.no_grad()
def transfer_without(
    part: str, student: ModernBertForMaskedLM, teacher: ModernBertForMaskedLM, batches: Batches
) -> tuple[Tensor, list[int]]:
    """`transfer_all_layers` with one part left out, see `Variant`; takes and returns the same."""
    S, T = student.config, teacher.config
    kept = choose_layers(T.layer_types, S.layer_types)
    moments = TeacherMoments(teacher.model)
    moments.add(batches[::2])
    of_stream = moments.stream.sum(0)  # (D_T, D_T)
    if part == "axes":
        table = teacher.get_input_embeddings().weight.double().cpu()
        table = layer_norm(table, table.shape[1:])
        of_stream = table.T @ table
    P = stream_basis(of_stream, S.hidden_size)
    selection = select_by_output(teacher, moments, kept, P, S.num_attention_heads, S.intermediate_size)
    if part == "selection":
        heads = select_uniformly(T.num_attention_heads, S.num_attention_heads)
        selection = [(heads, select_uniformly(T.intermediate_size, S.intermediate_size))] * len(kept)
    cut(student, teacher, kept, P, selection)
    if part == "healing":
        features = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
        states_S, states_T = (
            [model.model(**inputs).last_hidden_state for inputs in features] for model in (student, teacher)
        )
    else:
        states_S, states_T = heal(student.model, teacher.model, batches, kept, P)
    fit_head(student, teacher, batches, states_S, states_T)
    return P, kept


def start_student(
    variant: Variant,
    teacher: ModernBertForMaskedLM,
    dataset: MaskedLMDataset,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> tuple[ModernBertForMaskedLM, dict[str, Any]]:
    """A student that the variant initialises, and the arguments with which `layer_agreement` compares it."""
    phase = load_script("mlm/init_model_mlm.py")
    sizes = teacher.config
    args = phase.InitModelArguments(
        hidden_size=sizes.hidden_size // 2,
        num_hidden_layers=(sizes.num_hidden_layers + 1) // 2,
        num_attention_heads=sizes.num_attention_heads // 2,
        intermediate_size=sizes.hidden_size,
        max_position_embeddings=MAX_SEQ_LENGTH,
        init=variant.init,
        seed=seed,
    )
    student = phase.new_student(args, sizes, tokenizer)
    for model in (student, teacher):
        use_packed_attention(model.to(device()), "auto", device(), torch.float32)
    batches = sample_batches(dataset, SAMPLE_TOKENS, seed, device()) if variant.init == "all_layers" else ()
    if variant.without:
        projection, kept = transfer_without(variant.without, student, teacher, batches)
        return student, {"projection": projection, "teacher_layers": kept}
    transferred = transfer(variant.init, student, teacher, batches)
    return student, {"projection": transferred.projection, "teacher_layers": transferred.teacher_layers}


class HeldOutLoss(TrainerCallback):
    """Measures the held-out loss after some steps, and the seconds of training until then."""

    def __init__(self, steps: Sequence[int], dataset: MaskedLMDataset, tokens_per_step: float) -> None:
        self.steps, self.dataset, self.tokens_per_step = set(steps), dataset, tokens_per_step
        self.curve: list[dict[str, float]] = []
        self.seconds, self.resumed = 0.0, time.perf_counter()

    def measure(self, model: ModernBertForMaskedLM, step: int) -> None:
        """Add a point to the curve; the time of the measurement itself does not count."""
        self.seconds += time.perf_counter() - self.resumed
        loss = masked_lm_loss(model, self.dataset, HELDOUT_TOKENS, seed=0)
        tokens = round(step * self.tokens_per_step)
        self.curve.append({"step": step, "tokens": tokens, "seconds": round(self.seconds, 2), "loss": round(loss, 4)})
        model.train()
        self.resumed = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self.seconds, self.resumed = 0.0, time.perf_counter()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: ModernBertForMaskedLM,
        **kwargs: Any,
    ) -> None:
        """Measure if this is one of the steps."""
        if state.global_step in self.steps:
            self.measure(model, state.global_step)


def soft_trainer(base: type, teacher: ModernBertForMaskedLM) -> type:
    """Phase 3's trainer, with the mean of cross-entropy and the KL divergence from the teacher as its loss."""
    teacher.sparse_prediction = True

    class SoftTargets(base):
        def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
            with torch.no_grad():
                target = log_softmax(teacher(**inputs).logits.float(), -1)
            outputs = model(**inputs)
            soft = kl_div(log_softmax(outputs.logits.float(), -1), target, log_target=True, reduction="batchmean")
            return (outputs.loss + soft) / 2

    return SoftTargets


def checkpoints(steps: int) -> list[int]:
    """Five steps to measure at, each twice the one before, up to the last."""
    return sorted({steps // 2**k for k in range(5)})


def run_variant(job: tuple[str, int, Path, Path, Sizes, int]) -> None:
    """Start one student, compare it with its teacher, train it, and write its record to a file of its own."""
    name, seed, work, corpus, sizes, threads = job
    result = work / "runs" / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}.json"
    if result.exists():
        return
    logging.getLogger().setLevel(logging.WARNING)
    torch.set_num_threads(threads)
    variant = VARIANTS[name]
    teacher = ModernBertForMaskedLM.from_pretrained(work / "teacher").eval()
    tokenizer = load_tokenizer("--work", str(work / "teacher"))
    train_data, heldout = (
        MaskedLMDataset(tokenize_split(corpus, split, "text", tokenizer, MAX_SEQ_LENGTH), tokenizer, MLM_PROBABILITY)
        for split in ("train", "validation")
    )
    student, stands_for = start_student(variant, teacher, train_data, tokenizer, seed)
    agreement = layer_agreement(student, teacher, heldout, HELDOUT_TOKENS // 2, 0, **stands_for)
    phase = load_script("mlm/pre_train.py")
    steps = sizes.student_steps * (REACH if name == "random" else 1)
    args = phase.PreTrainArguments(
        output_dir=str(work / "scratch"),
        max_steps=steps,
        tokens_per_batch=sizes.student_batch,
        max_seq_length=MAX_SEQ_LENGTH,
        learning_rate=1e-3,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=sizes.student_steps // 20,
        seed=seed,
        **QUIET,
    )
    use_packed_attention(student, "auto", args.device, args.compute_dtype)
    student.sparse_prediction = True
    student.loss_function = masked_cross_entropy
    trainer_class = soft_trainer(phase.MaskedLMTrainer, teacher) if variant.soft else phase.MaskedLMTrainer
    trainer = trainer_class(model=student, args=args, train_dataset=train_data)
    tokens_per_step = float(train_data.store.offsets[-1]) / len(trainer.get_train_dataloader())
    watch = HeldOutLoss([*checkpoints(sizes.student_steps), *checkpoints(steps)], heldout, tokens_per_step)
    watch.measure(student, 0)
    trainer.add_callback(watch)
    trainer.train()
    teacher_loss = masked_lm_loss(teacher, heldout, HELDOUT_TOKENS, seed=0)
    record = {"variant": name, "seed": seed, "curve": watch.curve, **agreement, "teacher_loss": teacher_loss}
    write_json(result, {**record, "without": variant.without})


def read_runs(work: Path) -> dict[str, list[dict[str, Any]]]:
    """The finished runs of each variant."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((work / "runs").glob("*.json"))]
    return {name: [run for run in runs if run["variant"] == name] for name in VARIANTS}


def losses(runs: Sequence[dict[str, Any]]) -> tuple[list[int], np.ndarray]:
    """Tokens (P,) and held-out losses (seeds, P) of one variant at P points of the curve."""
    tokens = [point["tokens"] for point in runs[0]["curve"]]
    return tokens, np.array([[point["loss"] for point in run["curve"]] for run in runs])


def tokens_of_random(loss: float, tokens: Sequence[int], curve: np.ndarray) -> str:
    """The tokens that the random student needs to reach a loss, interpolated on its falling curve (P,)."""
    if loss < curve[-1]:
        return f"> {tokens[-1] / 1e6:.2f} M"
    return f"{float(np.interp(-loss, -curve, tokens)) / 1e6:.2f} M"


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Losses by tokens with their standard deviation over seeds, mean CKA, and the tokens that random students need."""
    tokens, _ = losses(runs["embeddings"])
    shown = (0, 1, len(tokens) // 2, len(tokens) - 1)
    random_tokens, random_losses = losses(runs["random"])
    header = ["", *(f"{tokens[index] / 1e6:.2f} M tokens" for index in shown), "CKA", "worth in tokens", "seconds"]
    rows = [header]
    for name, of_variant in runs.items():
        at, values = losses(of_variant)
        columns = [at.index(tokens[index]) for index in shown]
        cells = [f"{values[:, c].mean():.3f} ± {values[:, c].std(ddof=1):.3f}" for c in columns]
        cka = statistics.mean(statistics.mean(run["cka"]) for run in of_variant)
        worth = tokens_of_random(values[:, columns[-1]].mean(), random_tokens, random_losses.mean(0))
        seconds = statistics.median(run["curve"][columns[-1]]["seconds"] for run in of_variant)
        rows.append([name, *cells, f"{cka:.3f}", "" if name == "random" else worth, f"{seconds:.0f}"])
    return markdown_table(rows)


def agreement_table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """CKA and explained variance by layer, averaged over seeds."""
    n_layers = len(runs["guide"][0]["cka"])
    rows = [["", *(f"layer {index}" for index in range(n_layers))]]
    for name, of_variant in runs.items():
        cells = []
        for index in range(n_layers):
            cka = statistics.mean(run["cka"][index] for run in of_variant)
            shares = [run["explained_variance"] and run["explained_variance"][index] for run in of_variant]
            cells.append(f"{cka:.3f}" + ("" if shares[0] is None else f" ({100 * statistics.mean(shares):.0f} %)"))
        rows.append([name, *cells])
    return markdown_table(rows)


def plot(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw held-out loss over tokens, one line for each variant, into an SVG file."""
    import matplotlib.pyplot as plt  # only this benchmark draws

    plt.rcParams["svg.hashsalt"] = "guide"
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for (name, of_variant), marker in zip(runs.items(), "osv^<>Dx", strict=True):
        tokens, values = losses(of_variant)
        shown = [max(count, tokens[1] / 2) / 1e6 for count in tokens]  # no zero on a logarithmic axis
        axes.errorbar(shown, values.mean(0), values.std(0, ddof=1), label=name, marker=marker, markersize=4, capsize=2)
    axes.axhline(runs["random"][0]["teacher_loss"], color="black", linestyle=":", label="teacher")
    axes.set(xscale="log", xlabel="million tokens (leftmost: before training)", ylabel="held-out MLM loss, nats")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Make the corpus and the teacher, run all variants, write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="phase 1's output; default: this machine's docstrings")
    parser.add_argument(
        "--work", type=Path, default=Path("benchmarks/results/guide"), help="folder for teacher and runs"
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("benchmarks/results/guide"),
        help="folder for guide_ablation.md and .svg",
    )
    args = parser.parse_args()
    cuda = device().type == "cuda"
    sizes = CUDA if cuda else CPU
    (args.work / "runs").mkdir(parents=True, exist_ok=True)
    if args.corpus is None:
        args.corpus = args.work / "corpus"
        if not args.corpus.exists():
            write_docstrings(args.work / "source" / "docstrings.parquet")
            docstrings = str(args.work / "source" / "docstrings.parquet")
            build_corpus(args.corpus, {"docstrings": docstrings}, demo_tokenizer())
    teacher = make_teacher(args.work, args.corpus, sizes)
    record = json.loads((teacher / "run.json").read_text(encoding="utf-8"))
    workers = 1 if cuda else os.cpu_count() or 1
    threads = max(1, (os.cpu_count() or 1) // workers)
    jobs = [(name, seed, args.work, args.corpus, sizes, threads) for seed in SEEDS for name in VARIANTS]
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=1) as pool:
        for number, _ in enumerate(pool.imap(run_variant, jobs, chunksize=1), 1):
            print(f"{number} of {len(jobs)} runs", flush=True)
    runs = read_runs(args.work)
    where = ", ".join(f"{key} {value}" for key, value in machine().items())
    teacher_size = (
        f"{sizes.layers} layers x {sizes.width}, {sizes.teacher_steps * sizes.teacher_batch / 1e6:.1f} M tokens"
    )
    text = f"Teacher: {teacher_size}, held-out loss {record['heldout_mlm_loss']:.3f}.\n\n{table(runs)}\n\n"
    text += f"CKA with the teacher before training (and explained variance):\n\n{agreement_table(runs)}\n\n{where}\n"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "guide_ablation.md").write_text(text, encoding="utf-8")
    plot(runs, args.output_dir / "guide_ablation.svg")
    print(text)


if __name__ == "__main__":
    main()
