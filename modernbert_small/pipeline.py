"""All five phases of a recipe, one after the other.

    python -m modernbert_small.run my.yaml             # start, or go on after a kill
    python -m modernbert_small.run my.yaml --dry_run   # only say what would be done, and what it takes
    python -m modernbert_small.run my.yaml --from pre_train

The recipe is checked whole first. Then each phase is the script that one would run by hand, in a process of its own: a
finished phase does nothing, and an interrupted one goes on. At the end stand the comparison with the teacher and the
report.
"""

import argparse
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modernbert_small.run.errors import Terminated, UserError
from modernbert_small.run.places import output_folder, working_folder
from modernbert_small.run.processes import PARENT_PIPE
from modernbert_small.run.records import RUN_FILE, read_run
from modernbert_small.run.script import ROOT, command_parser, shown_path
from modernbert_small.settings.create_dataset import HELDOUT
from modernbert_small.settings.parse import require_inputs
from modernbert_small.settings.recipe import RECIPE_HELP, find_recipe
from modernbert_small.settings.sections import CHAINS, SECTIONS
from modernbert_small.settings.whole import Recipe, full_recipe, is_written, leaves_out_phase_3, location, missing_paths

logger = logging.getLogger(__name__)

_FEW_TOKENS = 630_000  # with which the demo's student keeps four fifths of its teacher (docs/LOG.md)


def run_phase(section: str, recipe: Path, flags: Sequence[str] = ()) -> None:
    """Run one script as a user would.

    If this process is stopped, the script is told to stop too and is waited for, so that it saves what it has. It
    is also told so if this process is killed: then its end of a pipe closes.

    Args:
        section: the script's section of the recipe.
        recipe: its file.
        flags: more of the command line.

    Raises:
        SystemExit: the script failed; the exit status is the script's.
        KeyboardInterrupt, Terminated: this process was stopped.
    """
    script = ROOT / SECTIONS[section].script
    words = ["--config", str(recipe), *flags]
    logger.info("$ python %s %s", shown_path(script), shlex.join(["--config", shown_path(recipe), *flags]))
    reading, writing = os.pipe()
    environment = os.environ | {PARENT_PIPE: str(reading)}
    # In a session of its own, so that Ctrl-C in a terminal reaches only this process.
    phase = subprocess.Popen(
        [sys.executable, str(script), *words], start_new_session=True, pass_fds=[reading], env=environment
    )
    os.close(reading)
    stopped: BaseException | None = None
    while phase.poll() is None:
        try:
            phase.wait()
        except (KeyboardInterrupt, Terminated) as stop:
            stopped = stop
            phase.send_signal(signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)
    os.close(writing)
    if stopped is not None:
        raise stopped
    if phase.returncode < 0:
        logger.error("%s was killed by signal %d; run the same command again to go on", section, -phase.returncode)
        sys.exit(128 - phase.returncode)
    if phase.returncode:
        sys.exit(phase.returncode)


def needed_phases(recipe: Recipe, first: str) -> list[str]:
    """The sections from one on, without phase 3 if phase 5 starts from what phase 2 writes.

    Args:
        recipe: all sections with all settings.
        first: the section to begin with.
    """
    sections = list(SECTIONS)[list(SECTIONS).index(first) :]
    return [section for section in sections if section != "pre_train" or not leaves_out_phase_3(recipe)]


def state(output_dir: str) -> str:
    """What lies in an output folder: `finished`, `goes on`, or `to do`. Its settings count in `states`."""
    final = output_folder(output_dir, "--output_dir")
    if (final / RUN_FILE).exists():
        return "finished"
    return "goes on" if (working_folder(final) / RUN_FILE).exists() else "to do"


def finished_record(output_dir: str) -> dict[str, Any] | None:
    """What run.json says of an artefact, None if it is not finished."""
    return read_run(output_dir) if state(output_dir) == "finished" else None


def states(recipe: Recipe, sections: Sequence[str], overwrite: bool) -> dict[str, str]:
    """What each phase will do, see `state`; and what happens to a result of other settings.

    Contents of inputs are not compared here, since that takes long; each phase does it.

    Args:
        recipe: all sections with all settings.
        sections: the phases that will run.
        overwrite: replace results of other settings or inputs.
    """
    from modernbert_small.run.artefacts import changed_settings  # takes seconds to import

    found: dict[str, str] = {}
    then = "it is made again" if overwrite else "the run stops here unless you pass --overwrite or name other folders"
    for section in sections:
        final = output_folder(recipe[section]["output_dir"], "--output_dir")
        found[section] = state(recipe[section]["output_dir"])
        if found[section] == "to do":
            continue
        folder = final if found[section] == "finished" else working_folder(final)
        changed = changed_settings(folder, recipe[section])
        remade = [
            writer
            for (writer, _), readers in CHAINS.items()
            if section in dict(readers) and found.get(writer, "finished") != "finished"
        ]
        if changed:
            found[section] += f" with other settings ({'; '.join(changed)}); {then}"
        elif remade:
            found[section] += f", but {remade[0]} makes again what it read; if that comes out different, {then}"
    return found


def reads(section: str, recipe: Recipe) -> list[str]:
    """What a phase reads: sources, teachers, and what earlier phases wrote; what is not on this disk is marked."""
    chained = [key for readers in CHAINS.values() for reader, key in readers if reader == section]
    keys = ["sources", "tokenizer_name_or_path", "teacher_name_or_path", *chained, "eval_datasets"]
    shown = []
    for key in dict.fromkeys(key for key in keys if key in recipe[section]):
        given = recipe[section][key]
        for value in given if isinstance(given, list) else [given]:
            path = location(key, value) if key == "sources" or key.endswith("_name_or_path") else ""
            is_here = not path or Path(path).exists() or is_written(recipe, path)
            shown.append(value if is_here else f"{value} (not here, so from the Hugging Face hub)")
    return shown


def read_columns(recipe: Recipe, sections: Sequence[str]) -> None:
    """Open all that is to be read of the user's own files, so that a wrong column or mapping is found at once.

    Raises:
        UserError: a source or evaluation set on this disk cannot be used, or a set has an unknown name.
    """
    from modernbert_small.corpus.heldout import require_pairs
    from modernbert_small.corpus.sources import is_local, open_sources, source_locations  # takes seconds to import
    from modernbert_small.evaluation.sets import HUB_SETS, load_evaluation_sets

    phase_1 = recipe["create_dataset"]
    if "create_dataset" in sections and state(phase_1["output_dir"]) != "finished":
        locations = source_locations(phase_1["sources"])
        local = {name: location for name, location in locations.items() if is_local(location)}
        sources = open_sources(local, phase_1["strict"])
        if HELDOUT in phase_1["eval_datasets"] and local == locations:
            require_pairs(sources)
    named = [tuple(recipe[section].get("eval_datasets", ())) for section in sections]
    for names in dict.fromkeys(named):
        own = [name for name in names if name != HELDOUT and name.lower() not in HUB_SETS]
        load_evaluation_sets(
            "--eval_datasets", [name for name in own if not is_written(recipe, location("eval_datasets", name))]
        )


def describe(recipe: Recipe, sections: Sequence[str], overwrite: bool) -> None:
    """Print what each phase will do, read, write and roughly take on this machine."""
    from modernbert_small import plan  # takes seconds to import, which a mistake in the recipe need not wait for
    from modernbert_small.reporting.formats import duration

    machine = plan.this_machine()
    rows, tokens, lengths, source = plan.corpus_size(recipe["create_dataset"], None, None)
    costs, assumed = plan.plan(recipe, rows, tokens, lengths)
    free = shutil.disk_usage(".").free / 1e9
    found = states(recipe, sections, overwrite)
    print(f"On {machine.name}, {free:,.0f} GB of disk free; some {tokens:,} tokens of text\n")
    for cost in costs:
        if cost.phase not in sections:
            continue
        settings = recipe[cost.phase]
        writes = [settings[key] for key in ("output_dir", "teacher_output_dir") if key in settings]
        takes = [duration(cost.duration(machine)), f"{cost.memory(machine) / 1e9:.1f} GB of memory"]
        takes += [f"{cost.disk / 1e9:.1f} GB of disk"]
        print(f"{SECTIONS[cost.phase].script}: {found[cost.phase]}")
        print(f"    reads   {', '.join(reads(cost.phase, recipe))}")
        print(f"    writes  {', '.join(writes)}")
        print(f"    takes   some {', '.join(takes)}")
    left = [cost for cost in costs if found.get(cost.phase, "finished") != "finished"]
    seconds = sum(cost.duration(machine) for cost in left)
    print(f"\nAll that is left to do: some {duration(seconds)}.")
    for line in plan.explain(machine, source, assumed):
        print(line)
    notes = [*plan.memory_problems(left, recipe, machine), *plan.without_gpu(seconds, machine)]
    if tokens < _FEW_TOKENS:
        few = f"{tokens:,} tokens of text are few, so expect a poor model; the demo has {_FEW_TOKENS:,}"
        notes.append(f"{few}. Add text, for example the source msmarco")
    for line in notes:
        print(f"\nNote: {line}.")
    print(flush=True)


def finish(model: str, before: Mapping[str, Any] | None) -> None:
    """Print where a finished model's report is, and how to use the model.

    Args:
        model: its folder.
        before: its record before the phases ran, None if it was not finished. If it still has that one, its comparison
            with its teacher is printed, which phase 5 prints when it ends.
    """
    record = read_run(model)
    if record == before:
        from modernbert_small.evaluation.tables import format_account  # takes seconds to import

        print(f"\n{format_account(record['account'])}\n")
    print(f"The report is {shown_path(Path(model, 'report.html'))}.")
    if record.get("ended_worse"):
        print("The model is worse than before its training, so do not use it.")
        return
    print("To use the model in Python:\n")
    print("    from sentence_transformers import SentenceTransformer")
    print(f"    model = SentenceTransformer({model!r})")
    print('    model.encode(["a sentence", "another one"]).shape')


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_parser("run", __doc__)
    parser.add_argument("recipe", help=RECIPE_HELP)
    parser.add_argument("--from", choices=SECTIONS, default=next(iter(SECTIONS)), dest="first", help="the first phase")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="stop before the first phase")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what these phases made with other settings or inputs"
    )
    return parser.parse_args()


def main() -> None:
    """Check the recipe, say what will be done, run the phases, and show the result."""
    args = parse_arguments()
    file = find_recipe(args.recipe)
    recipe = full_recipe(file)
    sections = needed_phases(recipe, args.first)
    if args.first not in ("create_dataset", "init_model_mlm"):
        require_inputs(args.first, argparse.Namespace(**recipe[args.first]), str(file))
    if missing := missing_paths(recipe, sections):
        raise UserError(f"{file}: {'; '.join(missing)}")
    read_columns(recipe, sections)
    describe(recipe, sections, args.overwrite)
    if args.dry_run:
        return
    model = recipe["distil_train"]["output_dir"]
    before = finished_record(model)
    for section in sections:
        run_phase(section, file, ["--overwrite"] if args.overwrite else [])
    finish(model, before)
