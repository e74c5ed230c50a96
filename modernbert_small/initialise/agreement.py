"""How far a student's layers agree with its teacher's, over held-out text.

Two measures of a layer, both over LayerNorm of its output, since the stream's size differs between models:
the share of the teacher's variance that lies in the directions the student was given, and linear CKA, which
is 1 if one stream is a rotation of the other, whatever the widths.

D_T, D_S: hidden_size. L_T, L_S: layers. N: tokens of the sample.

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
    """First and second moments of pairs of vectors, gathered batch by batch: nothing of length N is kept."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """x: (n, D_S). y: (n, D_T)."""
        x, y = x.double(), y.double()
        parts = [x.sum(0), y.sum(0), x.T @ x, y.T @ y, x.T @ y]
        self._sums = [a + b for a, b in zip(self._sums, parts, strict=True)] if self._sums else parts
        self.count += len(x)

    def covariances(self) -> tuple[Tensor, Tensor, Tensor]:
        """N times the covariance of x (D_S, D_S), of y (D_T, D_T) and of both (D_S, D_T), float64."""
        x, y, xx, yy, xy = self._sums
        return xx - x.outer(x) / self.count, yy - y.outer(y) / self.count, xy - x.outer(y) / self.count

    def cka(self) -> float:
        """Linear centred kernel alignment of x and y."""
        xx, yy, xy = self.covariances()
        return float(xy.square().sum() / (xx.norm() * yy.norm()))


def evenly_matched_layers(n_teacher: int, n_student: int) -> list[int]:
    """The teacher's layer at the same relative depth, for each of the student's; layers may repeat."""
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
        student, teacher: encoders on one device that share the dataset's vocabulary; put into eval mode.
        dataset: its first rows are read, masked as in training.
        max_tokens: N at most.
        seed: fixes which tokens are hidden.
        teacher_layers: (L_S,) whom each of the student's layers is compared with; by depth if None.
        projection: (D_S, D_T), orthonormal rows (or rows that span such), what the student's stream stands for.

    Returns:
        teacher_layers; explained_variance, None without a projection; cka.
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
        for moment, state, layer in zip(moments, states_S, kept, strict=True):
            moment.add(*(layer_norm(h[real].float(), h.shape[-1:]) for h in (state, states_T[layer])))
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
    """What `layer_agreement` found, a line for each of the student's layers."""
    shares = layers["explained_variance"] or [None] * len(layers["cka"])
    return [
        f"layer {index:2d} and the teacher's {source:2d}: "
        + ("" if share is None else f"explained variance {share:.3f}, ")
        + f"CKA {cka:.3f}"
        for index, (source, share, cka) in enumerate(zip(layers["teacher_layers"], shares, layers["cka"], strict=True))
    ]
