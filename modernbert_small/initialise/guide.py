"""GUIDE: a small ModernBERT's first weights from a large one's, by PCA and projection.

The `basis` B (D_T, D_S) has orthonormal columns, and the student's residual stream is h_S = B^T h_T. A weight W that
reads the stream becomes W B, and a weight that writes to it becomes B^T W. Heads and neurons are not projected but
selected, since they have no directions in common: RoPE pairs channels within a head, and GeGLU pairs each input row
with its gate row.

D_T, D_S: hidden_size of teacher and student. V: vocabulary. I_T, I_S: intermediate_size. H: kept heads. d: head_dim.

References:
    Trinh et al. 2025, GUIDE, arXiv:2510.06502
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import ModernBertConfig, ModernBertForMaskedLM

from modernbert_small.algebra import leading_directions


def principal_basis(vectors: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The directions in which vectors vary most: `leading_directions`, centred, for tensors.

    Args:
        vectors: (N, D).
        size: directions to keep, 1 <= size <= min(N, D).

    Returns:
        basis (D, size) float64, orthonormal columns by falling variance, each with its largest entry positive; and
        each one's share of the variance (size,) float64. Both are on the vectors' device.

    Raises:
        ValueError: size is out of range, or a value is not finite.
    """
    basis, explained = leading_directions(vectors.double().cpu().numpy(), size, centred=True)
    return torch.from_numpy(basis).to(vectors.device), torch.from_numpy(explained).to(vectors.device)


def select_uniformly(available: int, wanted: int) -> list[int]:
    """`wanted` of the indices 0 to `available` - 1, evenly spread: GUIDE's choice of heads and neurons.

    Raises:
        ValueError: more are wanted than available.
    """
    if wanted > available:
        raise ValueError(f"cannot select {wanted} of {available} heads or neurons; take at most {available}")
    return [index * available // wanted for index in range(wanted)]


def project_attention(
    Wqkv_T: Tensor, Wo_T: Tensor, basis: Tensor, kept_heads: Sequence[int], head_dim: int
) -> tuple[Tensor, Tensor]:
    """Project an attention block onto the student's width and heads.

    Args:
        Wqkv_T: (3 * D_T, D_T), rows [all q | all k | all v]; the preceding norm's weight is folded in already.
        Wo_T: (D_T, D_T).
        basis: (D_T, D_S), orthonormal columns.
        kept_heads: H distinct teacher heads; H * d == D_S.
        head_dim: d, the same in both models.

    Returns:
        Wqkv_S (3 * D_S, D_S) and Wo_S (D_S, D_S).

    Raises:
        ValueError: shapes disagree, or a head repeats or is out of range.
    """
    D_T, D_S = basis.shape
    n_heads = D_T // head_dim
    if Wqkv_T.shape != (3 * D_T, D_T) or Wo_T.shape != (D_T, D_T):
        raise ValueError(f"Wqkv {tuple(Wqkv_T.shape)}, Wo {tuple(Wo_T.shape)} do not fit a basis of {D_T} rows")
    if len(kept_heads) * head_dim != D_S:
        raise ValueError(f"{len(kept_heads)} heads x {head_dim} = {len(kept_heads) * head_dim}, but D_S is {D_S}")
    if len(set(kept_heads)) != len(kept_heads) or not all(0 <= head < n_heads for head in kept_heads):
        raise ValueError(f"kept_heads {list(kept_heads)}: expected distinct heads of 0..{n_heads - 1}")
    heads = torch.as_tensor(kept_heads)
    read = Wqkv_T.view(3, n_heads, head_dim, D_T)[:, heads].reshape(3 * D_S, D_T)
    write = Wo_T.view(D_T, n_heads, head_dim)[:, heads].reshape(D_T, D_S)
    return read @ basis, basis.T @ write


def project_mlp(Wi_T: Tensor, Wo_T: Tensor, basis: Tensor, kept_neurons: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Project a gated MLP onto the student's width and neurons.

    Args:
        Wi_T: (2 * I_T, D_T), rows [input | gate]; the preceding norm's weight is folded in already.
        Wo_T: (D_T, I_T).
        basis: (D_T, D_S), orthonormal columns.
        kept_neurons: I_S distinct neurons; each keeps its (input, gate) pair.

    Returns:
        Wi_S (2 * I_S, D_S) and Wo_S (D_S, I_S).

    Raises:
        ValueError: shapes disagree, or a neuron repeats or is out of range.
    """
    D_T, I_T = Wo_T.shape
    if basis.shape[0] != D_T or Wi_T.shape != (2 * I_T, D_T):
        raise ValueError(f"Wi {tuple(Wi_T.shape)}, Wo {tuple(Wo_T.shape)} do not fit a basis of {basis.shape[0]} rows")
    if len(set(kept_neurons)) != len(kept_neurons) or not all(0 <= n < I_T for n in kept_neurons):
        raise ValueError(f"kept_neurons holds repeated or unknown neurons; expected distinct ones of 0..{I_T - 1}")
    neurons = torch.as_tensor(kept_neurons)
    read = Wi_T.view(2, I_T, D_T)[:, neurons].reshape(-1, D_T)
    return read @ basis, basis.T @ Wo_T[:, neurons]


def project_norm(weight_T: Tensor, basis: Tensor) -> Tensor:
    """A norm's weight on the student's width, for a norm that no weight reads from.

    The exact projection B^T diag(weight) B is a full matrix (D_S, D_S). The nearest diagonal matrix is its diagonal.

    Args:
        weight_T: (D_T,).
        basis: (D_T, D_S), orthonormal columns.

    Returns:
        (D_S,), entry j is sum_i basis[i, j]^2 * weight[i].
    """
    return basis.square().T @ weight_T


def transfer_embeddings(student: ModernBertForMaskedLM, embeddings_T: Tensor, basis: Tensor) -> list[str]:
    """Fill the student's token embeddings, and with them the tied decoder, with the teacher's on the basis.

    The mean embedding is subtracted, as PCA does. In the decoder this changes nothing: a vector that all tokens share
    adds the same number to all logits. In the embeddings it would only hide the differences between the tokens.

    Args:
        student: modified.
        embeddings_T: (V, D_T).
        basis: (D_T, D_S).

    Returns:
        The names of the filled tensors.
    """
    weight = student.get_input_embeddings().weight
    with torch.no_grad():
        weight.copy_((embeddings_T.double() - embeddings_T.double().mean(0)) @ basis)
    return ["model.embeddings.tok_embeddings.weight"]


def require_same_head_dim(student: ModernBertConfig, teacher: ModernBertConfig) -> int:
    """The head_dim d of both models.

    Raises:
        ValueError: they differ. A head is copied whole, so both need the same.
    """
    d_S, d_T = (config.hidden_size // config.num_attention_heads for config in (student, teacher))
    if d_S != d_T:
        raise ValueError(
            f"student head_dim {d_S}, teacher {d_T}: must agree; give the student hidden_size / {d_T} attention heads"
        )
    return d_T


def transfer_first_layer(student: ModernBertForMaskedLM, teacher: ModernBertForMaskedLM, basis: Tensor) -> list[str]:
    """Project the teacher's first layer, norms and masked-LM head onto the student, as GUIDE does.

    A norm's weight is folded into the weights that read from it. No weight reads from the embeddings' norm, which the
    residual stream begins with, or from the head's norm, which the decoder reads; both use `project_norm`.

    Args:
        student: modified.
        teacher: a ModernBERT with masked-LM head and the student's head_dim.
        basis: (D_T, D_S), orthonormal columns.

    Returns:
        The names of the filled tensors.

    Raises:
        ValueError: the student has more heads or neurons than the teacher, or another head_dim.
    """
    S, T = student.config, teacher.config
    head_dim = require_same_head_dim(S, T)
    weights = {name: value.double() for name, value in teacher.state_dict().items()}
    layer = "model.layers.0."
    heads = select_uniformly(T.num_attention_heads, S.num_attention_heads)
    neurons = select_uniformly(T.intermediate_size, S.intermediate_size)
    Wqkv, attn_Wo = project_attention(
        weights[layer + "attn.Wqkv.weight"], weights[layer + "attn.Wo.weight"], basis, heads, head_dim
    )
    Wi, mlp_Wo = project_mlp(
        weights[layer + "mlp.Wi.weight"] * weights[layer + "mlp_norm.weight"],
        weights[layer + "mlp.Wo.weight"],
        basis,
        neurons,
    )
    new = {
        "model.embeddings.norm.weight": project_norm(weights["model.embeddings.norm.weight"], basis),
        layer + "attn.Wqkv.weight": Wqkv,
        layer + "attn.Wo.weight": attn_Wo,
        layer + "mlp.Wi.weight": Wi,
        layer + "mlp.Wo.weight": mlp_Wo,
        "head.dense.weight": basis.T @ (weights["head.dense.weight"] * weights["model.final_norm.weight"]) @ basis,
        "head.norm.weight": project_norm(weights["head.norm.weight"], basis),
        "decoder.bias": weights["decoder.bias"],
    }
    return _set_tensors(student, new)


def _set_tensors(student: ModernBertForMaskedLM, new: dict[str, Tensor]) -> list[str]:
    """Copy tensors into the student's tensors of the same names; returns the names."""
    targets = student.state_dict()
    with torch.no_grad():
        for name, value in new.items():
            if targets[name].shape != value.shape:
                raise ValueError(f"{name}: shape {tuple(value.shape)}, expected {tuple(targets[name].shape)}")
            targets[name].copy_(value)
    return list(new)


def student_config(
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    intermediate_size: int,
    max_position_embeddings: int,
    vocab_size: int,
    special_ids: dict[str, int | None],
    teacher: ModernBertConfig | None,
) -> ModernBertConfig:
    """The student's configuration: the given sizes, and everything else from the teacher.

    Args:
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, max_position_embeddings, vocab_size:
            the student's.
        special_ids: ids of the tokenizer's special tokens, such as `pad_token_id`.
        teacher: a ModernBERT's configuration, whose activations, RoPE and attention window are taken over; without
            one the student has ModernBERT's defaults.
    """
    inherited = {}
    if teacher is not None:
        names = (
            "hidden_activation",
            "norm_eps",
            "local_attention",
            "rope_parameters",
            "classifier_activation",
        )
        inherited = {name: getattr(teacher, name) for name in names}
    return ModernBertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=max_position_embeddings,
        **special_ids,
        **inherited,
    )
