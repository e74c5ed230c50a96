"""What a recipe costs: parameters, memory, counted FLOPs and hours of each phase, before anything is run.

    python -m modernbert_small.plan recipes/v2.yaml --gpu H100 --rows 20000000 --tokens 4000000000

Without --rows and --tokens, the size of the corpus is read from its run.json, which phase 1 writes. FLOPs are counted
(see packed/flops.py). Hours depend on an assumed utilisation of the GPU; phases 3 and 5 print the measured one.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, ModernBertConfig, ModernBertForMaskedLM, PreTrainedConfig

from modernbert_small.initialise.guide import student_config
from modernbert_small.packed.flops import PEAK_RATES, find_gpu, training_flops_per_token
from modernbert_small.run.errors import UserError
from modernbert_small.run.loading import load_config
from modernbert_small.run.records import RUN_FILE, read_run
from modernbert_small.run.script import run_script
from modernbert_small.run.tables import aligned
from modernbert_small.settings.whole import full_recipe

MODERNBERT_BASE = {
    "vocab_size": 50_368,
    "hidden_size": 768,
    "num_hidden_layers": 22,
    "num_attention_heads": 12,
    "intermediate_size": 1152,
}
# Assumed shares of the data sheet's rate. A narrow student's matrix products keep tensor cores less busy than a wide
# teacher's.
UTILISATION = {"pre_train": 0.25, "create_distil_dataset": 0.4, "distil_train": 0.2}
WEIGHTS_BYTES = 4  # of a parameter in float32
TRAINING_BYTES = 16  # of a trained parameter: its weight, its gradient and AdamW's two moments in float32
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
    """

    phase: str
    model: str
    parameters: int
    bytes_per_parameter: int
    flops: float

    @property
    def bytes(self) -> int:
        """Memory of all parameters."""
        return self.parameters * self.bytes_per_parameter

    def hours(self, peak: float) -> float:
        """Hours on a GPU whose bf16 rate is `peak` FLOP/s, at the assumed utilisation."""
        return self.flops / (peak * UTILISATION[self.phase]) / 3600 if self.flops else 0.0


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


def corpus_size(folder: str, rows: int | None, tokens: int | None) -> tuple[int, int, NDArray[np.int64], str]:
    """The size of a corpus, from the flags or else from phase 1's record.

    Args:
        folder: the corpus.
        rows: given by a flag, or None.
        tokens: given by a flag, or None.

    Returns:
        Rows, tokens, the lengths (N,) in tokens of some typical rows, and a sentence that says where these come from.

    Raises:
        UserError: neither the flags nor phase 1's record are there.
    """
    if rows and tokens:
        source = "Rows and tokens are those of the flags; every row is counted with the mean length"
        return rows, tokens, np.array([max(1, tokens // rows)]), source
    if not Path(folder, RUN_FILE).exists():
        raise UserError(f"corpus {folder}: no {RUN_FILE} there; run phase 1 first, or pass --rows and --tokens")
    parts = read_run(folder)["by_source"]
    total = sum(part["rows"] for part in parts)
    counts = [round(1000 * part["rows"] / total) for part in parts]
    lengths = np.repeat([max(1, part["tokens"] // part["rows"]) for part in parts], counts)
    source = f"Rows and tokens are those of {folder}/{RUN_FILE}; every row is counted with its source's mean length"
    return total, sum(part["tokens"] for part in parts), lengths, source


def trained_tokens(settings: dict[str, Any], tokens: int) -> float:
    """The tokens that a training phase runs on.

    Args:
        settings: of the phase.
        tokens: of the corpus.
    """
    steps = settings.get("max_steps") or -1
    return steps * settings["tokens_per_batch"] if steps > 0 else tokens * float(settings["num_train_epochs"])


def plan(
    recipe: dict[str, dict[str, Any]], tokens: int, lengths: NDArray[np.int64]
) -> tuple[list[PhaseCost], list[str]]:
    """What each phase after the first runs.

    Args:
        recipe: all sections with all settings.
        tokens: of the corpus.
        lengths: (N,) tokens of some of its rows; attention depends on them.

    Returns:
        The cost of phases 2 to 5, and what was assumed.
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
    loaded = count_parameters(large, False) + with_head
    mlm_flops = training_flops_per_token(student, lengths, mlm["mlm_probability"]) * trained_tokens(mlm, tokens)
    label_flops = forward_flops_per_token(teacher, lengths) * tokens
    distil_flops = training_flops_per_token(student, lengths) * trained_tokens(distil, tokens)
    costs = [
        PhaseCost("init_model_mlm", "large + student", loaded, WEIGHTS_BYTES, 0.0),
        PhaseCost("pre_train", "student", with_head, TRAINING_BYTES, mlm_flops),
        PhaseCost("create_distil_dataset", "teacher", count_parameters(teacher, False), WEIGHTS_BYTES, label_flops),
        PhaseCost("distil_train", "student", encoder, TRAINING_BYTES, distil_flops),
    ]
    assumed = dict.fromkeys([assumed_of_large, assumed_of_teacher])  # once if both are the same
    return costs, [text for text in assumed if text is not None]


def rate_of(name: str) -> tuple[str, float]:
    """A GPU's name and its bf16 rate in FLOP/s.

    Raises:
        UserError: the GPU is not in the table.
    """
    known = find_gpu(name)
    if known is None:
        raise UserError(f"--gpu {name}: its rate is not known; expected one of {', '.join(PEAK_RATES)}")
    return known, PEAK_RATES[known]


def format_plan(costs: Sequence[PhaseCost], peak: float) -> str:
    """An aligned table.

    Args:
        costs: of the phases.
        peak: the GPU's bf16 rate in FLOP/s.
    """
    rows = [("phase", "model", "parameters", "GB", "PFLOPs", "hours")]
    for cost in costs:
        size = (f"{cost.parameters / 1e6:.1f} M", f"{cost.bytes / 1e9:.2f}")
        work = (f"{cost.flops / 1e15:,.1f}", f"{cost.hours(peak):,.2f}") if cost.flops else ("", "")
        rows.append((cost.phase, cost.model, *size, *work))
    flops, hours = sum(cost.flops for cost in costs), sum(cost.hours(peak) for cost in costs)
    rows.append(("all", "", "", "", f"{flops / 1e15:,.1f}", f"{hours:,.2f}"))
    return aligned(rows, text_columns=(0, 1))


def parse_arguments() -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: one of --rows and --tokens is given without the other.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="a recipe, such as recipes/v2.yaml")
    parser.add_argument("--gpu", default="H100", help=f"one of {', '.join(PEAK_RATES)}; default: H100")
    parser.add_argument("--rows", type=int, help="number of texts in the corpus; needed until phase 1 has run")
    parser.add_argument("--tokens", type=int, help="number of tokens in the corpus; needed until phase 1 has run")
    args = parser.parse_args()
    if (args.rows is None) != (args.tokens is None):
        given, missing = ("--tokens", "--rows") if args.rows is None else ("--rows", "--tokens")
        raise UserError(f"{given} is given without {missing}; expected both, or neither once phase 1 has run")
    return args


def main() -> None:
    """Print what a recipe costs."""
    args = parse_arguments()
    gpu, peak = rate_of(args.gpu)
    recipe = full_recipe(args.recipe)
    count, tokens, lengths, source = corpus_size(recipe["pre_train"]["train_file"], args.rows, args.tokens)
    costs, assumed = plan(recipe, tokens, lengths)
    print(f"{count:,} rows, {tokens:,} tokens; one {gpu}, {peak / 1e12:,.0f} TFLOP/s in bf16\n")
    print(f"{format_plan(costs, peak)}\n")
    print("GB counts weights and, where they are trained, gradients and AdamW's moments, in float32.")
    print(f"Activations need memory besides. {source}.")
    shares = ", ".join(f"{phase} {share:.0%}" for phase, share in UTILISATION.items())
    print(f"Assumed: of the peak rate the phases reach {shares}. This was not measured on this GPU.")
    for text in assumed:
        print(f"Assumed: {text}.")


if __name__ == "__main__":
    run_script(main)
