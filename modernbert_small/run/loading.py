"""Models: loading them, the device they run on and its memory, whether their weights are sound."""

import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoModelForMaskedLM, PreTrainedModel

from modernbert_small.run.devices import best_device
from modernbert_small.run.errors import UserError
from modernbert_small.run.hub import explain_load_errors


def load_encoder(flag: str, name_or_path: str) -> tuple[PreTrainedModel, bool]:
    """An encoder in float32, and whether it has a masked-LM head.

    With a head it is the `...ForMaskedLM` model. A checkpoint without one (an embedding model) would get
    a random head from transformers, so the bare encoder is returned instead.
    """
    with explain_load_errors(flag, name_or_path):
        try:
            model, info = AutoModelForMaskedLM.from_pretrained(
                name_or_path, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
        except ValueError:  # an architecture without a masked-LM class
            model, info = None, {"missing_keys": ["all"]}
        if not info["missing_keys"]:
            return model, True
        return AutoModel.from_pretrained(name_or_path, dtype=torch.float32, use_safetensors=True), False


def load_sentence_transformer(flag: str, name_or_path: str, device: str | None = None) -> SentenceTransformer:
    """A SentenceTransformer folder or hub id, on this process's device; remote code and pickled weights stay off."""
    with explain_load_errors(flag, name_or_path):
        device = device or str(best_device())
        return SentenceTransformer(name_or_path, device=device, model_kwargs={"use_safetensors": True})


def require_finite(model: torch.nn.Module, what: str) -> None:
    """Refuse weights that hold NaN or infinity.

    Raises:
        UserError: with the first such tensor's name.
    """
    for name, value in model.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"{what}: weight {name} holds NaN or infinity, expected finite values")
