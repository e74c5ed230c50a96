"""Linear algebra that several phases need."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FloatArray = NDArray[np.floating]


def unit_vectors(vectors: FloatArray) -> FloatArray:
    """Vectors (N, D) scaled to length one.

    Raises:
        ValueError: one is not finite or has no length; its position is named.
    """
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0))
    if len(bad):
        raise ValueError(f"embedding {bad[0]} is zero or not finite, as are {len(bad) - 1} others")
    return vectors / norms


def mean_free_basis(size: int) -> Tensor:
    """Orthonormal columns orthogonal to the vector of ones (D, D - 1) float64: Helmert's contrasts."""
    rows = torch.tril(torch.ones(size - 1, size, dtype=torch.float64))
    rows[torch.arange(size - 1), torch.arange(1, size)] = -torch.arange(1, size, dtype=torch.float64)
    return (rows / rows.norm(dim=1, keepdim=True)).T.contiguous()
