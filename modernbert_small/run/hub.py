"""Loading by folder or hub id and uploading a finished folder, with errors that say what to do."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from modernbert_small.run.errors import UserError

logger = logging.getLogger(__name__)

_NOT_UPLOADED = ["checkpoint-*", "runs/*", "eval/*", "*.tmp"]


@contextmanager
def explain_load_errors(flag: str, name_or_path: str) -> Iterator[None]:
    """Turn a failure to load a folder or hub id into one line that names the flag.

    Raises:
        UserError: nothing there, not what was expected, or the hub cannot be reached.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # readers and the hub's client raise whatever the layer below did
        reason = " ".join(str(error).split())[:300]
        if Path(name_or_path).exists():
            raise UserError(f"{flag} {name_or_path}: cannot be loaded from this folder: {reason}") from error
        raise UserError(
            f"{flag} {name_or_path}: no such folder here, and the Hugging Face hub did not give it; check the "
            f"name and the network, or pass {flag} <local folder>"
        ) from error


def load_tokenizer(flag: str, name_or_path: str) -> PreTrainedTokenizerBase:
    """A tokenizer."""
    with explain_load_errors(flag, name_or_path):
        return AutoTokenizer.from_pretrained(name_or_path)


def load_config(flag: str, name_or_path: str) -> PreTrainedConfig:
    """A model's configuration, without its weights."""
    with explain_load_errors(flag, name_or_path):
        return AutoConfig.from_pretrained(name_or_path)


def prepare_upload(args: Any) -> Callable[[str], None]:
    """What --push_to_hub does: the repository opened now, before hours are spent; the finished folder uploaded later.

    The flag is taken from the Trainer, which would upload every checkpoint from a folder without its final name.

    Args:
        args: TrainingArguments; modified. hub_model_id, hub_token, hub_private_repo and hub_revision count.

    Returns:
        A function that uploads a folder without checkpoints and logs; one that does nothing without the flag.

    Raises:
        UserError: the hub does not open the repository, or later does not take the folder.
    """
    wanted, args.push_to_hub = args.push_to_hub and args.should_save, False
    if not wanted:
        return lambda folder: None
    api, name = HfApi(token=args.hub_token), args.hub_model_id or Path(args.output_dir).name
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
        raise UserError(f"--push_to_hub: {what} ({' '.join(str(error).split())[:200]}); {remedy}") from error
