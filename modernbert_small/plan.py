"""What a recipe costs, before anyone spends it: parameters, memory, counted FLOPs and hours of each phase.

    python -m modernbert_small.plan recipes/v2.yaml --gpu H100 --rows 20000000 --tokens 4000000000

Rows and tokens come from the corpus's run.json once phase 1 has run. FLOPs are counted (see flops.py), hours rest on
an assumed utilisation, which phases 3 and 5 print for themselves as they run.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, ModernBertConfig, ModernBertForMaskedLM, PreTrainedConfig

from modernbert_small.initialise.guide import student_config
from modernbert_small.packed.flops import PEAK_RATES, training_flops_per_token
from modernbert_small.run.artefacts import RUN_FILE, read_run
from modernbert_small.run.errors import UserError
from modernbert_small.run.loading import load_config
from modernbert_small.run.recipe import full_recipe, require_equal_widths
from modernbert_small.run.script import run_script

MODERNBERT_BASE = {
    "vocab_size": 50_368,
    "hidden_size": 768,
    "num_hidden_layers": 22,
    "num_attention_heads": 12,
    "intermediate_size": 1152,
}
# Of the data sheet's rate. Products of a narrow student keep tensor cores less busy than those of a wide teacher.
UTILISATION = {"pre_train": 0.25, "create_distil_dataset": 0.4, "distil_train": 0.2}
WEIGHTS_BYTES = 4  # float32
TRAINING_BYTES = 16  # float32: weights, gradients and AdamW's two moments
_IDS: dict[str, int | None] = dict.fromkeys([f"{name}_token_id" for name in ("pad", "cls", "sep", "bos", "eos")], 0)


def teacher_config(name_or_path: str) -> tuple[PreTrainedConfig, str | None]:
    """A teacher's configuration, and what is assumed about it if it cannot be read."""
    try:
        return load_config("teacher", name_or_path), None
    except UserError:
        known = ", ".join(f"{key} {value}" for key, value in MODERNBERT_BASE.items())
        return ModernBertConfig(**MODERNBERT_BASE), f"{name_or_path} cannot be read here; as ModernBERT-base: {known}"


def count_parameters(config: PreTrainedConfig, has_head: bool) -> int:
    """Of a model, counted on the model itself, whose weights take no memory on torch's meta device."""
    with torch.device("meta"):
        model = ModernBertForMaskedLM(config) if has_head else AutoModel.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def forward_flops_per_token(config: PreTrainedConfig, lengths: NDArray[np.int64]) -> float:
    """Of an encoder without a head; backward counts twice forward.

    A BERT-like teacher counts as a ModernBERT that attends to everything and whose gated MLP, three matrices, has
    two thirds of the neurons, and so the same products.
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
    return training_flops_per_token(config, lengths) / 3


def corpus_size(folder: str, rows: int | None, tokens: int | None) -> tuple[int, int, NDArray[np.int64], str]:
    """Rows, tokens, a thousand rows' lengths and where they come from: the flags, else phase 1's record.

    Raises:
        UserError: neither.
    """
    if rows and tokens:
        return rows, tokens, np.array([max(1, tokens // rows)]), "rows and tokens: as given, all rows of mean length"
    if not Path(folder, RUN_FILE).exists():
        raise UserError(f"corpus {folder}: no {RUN_FILE} there; run phase 1 first, or pass --rows and --tokens")
    parts = read_run(folder)["by_source"]
    total = sum(part["rows"] for part in parts)
    counts = [round(1000 * part["rows"] / total) for part in parts]
    lengths = np.repeat([max(1, part["tokens"] // part["rows"]) for part in parts], counts)
    source = f"rows and tokens: from {folder}/{RUN_FILE}, every row of its source's mean length"
    return total, sum(part["tokens"] for part in parts), lengths, source


def trained_tokens(settings: dict[str, Any], tokens: int) -> float:
    """Tokens that a training phase sees."""
    steps = settings.get("max_steps") or -1
    return steps * settings["tokens_per_batch"] if steps > 0 else tokens * float(settings["num_train_epochs"])


def plan(recipe: dict[str, dict[str, Any]], tokens: int, lengths: NDArray[np.int64]) -> tuple[list[dict], list[str]]:
    """What each phase runs.

    Args:
        recipe: all sections, all settings.
        tokens: of the corpus.
        lengths: of some of its rows, for attention.

    Returns:
        A row per phase with `phase`, `model`, `parameters`, `bytes` of weights, gradients and optimiser, and `flops`;
        and what was assumed.
    """
    init, mlm, labels, distil = (recipe[name] for name in list(recipe)[1:])
    large, *assumed = teacher_config(init["teacher_name_or_path"])
    teacher, *also_assumed = teacher_config(labels["teacher_name_or_path"])
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
    sizes = {name: init[name] for name in names}
    inherited = large if isinstance(large, ModernBertConfig) else None
    config = student_config(**sizes, vocab_size=large.vocab_size, special_ids=_IDS, teacher=inherited)
    with_head, encoder = count_parameters(config, True), count_parameters(config, False)
    teachers = count_parameters(large, False), count_parameters(teacher, False)
    mlm_flops = training_flops_per_token(config, lengths, mlm["mlm_probability"])
    distil_flops = training_flops_per_token(config, lengths)
    rows = [
        ("init_model_mlm", "large + student", teachers[0] + with_head, WEIGHTS_BYTES, 0.0),
        ("pre_train", "student", with_head, TRAINING_BYTES, mlm_flops * trained_tokens(mlm, tokens)),
        (
            "create_distil_dataset",
            "teacher",
            teachers[1],
            WEIGHTS_BYTES,
            forward_flops_per_token(teacher, lengths) * tokens,
        ),
        ("distil_train", "student", encoder, TRAINING_BYTES, distil_flops * trained_tokens(distil, tokens)),
    ]
    found = [
        {"phase": phase, "model": model, "parameters": count, "bytes": count * each, "flops": flops}
        for phase, model, count, each, flops in rows
    ]
    return found, [text for text in dict.fromkeys([*assumed, *also_assumed]) if text]


def find_gpu(name: str) -> tuple[str, float]:
    """A GPU's name and its bf16 rate in FLOP/s.

    Raises:
        UserError: it is not in the table.
    """
    for known, rate in PEAK_RATES.items():
        if known.lower() in name.lower():
            return known, rate
    raise UserError(f"--gpu {name}: no rate known, expected one of {', '.join(PEAK_RATES)}")


def format_plan(rows: list[dict], peak: float) -> str:
    """An aligned table."""
    lines = [("phase", "model", "parameters", "GB", "PFLOPs", "hours")]
    for row in rows:
        rate = peak * UTILISATION.get(row["phase"], 1)
        spent = (f"{row['flops'] / 1e15:,.1f}", f"{row['flops'] / rate / 3600:,.2f}") if row["flops"] else ("", "")
        memory = f"{row['bytes'] / 1e9:.2f}"
        lines.append((row["phase"], row["model"], f"{row['parameters'] / 1e6:.1f} M", memory, *spent))
    hours = sum(row["flops"] / (peak * UTILISATION[row["phase"]]) for row in rows if row["flops"]) / 3600
    lines.append(("all", "", "", "", f"{sum(row['flops'] for row in rows) / 1e15:,.1f}", f"{hours:,.2f}"))
    return "\n".join(f"{a:<22}{b:<16}{c:>11}{d:>8}{e:>14}{f:>10}" for a, b, c, d, e, f in lines)


def main() -> None:
    """Recipe in, table out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="recipes/v2.yaml, or one of your own")
    parser.add_argument("--gpu", default="H100", help=f"default: H100; one of {', '.join(PEAK_RATES)}")
    parser.add_argument("--rows", type=int, help="texts of the corpus, if phase 1 has not run")
    parser.add_argument("--tokens", type=int, help="tokens of the corpus, if phase 1 has not run")
    args = parser.parse_args()
    if (args.rows is None) != (args.tokens is None):
        raise UserError("--rows and --tokens: expected both, or neither once phase 1 has run")
    gpu, peak = find_gpu(args.gpu)
    recipe = full_recipe(args.recipe)
    require_equal_widths(args.recipe, recipe)
    count, tokens, lengths, source = corpus_size(recipe["pre_train"]["train_file"], args.rows, args.tokens)
    rows, assumed = plan(recipe, tokens, lengths)
    print(f"{count:,} rows, {tokens:,} tokens; one {gpu}, {peak / 1e12:,.0f} TFLOP/s in bf16\n")
    print(f"{format_plan(rows, peak)}\n")
    shares = ", ".join(f"{phase} {share:.0%}" for phase, share in UTILISATION.items())
    print(
        f"GB: weights, and where trained gradients and AdamW's moments, in float32; activations come on top.\n{source}."
    )
    print(f"Assumed: of the peak rate, {shares}; no run on this GPU stands behind it.")
    for text in assumed:
        print(f"Assumed: {text}.")


if __name__ == "__main__":
    run_script(main)
