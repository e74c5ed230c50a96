"""Turning a student to its teacher's axes before training, by a rotation that is folded into its weights.

The axes of a language model's space are arbitrary. Left to itself, distillation first spends hundreds of steps on
turning them, and the student forgets while it does. The rotation that is best for a sample of labels has a closed
form, and a ModernBERT can be rotated without changing what it computes. For an orthogonal Q with Q 1 = 1,
LayerNorm(Q h) equals Q LayerNorm(h), once the norms' weights are folded into the weights that read from them.

D: hidden_size. h: (D,) residual stream. 1: (D,) vector of ones.

References:
    Schoenemann 1966, A generalized solution of the orthogonal Procrustes problem
    Ashkboos et al. 2024, SliceGPT, arXiv:2401.15024 (rotations folded into a transformer's weights)
"""

import logging

import numpy as np
import torch
from accelerate.utils import send_to_device
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import ModernBertModel

from modernbert_small.algebra import mean_free_basis
from modernbert_small.distil.labels import DistillationDataset
from modernbert_small.packed.batches import PackedSampler, packed_features
from modernbert_small.run.devices import bf16_autocast
from modernbert_small.run.progress import ProgressBar

logger = logging.getLogger(__name__)

_SAMPLE_ROWS_PER_DIMENSION = 10


def align(
    student: SentenceTransformer,
    dataset: DistillationDataset,
    heldout: DistillationDataset,
    tokens_per_batch: int,
) -> dict[str, float]:
    """Turn a student to the axes of its labels, unless it is nearer to them as it is.

    Args:
        student: ModernBERT, pooling, Normalize; modified.
        dataset: texts and labels (N, D). The sample is its first 10 * D rows, which are in random order.
        heldout: other texts and labels, on which both are measured: of few rows a rotation fits its own too well.
        tokens_per_batch: of the student's forward passes.

    Returns:
        The mean cosine to the held-out labels, `before` and `after` the rotation.
    """
    encoder = student[0].auto_model
    # `rotate` sets this weight to 1, so the rotation is sought without it. Pooling is linear: the vectors with the
    # weight are those without it, times the weight, and the rotated ones need no further pass either.
    weight = encoder.final_norm.weight.detach().float().cpu().clone()
    encoder.final_norm.weight.data.fill_(1)
    labels = _sample_labels(dataset)
    Q = best_rotation(_embed(student, dataset, len(labels), tokens_per_batch), labels)
    labels = _sample_labels(heldout)
    vectors = _embed(student, heldout, len(labels), tokens_per_batch)
    cosines = {"before": _mean_cosine(vectors * weight, labels), "after": _mean_cosine(vectors @ Q.T.float(), labels)}
    logger.info(
        "cosine to the held-out labels %(before).3f, turned to the teacher's axes %(after).3f; starts from the better",
        cosines,
    )
    if cosines["after"] > cosines["before"]:
        rotate(encoder, Q.to(encoder.device))
    else:
        encoder.final_norm.weight.data.copy_(weight)
    return cosines


def cosine_to_labels(student: SentenceTransformer, dataset: DistillationDataset, tokens_per_batch: int) -> float:
    """The mean cosine of a student's vectors to the labels of the first 10 * D rows of a dataset."""
    labels = _sample_labels(dataset)
    return _mean_cosine(_embed(student, dataset, len(labels), tokens_per_batch), labels)


def _sample_labels(dataset: DistillationDataset) -> Tensor:
    """The labels (rows, D) float32 of a dataset's first 10 * D rows."""
    rows = min(len(dataset), int(_SAMPLE_ROWS_PER_DIMENSION * dataset.labels.shape[1]))
    return torch.from_numpy(dataset.labels[:rows].astype(np.float32))


def _mean_cosine(vectors: Tensor, others: Tensor) -> float:
    """Of pairs of vectors, (N, D) each; to four digits."""
    return round(float(cosine_similarity(vectors, others).mean()), 4)


@torch.no_grad()
def _embed(student: SentenceTransformer, dataset: DistillationDataset, rows: int, tokens_per_batch: int) -> Tensor:
    """Embeddings (rows, D) float32 of a dataset's first rows, on the CPU."""
    student.eval()
    device, parts = student.device, []
    with ProgressBar(rows, "sample for the alignment", "text") as bar:
        for batch in PackedSampler(dataset.store.lengths[:rows], tokens_per_batch, seed=0, shuffle=False):
            features = send_to_device(packed_features(*dataset.store.gather(batch.rows)), device)
            with bf16_autocast(device):
                parts.append(student(features)["sentence_embedding"].float().cpu())
            bar.update(len(batch.rows))
    return torch.cat(parts)


def best_rotation(vectors: Tensor, targets: Tensor) -> Tensor:
    """Find the rotation that brings vectors nearest to their targets, among those that leave the vector of ones fixed.

    This is the orthogonal Procrustes problem in the space of dimension D - 1 that is orthogonal to 1.

    Args:
        vectors: (N, D).
        targets: (N, D).

    Returns:
        Q (D, D) float64, orthogonal, with Q 1 = 1 and the least sum of |Q v - t|^2 over the pairs.
    """
    D = vectors.shape[1]
    R = mean_free_basis(D)  # (D, D - 1)
    U, _, Vh = torch.linalg.svd((targets.double() @ R).T @ (vectors.double() @ R))
    return R @ U @ Vh @ R.T + torch.full((D, D), 1 / D, dtype=torch.float64)


@torch.no_grad()
def rotate(model: ModernBertModel, Q: Tensor) -> None:
    """Turn a ModernBERT's residual stream by Q, so that its last hidden states become Q LayerNorm(h).

    The rotation is exact, but for two norms whose weights cannot be folded into a weight that reads from them. The
    final norm's weight is set to 1, and training gives it a new one. The embedding norm's weight moves into the
    embedding table, where it also changes each vector's length; the norm after the table removes that change.

    Args:
        model: a ModernBERT whose norms have no biases, as is usual; modified.
        Q: (D, D), orthogonal, with Q 1 = 1.
    """
    centre = torch.eye(len(Q), dtype=torch.float64, device=Q.device) - 1 / len(Q)
    write = Q @ centre  # a LayerNorm would subtract the mean later, and so may this

    def fold(weight: Tensor, norm: torch.nn.Module) -> None:
        """Fold a norm's weight (D,) and the rotation into the weight (n, D) that reads from the norm."""
        scale = getattr(norm, "weight", None)  # layer 0 has no norm before its attention
        folded = weight.double() if scale is None else weight.double() * scale.double()
        weight.copy_(folded @ Q.T)
        if scale is not None:
            scale.fill_(1)

    table, norm = model.embeddings.tok_embeddings.weight, model.embeddings.norm
    table.copy_(norm(table).double() @ write.T)
    norm.weight.fill_(1)
    for layer in model.layers:
        fold(layer.attn.Wqkv.weight, layer.attn_norm)
        fold(layer.mlp.Wi.weight, layer.mlp_norm)
        for Wo in (layer.attn.Wo, layer.mlp.Wo):
            Wo.weight.copy_(write @ Wo.weight.double())
            if Wo.bias is not None:
                Wo.bias.copy_(write @ Wo.bias.double())
    model.final_norm.weight.fill_(1)
