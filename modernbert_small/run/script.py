"""Running a script: its log, its signals, and what turns errors into exit statuses."""

import argparse
import errno
import logging
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from modernbert_small.run import peers
from modernbert_small.run.errors import Terminated, UserError, raise_stop
from modernbert_small.run.processes import (
    end_soon_after_sigterm,
    end_with_parent,
    is_lost_process,
    local_world_size,
    rank,
    world_size,
)
from modernbert_small.run.tables import printable

ROOT = Path(__file__).resolve().parents[2]  # of the checkout, or of the installed packages
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_LOST = "another process of this run has ended"
_KEPT = "what was saved is kept; go on with"
_NO_SPACE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


# How the libraries that write weights and arrays say so: safetensors and tokenizers (Rust), torch.save, NumPy.
_NO_SPACE_WORDS = (
    *("os error 28", "os error 27", "os error 122"),
    *("PytorchStreamWriter failed", "unexpected pos", "requested and"),
)


class _PrintableFormatter(logging.Formatter):
    """Log lines without control characters, which names of files may hold."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main`, and turn what can go wrong into one line and an exit status.

    The status is 2 for what the user can put right, such as a mistake or a denied permission, 130 and 143 for SIGINT
    and SIGTERM, and 1 if the disk is full or another process of this run has ended. Anything else is a defect of this
    project and keeps its traceback.
    """
    _set_up_logs()
    # transformers would send pickled weights, and the user's token, to a service that converts them.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "true")
    signal.signal(signal.SIGTERM, raise_stop)
    signal.signal(signal.SIGINT, raise_stop)
    end_with_parent()
    if world_size() > 1:
        peers.last_words = f"error: {_LOST}; {_KEPT}: {_command()}"
        end_soon_after_sigterm(peers.last_words)
    status = 0
    try:
        main()
    except UserError as error:
        status = _print_error(str(error), 2)
    except (KeyboardInterrupt, Terminated) as stop:
        status = 143 if isinstance(stop, Terminated) else 130
        if rank() == 0:
            print(f"stopped; go on with: {_command()}", file=sys.stderr)
    except Exception as error:
        if denied := _denied(error):
            status = _print_error(denied, 2)
        elif remedy := _remedy(error):
            status = _print_error(f"{remedy}: {_command()}", 1)
        else:
            raise
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # torchrun sends one to all when one has ended
    if status == 0:
        peers.say_farewell()
    sys.stdout.flush()
    sys.exit(status)


def _set_up_logs() -> None:
    """Log this project's lines, in printable characters, and leave out what the libraries say."""
    handler = logging.StreamHandler()
    handler.setFormatter(_PrintableFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in ("httpx", "httpcore", "sentence_transformers", "datasets", "accelerate", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if rank() > 0:
        logging.getLogger().setLevel(logging.WARNING)  # the first process says it for all
    if "transformers" not in sys.modules:
        return  # a command without models, whose user need not wait for these imports
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    hub_logging.set_verbosity_error()  # five retries a file would be ten lines of warnings
    transformers_logging.set_verbosity_error()  # weights that a head lacks, and the like: said better here
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="accelerate")  # of what the Trainer passes on


def check_early(parse_arguments: Callable[[], object]) -> None:
    """Answer --help and refuse mistakes, at the beginning of a command: what it imports after takes seconds."""
    try:
        parse_arguments()
    except UserError as error:
        exit_with_error(error)


def exit_with_error(error: UserError) -> NoReturn:
    """Print an error as one line and end with the status of a mistake that the user can put right."""
    sys.exit(_print_error(str(error), 2))


def _print_error(message: str, status: int) -> int:
    """Print an error as one line; returns the exit status."""
    print(f"error: {printable(message, one_line=True)}", file=sys.stderr)
    return status


def _command() -> str:
    """The command that was typed, to be typed again; with $HF_TOKEN for the hub's token."""
    launcher = f"torchrun --nproc_per_node {local_world_size()}" if world_size() > 1 else "python"
    module = getattr(sys.modules["__main__"].__spec__, "name", None)  # of `python -m module`
    words = ["-m", module.removesuffix(".__main__"), *sys.argv[1:]] if module else sys.argv
    shown = [shlex.quote(word) for word in words]
    for place, word in enumerate(words):
        if word.startswith("--hub_token="):
            shown[place] = "--hub_token=$HF_TOKEN"
        elif place and words[place - 1] == "--hub_token":
            shown[place] = "$HF_TOKEN"
    return f"{launcher} {' '.join(shown)}"


def recipe_path(command_line: list[str]) -> str | None:
    """The value of --config, read before anything else is parsed."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--config")
    try:
        recipe = early.parse_known_args(command_line)[0].config
    except argparse.ArgumentError as error:
        raise UserError(f"--config: {error}") from error
    return recipe and os.path.expanduser(recipe)


def shown_path(path: Path) -> str:
    """A path for people and shells: relative to the working folder if it is below it, else absolute."""
    path = path.absolute()
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


def command_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for `python -m modernbert_small.<module>`, whose description is printed as it is written."""
    return argparse.ArgumentParser(
        prog=f"python -m modernbert_small.{module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def next_command(script: str, recipe: str | None = None) -> str:
    """The command that runs another script, by its path below `ROOT`, with a recipe or the one that this was given."""
    recipe = recipe or recipe_path(sys.argv[1:])
    return f"python {shown_path(ROOT / script)}" + (f" --config {shlex.quote(recipe)}" if recipe else "")


def _denied(error: BaseException) -> str | None:
    """What to do about a denied permission, or None if an error is something else.

    Libraries in Rust (safetensors, tokenizers) say it only in words.
    """
    text = " ".join(str(error).split())[:300]
    is_denied = isinstance(error, OSError) and error.errno in _DENIED
    if not (is_denied or isinstance(error, PermissionError) or "os error 13" in text or "os error 30" in text):
        return None
    where = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else text
    return f"{where}; expected the right to read or write it: change it with chmod or chown, or name another path"


def _remedy(error: Exception) -> str | None:
    """What to do about an error that the machine or another process caused; None if nothing is known about it."""
    text = " ".join(str(error).split())[:200]
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return f"{error.strerror}: {error.filename or 'output'}; free some space, then go on with"
    if any(words in text for words in _NO_SPACE_WORDS):
        return f"no space left for the output ({text}); free some space, then go on with"
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:  # on a GPU, on a CPU
        return (
            f"out of memory ({text}); smaller batches need less: in phases 3 to 5 halve --tokens_per_batch, and double "
            "--gradient_accumulation_steps of phases 3 and 5 for the same steps; with --overwrite, run again"
        )
    if is_lost_process(error):
        return f"{_LOST} or cannot be reached ({text}); {_KEPT}"
    return None
