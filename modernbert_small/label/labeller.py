"""Embedding texts with a teacher, in batches of similar length that hold about equally many tokens."""

import copy
import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor

from modernbert_small.label.sample import Sample
from modernbert_small.packed.attention import use_packed_attention
from modernbert_small.packed.batches import packed_features
from modernbert_small.packed.compiling import compile_layers
from modernbert_small.packed.tokens import text_tokenizer
from modernbert_small.run.devices import bf16_autocast, compute_dtype, has_bf16
from modernbert_small.run.errors import UserError
from modernbert_small.run.progress import ProgressBar

logger = logging.getLogger(__name__)

# Names that models give to their prompts, in the order in which they are looked for.
PROMPT_NAMES = {
    "query": ("query", "search_query"),
    "document": ("document", "passage", "corpus", "search_document"),
}
_TEXTS_AT_ONCE = 1024  # an encoding holds some 100 bytes a token, of which 8 are kept


def _embeds_in_bf16(device: torch.device) -> bool:
    """Whether the encoder's weights, residual stream and norms are bf16 too, and not its matrix products alone."""
    return device.type == "cuda" and has_bf16(device)


def _with_bf16_weights(teacher: SentenceTransformer) -> SentenceTransformer:
    """A copy of a teacher whose encoder's weights are bf16; its buffers, such as RoPE's frequencies, stay float32."""
    model = copy.deepcopy(teacher)
    model[0].to(torch.bfloat16)
    for ours, theirs in zip(model[0].modules(), teacher[0].modules(), strict=True):
        for name, buffer in theirs.named_buffers(recurse=False):
            setattr(ours, name, buffer)
    return model


def require_vectors(embeddings: NDArray[np.float32], texts: Sequence[str] | pa.ChunkedArray, where: str) -> None:
    """Refuse embeddings (N, D) without a finite length.

    Raises:
        UserError: with the first such text, and how many there are.
    """
    lengths = np.linalg.norm(embeddings, axis=1)
    bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(bad):
        text = str(texts[int(bad[0])])
        raise UserError(
            f"{where}: the teacher's vector of row {bad[0]} ({text[:60]!r}) has length {lengths[bad[0]]}, "
            f"expected a finite one; {len(bad)} of {len(texts)} rows are so; choose another --teacher_name_or_path"
        )


def text_prompts(teacher: SentenceTransformer) -> dict[str, str]:
    """The prompt of each kind of text: one with a known name, else the model's default prompt, else none."""
    prompts = {name: prompt for name, prompt in (teacher.prompts or {}).items() if prompt}
    default = prompts.get(teacher.default_prompt_name or "", "")
    found = {
        kind: next((prompts[name] for name in names if name in prompts), default)
        for kind, names in PROMPT_NAMES.items()
    }
    unused = [name for name, prompt in prompts.items() if prompt not in found.values()]
    if unused:
        logger.warning("prompts of the teacher that are not used: %s; used: %s", ", ".join(unused), found)
    return found


class Labeller:
    """A teacher that embeds queries with its query prompt and documents with its document prompt.

    A ModernBERT runs on packed rows, without padding. Other architectures run on padded batches of similar length. On
    a GPU with bf16, a copy of the encoder in bf16 runs; on a CPU with bf16 it runs under bf16 autocast.

    Args:
        teacher: any text SentenceTransformer with a fast tokenizer.
        device: where it runs.
        tokens_per_batch: tokens in a batch, padding included. A batch holds at least one text, whatever its length.
        attn_implementation: for a ModernBERT, see packed/attention.py.
        compiled: whether a ModernBERT's layers are compiled, see packed/compiling.py.

    Attributes:
        teacher: in float32.
        model: what embeds, the teacher or its copy.
        truncated: texts that were longer than the teacher reads.
        tokens, positions: how many were embedded so far; positions include padding.
        seconds: how long `embed` took so far.

    Raises:
        UserError: no transformer, no fast tokenizer, or a pooling that leaves out prompts.
    """

    def __init__(
        self,
        teacher: SentenceTransformer,
        device: torch.device,
        tokens_per_batch: int,
        attn_implementation: str,
        compiled: bool = False,
    ) -> None:
        if not isinstance(teacher[0], Transformer):
            raise UserError(f"the teacher begins with a {type(teacher[0]).__name__}, expected a Transformer")
        self.model = self.teacher = teacher.to(device).eval()
        if _embeds_in_bf16(device):
            self.model = _with_bf16_weights(teacher)
        self.device, self.tokens_per_batch = device, tokens_per_batch
        self.max_seq_length = int(min(teacher.max_seq_length or 512, 8192))
        self.encoder = text_tokenizer(teacher.tokenizer, self.max_seq_length)
        self.prompts = text_prompts(teacher)
        if any(self.prompts.values()) and any(isinstance(m, Pooling) and not m.include_prompt for m in teacher):
            raise UserError(
                "the teacher's pooling leaves its prompt out, which is not supported; choose another teacher"
            )
        transformer = self.model[0].auto_model
        self.packed = transformer.config.model_type == "modernbert"
        if self.packed:
            use_packed_attention(transformer, attn_implementation, device, compute_dtype(device))
            if compiled:
                compile_layers(transformer)
        self.truncated, self.tokens, self.positions, self.seconds = 0, 0, 0, 0.0

    @property
    def speed(self) -> dict[str, float]:
        """Tokens a second and the share of padding, for run.json; empty if nothing was embedded yet."""
        if not self.tokens:
            return {}
        return {
            "tokens_per_second": round(self.tokens / self.seconds),
            "padding_share": round(1 - self.tokens / self.positions, 4),
        }

    @property
    def speed_text(self) -> str:
        """The same for a progress bar."""
        return f"{self.speed['tokens_per_second']:,.0f} tokens/s, {self.speed['padding_share']:.0%} padding"

    def tokenize(self, texts: Sequence[str], kinds: Sequence[str]) -> list[NDArray[np.int64]]:
        """Token ids of texts with their kind's prompt, in parallel."""
        if unknown := set(kinds) - set(self.prompts):
            raise UserError(f"column 'kind': found {unknown.pop()!r}, expected query or document")
        prompted = [self.prompts[kind] + text for text, kind in zip(texts, kinds, strict=True)]
        rows: list[NDArray[np.int64]] = []
        for first in range(0, len(prompted), _TEXTS_AT_ONCE):
            encodings = self.encoder.encode_batch_fast(prompted[first : first + _TEXTS_AT_ONCE])
            self.truncated += sum(bool(row.overflowing) for row in encodings)
            rows += [np.array(row.ids, np.int64) for row in encodings]
        return rows

    @torch.no_grad()
    def embed(self, rows: Sequence[NDArray[np.int64]], bar: ProgressBar | None = None) -> NDArray[np.float32]:
        """Embeddings (N, D) of tokenised texts, in their order, as the model's last module gives them.

        Args:
            rows: what `tokenize` gives.
            bar: told of each batch of rows.
        """
        began = time.perf_counter()
        order = np.argsort([-len(row) for row in rows], kind="stable")
        out: NDArray[np.float32] | None = None
        first = 0
        while first < len(order):
            size = max(1, self.tokens_per_batch // len(rows[order[first]]))
            batch = order[first : first + size]
            features = self._features([rows[index] for index in batch])
            self.positions += features["input_ids"].numel()  # type: ignore[union-attr]
            embeddings = self._forward(features)
            if out is None:
                out = np.empty((len(rows), embeddings.shape[1]), np.float32)
            out[batch] = embeddings
            first += size
            self.tokens += sum(len(rows[index]) for index in batch)
            self.seconds, began = self.seconds + time.perf_counter() - began, time.perf_counter()
            if bar is not None:
                bar.update(len(batch), self.speed_text)
        assert out is not None, "no rows"
        return out

    def embed_rest(
        self, rows: Sequence[NDArray[np.int64]], known: Sample, bar: ProgressBar | None = None
    ) -> NDArray[np.float32]:
        """As `embed`, but without embedding again the rows whose vectors are known.

        Args:
            rows: what `tokenize` gives.
            known: vectors of some of these rows.
            bar: told of each batch of rows.
        """
        out = np.empty((len(rows), known.vectors.shape[1]), np.float32)
        out[known.rows] = known.vectors
        missing = np.setdiff1d(np.arange(len(rows)), known.rows)
        if bar is not None and len(known.rows):
            bar.update(len(known.rows), "in the sample")
        if len(missing):
            out[missing] = self.embed([rows[index] for index in missing], bar)
        return out

    def _forward(self, features: dict[str, Any]) -> NDArray[np.float32]:
        """Embeddings (B, D): the encoder in bf16 where there is hardware for it, what follows in float32."""
        encoder, *others = self.model
        with nullcontext() if _embeds_in_bf16(self.device) else bf16_autocast(self.device):
            features = encoder(features)
        features["token_embeddings"] = features["token_embeddings"].float()
        for module in others:
            features = module(features)
        return features["sentence_embedding"][:, : self.model.truncate_dim].cpu().numpy()

    def _features(self, rows: list[NDArray[np.int64]]) -> dict[str, Tensor | int]:
        if self.packed:
            features = packed_features(np.concatenate(rows), np.array([len(row) for row in rows]))
        else:
            padding = self.model.tokenizer.pad_token_id or 0  # RoBERTa's positions are counted past it
            input_ids = np.full((len(rows), len(rows[0])), padding, np.int64)
            for row, tokens in zip(input_ids, rows, strict=True):
                row[: len(tokens)] = tokens
            lengths = np.array([len(row) for row in rows])
            mask = (np.arange(input_ids.shape[1]) < lengths[:, None]).astype(np.int64)
            features = {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask)}
        return send_to_device(features, self.device)
