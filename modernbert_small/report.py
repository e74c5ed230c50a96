"""The report of a model: one HTML page, from the run.json files of all five phases.

    python -m modernbert_small.report checkpoints/ModernBERT-small-v2
    python -m modernbert_small.report recipes/v2.yaml

The search for run.json files starts at the final model's folder, or at a recipe's output folders, and follows the
inputs that each run.json names. Relative paths are relative to the working folder. The page is written as report.html
into the final model's folder, or into the working folder while there is no final model. What was not measured is left
out.
"""

import argparse

from modernbert_small.run.script import check_early, command_parser, run_script


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_parser("report", __doc__)
    parser.add_argument("recipe_or_folder", help="a recipe, or the folder of a final model")
    return parser.parse_args()


if __name__ == "__main__":
    check_early(parse_arguments)  # before the imports below, which take seconds

from collections.abc import Mapping
from pathlib import Path

from modernbert_small.reporting.page import page
from modernbert_small.reporting.paths import public_record
from modernbert_small.reporting.phases import (
    Record,
    corpus,
    distillation,
    initialisation,
    labels,
    pre_training,
    projection,
)
from modernbert_small.reporting.provenance import provenance
from modernbert_small.reporting.quality import (
    headline,
    searches,
    size_and_speed,
    smaller_vectors,
    student_and_teacher,
)
from modernbert_small.run.errors import UserError
from modernbert_small.run.records import RUN_FILE, find_records, write_text
from modernbert_small.settings.sections import SECTIONS
from modernbert_small.settings.whole import full_recipe

REPORT_FILE = "report.html"


def start_folders(recipe_or_folder: str) -> list[str]:
    """The folders at which the search starts: the given one, or a recipe's output folders, the final model's first.

    Raises:
        UserError: there is no such file or folder, or the recipe is not one.
    """
    path = Path(recipe_or_folder)
    if path.is_dir():
        return [recipe_or_folder]
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected a recipe, or a model's folder")
    recipe = full_recipe(path)
    outputs = [recipe[name].get(key) for name in reversed(SECTIONS) for key in ("output_dir", "teacher_output_dir")]
    return [str(folder) for folder in outputs if folder]


def build(records: Mapping[str, Record]) -> str:
    """The report as an HTML page that shows no private path.

    Args:
        records: by phase, as `run.records.find_records` gives them.
    """
    final = records.get("distil_train")
    title = final["settings"].get("model_name") or Path(final["folder"]).resolve().name if final else "Unfinished model"
    records = {phase: public_record(record) for phase, record in records.items()}
    of_phases = {
        "Corpus": (corpus, "create_dataset"),
        "Initialisation": (initialisation, "init_model_mlm"),
        "Pre-training": (pre_training, "pre_train"),
        "Projection": (projection, "reduced_teacher"),
        "Labels": (labels, "create_distil_dataset"),
        "Distillation": (distillation, "distil_train"),
    }
    of_account = {
        "Student and teacher": student_and_teacher,
        "Searches": searches,
        "Smaller vectors": smaller_vectors,
        "Size and speed": size_and_speed,
    }
    account = records.get("distil_train", {}).get("account", {})
    sections = {name: make(account) for name, make in of_account.items()}
    sections |= {name: make(records[phase]) for name, (make, phase) in of_phases.items() if phase in records}
    sections["Provenance"] = provenance(records)
    return page(title, headline(records), sections)


def write_report(recipe_or_folder: str) -> Path:
    """Write the report of all phases that are finished.

    Returns:
        Its path.

    Raises:
        UserError: no finished phase was found.
    """
    records = find_records(start_folders(recipe_or_folder))
    if not records:
        raise UserError(f"{recipe_or_folder}: no {RUN_FILE} of a finished phase there; run the scripts first")
    folder = Path(records["distil_train"]["folder"]) if "distil_train" in records else Path()
    report = folder / REPORT_FILE
    write_text(report, build(records))
    return report


def main() -> None:
    """Write the report that the command line asks for."""
    print(write_report(parse_arguments().recipe_or_folder))


if __name__ == "__main__":
    run_script(main)
