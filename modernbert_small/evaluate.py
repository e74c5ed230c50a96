"""Where a student stands against its teacher and which step lost the rest; or which of several students is better.

    python -m modernbert_small.evaluate checkpoints/ModernBERT-small-v2 checkpoints/teacher
    python -m modernbert_small.evaluate <student> <teacher> --datasets nanobeir stsb <folder> <pairs.parquet>
    python -m modernbert_small.evaluate <student> <student> <student> <teacher>

All systems are measured on the same sets: the teacher, the teacher after phase 4's projection (the ceiling of any
student), the student, the student's queries against the teacher's documents, and the student with truncated and with
quantised vectors. Shown are nDCG@10, what is kept of the teacher's in per cent with an interval from a paired bootstrap
over queries, Spearman's correlation on sentence pairs, size, and speed on this machine. All is computed in float32.

Of several students the differences in nDCG@10 are shown too, each with the interval of a paired bootstrap, and not
their smaller vectors.
"""

import argparse
from pathlib import Path

from modernbert_small.run.errors import UserError
from modernbert_small.run.script import check_early, command_parser, run_script

_TEACHERS = ("teacher", "teacher, projected")  # names in the tables, as in evaluation.systems


def parse_arguments() -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: the output is a folder, the output file's folder does not exist, or students have no name of their
            own.
    """
    parser = command_parser("evaluate", __doc__)
    parser.add_argument("student", nargs="+", help="model folders or hub ids")
    parser.add_argument("teacher", help="last: phase 4's reduced teacher, or any other model folder or hub id")
    parser.add_argument(
        "--datasets",
        nargs="+",
        default=["nanobeir"],
        help="NanoBEIR names, nanobeir for all 13 of them (the default, from the hub), stsb, folders as in BEIR or "
        "NanoBEIR, a corpus's folder heldout, files of queries and answers or of sentence pairs",
    )
    parser.add_argument(
        "--mteb", nargs="+", default=[], metavar="TASK", help="also run these MTEB tasks; needs the extra [mteb]"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that a model's repository brings")
    parser.add_argument("--output", type=Path, help="also write the account to this JSON file")
    args = parser.parse_args()
    if len(args.student) > 1 and len({*_TEACHERS, *args.student}) < len(args.student) + len(_TEACHERS):
        raise UserError(
            f"students {', '.join(args.student)}: expected different names, none of them {_TEACHERS[0]}; give the path "
            "of one in another way, such as ./ before it"
        )
    if args.output and args.output.is_dir():
        raise UserError(
            f"--output {args.output}: is a folder, expected a file; name one such as {args.output / 'account.json'}"
        )
    if args.output and not args.output.parent.is_dir():
        raise UserError(
            f"--output {args.output}: no such folder {args.output.parent}; make it, or name a file in another folder"
        )
    return args


if __name__ == "__main__":
    check_early(parse_arguments)  # before the imports below, which take seconds

import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

from sentence_transformers import SentenceTransformer

from modernbert_small.evaluation.account import account
from modernbert_small.evaluation.comparison import compare
from modernbert_small.evaluation.overlap import warn_of_own_overlap
from modernbert_small.evaluation.sets import load_evaluation_sets
from modernbert_small.evaluation.systems import PROJECTED, STUDENT, is_reduced_teacher
from modernbert_small.evaluation.tables import format_account
from modernbert_small.run.loading import load_sentence_transformer
from modernbert_small.run.records import write_json

logger = logging.getLogger(__name__)


def mteb_scores(models: dict[str, SentenceTransformer], names: Sequence[str]) -> list[dict[str, Any]]:
    """The main score of each model on MTEB tasks, as the package mteb measures it.

    Args:
        models: by the name to show.
        names: of MTEB tasks.

    Returns:
        A row per model with `system` and `scores` by task.

    Raises:
        UserError: mteb is not installed, knows no such task, or cannot download a task's data.
    """
    if importlib.util.find_spec("mteb") is None:
        raise UserError("--mteb: the package mteb is missing; install it with: pip install -e .[mteb]")
    import mteb  # comes with the extra [mteb]

    try:
        tasks = mteb.get_tasks(tasks=list(names))
    except KeyError as error:
        raise UserError(f"--mteb: {error.args[0]}") from error
    rows = []
    for name, model in models.items():
        try:
            results = mteb.evaluate(model, tasks, cache=None, show_progress_bar=False).task_results
        except OSError as error:
            raise UserError(f"--mteb: a task's data cannot be downloaded from the Hugging Face hub: {error}") from error
        scores = {result.task_name: round(float(result.get_score()), 4) for result in results}
        rows.append({"system": name, "scores": scores})
    return rows


def main() -> None:
    """Measure the models on the same sets and print the tables."""
    args = parse_arguments()
    flag = "--datasets"
    students = {
        name: load_sentence_transformer("student", name, trust_remote_code=args.trust_remote_code)
        for name in args.student
    }
    teacher = load_sentence_transformer("teacher", args.teacher, trust_remote_code=args.trust_remote_code)
    retrieval_sets, pair_sets = load_evaluation_sets(flag, args.datasets)
    for name in args.student:
        warn_of_own_overlap(name, retrieval_sets, pair_sets)
    is_reduced = is_reduced_teacher(args.teacher)
    if len(students) > 1:
        record = compare(students, teacher, is_reduced, retrieval_sets, pair_sets, flag)
    else:
        (student,) = students.values()
        students = {STUDENT: student}
        record = account(student, teacher, is_reduced, retrieval_sets, pair_sets, flag)
    if args.mteb:
        record["mteb"] = mteb_scores({PROJECTED: teacher} | students, args.mteb)
    if args.output:
        write_json(args.output, record)
    print(format_account(record))


if __name__ == "__main__":
    run_script(main)
