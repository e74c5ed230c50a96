"""The settings of a script, checked before anything is loaded.

The command line wins over the recipe, and the recipe over the defaults. A recipe is checked whole by every script.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from modernbert_small.run.errors import UserError
from modernbert_small.run.script import exit_with_error, next_command, recipe_path
from modernbert_small.settings.parser import SettingsParser, declared_settings, field_values, flags
from modernbert_small.settings.recipe import find_recipe, read_recipe
from modernbert_small.settings.sections import CHAINS, SECTIONS, settings_class
from modernbert_small.settings.whole import full_recipe, missing_paths

logger = logging.getLogger(__name__)
Arguments = TypeVar("Arguments")


def check_command_line(section: str, description: str | None) -> None:
    """Answer --help and refuse mistakes, at the beginning of a script: what it imports after takes seconds.

    Args:
        section: the script's section of a recipe.
        description: the script's docstring, for --help.
    """
    own = SECTIONS[section].settings
    try:
        _, namespace = _parse(None, section, description, sys.argv[1:])
        args = own(**field_values(own, vars(namespace)))
        _refuse(args)
        if section != "init_model_mlm":  # which needs its corpus only for all_layers
            require_inputs(section, args)
        if missing := missing_paths({section: vars(args)}, [section]):
            raise UserError("; ".join(problem.replace(f"{section}: ", "--", 1) for problem in missing))
    except UserError as error:
        exit_with_error(error)


def parse_settings(
    dataclass_type: type[Arguments], section: str, description: str | None, argv: Sequence[str] | None = None
) -> Arguments:
    """Read a script's settings: defaults, then the recipe's section, then the command line.

    A recipe's values become command-line words placed before the real ones, so one parser checks
    both: `learning_rate: 5e-4`, which YAML reads as a string, is a float as it is in the shell.

    The token of --hub_token becomes the environment's HF_TOKEN, and the setting becomes None.

    Args:
        dataclass_type: the script's settings. If it has `problems() -> list[str]`, all of them are
            reported together.
        section: the script's section of the recipe.
        description: the script's docstring, for --help.
        argv: command line without the program; `sys.argv[1:]` by default.

    Raises:
        UserError: an unknown key, a wrong type or an impossible value, with the key and the value; of a recipe in any
            of its sections.
    """
    parser, namespace = _parse(dataclass_type, section, description, sys.argv[1:] if argv is None else argv)
    if namespace.log_level == "debug":
        logging.getLogger("modernbert_small").setLevel(logging.DEBUG)
    values = field_values(dataclass_type, vars(namespace))
    if token := values.get("hub_token"):
        # The hub's client finds it there. As a setting it would stand in logs, and in the Trainer's checkpoints.
        os.environ["HF_TOKEN"], values["hub_token"] = token, None
    try:
        settings = dataclass_type(**values)
    except (ValueError, ImportError) as error:
        raise UserError(f"settings: {error}") from error
    _refuse(settings)
    own = declared_settings(dataclass_type)
    shown = [name for name, value in values.items() if name in own or value != parser.get_default(name)]
    logger.info("settings: %s", " ".join(f"{name}={values[name]}" for name in shown))
    return settings


def require_inputs(section: str, args: object, recipe: str | None = None) -> None:
    """Refuse to start without what an earlier phase makes.

    A model that is not there may be one of the hub, unless it is the one that the recipe, or the default, has an
    earlier phase write.

    Args:
        section: the script's section of a recipe.
        args: its settings.
        recipe: the recipe that they come from; by default that of the command line's --config.

    Raises:
        UserError: with each path that was looked at, and the phase and command that make it.
    """
    recipe = recipe or recipe_path(sys.argv[1:])
    whole = full_recipe(find_recipe(recipe)) if recipe else None
    missing = []
    for writer, output in CHAINS:
        written = whole[writer][output] if whole else getattr(SECTIONS[writer].settings, output)
        for key in (key for reader, key in CHAINS[writer, output] if reader == section):
            path = getattr(args, key)
            if not Path(path).exists() and (key == "train_file" or path == written):
                missing.append(
                    f"--{key} {path}: no such folder; looked at {Path(path).absolute()}; phase "
                    f"{list(SECTIONS).index(writer) + 1} makes it: {next_command(SECTIONS[writer].script, recipe)}"
                )
    if missing:
        raise UserError("; ".join(missing))


def _parse(
    dataclass_type: type[Any] | None, section: str, description: str | None, command_line: Sequence[str]
) -> tuple[SettingsParser, argparse.Namespace]:
    """The parser of a script, and what it made of recipe and command line.

    Args:
        dataclass_type: the script's settings; None for a class that has those that are given.
        section: as in `parse_settings`.
        description: as in `parse_settings`.
        command_line: without the program.
    """
    recipe = recipe_path(list(command_line))
    given: dict[str, Any] = {}
    if recipe:
        given = read_recipe(find_recipe(recipe)).get(section) or {}
    names = flags(command_line)
    if dataclass_type is None:
        dataclass_type = settings_class(section, {*given, *names} - {"config", "help"})
    parser = SettingsParser(dataclass_type, description)
    if recipe:
        # Before the recipe's section becomes words here, so that its mistakes are named with it.
        by_flag = vars(parser.parse(command_line))
        full_recipe(find_recipe(recipe), {section: {name: by_flag[name] for name in names if name in by_flag}})
    return parser, parser.parse([*parser.words(given), *command_line])


def _refuse(settings: object) -> None:
    """Raise a UserError with all problems of the settings, if there are any."""
    problems = settings.problems() if hasattr(settings, "problems") else []
    if problems:
        raise UserError("; ".join(problems))
