"""The Hugging Face hub: what its failures mean, and uploading a finished folder."""

import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers import TrainingArguments

from modernbert_small.run.errors import UserError

logger = logging.getLogger(__name__)

_PACKAGE = str(Path(__file__).resolve().parents[1])
# run.json names folders of the machine that it was written on.
_NOT_UPLOADED = ["checkpoint-*", "runs/*", "eval/*", "*.tmp", ".training/*", "run.json"]
_TOO_MANY_REQUESTS = 429
_DEFECTS = (TypeError, AttributeError, LookupError, NameError, AssertionError)


@contextmanager
def explain_load_errors(flag: str, name_or_path: str) -> Iterator[None]:
    """Turn a failure to load a folder or hub id into one line that names the flag.

    Raises:
        UserError: nothing there, not what was expected, or the hub cannot be reached.
    """
    try:
        yield
    except Exception as error:  # transformers, the hub's client and readers of files raise many kinds
        if is_own(error):
            raise
        logger.debug("%s %s", flag, name_or_path, exc_info=True)
        _require_readable(Path(name_or_path))
        if "named model.safetensors" in str(error):
            raise UserError(
                f"{flag} {name_or_path}: holds pickled weights alone, which are not read since they can run code; "
                "convert them to safetensors: https://huggingface.co/docs/safetensors/convert-weights"
            ) from error
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{flag} {name_or_path}: brings code of its own, which is not run; read it, and if you trust it pass "
                "--trust_remote_code to a phase that has this flag"
            ) from error
        if Path(name_or_path).exists():
            raise UserError(f"{flag} {name_or_path}: cannot be loaded from this folder: {reason(error)}") from error
        why = why_the_hub_failed(error)
        raise UserError(
            f"{flag} {name_or_path}: no such folder here ({Path(name_or_path).absolute()}), and {why}, or pass {flag} "
            "<local folder>"
        ) from error


def _require_readable(folder: Path) -> None:
    """Raise PermissionError for a file that may not be read, which safetensors reports as one that is not there."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.open("rb").close()


def is_own(error: Exception) -> bool:
    """Whether an error needs no words from its catcher: a message for the user, a denied permission, or a defect here.

    `script.run_script` says the same of a denied permission wherever it came from.
    """
    if isinstance(error, _DEFECTS):
        return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(_PACKAGE)
    return isinstance(error, UserError | PermissionError)


def reason(error: BaseException) -> str:
    """An error's type and message in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def is_of_the_network(error: BaseException) -> bool:
    """Whether an error says that no whole answer came. The hub's client is built on httpx, whose name may change."""
    if isinstance(error, LocalEntryNotFoundError | ConnectionError | TimeoutError):
        return True
    return type(error).__module__.startswith("httpx")


def why_the_hub_failed(error: BaseException) -> str:
    """What the hub said and what to do about it, from an error that its client, transformers or datasets raised."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    # datasets says only in words which of the two it is.
    said = [str(cause) for cause in causes if type(cause).__name__ == "DatasetNotFoundError"]
    if any(isinstance(cause, HFValidationError) for cause in causes):
        return "it is no name of a repository on the Hugging Face hub either; check the path"
    if any(isinstance(cause, GatedRepoError) for cause in causes) or any("gated" in words for words in said):
        return "on the Hugging Face hub it is gated; accept its terms on its page there and log in with `hf auth login`"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes) or said:
        return (
            "the Hugging Face hub has no such repository, or a private one; check the name, log in with `hf auth login`"
        )
    statuses = [cause.response.status_code for cause in causes if isinstance(cause, HfHubHTTPError)]
    if _TOO_MANY_REQUESTS in statuses:
        return "the Hugging Face hub has had too many requests from here; wait, log in with `hf auth login`"
    if any(is_of_the_network(cause) for cause in causes):
        return "the Hugging Face hub cannot be reached; check the network"
    return f"the Hugging Face hub did not give it ({reason(causes[-1])}); check the name and the network"


def prepare_upload(args: TrainingArguments) -> Callable[[str], None]:
    """Open the repository for --push_to_hub now, before hours are spent, and upload the finished folder later.

    The flag is switched off for the Trainer, which would upload every checkpoint of an unfinished folder.

    Args:
        args: TrainingArguments; modified. hub_model_id, hub_private_repo and hub_revision count. The token is that of
            the environment's HF_TOKEN, where `parse_settings` puts --hub_token, or of `hf auth login`.

    Returns:
        A function that uploads a folder without checkpoints and logs. Without the flag it does nothing.

    Raises:
        UserError: the hub does not open the repository, or later does not take the folder.
    """
    wanted, args.push_to_hub = args.push_to_hub and args.should_save, False
    if not wanted:
        return lambda folder: None
    api, name = HfApi(), args.hub_model_id or Path(args.output_dir).name
    with _explain_hub_errors(f"the hub did not open {name}", "log in with `hf auth login`, or leave the flag out"):
        repository = api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id

    def upload(folder: str) -> None:
        with _explain_hub_errors(f"{folder} is finished, but was not uploaded", "run the same command again"):
            api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                revision=args.hub_revision,
                commit_message="Model trained with modernbert-small",
                ignore_patterns=_NOT_UPLOADED,
            )
        logger.info("uploaded %s to %s", folder, repository)

    return upload


@contextmanager
def _explain_hub_errors(what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub's client raises whatever the layer below did
        if is_own(error):
            raise
        logger.debug("--push_to_hub", exc_info=True)
        raise UserError(f"--push_to_hub: {what} ({reason(error)}); {remedy}") from error
