"""A parser for the settings of a script: its flags, its --help, and a recipe's section as command-line words."""

import argparse
import dataclasses
import difflib
import importlib.util
import inspect
import json
import os
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from modernbert_small.run.errors import UserError
from modernbert_small.settings.training import UNUSED, TrainingSettings

if TYPE_CHECKING:
    from transformers.hf_argparser import HfArgumentParser
else:  # the file alone: the package around it takes more than a second to import
    _package = importlib.util.find_spec("transformers").submodule_search_locations[0]
    _spec = importlib.util.spec_from_file_location("hf_argparser", Path(_package, "hf_argparser.py"))
    _module = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
    HfArgumentParser = _module.HfArgumentParser

_LIBRARIES = ("builtins", "types", "transformers", "sentence_transformers")


_LOG_LEVEL = "debug shows the tracebacks behind one-line errors"
_INHERITED = """\
Settings of the Trainer work too, such as seed, optim, max_grad_norm, torch_compile, push_to_hub; not batch sizes,
which are counted in tokens, nor resume_from_checkpoint, which happens by itself:
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


class SettingsParser(HfArgumentParser):
    """An HfArgumentParser that raises UserErrors, and whose --help shows only what a script declares itself.

    Args:
        dataclass_type: the settings.
        description: the script's docstring, for --help.
    """

    def __init__(self, dataclass_type: type, description: str | None = None) -> None:
        super().__init__(
            dataclass_type,
            description=description,
            usage="%(prog)s [--config RECIPE.yaml] [--SETTING VALUE ...]",
            allow_abbrev=False,
            formatter_class=_HelpFormatter,
        )
        self.types = typing.get_type_hints(dataclass_type)
        self.add_argument(
            "--config", metavar="RECIPE.yaml", help="recipe; its section for this script comes before the flags"
        )
        if "log_level" not in self.types:
            self.add_argument("--log_level", choices=["info", "debug"], default="info", help=_LOG_LEVEL)
        self._show_own_settings(dataclass_type)
        for action in self._actions:
            action.nargs = "*" if action.nargs == "+" else action.nargs  # a list may be emptied

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        message = re.sub(r"^(argument --\w+)/\S+:", r"\1:", message)  # which also has the name with hyphens
        raise UserError(f"{message} (see --help)")

    def _show_own_settings(self, dataclass_type: type) -> None:
        """Leave the hundred inherited settings out of --help, and name where they are described instead."""
        shown = ["help", "config", "log_level", *declared_settings(dataclass_type)]
        if issubclass(dataclass_type, TrainingSettings):
            self.epilog = _INHERITED
        own = [action for action in self._optionals._group_actions if action.dest in shown]
        own = [action for action in own if not action.option_strings[0].startswith("--no_")]  # `false` says it too
        self._optionals._group_actions = sorted(own, key=lambda action: shown.index(action.dest))

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Settings from command-line words. `~` at the beginning of a value is the user's home folder.

        Raises:
            UserError: an unknown setting, one without effect here, or a value of a wrong type.
        """
        namespace, unknown = self.parse_known_args(list(words))
        if unknown:
            name = unknown[0].partition("=")[0]  # its value may be secret
            raise UserError(f"unknown setting {name!r}{self._suggestion(name.lstrip('-'))}")
        for name in flags(words):
            if name in UNUSED and name in self.types:
                raise UserError(f"{name}: {UNUSED[name]}")
        for name, value in vars(namespace).items():
            setattr(namespace, name, _with_home(value))
        return namespace

    def words(self, section: Mapping[str, Any]) -> list[str]:
        """A recipe's section as command-line words; a value that no words say becomes the default.

        Raises:
            UserError: an unknown key, or one without a value that needs one.
        """
        words = []
        known = {action.dest for action in self._actions} - {"config", "help"}
        for key, value in section.items():
            if key not in known:
                raise UserError(f"unknown key {key!r}{self._suggestion(key)}")
            if value is None and type(None) not in typing.get_args(self.types.get(key)):
                raise UserError(f"{key} has no value; leave the line out for the default")
            if value is None or value == []:  # which no words say to argparse
                self.set_defaults(**{key: value})
                continue
            items = value if isinstance(value, list) else [value]
            words += [f"--{key}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in items)]
        return words

    def _suggestion(self, key: str) -> str:
        """The nearest setting's name, if one is near."""
        names = [action.dest for action in self._actions]
        near = difflib.get_close_matches(key, names, n=1) or [name for name in names if key and name.startswith(key)]
        return f"; did you mean {near[0]!r}?" if near else ""


def flags(words: Sequence[str]) -> list[str]:
    """The names of the settings in a command line; a name may be written with hyphens."""
    return [word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")]


def declared_settings(dataclass_type: type) -> list[str]:
    """The settings that this project's classes declare, without those that transformers and others declare.

    A script's class comes first, then the classes that it shares with other scripts.
    """
    names: dict[str, None] = {}
    for base in dataclass_type.__mro__:
        if base.__module__.partition(".")[0] not in _LIBRARIES:
            names |= dict.fromkeys(inspect.get_annotations(base))
    fields = {field.name for field in dataclasses.fields(dataclass_type)}
    return [name for name in names if name in fields]


def _with_home(value: object) -> object:
    """A path with the user's home folder for `~`, which no shell expands in recipes; other values as they are."""
    if isinstance(value, list):
        return [_with_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def field_values(dataclass_type: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a class takes."""
    return {field.name: values[field.name] for field in dataclasses.fields(dataclass_type) if field.init}
