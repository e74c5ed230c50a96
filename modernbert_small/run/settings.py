"""The settings of a script, checked before anything is loaded.

The command line wins over the recipe, and the recipe over the defaults.
"""

import argparse
import dataclasses
import difflib
import inspect
import json
import logging
import os
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from transformers import HfArgumentParser

from modernbert_small.run.errors import UserError
from modernbert_small.run.recipe import read_recipe, recipe_path

logger = logging.getLogger(__name__)
Arguments = TypeVar("Arguments")
_LIBRARIES = ("builtins", "transformers", "sentence_transformers")


_LOG_LEVEL = "debug shows the tracebacks behind one-line errors"
_INHERITED = """\
Settings of the Trainer work too, such as max_steps, gradient_accumulation_steps, seed, optim, torch_compile,
push_to_hub; not batch sizes, which are counted in tokens, nor resume_from_checkpoint, which happens by itself:
https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments
"""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows each setting on one line: its name, its value's type, what it does, its default."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=120)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.nargs == 0:
            return ", ".join(action.option_strings)
        choices = action.choices and "|".join(map(str, action.choices))
        kind = action.metavar or choices or getattr(action.type, "__name__", "str").replace("string_to_bool", "bool")
        kind = {"?": f"[{kind}]", "*": f"{kind} ..."}.get(str(action.nargs), kind)
        return f"{action.option_strings[0]} {kind}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, [], argparse.SUPPRESS):
            return action.help
        listed = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        return f"{action.help} (default: {listed})"


class _Parser(HfArgumentParser):
    """An HfArgumentParser that raises UserErrors, and whose --help shows only what a script declares itself."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")

    def show_own_settings(self, dataclass_type: type) -> None:
        """Leave the hundred inherited settings out of --help, and name where they are described instead."""
        shown = ["help", "config", "log_level", *declared_settings(dataclass_type)]
        actions = self._optionals._group_actions
        own = [action for action in actions if action.dest in shown]
        if len(own) < len(actions):
            self.epilog = _INHERITED
        own = [action for action in own if not action.option_strings[0].startswith("--no_")]  # `false` says it too
        self._optionals._group_actions = sorted(own, key=lambda action: shown.index(action.dest))


def declared_settings(dataclass_type: type) -> list[str]:
    """The settings that this project's classes declare, without those that transformers and others declare.

    A script's class comes first, then the classes that it shares with other scripts.
    """
    names: dict[str, None] = {}
    for base in dataclass_type.__mro__:
        if base.__module__.partition(".")[0] not in _LIBRARIES:
            names |= dict.fromkeys(inspect.get_annotations(base))
    return list(names)


def parse_settings(
    dataclass_type: type[Arguments], section: str, description: str | None, argv: Sequence[str] | None = None
) -> Arguments:
    """Read a script's settings: defaults, then the recipe's section, then the command line.

    A recipe's values become command-line words placed before the real ones, so one parser checks
    both: `learning_rate: 5e-4`, which YAML reads as a string, is a float as it is in the shell.

    `~` at the beginning of a value is the user's home folder. The token of --hub_token becomes the environment's
    HF_TOKEN, and the setting becomes None.

    Args:
        dataclass_type: the script's settings. If it has `problems() -> list[str]`, all of them are
            reported together.
        section: the script's section of the recipe.
        description: the script's docstring, for --help.
        argv: command line without the program; `sys.argv[1:]` by default.

    Raises:
        UserError: an unknown key, a wrong type or an impossible value, with the key and the value.
    """
    parser = _Parser(
        dataclass_type,
        description=description,
        usage="%(prog)s [--config RECIPE.yaml] [--SETTING VALUE ...]",
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument(
        "--config", metavar="RECIPE.yaml", help="recipe; its section for this script comes before the flags"
    )
    if "log_level" not in {field.name for field in dataclasses.fields(dataclass_type)}:  # type: ignore[arg-type]
        parser.add_argument("--log_level", choices=["info", "debug"], default="info", help=_LOG_LEVEL)
    parser.show_own_settings(dataclass_type)
    for action in parser._actions:
        action.nargs = "*" if action.nargs == "+" else action.nargs  # a list may be emptied
    command_line = list(sys.argv[1:] if argv is None else argv)
    recipe = recipe_path(command_line)
    words = _recipe_words(parser, Path(recipe), section, typing.get_type_hints(dataclass_type)) if recipe else []
    namespace, unknown = parser.parse_known_args(words + command_line)
    if namespace.log_level == "debug":
        logging.getLogger("modernbert_small").setLevel(logging.DEBUG)
    if unknown:
        name = unknown[0].partition("=")[0]  # its value may be secret
        raise UserError(f"unknown setting {name!r}{_suggestion(name.lstrip('-'), parser)}")
    names = [field.name for field in dataclasses.fields(dataclass_type) if field.init]  # type: ignore[arg-type]
    values: dict[str, Any] = {name: _with_home(getattr(namespace, name)) for name in names}
    if token := values.get("hub_token"):
        # The hub's client finds it there. As a setting it would stand in logs, and in the Trainer's checkpoints.
        os.environ["HF_TOKEN"], values["hub_token"] = token, None
    try:
        settings = dataclass_type(**values)
    except (ValueError, ImportError) as error:
        raise UserError(f"settings: {error}") from error
    problems = settings.problems() if hasattr(settings, "problems") else []
    if problems:
        raise UserError("; ".join(problems))
    own = declared_settings(dataclass_type)
    shown = [name for name, value in values.items() if name in own or value != parser.get_default(name)]
    logger.info("settings: %s", " ".join(f"{name}={values[name]}" for name in shown))
    return settings


def _recipe_words(parser: _Parser, recipe: Path, section: str, types: Mapping[str, Any]) -> list[str]:
    """One script's section of a recipe as command-line words."""
    values = read_recipe(recipe).get(section) or {}
    words = []
    known = {action.dest for action in parser._actions} - {"config", "help"}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{recipe}: {section}: unknown key {key!r}{_suggestion(key, parser)}")
        if value is None and type(None) not in typing.get_args(types[key]):
            raise UserError(f"{recipe}: {section}: {key} has no value; leave the line out for the default")
        if value is None or value == []:  # which no words say to argparse
            parser.set_defaults(**{key: value})
            continue
        items = value if isinstance(value, list) else [value]
        words += [f"--{key}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in items)]
    return words


def _with_home(value: object) -> object:
    """A path with the user's home folder for `~`, which no shell expands in recipes; other values as they are."""
    if isinstance(value, list):
        return [_with_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def _suggestion(key: str, parser: argparse.ArgumentParser) -> str:
    """The nearest setting's name, if one is near."""
    names = [action.dest for action in parser._actions]
    near = difflib.get_close_matches(key, names, n=1) or [name for name in names if key and name.startswith(key)]
    return f"; did you mean {near[0]!r}?" if near else ""
