"""What a recipe costs: parameters, memory, disk, counted FLOPs and time of each phase, before anything is run.

    python -m modernbert_small.plan recipes/cpu.yaml
    python -m modernbert_small.plan recipes/v2.yaml --gpu H100 --rows 20000000 --tokens 4e9
    python -m modernbert_small.plan recipes/v2.yaml --gpu H100 --gpus 8 --machines 2 --tokens 1e9 1e10 1e11 1e12

Without --tokens, the size of the corpus is read from its run.json, which phase 1 writes, or else is estimated from the
sources. FLOPs are counted (see packed/flops.py). Times are of this machine, or of a GPU that --gpu names, or of many.
They depend on how much of its rate the phases reach; on a GPU, phases 3 and 5 print what they do reach. A step of
phases 3 and 5 is the recipe's, dealt to all GPUs.
"""

import argparse
import math

from modernbert_small.run.errors import UserError
from modernbert_small.run.script import check_early, command_parser, recipe_path, run_script
from modernbert_small.settings.recipe import RECIPE_HELP, find_recipe
from modernbert_small.settings.whole import Recipe, full_recipe, leaves_out_phase_3


def parse_arguments() -> argparse.Namespace:
    """The command line, with the recipe read and checked.

    Raises:
        UserError: --rows is given without one --tokens, a number is below 1, or the recipe is wrong.
    """
    parser = command_parser("plan", __doc__)
    parser.add_argument("recipe", help=RECIPE_HELP)
    parser.add_argument("--gpu", help='a GPU such as H100 or "RTX 4090"; by default this machine')
    parser.add_argument("--gpus", type=int, default=1, help="GPUs in each machine, as torchrun's --nproc_per_node")
    parser.add_argument("--machines", type=int, default=1, help="machines, as torchrun's --nnodes")
    parser.add_argument("--rows", type=int, help="number of texts in the corpus; by default --tokens over their mean")
    parser.add_argument(
        "--tokens", type=float, nargs="+", help="number of tokens in the corpus, such as 4e9; several: a line for each"
    )
    args = parser.parse_args()
    if not all(map(math.isfinite, args.tokens or [])):
        raise UserError("--tokens: expected numbers such as 4e9")
    args.tokens = [round(tokens) for tokens in args.tokens or []]
    if args.rows is not None and len(args.tokens) != 1:
        raise UserError(f"--rows is given with {len(args.tokens)} numbers of --tokens; expected one")
    given = {"gpus": args.gpus, "machines": args.machines, "tokens": min(args.tokens, default=1), "rows": args.rows}
    for name, least in given.items():
        if least is not None and least < 1:
            raise UserError(f"--{name}: {least}, expected at least 1")
    args.recipe = full_recipe(find_recipe(args.recipe))
    return args


if __name__ == "__main__":
    check_early(parse_arguments)  # before the imports below, which take seconds

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, BertConfig, ModernBertConfig, ModernBertForMaskedLM, PreTrainedConfig

from modernbert_small.corpus.sources import PYTHON_DOCS, source_locations
from modernbert_small.initialise.guide import student_config
from modernbert_small.packed.costs import BETWEEN_MACHINES, WITHIN_MACHINE, PhaseCost
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
# The teacher of recipes/cpu.yaml, which is not on the machine when its user plans for the first time.
KNOWN_TEACHERS = {
    "sentence-transformers/all-MiniLM-L6-v2": {
        "vocab_size": 30_522,
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    }
}
WEIGHTS_BYTES = 4  # of a parameter in float32
TRAINING_BYTES = 16  # of a trained parameter: its weight, its gradient and AdamW's two moments in float32
CHECKPOINT_BYTES = 12  # of a trained parameter: its weight and the moments
# Fitted to phases 3 and 5 in docs/LOG.md, in bf16 and in float32, to within 5 %: the values that training keeps for a
# token: so many times the width and the neurons of each layer, and the logits.
_VALUES_OF_WIDTH, _VALUES_OF_NEURONS, _VALUES_OF_LOGITS = 16, 8, 4
# Of a process with two CPU cores (docs/LOG.md): phase 1 without downloads; tokenising; reading and unpacking texts.
CORPUS_TOKENS_PER_SECOND, TOKENISED_PER_SECOND, READ_PER_SECOND = 1_700_000, 1_800_000, 150_000_000
ROW_BYTES = 40  # of a row in each process that trains: its place, its length, and the shuffle (tests/test_plan.py)
INIT_SECONDS = 120  # phase 2 with ModernBERT-base on two CPU cores at most (docs/LOG.md)
TEXT_BYTES = 4.5  # of a token of English, its space included
# Where no size is known: docstrings and hub rows as the small runs in docs/LOG.md met them, and an assumption.
_DOCSTRINGS, _TOKENS_OF_DOCSTRING, _TOKENS_OF_HUB_ROW, _ASSUMED_HUB_TOKENS = 8_100, 85, 580, 1_000_000_000
_SHARE_OF_LONGEST = 0.4  # mean length of a text, of max_seq_length
_LONG_SECONDS = 36 * 3600  # more than a night and a day
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
_IDS: dict[str, int | None] = dict.fromkeys([f"{name}_token_id" for name in ("pad", "cls", "sep", "bos", "eos")], 0)


def teacher_config(name_or_path: str) -> tuple[PreTrainedConfig, str | None]:
    """A teacher's configuration, and what is assumed about it if it cannot be read; None if it can."""
    if name_or_path in KNOWN_TEACHERS:
        return BertConfig(**KNOWN_TEACHERS[name_or_path]), None
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
    mean = max(1, round(_SHARE_OF_LONGEST * settings["max_seq_length"]))
    if tokens:
        source = f"Tokens are those of the flags; a row is assumed to have {mean} tokens"
        return max(1, tokens // mean), tokens, np.array([mean]), source
    if not Path(folder, RUN_FILE).exists():
        tokens = _expected_tokens(settings)
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


def trained_tokens(settings: Mapping[str, Any], tokens: int) -> float:
    """The tokens that a training phase runs on.

    Args:
        settings: of the phase.
        tokens: of the corpus.
    """
    steps = settings["max_steps"]
    return steps * step_tokens(settings) if steps > 0 else tokens * float(settings["num_train_epochs"])


def step_tokens(settings: Mapping[str, Any]) -> int:
    """The tokens of a step of a training phase, which all processes share."""
    return settings["tokens_per_batch"] * settings["gradient_accumulation_steps"]


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
        PhaseCost(
            *("create_dataset", "", 0, 0, 0.0),
            dealt_seconds=tokens / CORPUS_TOKENS_PER_SECOND,
            disk=texts,
        ),
        PhaseCost(
            *("init_model_mlm", "large + student", loaded, WEIGHTS_BYTES, 0.0, INIT_SECONDS),
            disk=WEIGHTS_BYTES * with_head,
            most_processes=1,
        ),
        PhaseCost(
            *("pre_train", "student", with_head, TRAINING_BYTES, mlm_flops),
            activations=mlm["tokens_per_batch"] * (values + logits),
            disk=token_ids + checkpoint_bytes(mlm, with_head),
            **_of_training(mlm, rows, tokens),
        ),
        PhaseCost(
            *("create_distil_dataset", "teacher", of_teacher, WEIGHTS_BYTES, label_flops),
            activations=labels["tokens_per_batch"] * layer_values(teacher),
            disk=texts + vectors + WEIGHTS_BYTES * of_teacher,
            dealt_seconds=tokens / TOKENISED_PER_SECOND + tokens / READ_PER_SECOND,
        ),
        PhaseCost(
            *("distil_train", "student", encoder, TRAINING_BYTES, distil_flops),
            activations=distil["tokens_per_batch"] * values,
            disk=token_ids + vectors + checkpoint_bytes(distil, encoder),
            **_of_training(distil, rows, tokens),
        ),
    ]
    if leaves_out_phase_3(recipe):
        costs[2] = PhaseCost("pre_train", "left out", 0, 0, 0.0)
    assumed = dict.fromkeys([assumed_of_large, assumed_of_teacher])  # once if both are the same
    return costs, [text for text in assumed if text is not None]


def _of_training(settings: Mapping[str, Any], rows: int, tokens: int) -> dict[str, Any]:
    """What both training phases cost beside their FLOPs: tokenising comes first.

    A step can be dealt to as many processes as have room for the longest text in their share of it.
    """
    return {
        "dealt_seconds": tokens / TOKENISED_PER_SECOND,
        "steps": trained_tokens(settings, tokens) / step_tokens(settings),
        "most_processes": max(1, settings["tokens_per_batch"] // settings["max_seq_length"]),
        "held": float(ROW_BYTES * rows),
    }


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
    """An aligned table: a line for each phase."""
    many = machine.processes > 1
    rows = [
        ("phase", "model", "parameters", *["processes"] * many, "memory, GB", "RAM, GB", "disk, GB", "PFLOPs", "time")
    ]
    for cost in costs:
        size = f"{cost.parameters / 1e6:.1f} M" if cost.parameters else ""
        flops = f"{cost.flops / 1e15:,.1f}" if cost.flops else ""
        room = [f"{size / 1e9:,.1f}" for size in (cost.memory(machine), cost.machine_memory(machine), cost.disk)]
        used = [f"{cost.processes(machine)}"] * many
        rows.append((cost.phase, cost.model, size, *used, *room, flops, duration(cost.duration(machine))))
    disk, work = sum(cost.disk for cost in costs), sum(cost.flops for cost in costs)
    seconds = sum(cost.duration(machine) for cost in costs)
    total = (f"{disk / 1e9:,.1f}", f"{work / 1e15:,.1f}", duration(seconds))
    rows.append(("all", "", "", *[""] * many, "", "", *total))
    return aligned(rows, text_columns=(0, 1))


def format_sizes(plans: Mapping[int, Sequence[PhaseCost]], machine: Machine) -> str:
    """An aligned table: a line for each number of tokens, with the hours of each phase."""
    rows: list[tuple[str, ...]] = [("tokens", "1", "2", "3", "4", "5", "all, hours", "longest", "RAM, GB", "disk, GB")]
    for tokens, costs in plans.items():
        hours = {cost.phase: cost.duration(machine) / 3600 for cost in costs}
        times = [f"{time:,.2f}" if time < 1 else f"{time:,.1f}" for time in (*hours.values(), sum(hours.values()))]
        ram, disk = max(cost.machine_memory(machine) for cost in costs), sum(cost.disk for cost in costs)
        room = (f"{ram / 1e9:,.0f}", f"{disk / 1e9:,.0f}")
        rows.append((f"{tokens:.3g}", *times, max(hours, key=lambda phase: hours[phase]), *room))
    return aligned(rows, text_columns=(7,))


def memory_problems(costs: Sequence[PhaseCost], recipe: Recipe, machine: Machine) -> list[str]:
    """Batches that do not fit into the machine's memory, each with sizes that do: smaller batches, more in a step."""
    problems = []
    for cost in costs:
        settings = recipe[cost.phase]
        if machine.memory is None or cost.memory(machine) <= machine.memory or not cost.activations:
            continue
        # Where processes share a batch, each one's part must hold the longest text.
        least = settings.get("max_seq_length", 1) * (cost.processes(machine) if cost.steps else 1)
        size = settings["tokens_per_batch"]
        smaller, fitting = size, cost
        while fitting.memory(machine) > machine.memory and smaller // 2 >= least:
            smaller //= 2
            fitting = replace(fitting, activations=cost.activations * smaller / size)
        steps = settings.get("gradient_accumulation_steps", 0) * size // smaller
        same = f" and gradient_accumulation_steps: {steps}, which gives the same steps" if steps else ""
        if fitting.memory(machine) > machine.memory:
            same += f"; even that needs {fitting.memory(machine) / 1e9:.0f} GB"
        problems.append(
            f"{cost.phase}: tokens_per_batch {size} needs some {cost.memory(machine) / 1e9:.0f} GB, and this machine "
            f"has {machine.memory / 1e9:.0f}; use tokens_per_batch: {smaller}{same}"
        )
    return problems


def unused_processes(costs: Sequence[PhaseCost], recipe: Recipe, machine: Machine) -> list[str]:
    """Training phases whose steps are too small for all GPUs."""
    found = [(cost.phase, cost.processes(machine)) for cost in costs if cost.steps]
    return [
        f"{phase} is fastest on {used} of {machine.processes} GPUs: {step_tokens(recipe[phase]):,} tokens a step give "
        "more of them too little to do; larger steps use more GPUs, and are another recipe"
        for phase, used in found
        if used < machine.processes
    ]


def without_gpu(seconds: float, machine: Machine) -> list[str]:
    """What to say to somebody whose phases take days on a CPU."""
    if machine.has_gpu or seconds < _LONG_SECONDS:
        return []
    return [
        f"no GPU was found, and on this CPU that takes some {duration(seconds)}. Settings for a CPU are those of "
        "recipes/cpu.yaml: a smaller teacher and student, texts of 128 tokens, small batches. To try all phases "
        "quickly, set max_rows_per_source: 1000 in create_dataset, and max_steps: 20 in pre_train and distil_train"
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
    exchange = (
        f"Assumed: N processes do phases 1 and 4 in an Nth of the time; GPUs exchange {WITHIN_MACHINE / 1e9:g} GB/s of "
        f"gradients in a machine and {BETWEEN_MACHINES / 1e9:g} GB/s between machines; disks keep up (not measured)."
    )
    return [
        "Memory is a process's: weights and, where they are trained, gradients and AdamW's moments, in float32, and a "
        "batch. RAM is a machine's.",
        "Disk is what stays; while phase 1 runs, its texts are there twice. Time is without downloads and evaluations.",
        "Phase 1, tokenising and reading count with the rate of one process on two CPU cores (measured, docs/LOG.md).",
        f"{source}.",
        f"Assumed: of the rate the phases reach {shares} ({measured}).",
        *[exchange] * (machine.processes > 1),
        *(f"Assumed: {text}." for text in assumed),
    ]


def chosen_machine(args: argparse.Namespace) -> Machine:
    """The GPUs and machines that the flags name.

    Raises:
        UserError: an unknown GPU, or several where this machine has none.
    """
    machine = gpu_of(args.gpu) if args.gpu else this_machine()
    if args.gpus * args.machines > 1:
        if not machine.has_gpu:
            raise UserError(f"--gpus {args.gpus} --machines {args.machines}: no GPU is here; name one with --gpu")
        kind = machine.name.removeprefix("one ")
        machines = f"{args.machines} machines with " if args.machines > 1 else ""
        machine = replace(machine, name=f"{machines}{args.gpus} {kind}", gpus=args.gpus, machines=args.machines)
    return machine


def main() -> None:
    """Print what a recipe costs."""
    args = parse_arguments()
    machine = chosen_machine(args)
    recipe: Recipe = args.recipe
    rate = f"{machine.flops_per_second / 1e12:,.3g} TFLOP/s {'measured' if machine.is_measured else 'in bf16'}"
    plans = {}
    for size in args.tokens or [None]:
        rows, tokens, lengths, source = corpus_size(recipe["create_dataset"], args.rows, size)
        plans[tokens], assumed = plan(recipe, rows, tokens, lengths)
    costs = plans[tokens]
    if len(plans) > 1:
        print(f"{machine.name}, {rate}; hours of phases 1 to 5\n\n{format_sizes(plans, machine)}\n")
    else:
        print(f"{rows:,} rows, {tokens:,} tokens; {machine.name}, {rate}\n\n{format_plan(costs, machine)}\n")
    for line in explain(machine, source, assumed):
        print(line)
    seconds = sum(cost.duration(machine) for cost in costs)
    notes = [*memory_problems(costs, recipe, machine), *unused_processes(costs, recipe, machine)]
    for line in (*notes, *without_gpu(seconds, machine)):
        print(f"Note: {line}.")


if __name__ == "__main__":
    run_script(main)
