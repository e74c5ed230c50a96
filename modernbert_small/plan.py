"""What a recipe costs: parameters, memory, disk, counted FLOPs and time of each phase, before anything is run.

    python -m modernbert_small.plan recipes/cpu.yaml
    python -m modernbert_small.plan recipes/v2.yaml --gpu H100 --rows 20000000 --tokens 4000000000

Without --rows and --tokens, the size of the corpus is read from its run.json, which phase 1 writes, or else is
estimated from the sources. FLOPs are counted (see packed/flops.py). Times are of this machine, or of a GPU that --gpu
names. They depend on how much of its rate the phases reach; on a GPU, phases 3 and 5 print what they do reach.
"""

import argparse

from modernbert_small.run.errors import UserError
from modernbert_small.run.script import check_early, recipe_path, run_script
from modernbert_small.settings.recipe import RECIPE_HELP, find_recipe
from modernbert_small.settings.whole import Recipe, full_recipe


def parse_arguments() -> argparse.Namespace:
    """The command line, with the recipe read and checked.

    Raises:
        UserError: one of --rows and --tokens is given without the other, or the recipe is wrong.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help=RECIPE_HELP)
    parser.add_argument("--gpu", help='a GPU such as H100 or "RTX 4090"; by default this machine')
    parser.add_argument("--rows", type=int, help="number of texts in the corpus, before phase 1 has run")
    parser.add_argument("--tokens", type=int, help="number of tokens in the corpus, before phase 1 has run")
    args = parser.parse_args()
    if (args.rows is None) != (args.tokens is None):
        given, missing = ("--tokens", "--rows") if args.rows is None else ("--rows", "--tokens")
        raise UserError(f"{given} is given without {missing}; expected both, or neither once phase 1 has run")
    args.recipe = full_recipe(find_recipe(args.recipe))
    return args


if __name__ == "__main__":
    check_early(parse_arguments)  # before the imports below, which take seconds

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, ModernBertConfig, ModernBertForMaskedLM, PreTrainedConfig

from modernbert_small.corpus.sources import PYTHON_DOCS, source_locations
from modernbert_small.initialise.guide import student_config
from modernbert_small.packed.flops import PEAK_RATES, find_gpu, training_flops_per_token
from modernbert_small.packed.machine import Machine, named_gpu, this_machine
from modernbert_small.reporting.formats import duration
from modernbert_small.run.columns import split_mapping
from modernbert_small.run.devices import best_device
from modernbert_small.run.loading import load_config
from modernbert_small.run.records import RUN_FILE, read_run
from modernbert_small.run.tables import aligned
from modernbert_small.settings.sections import SECTIONS

logger = logging.getLogger(__name__)

MODERNBERT_BASE = {
    "vocab_size": 50_368,
    "hidden_size": 768,
    "num_hidden_layers": 22,
    "num_attention_heads": 12,
    "intermediate_size": 1152,
}
WEIGHTS_BYTES = 4  # of a parameter in float32
TRAINING_BYTES = 16  # of a trained parameter: its weight, its gradient and AdamW's two moments in float32
CHECKPOINT_BYTES = 12  # of a trained parameter: its weight and the moments
# Fitted to phases 3 and 5 in docs/LOG.md, in bf16 and in float32, to within 5 %: a process without a model, and the
# values that training keeps for a token: so many times the width and the neurons of each layer, and the logits.
PROCESS_BYTES = 1_300_000_000
_VALUES_OF_WIDTH, _VALUES_OF_NEURONS, _VALUES_OF_LOGITS = 16, 8, 4
CORPUS_TOKENS_PER_SECOND = 1_700_000  # phase 1 on two CPU cores, without downloads (docs/LOG.md)
INIT_SECONDS = 120  # phase 2 with ModernBERT-base on two CPU cores at most (docs/LOG.md)
TEXT_BYTES = 4.5  # of a token of English, its space included
# Where no size is known: docstrings and hub rows as the small runs in docs/LOG.md met them, and an assumption.
_DOCSTRINGS, _TOKENS_OF_DOCSTRING, _TOKENS_OF_HUB_ROW, _ASSUMED_HUB_TOKENS = 8_100, 85, 580, 1_000_000_000
_SHARE_OF_LONGEST = 0.4  # mean length of a text, of max_seq_length
_LONG_SECONDS = 36 * 3600  # more than a night and a day
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
_IDS: dict[str, int | None] = dict.fromkeys([f"{name}_token_id" for name in ("pad", "cls", "sep", "bos", "eos")], 0)


@dataclass(frozen=True)
class PhaseCost:
    """What a phase runs.

    Attributes:
        phase: the script's name.
        model: which models it loads.
        parameters: of these models together.
        bytes_per_parameter: of weights and, where they are trained, gradients and optimiser.
        flops: of the whole phase; 0 where they are not counted.
        seconds: of work that no FLOPs are counted for.
        activations: values that a batch keeps in memory.
        disk: bytes that the phase writes and keeps.
    """

    phase: str
    model: str
    parameters: int
    bytes_per_parameter: int
    flops: float
    seconds: float = 0.0
    activations: float = 0.0
    disk: float = 0.0

    @property
    def bytes(self) -> int:
        """Memory of all parameters."""
        return self.parameters * self.bytes_per_parameter

    def memory(self, machine: Machine) -> float:
        """Bytes of the process: of itself, all parameters, and a batch's activations."""
        return PROCESS_BYTES + self.bytes + self.activations * (2 if machine.bf16 else 4)

    def duration(self, machine: Machine) -> float:
        """Seconds, without evaluations, loading and downloads."""
        if not self.flops:
            return self.seconds
        return self.flops / (machine.flops_per_second * machine.utilisation[self.phase])


def teacher_config(name_or_path: str) -> tuple[PreTrainedConfig, str | None]:
    """A teacher's configuration, and what is assumed about it if it cannot be read; None if it can."""
    try:
        return load_config("teacher", name_or_path), None
    except UserError:
        known = ", ".join(f"{key} {value}" for key, value in MODERNBERT_BASE.items())
        return ModernBertConfig(
            **MODERNBERT_BASE
        ), f"{name_or_path} cannot be read here and has ModernBERT-base's sizes: {known}"


def count_parameters(config: PreTrainedConfig, has_head: bool) -> int:
    """The parameters of a model, counted on the model itself; on torch's meta device its weights take no memory."""
    with torch.device("meta"):
        model = ModernBertForMaskedLM(config) if has_head else AutoModel.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def forward_flops_per_token(config: PreTrainedConfig, lengths: NDArray[np.int64]) -> float:
    """The FLOPs of an encoder's forward pass for a token, without a head.

    A BERT-like teacher is counted as a ModernBERT whose layers all attend to the whole row. Its MLP has two matrices,
    ModernBERT's gated MLP three, so two thirds of the neurons give the same number of operations.

    Args:
        config: the encoder's.
        lengths: (N,) tokens of each row; attention depends on them.
    """
    if not isinstance(config, ModernBertConfig):
        config = ModernBertConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size * 2 // 3,
            global_attn_every_n_layers=1,
            **_IDS,
        )
    return training_flops_per_token(config, lengths) / 3  # forward and backward, which counts twice forward


def corpus_size(
    settings: dict[str, Any], rows: int | None, tokens: int | None
) -> tuple[int, int, NDArray[np.int64], str]:
    """The size of a corpus: from the flags, or phase 1's record, or else by its sources.

    Args:
        settings: of phase 1.
        rows: given by a flag, or None.
        tokens: given by a flag, or None.

    Returns:
        Rows, tokens, the lengths (N,) in tokens of some typical rows, and a sentence that says where these come from.
    """
    folder = settings["output_dir"]
    if rows and tokens:
        source = "Rows and tokens are those of the flags; every row is counted with the mean length"
        return rows, tokens, np.array([max(1, tokens // rows)]), source
    if not Path(folder, RUN_FILE).exists():
        tokens, mean = _expected_tokens(settings), max(1, round(_SHARE_OF_LONGEST * settings["max_seq_length"]))
        source = "Rows and tokens are guessed from the sources; they are known once phase 1 has run"
        return max(1, tokens // mean), tokens, np.array([mean]), source
    parts = read_run(folder)["by_source"]
    total = sum(part["rows"] for part in parts)
    counts = [round(1000 * part["rows"] / total) for part in parts]
    lengths = np.repeat([max(1, part["tokens"] // part["rows"]) for part in parts], counts)
    source = f"Rows and tokens are those of {folder}/{RUN_FILE}; every row is counted with its source's mean length"
    return total, sum(part["tokens"] for part in parts), lengths, source


def _expected_tokens(settings: dict[str, Any]) -> int:
    """Tokens of a corpus that is not there yet, at the worst: by its files' sizes, or by the rows that are read."""
    limit, total = settings["max_rows_per_source"], 0
    for name, location in source_locations(settings["sources"]).items():
        path = None if location is None else Path(split_mapping("--sources", location).path)
        if path is not None and path.exists():
            files = [file for file in (path, *path.rglob("*")) if file.is_file()]
            size = round(sum(file.stat().st_size for file in files) / TEXT_BYTES)
            total += min(size, limit * _TOKENS_OF_HUB_ROW) if limit else size
        elif name == PYTHON_DOCS:
            total += (limit or _DOCSTRINGS) * _TOKENS_OF_DOCSTRING
        else:
            total += limit * _TOKENS_OF_HUB_ROW if limit else _ASSUMED_HUB_TOKENS
    return max(1, total)


def trained_tokens(settings: dict[str, Any], tokens: int) -> float:
    """The tokens that a training phase runs on.

    Args:
        settings: of the phase.
        tokens: of the corpus.
    """
    steps = settings["max_steps"] * settings["gradient_accumulation_steps"]
    return steps * settings["tokens_per_batch"] if steps > 0 else tokens * float(settings["num_train_epochs"])


def checkpoint_bytes(settings: dict[str, Any], parameters: int) -> int:
    """Bytes of the checkpoints that a training phase keeps, the best one and the model itself among them."""
    return CHECKPOINT_BYTES * parameters * ((settings["save_total_limit"] or 2) + 1)


def layer_values(config: PreTrainedConfig) -> float:
    """Values of a token that a layer keeps for backward; without backward, at most those of one layer are there."""
    return _VALUES_OF_WIDTH * config.hidden_size + _VALUES_OF_NEURONS * config.intermediate_size


def plan(recipe: Recipe, rows: int, tokens: int, lengths: NDArray[np.int64]) -> tuple[list[PhaseCost], list[str]]:
    """What each phase runs, and what it writes.

    Args:
        recipe: all sections with all settings.
        rows: of the corpus.
        tokens: of the corpus.
        lengths: (N,) tokens of some of its rows; attention depends on them.

    Returns:
        The cost of each phase, and what was assumed.
    """
    init, mlm, labels, distil = (
        recipe[section] for section in ("init_model_mlm", "pre_train", "create_distil_dataset", "distil_train")
    )
    large, assumed_of_large = teacher_config(init["teacher_name_or_path"])
    teacher, assumed_of_teacher = teacher_config(labels["teacher_name_or_path"])
    sizes = {name: init[name] for name in _SIZES}
    inherited = large if isinstance(large, ModernBertConfig) else None
    student = student_config(**sizes, vocab_size=large.vocab_size, special_ids=_IDS, teacher=inherited)
    with_head, encoder = count_parameters(student, True), count_parameters(student, False)
    loaded, of_teacher = count_parameters(large, False) + with_head, count_parameters(teacher, False)
    mlm_flops = training_flops_per_token(student, lengths, mlm["mlm_probability"]) * trained_tokens(mlm, tokens)
    label_flops = forward_flops_per_token(teacher, lengths) * tokens
    distil_flops = training_flops_per_token(student, lengths) * trained_tokens(distil, tokens)
    texts, token_ids, vectors = TEXT_BYTES * tokens, 2.0 * tokens, 2.0 * rows * labels["embedding_dim"]
    values = student.num_hidden_layers * layer_values(student)
    logits = _VALUES_OF_LOGITS * mlm["mlm_probability"] * student.vocab_size
    costs = [
        PhaseCost("create_dataset", "", 0, 0, 0.0, tokens / CORPUS_TOKENS_PER_SECOND, 0.0, texts),
        PhaseCost(
            *("init_model_mlm", "large + student", loaded, WEIGHTS_BYTES, 0.0, INIT_SECONDS, 0.0),
            WEIGHTS_BYTES * with_head,
        ),
        PhaseCost(
            *("pre_train", "student", with_head, TRAINING_BYTES, mlm_flops, 0.0),
            mlm["tokens_per_batch"] * (values + logits),
            token_ids + checkpoint_bytes(mlm, with_head),
        ),
        PhaseCost(
            *("create_distil_dataset", "teacher", of_teacher, WEIGHTS_BYTES, label_flops, 0.0),
            labels["tokens_per_batch"] * layer_values(teacher),
            texts + vectors + WEIGHTS_BYTES * of_teacher,
        ),
        PhaseCost(
            *("distil_train", "student", encoder, TRAINING_BYTES, distil_flops, 0.0),
            distil["tokens_per_batch"] * values,
            token_ids + vectors + checkpoint_bytes(distil, encoder),
        ),
    ]
    assumed = dict.fromkeys([assumed_of_large, assumed_of_teacher])  # once if both are the same
    return costs, [text for text in assumed if text is not None]


def gpu_of(name: str) -> Machine:
    """The GPU that --gpu names.

    Raises:
        UserError: the GPU is not in the table.
    """
    known = find_gpu(name)
    if known is None:
        raise UserError(f"--gpu {name}: its rate is not known; expected one of {', '.join(PEAK_RATES)}")
    return named_gpu(known)


def format_plan(costs: Sequence[PhaseCost], machine: Machine) -> str:
    """An aligned table."""
    rows = [("phase", "model", "parameters", "memory, GB", "disk, GB", "PFLOPs", "time")]
    for cost in costs:
        size = f"{cost.parameters / 1e6:.1f} M" if cost.parameters else ""
        flops = f"{cost.flops / 1e15:,.1f}" if cost.flops else ""
        room = (f"{cost.memory(machine) / 1e9:.1f}", f"{cost.disk / 1e9:,.1f}")
        rows.append((cost.phase, cost.model, size, *room, flops, duration(cost.duration(machine))))
    disk, work = sum(cost.disk for cost in costs), sum(cost.flops for cost in costs)
    seconds = sum(cost.duration(machine) for cost in costs)
    rows.append(("all", "", "", "", f"{disk / 1e9:,.1f}", f"{work / 1e15:,.1f}", duration(seconds)))
    return aligned(rows, text_columns=(0, 1))


def memory_problems(costs: Sequence[PhaseCost], recipe: Recipe, machine: Machine) -> list[str]:
    """Batches that do not fit into the machine's memory, each with sizes that do: smaller batches, more in a step."""
    problems = []
    for cost in costs:
        settings = recipe[cost.phase]
        if machine.memory is None or cost.memory(machine) <= machine.memory or not cost.activations:
            continue
        size, least = settings["tokens_per_batch"], settings.get("max_seq_length", 1)
        smaller, fitting = size, cost
        while fitting.memory(machine) > machine.memory and smaller // 2 >= least:
            smaller //= 2
            fitting = replace(fitting, activations=cost.activations * smaller / size)
        steps = settings.get("gradient_accumulation_steps", 0) * size // smaller
        same = f" and gradient_accumulation_steps: {steps}, which gives the same steps" if steps else ""
        problems.append(
            f"{cost.phase}: tokens_per_batch {size} needs some {cost.memory(machine) / 1e9:.0f} GB, and this machine "
            f"has {machine.memory / 1e9:.0f}; use tokens_per_batch: {smaller}{same}"
        )
    return problems


def without_gpu(seconds: float, machine: Machine) -> list[str]:
    """What to say to somebody whose phases take days on a CPU."""
    if not machine.name.startswith("a CPU") or seconds < _LONG_SECONDS:
        return []
    return [
        f"no GPU was found, and on this CPU that takes some {duration(seconds)}. Settings for a CPU are those of "
        "recipes/cpu.yaml: a smaller teacher and student, texts of 128 tokens, small batches; for a look at all "
        "phases, give 3 and 5 max_steps: 20, and 1 max_rows_per_source: 1000"
    ]


def note_without_gpu(section: str, settings: Mapping[str, Any]) -> None:
    """Log, at the beginning of a phase with sizes for a GPU, that there is none, and how long the recipe takes so.

    Args:
        section: of a recipe.
        settings: of this run, with its flags.
    """
    default: int = SECTIONS[section].settings.tokens_per_batch
    if best_device().type != "cpu" or settings["tokens_per_batch"] < default:
        return
    machine = this_machine()
    recipe = full_recipe(find_recipe(recipe_path(sys.argv[1:]) or "v2"))
    recipe[section] |= settings
    rows, tokens, lengths, _ = corpus_size(recipe["create_dataset"], None, None)
    costs, _ = plan(recipe, rows, tokens, lengths)
    (cost,) = (cost for cost in costs if cost.phase == section)
    for note in (*memory_problems([cost], recipe, machine), *without_gpu(cost.duration(machine), machine)):
        logger.warning("%s", note)


def explain(machine: Machine, source: str, assumed: Sequence[str]) -> list[str]:
    """Where the figures of a plan come from, a sentence each."""
    shares = ", ".join(f"{phase} {share:.0%}" for phase, share in machine.utilisation.items())
    measured = "measured on a CPU, docs/LOG.md" if machine.is_measured else "not measured on this GPU"
    return [
        "Memory holds weights and, where they are trained, gradients and AdamW's moments, in float32, and a batch.",
        "Disk is what stays; while phase 1 runs, its texts are there twice. Time is without downloads and evaluations.",
        f"{source}.",
        f"Assumed: of the rate the phases reach {shares} ({measured}).",
        *(f"Assumed: {text}." for text in assumed),
    ]


def main() -> None:
    """Print what a recipe costs."""
    args = parse_arguments()
    machine = gpu_of(args.gpu) if args.gpu else this_machine()
    recipe: Recipe = args.recipe
    count, tokens, lengths, source = corpus_size(recipe["create_dataset"], args.rows, args.tokens)
    costs, assumed = plan(recipe, count, tokens, lengths)
    rate = f"{machine.flops_per_second / 1e12:,.3g} TFLOP/s {'measured' if machine.is_measured else 'in bf16'}"
    print(f"{count:,} rows, {tokens:,} tokens; {machine.name}, {rate}\n")
    print(f"{format_plan(costs, machine)}\n")
    for line in explain(machine, source, assumed):
        print(line)
    seconds = sum(cost.duration(machine) for cost in costs)
    for line in (*memory_problems(costs, recipe, machine), *without_gpu(seconds, machine)):
        print(f"Note: {line}.")


if __name__ == "__main__":
    run_script(main)
