"""The settings of a script: default < recipe < command line, checked before anything is loaded."""

import argparse
import dataclasses
import difflib
import errno
import inspect
import json
import logging
import shlex
import signal
import sys
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from huggingface_hub.utils import logging as hub_logging
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from modernbert_small.processes import is_lost_process, local_world_size, rank, world_size

logger = logging.getLogger(__name__)
Arguments = TypeVar("Arguments")

DEFAULT_RECIPE = Path(__file__).parent.parent / "recipes" / "v2.yaml"  # the scripts' own values
SECTIONS = ("create_dataset", "init_model_mlm", "pre_train", "create_distil_dataset", "distil_train")


_NO_SPACE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
# How the libraries that write weights and arrays say so: safetensors and tokenizers (Rust), torch.save, NumPy.
_NO_SPACE_WORDS = (
    *("os error 28", "os error 27", "os error 122"),
    *("PytorchStreamWriter failed", "unexpected pos", "requested and"),
)

_INHERITED = """\
Settings of the Trainer work too, such as max_steps, gradient_accumulation_steps, seed, optim, torch_compile,
push_to_hub; not batch sizes, which are counted in tokens, nor resume_from_checkpoint, which happens by itself:
https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments
"""


class UserError(Exception):
    """Something the user can put right. Printed as one line, exit status 2, no traceback."""


class Terminated(SystemExit):
    """SIGTERM, raised where the program stands so that what is open gets closed."""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """A line a setting: its name, its value's type, what it does, its default; line breaks of texts as they are."""

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
    """HfArgumentParser whose complaints are UserErrors, and whose --help shows what a script declares itself."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")

    def show_own_settings(self, dataclass_type: type) -> None:
        """Leave inherited settings out of --help, of which there are a hundred, and name where they are described."""
        shown = ["help", "config", *inspect.get_annotations(dataclass_type)]
        actions = self._optionals._group_actions
        own = [action for action in actions if action.dest in shown]
        if len(own) < len(actions):
            self.epilog = _INHERITED
        own = [action for action in own if not action.option_strings[0].startswith("--no_")]  # `false` says it too
        self._optionals._group_actions = sorted(own, key=lambda action: shown.index(action.dest))


def parse_settings(
    dataclass_type: type[Arguments], section: str, description: str | None, argv: Sequence[str] | None = None
) -> Arguments:
    """Read a script's settings: defaults, then the recipe's section, then the command line.

    A recipe's values become command-line words placed before the real ones, so one parser checks
    both: `learning_rate: 5e-4`, which YAML reads as a string, is a float as it is in the shell.

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
    parser.show_own_settings(dataclass_type)
    for action in parser._actions:
        action.nargs = "*" if action.nargs == "+" else action.nargs  # a list may be emptied
    command_line = list(sys.argv[1:] if argv is None else argv)
    recipe = _recipe_path(command_line)
    words = _recipe_words(parser, Path(recipe), section, typing.get_type_hints(dataclass_type)) if recipe else []
    namespace, unknown = parser.parse_known_args(words + command_line)
    if unknown:
        raise UserError(f"unknown setting {unknown[0]!r}{_suggestion(unknown[0].lstrip('-'), parser)}")
    values = {field.name: getattr(namespace, field.name) for field in dataclasses.fields(dataclass_type) if field.init}  # type: ignore[arg-type]
    try:
        settings = dataclass_type(**values)
    except (ValueError, ImportError) as error:
        raise UserError(f"settings: {error}") from error
    problems = settings.problems() if hasattr(settings, "problems") else []
    if problems:
        raise UserError("; ".join(problems))
    own = inspect.get_annotations(dataclass_type)
    shown = [name for name, value in values.items() if name in own or value != parser.get_default(name)]
    logger.info("settings: %s", " ".join(f"{name}={values[name]}" for name in shown))
    return settings


def _recipe_path(command_line: list[str]) -> str | None:
    """The value of --config, read before anything else is parsed."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--config")
    try:
        return early.parse_known_args(command_line)[0].config
    except argparse.ArgumentError as error:
        raise UserError(f"--config: {error}") from error


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


def read_recipe(recipe: Path) -> dict[str, dict[str, Any]]:
    """Read a recipe: one mapping per script, nothing else.

    Raises:
        UserError: no such file, no YAML, or a section that no script has.
    """
    try:
        sections = yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"{recipe}: {error.strerror}; expected a recipe") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{recipe}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(sections, dict):
        raise UserError(f"{recipe}: expected sections {', '.join(SECTIONS)}, found {type(sections).__name__}")
    for name, values in sections.items():
        if name not in SECTIONS:
            raise UserError(f"{recipe}: unknown section {name!r}; sections are {', '.join(SECTIONS)}")
        if not isinstance(values, dict | None):
            raise UserError(f"{recipe}: {name}: expected `key: value` lines, found {values!r}")
    require_equal_widths(recipe, sections)
    return sections


def require_equal_widths(recipe: Path, sections: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Refuse a student as wide as no label, which phase 5 would only find after phases 3 and 4.

    Raises:
        UserError: both widths are given, and differ.
    """
    width = (sections.get("init_model_mlm") or {}).get("hidden_size")
    labels = (sections.get("create_distil_dataset") or {}).get("embedding_dim")
    if width != labels and None not in (width, labels):
        raise UserError(
            f"{recipe}: init_model_mlm has hidden_size {width}, create_distil_dataset embedding_dim {labels}; expected "
            "the same, since the student's vectors are compared with the labels"
        )


def full_recipe(recipe: Path) -> dict[str, dict[str, Any]]:
    """A recipe over the scripts' defaults."""
    given, defaults = read_recipe(recipe), read_recipe(DEFAULT_RECIPE)
    return {section: values | (given.get(section) or {}) for section, values in defaults.items()}


def _suggestion(key: str, parser: argparse.ArgumentParser) -> str:
    """The nearest setting's name, if one is near."""
    names = [action.dest for action in parser._actions]
    near = difflib.get_close_matches(key, names, n=1) or [name for name in names if key and name.startswith(key)]
    return f"; did you mean {near[0]!r}?" if near else ""


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main` and turn what can go wrong into one line and an exit status.

    2: the user can put it right. 130, 143: SIGINT, SIGTERM. 1: the disk is full, or another process of this
    run ended. Anything else is a defect of this project and keeps its traceback.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for noisy in ("httpx", "httpcore", "sentence_transformers", "datasets", "accelerate", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if rank() > 0:
        logging.getLogger().setLevel(logging.WARNING)  # the first process says it for all
    hub_logging.set_verbosity_error()  # five retries a file would be ten lines of warnings
    transformers_logging.set_verbosity_error()  # weights that a head lacks, and the like: said better here
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="accelerate")  # of what the Trainer passes on
    signal.signal(signal.SIGTERM, raise_stop)
    signal.signal(signal.SIGINT, raise_stop)
    status = 0
    try:
        main()
    except (UserError, KeyboardInterrupt, Terminated) as stop:
        status = {KeyboardInterrupt: 130, Terminated: 143}.get(type(stop), 2)
        if status == 2:
            print(f"error: {stop}", file=sys.stderr)
        elif rank() == 0:
            print(f"stopped; go on with: {_command()}", file=sys.stderr)
    except Exception as error:
        remedy = _remedy(error)
        if remedy is None:
            raise
        print(f"error: {remedy}: {_command()}", file=sys.stderr)
        status = 1
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # torchrun sends one to all when one has ended
    sys.stdout.flush()
    sys.exit(status)


def raise_stop(number: int, _frame: object) -> NoReturn:
    """Handle SIGINT or SIGTERM by an exception where the program stands, so that what is open gets closed."""
    if number == signal.SIGTERM:
        raise Terminated(143)
    raise KeyboardInterrupt


def _command() -> str:
    """What was typed, to be typed again."""
    launcher = f"torchrun --nproc_per_node {local_world_size()}" if world_size() > 1 else "python"
    module = getattr(sys.modules["__main__"].__spec__, "name", None)  # of `python -m module`
    return f"{launcher} {shlex.join(['-m', module, *sys.argv[1:]] if module else sys.argv)}"


def next_command(script: str) -> str:
    """How to start the next phase with the recipe that this one was given."""
    recipe = _recipe_path(sys.argv[1:])
    return f"python {script}" + (f" --config {shlex.quote(recipe)}" if recipe else "")


def _remedy(error: Exception) -> str | None:
    """What to do about an error that is not of this project's making, None if it is not known."""
    text = " ".join(str(error).split())[:200]
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return f"{error.strerror}: {error.filename or 'output'}; free some space, then go on with"
    if any(words in text for words in _NO_SPACE_WORDS):
        return f"no space left for the output ({text}); free some space, then go on with"
    if is_lost_process(error):
        return "another process of this run has ended; what was saved is kept; go on with"
    return None
