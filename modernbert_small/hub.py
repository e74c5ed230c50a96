"""Loading by folder or hub id, with errors that say what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from modernbert_small.settings import UserError


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
