"""A recipe checked whole: each section by itself, then what must agree between sections."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from modernbert_small.run.errors import UserError
from modernbert_small.settings.parser import SettingsParser, field_values
from modernbert_small.settings.recipe import read_recipe
from modernbert_small.settings.sections import CHAINS, SECTIONS, settings_class

Recipe = dict[str, dict[str, Any]]


def full_recipe(recipe: Path) -> Recipe:
    """A recipe over the scripts' defaults, by section and setting.

    Raises:
        UserError: all that is wrong with the recipe: unknown sections and keys, wrong types, impossible values, and
            sections that do not agree. It names section and key.
    """
    given = {section: values or {} for section, values in read_recipe(recipe).items()}
    whole: Recipe = {}
    problems: list[str] = []
    for section in SECTIONS:
        try:
            whole[section], found = _resolve(section, given.get(section, {}))
        except UserError as error:
            message = str(error).removeprefix("argument --").removesuffix(" (see --help)")
            found = [message]
        problems += [f"{section}: {problem}" for problem in found]
    if len(whole) == len(SECTIONS):
        problems += [*_disagreements(whole, given), *_broken_chains(whole, given)]
    if problems:
        raise UserError(f"{recipe}: {'; '.join(problems)}")
    return whole


def _resolve(section: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A section's settings with the defaults filled in, and what is wrong with them on any machine."""
    parser = SettingsParser(settings_class(section, given))
    values = vars(parser.parse(parser.words(given)))
    own = SECTIONS[section].settings
    return values, own(**field_values(own, values)).problems()


def _disagreements(whole: Recipe, given: Recipe) -> Iterator[str]:
    """Sizes and lengths of different sections that do not fit together."""

    def shown(section: str, key: str) -> str:
        default = "" if key in given.get(section, {}) else ", the default"
        return f"{section} has {key} {whole[section][key]}{default}"

    if whole["init_model_mlm"]["hidden_size"] != whole["create_distil_dataset"]["embedding_dim"]:
        yield (
            f"{shown('init_model_mlm', 'hidden_size')}, and {shown('create_distil_dataset', 'embedding_dim')}; "
            "expected the same, since the student's vectors are compared with the labels"
        )
    for section in ("pre_train", "distil_train"):
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
            if os.path.normpath(read) == os.path.normpath(written):
                continue
            if key not in given.get(reader, {}):
                yield f"{reader}: {key} is {read}, the default, but {writer} writes {written}; add {key}: {written}"
            elif writer in given and not Path(read).exists():
                yield f"{reader}: {key} is {read}, which is not there, but {writer} writes {written}"
