"""Loading models, tokenizers and configurations, by folder or hub id.

Every model is loaded here, and its weights are float32 whatever dtype they are stored in. transformers 5 keeps the
stored dtype, and many models are stored in half precision: beside a projection or a loss in float32 they would fail.
Speed does not suffer: where the hardware has bf16, forward passes run in it under `devices.bf16_autocast`, or
phase 4 labels with a copy in bf16.

Of encoders only safetensors are read, never pickled weights. (sentence-transformers may read a small pickled module
after the encoder, such as a Dense, which torch restricts to tensors.) A repository's own code runs only if the user
allows it. Every call here says whether it may, since transformers would otherwise ask on the terminal. Weights that a
checkpoint lacks are refused, since transformers would draw them at random.
"""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import load_file_path
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    ModernBertForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from modernbert_small.run.devices import best_device
from modernbert_small.run.errors import UserError
from modernbert_small.run.hub import explain_load_errors

PoolingMode = Literal["cls", "mean"]


def load_tokenizer(flag: str, name_or_path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer."""
    with explain_load_errors(flag, name_or_path):
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)


def load_config(flag: str, name_or_path: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """A model's configuration, without its weights."""
    with explain_load_errors(flag, name_or_path):
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)


def load_encoder(flag: str, name_or_path: str, trust_remote_code: bool = False) -> tuple[PreTrainedModel, bool]:
    """An encoder, and whether it has a masked-LM head.

    With a head it is the `...ForMaskedLM` model. A checkpoint without one (an embedding model) would get a random head
    from transformers, so the bare encoder is returned instead.
    """
    with explain_load_errors(flag, name_or_path):
        try:
            model, info = AutoModelForMaskedLM.from_pretrained(
                name_or_path,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
        except ValueError as error:
            if "trust_remote_code" in str(error):
                raise
            model, info = None, {"missing_keys": ["all"]}  # an architecture without a masked-LM class
        if not info["missing_keys"]:
            return model, True
        encoder = AutoModel.from_pretrained(
            name_or_path, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code
        )
        return encoder, False


def load_masked_lm(flag: str, name_or_path: str) -> ModernBertForMaskedLM:
    """A ModernBERT with its masked-LM head."""
    with explain_load_errors(flag, name_or_path), _no_missing_weights(flag, name_or_path):
        return ModernBertForMaskedLM.from_pretrained(
            name_or_path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )


def load_sentence_transformer(
    flag: str, name_or_path: str, device: str | None = None, trust_remote_code: bool = False
) -> SentenceTransformer:
    """A SentenceTransformer, on this process's device unless another is named."""
    with explain_load_errors(flag, name_or_path), _no_missing_weights(flag, name_or_path):
        model = SentenceTransformer(
            name_or_path,
            device=device or str(best_device()),
            trust_remote_code=trust_remote_code,
            model_kwargs={"dtype": torch.float32, "use_safetensors": True},
        )
        return model.float()  # modules after the transformer keep the dtype they were stored in


def load_pooled(
    flag: str, name_or_path: str, max_seq_length: int, device: str | None = None, pooling: PoolingMode | None = None
) -> SentenceTransformer:
    """An encoder with pooling and Normalize: a SentenceTransformer whose vectors have length one.

    It is on this process's device unless another is named. Without `pooling`, it pools as it was made to, see
    `pooling_of`, or by the mean.
    """
    with explain_load_errors(flag, name_or_path), _no_missing_weights(flag, name_or_path):
        transformer = Transformer(
            name_or_path,
            max_seq_length=max_seq_length,
            model_kwargs={"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False},
            processor_kwargs={"trust_remote_code": False},
            config_kwargs={"trust_remote_code": False},
        )
    pooling = pooling or pooling_of(flag, name_or_path) or "mean"
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), pooling), Normalize()]
    return SentenceTransformer(modules=modules, similarity_fn_name="cosine", device=device or str(best_device()))


def pooling_of(flag: str, name_or_path: str) -> PoolingMode | None:
    """How an encoder's states are pooled, from the list of modules that sentence-transformers keeps beside it.

    Returns:
        None if there is no such list.

    Raises:
        UserError: it pools neither the first token nor the mean.
    """
    with explain_load_errors(flag, name_or_path):
        listed = load_file_path(name_or_path, "modules.json")
        modules = json.loads(Path(listed).read_text(encoding="utf-8")) if listed else []
        paths = [module["path"] for module in modules if module["type"].endswith(".Pooling")]
        mode = Pooling.load(name_or_path, subfolder=paths[0]).pooling_mode if paths else None
    if mode not in ("cls", "mean", None):
        raise UserError(f"{flag} {name_or_path}: pools by {mode}, expected cls or mean")
    return mode


@contextmanager
def _no_missing_weights(flag: str, name_or_path: str) -> Iterator[None]:
    """Refuse a checkpoint that lacks weights of the model that is loaded meanwhile.

    sentence-transformers hands on no loading information, so transformers' report is read from its log.

    Raises:
        UserError: weights are missing, other than a pooler's, which no embedding model here uses.
    """
    logger, reports = logging.getLogger("transformers.modeling_utils"), _Messages()
    level, logger.propagate = logger.level, False
    logger.addHandler(reports)
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(reports)
        logger.setLevel(level)
        logger.propagate = True
    missing = [key for message in reports.said for key in _MISSING.findall(message) if "pooler" not in key]
    if missing:
        others = f" and {len(missing) - 3} others" if len(missing) > 3 else ""
        raise UserError(
            f"{flag} {name_or_path}: has no weights for {', '.join(missing[:3])}{others}; expected a whole model "
            "of the architecture that its config.json names"
        )


class _Messages(logging.Handler):
    """Collects what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


# A line of transformers' report: a weight's name, and its status, which may be coloured.
_MISSING = re.compile(r"^(.+?) *\|[^|\w]*(?:\x1b\[[0-9;]*m)?MISSING", re.MULTILINE)


def require_finite(model: torch.nn.Module, what: str) -> None:
    """Refuse weights that hold NaN or infinity.

    Raises:
        UserError: with the first such tensor's name.
    """
    for name, value in model.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"{what}: weight {name} holds NaN or infinity, expected finite values")
