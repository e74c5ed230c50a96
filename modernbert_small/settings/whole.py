"""A recipe checked whole: each section by itself, then what must agree between sections."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from modernbert_small.run.columns import split_mapping
from modernbert_small.run.errors import UserError
from modernbert_small.settings.parser import SettingsParser, field_values
from modernbert_small.settings.recipe import read_recipe
from modernbert_small.settings.sections import CHAINS, SECTIONS, settings_class

Recipe = dict[str, dict[str, Any]]

# The settings that name what phases read and no phase may have written: files, folders, or names on the hub.
_READ = (
    *("sources", "tokenizer_name_or_path", "teacher_name_or_path", "mlm_head_name_or_path", "model_name_or_path"),
    "eval_datasets",
)
# Files that `run.readers` reads, whose import takes seconds; and paths that no name on the hub looks like.
_LOCAL = re.compile(
    r".*\.(jsonl?|[ct]sv|txt|md|html?|parquet|arrow|pdf)(\.(gz|bz2|zst))?|[.~/\\].*|[A-Za-z]:.*|.*/.*/.*", re.IGNORECASE
)


def full_recipe(recipe: Path, flags: Recipe | None = None) -> Recipe:
    """A recipe over the scripts' defaults, by section and setting.

    Args:
        recipe: its file.
        flags: settings of the command line, which stand above those of the recipe, by section.

    Raises:
        UserError: all that is wrong with the recipe: unknown sections and keys, wrong types, impossible values, and
            sections that do not agree. It names section and key.
    """
    given = {section: values or {} for section, values in read_recipe(recipe).items()}
    flags = flags or {}
    whole: Recipe = {}
    problems: list[str] = []
    for section in SECTIONS:
        try:
            whole[section], found = _resolve(section, given.get(section, {}), flags.get(section, {}))
        except UserError as error:
            message = str(error).removeprefix("argument --").removesuffix(" (see --help)")
            found = [message]
        problems += [f"{section}: {problem}" for problem in found]
    if len(whole) == len(SECTIONS):
        written = {section: values | flags.get(section, {}) for section, values in whole.items()}
        problems += [*_disagreements(written, given, flags), *_broken_chains(whole, given)]
    if problems:
        raise UserError(f"{recipe}: {'; '.join(problems)}")
    return whole


def leaves_out_phase_3(recipe: Recipe) -> bool:
    """Whether phase 5 starts from what phase 2 writes.

    That is so for `init: all_layers` from an embedding model, which has no masked-LM head to train, and for a student
    whose embeddings phase 5 replaces, with `start: static`.

    Args:
        recipe: all sections with all settings.
    """
    start, first_weights = recipe["distil_train"]["model_name_or_path"], recipe["init_model_mlm"]["output_dir"]
    return os.path.normpath(start) == os.path.normpath(first_weights)


def missing_paths(whole: Recipe, sections: Sequence[str]) -> list[str]:
    """What phases read that is no name on the hub by its look, and is not there. Data sets there are OWNER/NAME.

    Args:
        whole: settings by section.
        sections: the phases that will run. What one of `whole` writes need not be there yet.
    """
    named_by: dict[tuple[str, str], list[str]] = {}
    for section in sections:
        for key in _READ:
            for given in _items(whole[section].get(key)):
                path = location(key, given)
                is_local = path and (_LOCAL.fullmatch(path) or (key == "sources" and "/" not in path))
                if is_local and not Path(path).exists() and not is_written(whole, path):
                    named_by.setdefault((given, path), []).append(f"{section}: {key}")
    return [
        f"{', '.join(places)} {given}: no such file or folder; looked at {Path(path).absolute()}; check the path"
        for (given, path), places in named_by.items()
    ]


def location(key: str, given: str) -> str:
    """The path or hub id in a setting's value, without the name of a source and the mapping; empty for a name alone."""
    if key == "sources":
        given = os.path.expanduser(given.partition("=")[2])
    return split_mapping(f"--{key}", given).path if key in ("sources", "eval_datasets") else given


def is_written(whole: Recipe, path: str) -> bool:
    """Whether a path is, or lies in, a folder that a phase of a recipe writes."""
    folders = [os.path.abspath(whole[section][output]) for section, output in CHAINS if section in whole]
    return any(os.path.commonpath([folder, os.path.abspath(path)]) == folder for folder in folders)


def _items(value: str | Sequence[str] | None) -> Sequence[str]:
    return [value] if isinstance(value, str) else value or ()


def _resolve(section: str, given: Mapping[str, Any], flags: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A section's settings with the defaults filled in, and what is wrong with them and the flags on any machine."""
    parser = SettingsParser(settings_class(section, given))
    values = vars(parser.parse(parser.words(given)))
    own = SECTIONS[section].settings
    return values, own(**field_values(own, {**values, **flags})).problems()


def _disagreements(whole: Recipe, given: Recipe, flags: Recipe) -> Iterator[str]:
    """Sizes and lengths of different sections that do not fit together.

    Args:
        whole: all settings, with those of the command line.
        given: those of the recipe.
        flags: those of the command line.
    """

    def shown(section: str, key: str) -> str:
        default = "" if key in given.get(section, {}) else ", the default"
        default = ", by its flag" if key in flags.get(section, {}) else default
        return f"{section} has {key} {whole[section][key]}{default}"

    if whole["init_model_mlm"]["hidden_size"] != whole["create_distil_dataset"]["embedding_dim"]:
        yield (
            f"{shown('init_model_mlm', 'hidden_size')}, and {shown('create_distil_dataset', 'embedding_dim')}; "
            "expected the same, since the student's vectors are compared with the labels"
        )
    for section in ("distil_train",) if leaves_out_phase_3(whole) else ("pre_train", "distil_train"):
        if whole[section]["max_seq_length"] > whole["init_model_mlm"]["max_position_embeddings"]:
            yield (
                f"{shown(section, 'max_seq_length')}, but {shown('init_model_mlm', 'max_position_embeddings')}; "
                "expected at most as many, since the student reads no longer text"
            )


def _broken_chains(whole: Recipe, given: Recipe) -> Iterator[str]:
    """Phases that do not read what an earlier phase of the same recipe writes, unless they name another folder."""
    for (writer, output), readers in CHAINS.items():
        written = whole[writer][output]
        for reader, key in readers:
            read = whole[reader][key]
            is_unused = leaves_out_phase_3(whole) and "pre_train" in (reader, writer)
            if is_unused or os.path.normpath(read) == os.path.normpath(written):
                continue
            if key not in given.get(reader, {}):
                yield f"{reader}: {key} is {read}, the default, but {writer} writes {written}; add {key}: {written}"
            elif writer in given and not Path(read).exists():
                yield f"{reader}: {key} is {read}, which is not there, but {writer} writes {written}"
