"""Running a script: its log, its signals, and what turns errors into exit statuses."""

import errno
import logging
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging

from modernbert_small.run.errors import Terminated, UserError, raise_stop
from modernbert_small.run.processes import is_lost_process, local_world_size, rank, world_size
from modernbert_small.run.recipe import recipe_path

_NO_SPACE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


# How the libraries that write weights and arrays say so: safetensors and tokenizers (Rust), torch.save, NumPy.
_NO_SPACE_WORDS = (
    *("os error 28", "os error 27", "os error 122"),
    *("PytorchStreamWriter failed", "unexpected pos", "requested and"),
)


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main`, and turn what can go wrong into one line and an exit status.

    The status is 2 for what the user can put right, 130 and 143 for SIGINT and SIGTERM, and 1 if the disk is full or
    another process of this run has ended. Anything else is a defect of this project and keeps its traceback.
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
    # transformers would send pickled weights, and the user's token, to a service that converts them.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "true")
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


def _command() -> str:
    """The command that was typed, to be typed again."""
    launcher = f"torchrun --nproc_per_node {local_world_size()}" if world_size() > 1 else "python"
    module = getattr(sys.modules["__main__"].__spec__, "name", None)  # of `python -m module`
    return f"{launcher} {shlex.join(['-m', module, *sys.argv[1:]] if module else sys.argv)}"


def next_command(script: str) -> str:
    """The command that starts the next phase, with the recipe that this phase was given."""
    recipe = recipe_path(sys.argv[1:])
    return f"python {script}" + (f" --config {shlex.quote(recipe)}" if recipe else "")


def _remedy(error: Exception) -> str | None:
    """What to do about an error that the machine or another process caused; None if nothing is known about it."""
    text = " ".join(str(error).split())[:200]
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return f"{error.strerror}: {error.filename or 'output'}; free some space, then go on with"
    if any(words in text for words in _NO_SPACE_WORDS):
        return f"no space left for the output ({text}); free some space, then go on with"
    if is_lost_process(error):
        return "another process of this run has ended; what was saved is kept; go on with"
    return None
