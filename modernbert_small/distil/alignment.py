"""Turning a student into its teacher's coordinates before training, by a rotation folded into its weights.

A language model's space has arbitrary axes. Left to itself, distillation first spends hundreds of steps on
turning them, and forgets while it does. The turn that is best for a sample of labels has a closed form, and
ModernBERT can be turned without changing what it computes: with Q orthogonal and Q 1 = 1, LayerNorm of Q h is
Q LayerNorm(h), once the norms' weights are folded into the weights that read from them.

D: hidden_size. h: (D,) residual stream.

References:
    Schoenemann 1966, A generalized solution of the orthogonal Procrustes problem
    Ashkboos et al. 2024, SliceGPT, arXiv:2401.15024 (rotations folded into a transformer's weights)
"""

import torch
from torch import Tensor
from transformers import ModernBertModel

from modernbert_small.algebra import mean_free_basis


def best_rotation(vectors: Tensor, targets: Tensor) -> Tensor:
    """The rotation that brings vectors nearest to their targets, among those that fix the vector of ones.

    Args:
        vectors: (N, D).
        targets: (N, D).

    Returns:
        Q (D, D) float64, orthogonal, Q 1 = 1, least sum of |Q v - t|^2: Procrustes on what is orthogonal to 1.
    """
    D = vectors.shape[1]
    R = mean_free_basis(D)
    U, _, Vh = torch.linalg.svd((targets.double() @ R).T @ (vectors.double() @ R))
    return R @ U @ Vh @ R.T + torch.full((D, D), 1 / D, dtype=torch.float64)


@torch.no_grad()
def rotate(model: ModernBertModel, Q: Tensor) -> None:
    """Turn a ModernBERT's residual stream by Q, so that its hidden states become Q LayerNorm(h).

    Exact but for two norms that no weight reads. The final one loses its weight (training gives it a new
    one). The embeddings' weight moves into the table, where the norm that follows undoes what it did to each
    token's length.

    Args:
        model: modified. Without biases in its norms, as ModernBERT is.
        Q: (D, D), orthogonal, Q 1 = 1.
    """
    centre = torch.eye(len(Q), dtype=torch.float64, device=Q.device) - 1 / len(Q)
    write = Q @ centre  # LayerNorm would subtract the mean later

    def fold(weight: Tensor, norm: torch.nn.Module) -> None:
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
