"""How far a student's layers agree with its teacher's, over held-out text.

There are two measures of a layer. Explained variance is the share of the teacher's variance that lies in the D_S
directions the student has. Linear CKA is 1 if one layer's outputs are a rotation of the other's, whatever the widths.
Both are measured after LayerNorm, since the length of the residual stream differs between models.

D_T, D_S: hidden_size. L_T, L_S: layers. N: tokens of the sample. n: tokens of a batch.

References:
    Kornblith et al. 2019, Similarity of Neural Network Representations Revisited, arXiv:1905.00414
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm
from transformers import PreTrainedModel

from modernbert_small.pretrain.masking import MaskedLMDataset, padded_batches


class Moments:
    """First and second moments of pairs of vectors, summed batch by batch, so that no vector is kept."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add a batch of pairs: x (n, D_S) and y (n, D_T)."""
        x, y = x.double(), y.double()
        parts = [x.sum(0), y.sum(0), x.T @ x, y.T @ y, x.T @ y]
        self._sums = [a + b for a, b in zip(self._sums, parts, strict=True)] if self._sums else parts
        self.count += len(x)

    def covariances(self) -> tuple[Tensor, Tensor, Tensor]:
        """N times the covariance of x (D_S, D_S), of y (D_T, D_T) and of both (D_S, D_T), float64."""
        x, y, xx, yy, xy = self._sums
        return xx - x.outer(x) / self.count, yy - y.outer(y) / self.count, xy - x.outer(y) / self.count

    def cka(self) -> float:
        """Linear centred kernel alignment of x and y: from 0 to 1, 1 if one is a rotation of the other."""
        xx, yy, xy = self.covariances()
        return float(xy.square().sum() / (xx.norm() * yy.norm()))


def evenly_matched_layers(n_teacher: int, n_student: int) -> list[int]:
    """The teacher's layer at the same relative depth for each of the student's (L_S,); layers may repeat."""
    return [round(index * (n_teacher - 1) / max(1, n_student - 1)) for index in range(n_student)]


@torch.no_grad()
def layer_agreement(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    dataset: MaskedLMDataset,
    max_tokens: int,
    seed: int,
    teacher_layers: Sequence[int] | None = None,
    projection: Tensor | None = None,
) -> dict[str, list[float] | list[int] | None]:
    """Compare each of the student's layers with one of the teacher's.

    Args:
        student, teacher: encoders on one device that share the dataset's vocabulary; they are put into eval mode.
        dataset: its first rows are read, masked as in training.
        max_tokens: the largest N.
        seed: chooses the masked tokens.
        teacher_layers: (L_S,), the teacher's layer that each of the student's layers is compared with; if None, the
            one at the same relative depth.
        projection: P (D_S, D_T), with which the student's stream is P times the teacher's. P^T P is an orthogonal
            projection: the rows are orthonormal, or are so but for a rank of D_S - 1.

    Returns:
        teacher_layers (L_S,); explained_variance (L_S,), None without a projection; cka (L_S,).
    """
    encoders = [model.base_model.eval() for model in (student, teacher)]
    kept: Sequence[int] = teacher_layers or ()
    moments: list[Moments] = []
    for input_ids, attention_mask, _ in padded_batches(dataset, max_tokens, seed, "agreement by layer"):
        inputs = {"input_ids": input_ids.to(student.device), "attention_mask": attention_mask.to(student.device)}
        real = attention_mask.bool().to(student.device)
        # The first of hidden_states is the embeddings.
        states_S, states_T = (encoder(**inputs, output_hidden_states=True).hidden_states[1:] for encoder in encoders)
        kept = kept or evenly_matched_layers(len(states_T), len(states_S))
        moments = moments or [Moments() for _ in kept]
        for moment, h_S, layer in zip(moments, states_S, kept, strict=True):
            h_T = states_T[layer]
            moment.add(*(layer_norm(h[real].float(), h.shape[-1:]) for h in (h_S, h_T)))
    explained = None
    if projection is not None:
        P = projection.to(student.device, torch.float64)
        covariances = [moment.covariances()[1] for moment in moments]
        explained = [round(float(((P @ C) * P).sum() / C.trace()), 4) for C in covariances]
    return {
        "teacher_layers": list(kept),
        "explained_variance": explained,
        "cka": [round(moment.cka(), 4) for moment in moments],
    }


def format_agreement(layers: Mapping[str, Any]) -> list[str]:
    """The result of `layer_agreement` as text, one line for each of the student's layers."""
    shares = layers["explained_variance"]
    lines = []
    for index, (source, cka) in enumerate(zip(layers["teacher_layers"], layers["cka"], strict=True)):
        explained = f"explained variance {shares[index]:.3f}, " if shares else ""
        lines.append(f"layer {index:2d} and the teacher's {source:2d}: {explained}CKA {cka:.3f}")
    return lines
