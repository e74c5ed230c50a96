"""The report of a model: one page, from the run.json files of all five phases.

    python -m modernbert_small.report checkpoints/ModernBERT-small-v2
    python -m modernbert_small.report recipes/v2.yaml

Phases are found by the inputs that each run.json names, from the final model or from a recipe's output folders on;
relative paths are relative to the working folder. The page is report.html in the final model's folder, or in the
working folder while there is none. What was not measured is left out.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

from modernbert_small.reporting.page import page
from modernbert_small.reporting.phases import (
    Record,
    corpus,
    distillation,
    inheritance,
    labels,
    language,
    projection,
    provenance,
)
from modernbert_small.reporting.quality import gap, headline, searches, size_and_speed, smaller_vectors
from modernbert_small.run.artefacts import RUN_FILE, find_records
from modernbert_small.run.errors import UserError
from modernbert_small.run.recipe import SECTIONS, full_recipe
from modernbert_small.run.script import run_script

REPORT_FILE = "report.html"


def start_folders(recipe_or_folder: str) -> list[str]:
    """A folder, or a recipe's output folders, the final model's first.

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
    """The page of these records."""
    of_phases = {
        "Corpus": (corpus, "create_dataset"),
        "Inheritance": (inheritance, "init_model_mlm"),
        "Language": (language, "pre_train"),
        "Projection": (projection, "teacher"),
        "Labels": (labels, "labels"),
        "Distillation": (distillation, "distil_train"),
    }
    of_account = {
        "The gap": gap,
        "Smaller vectors": smaller_vectors,
        "Size and speed": size_and_speed,
        "Searches": searches,
    }
    sections = {title: make(records[phase]) for title, (make, phase) in of_phases.items() if phase in records}
    account = records.get("distil_train", {}).get("account", {})
    sections |= {title: make(account) for title, make in of_account.items()}
    sections["Provenance"] = provenance(records)
    final = records.get("distil_train")
    return page(Path(final["folder"]).resolve().name if final else "A model in the making", headline(records), sections)


def write_report(recipe_or_folder: str) -> Path:
    """Write the report of what has been done so far.

    Returns:
        Its path.

    Raises:
        UserError: no finished phase was found.
    """
    records = find_records(start_folders(recipe_or_folder))
    if not records:
        raise UserError(f"{recipe_or_folder}: no {RUN_FILE} of a finished phase there; run the scripts first")
    folder = Path(records["distil_train"]["folder"]) if "distil_train" in records else Path()
    temporary = folder / f"{REPORT_FILE}.tmp"
    temporary.write_text(build(records), encoding="utf-8")
    return temporary.replace(folder / REPORT_FILE)


def main() -> None:
    """Records in, page out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe_or_folder", help="a recipe, or the folder of a final model")
    print(write_report(parser.parse_args().recipe_or_folder))


if __name__ == "__main__":
    run_script(main)
