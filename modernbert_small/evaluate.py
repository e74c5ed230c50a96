"""Where a student stands against its teacher, and where the rest was lost.

    python -m modernbert_small.evaluate checkpoints/ModernBERT-small-v2 checkpoints/teacher
    python -m modernbert_small.evaluate <student> <teacher> --datasets nanobeir stsb <folder> <pairs.parquet>

The same sets, step by step: the teacher, the teacher after phase 4's projection (the ceiling), the student, its
queries against the teacher's documents, the student truncated and quantised. nDCG@10 in per cent of the teacher's
with a paired bootstrap over queries, Spearman on sentence pairs, speed on this machine, size.
"""

import argparse
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from modernbert_small.evaluation.account import account, format_account, is_reduced_teacher
from modernbert_small.evaluation.sets import load_evaluation_sets
from modernbert_small.run.artefacts import write_json
from modernbert_small.run.errors import UserError
from modernbert_small.run.loading import load_sentence_transformer
from modernbert_small.run.script import run_script

logger = logging.getLogger(__name__)


def mteb_scores(models: dict[str, SentenceTransformer], names: Sequence[str]) -> list[dict[str, Any]]:
    """The main score of each model on MTEB tasks, by mteb itself.

    Raises:
        UserError: mteb is not installed, knows no such task, or its data did not come.
    """
    if importlib.util.find_spec("mteb") is None:
        raise UserError("--mteb: the package mteb is missing; install it with: pip install -e .[mteb]")
    import mteb  # an extra

    try:
        tasks = mteb.get_tasks(tasks=list(names))
    except KeyError as error:
        raise UserError(f"--mteb: {error.args[0]}") from error
    rows = []
    for name, model in models.items():
        try:
            results = mteb.evaluate(model, tasks, cache=None, show_progress_bar=False).task_results
        except OSError as error:
            raise UserError(f"--mteb: a task's data did not come from the Hugging Face hub: {error}") from error
        rows.append({"system": name, "scores": {one.task_name: round(float(one.get_score()), 4) for one in results}})
    return rows


def main() -> None:
    """Two models and sets in, tables out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", help="model folder or hub id")
    parser.add_argument("teacher", help="phase 4's reduced teacher, or any model")
    parser.add_argument(
        "--datasets",
        nargs="+",
        default=["nanobeir"],
        help="NanoBEIR names, nanobeir for all 13 (the default, from the hub), stsb, folders laid out like NanoBEIR, "
        "files of sentence pairs",
    )
    parser.add_argument("--mteb", nargs="+", default=[], metavar="TASK", help="MTEB tasks, with the extra [mteb]")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that a model's repository brings")
    parser.add_argument("--output", type=Path, help="JSON file to write the account to")
    args = parser.parse_args()
    if args.output and not args.output.parent.is_dir():
        raise UserError(f"--output {args.output}: no such folder {args.output.parent}")
    retrieval_sets, pair_sets = load_evaluation_sets("--datasets", args.datasets)
    student, teacher = (
        load_sentence_transformer(flag, path, trust_remote_code=args.trust_remote_code)
        for flag, path in (("student", args.student), ("teacher", args.teacher))
    )
    record = account(student, teacher, is_reduced_teacher(args.teacher), retrieval_sets, pair_sets)
    if args.mteb:
        record["mteb"] = mteb_scores({"teacher, projected": teacher, "student": student}, args.mteb)
    if args.output:
        write_json(args.output, record)
    print(format_account(record))


if __name__ == "__main__":
    run_script(main)
