"""All layers of a ModernBERT cut to a student's width and depth, in closed form, without training.

The student's residual stream stands for h_S = P h_T. LayerNorm subtracts the mean over the width, so only the
part of h_T that has mean zero matters, and P = R B^T takes its leading directions B (D_T, D_S - 1) to R
(D_S, D_S - 1), orthonormal and orthogonal to the vector of ones: h_S has mean zero as well. Where h_T lies in
the span of B,

    LN(h_T) = sqrt(D_T / D_S) P^T LN(h_S),

so a weight W that reads LN(h_T) * w becomes sqrt(D_T / D_S) W diag(w) P^T, one that writes becomes P W, and the
norms' own weights become 1. What the cut loses is then refitted, layer after layer on the student's own inputs:
each weight that writes to the stream is moved by ridge regression to what the teacher's stream does from this
layer to the next one kept, the layers left out included.

The embeddings' norm, whose output is the stream itself, gives every token the same length. A factor a token is
free there, and is spent on the decoder, which the table is tied to: logits are E_T y_T, and G = pinv(E_S) E_T
gives the y_S = G y_T that comes nearest. The head's dense layer is regressed to it, scaled down to where GELU is
a straight line; its norm undoes the scale.

D_T, D_S: hidden_size. L_T, L_S: layers. N: tokens of the sample.

References:
    Ashkboos et al. 2024, SliceGPT, arXiv:2401.15024; Muralidharan et al. 2024, Minitron, arXiv:2407.14679;
    Trinh et al. 2025, GUIDE, arXiv:2510.06502
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm
from transformers import ModernBertForMaskedLM, ModernBertModel

from modernbert_small.algebra import mean_free_basis
from modernbert_small.initialise.guide import select_uniformly
from modernbert_small.pretrain.masking import IGNORED
from modernbert_small.run.progress import ProgressBar

# Relative to the mean square of the inputs. Small: there are dozens of tokens for each weight of a row.
_RIDGE = 1e-3
# Size of the head's inputs to GELU. GELU(u) = u / 2 + 0.4 u^2 - ...: a straight line to 4 % of u here.
_LINEAR_SCALE = 0.05


@dataclass(frozen=True)
class Parts:
    """What makes the transfer up; each can be switched off to see what it is worth.

    stream_basis: axes from the residual stream over the sample, else from the token embeddings.
    importance: heads and neurons by what they write over the sample, else evenly spread.
    heal: refit the weights that write.
    """

    stream_basis: bool = True
    importance: bool = True
    heal: bool = True


def choose_layers(teacher_types: Sequence[str], student_types: Sequence[str]) -> list[int]:
    """The teacher's layer for each of the student's: of the same attention, in order, evenly spread.

    Layer 0 stays layer 0, which alone has no norm before its attention. Among all choices the one with the least sum
    of distances to even spacing.

    Raises:
        ValueError: there is no such choice.
    """
    L_T, L_S = len(teacher_types), len(student_types)
    if L_S > L_T or teacher_types[0] != student_types[0]:
        raise ValueError(f"cannot choose {L_S} layers of {L_T} that begin with {student_types[0]}")
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [0])}  # last layer chosen -> distance, choice
    for index in range(1, L_S):
        ideal = index * (L_T - 1) / (L_S - 1)
        best = {
            layer: min(
                (distance + abs(layer - ideal), [*choice, layer])
                for last, (distance, choice) in best.items()
                if last < layer
            )
            for layer in range(index, L_T)
            if teacher_types[layer] == student_types[index] and min(best) < layer
        }
        if not best:
            raise ValueError(f"the teacher has too few {student_types[index]} layers for {L_S} in this order")
    return min(best.values())[1]


class _Recorder:
    """Second moments of what a teacher computes over the sample.

    stream: (L_T + 1, D_T, D_T), of LN(h) before each layer and after the last. heads: for each layer and head what
    attention's Wo reads of it (d, d). neurons: for each layer the mean squares of the MLP's Wo's inputs (I_T,).
    """

    def __init__(self, model: ModernBertModel) -> None:
        D = model.config.hidden_size
        self.stream = torch.zeros(len(model.layers) + 1, D, D, dtype=torch.float64)
        n_heads = model.config.num_attention_heads
        self.heads = torch.zeros(len(model.layers), n_heads, D // n_heads, D // n_heads, dtype=torch.float64)
        self.neurons = torch.zeros(len(model.layers), model.config.intermediate_size, dtype=torch.float64)
        self.model = model

    @torch.no_grad()
    def run(self, batches: Sequence[dict[str, Any]]) -> None:
        with ProgressBar(len(batches) * len(self.model.layers), "reading the teacher", "layer") as bar:
            for batch in batches:
                h = self.model.embeddings(batch["input_ids"])
                for index, layer in enumerate(self.model.layers):
                    self._add(self.stream[index], _normalised(h))
                    x, written = _attention(self.model, index, h, batch)
                    by_head = x[0].double().unflatten(1, self.heads.shape[1:3]).transpose(0, 1)
                    self.heads[index] += (by_head.transpose(1, 2) @ by_head).to(self.heads.device)
                    h = h + written
                    x = _mlp_input(layer, h)
                    self.neurons[index] += x[0].double().square().sum(0).cpu()
                    h = h + layer.mlp.Wo(x)
                    bar.update(1)
                self._add(self.stream[-1], _normalised(h))

    @staticmethod
    def _add(moment: Tensor, x: Tensor) -> None:
        x = x[0].double()
        moment += (x.T @ x).to(moment.device)


def _normalised(h: Tensor) -> Tensor:
    return layer_norm(h, h.shape[-1:])


def _attention(model: ModernBertModel, index: int, h: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What attention's Wo reads and what it writes, both (1, T, D), of a stream h (1, T, D)."""
    layer = model.layers[index]
    seen: list[Tensor] = []
    hook = layer.attn.Wo.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    packed = {name: value for name, value in batch.items() if name.startswith(("cu_seq", "max_length"))}
    rotary = model.rotary_emb(h, batch["position_ids"], layer.attention_type)
    written, _ = layer.attn(layer.attn_norm(h), position_embeddings=rotary, attention_mask=None, **packed)
    hook.remove()
    return seen[0], written


def _mlp_input(layer: torch.nn.Module, h: Tensor) -> Tensor:
    """What the MLP's Wo reads (1, T, I)."""
    inputs, gate = layer.mlp.Wi(layer.mlp_norm(h)).chunk(2, dim=-1)
    return layer.mlp.act(inputs) * gate


def stream_basis(moments: Tensor, size: int) -> Tensor:
    """P (size, D_T) float64 for the leading mean-free directions of second moments.

    Args:
        moments: (D_T, D_T) of LN(h), which has mean zero over the width.
        size: D_S. If it is D_T nothing is cut: P only subtracts the mean.
    """
    D = len(moments)
    if size == D:
        return torch.eye(D, dtype=torch.float64) - 1 / D
    R_T = mean_free_basis(D)
    _, directions = torch.linalg.eigh(R_T.T @ moments @ R_T)
    B = R_T @ directions.flip(1)[:, : size - 1]
    return mean_free_basis(size) @ B.T


def select_heads(moments: Tensor, Wo: Tensor, wanted: int) -> list[int]:
    """The heads that write most: largest E|Wo_h o_h|^2 = tr(Wo_h E[o_h o_h^T] Wo_h^T).

    Args:
        moments: (H, d, d), second moments of each head's part of Wo's input.
        Wo: (D, H * d).
    """
    parts = Wo.unflatten(1, moments.shape[:2]).transpose(0, 1)  # (H, D, d)
    sizes = ((parts @ moments) * parts).sum((1, 2))
    return sorted(sizes.topk(wanted).indices.tolist())


def select_neurons(mean_square: Tensor, Wo: Tensor, wanted: int) -> list[int]:
    """The neurons that write most: largest E a_i^2 |Wo_i|^2."""
    return sorted((mean_square * Wo.square().sum(0)).topk(wanted).indices.tolist())


@torch.no_grad()
def transfer_all_layers(
    student: ModernBertForMaskedLM,
    teacher: ModernBertForMaskedLM,
    batches: Sequence[dict[str, Any]],
    parts: Parts = Parts(),
) -> tuple[Tensor, list[int]]:
    """Give a student all that fits of a teacher.

    Args:
        student: modified; the teacher's head_dim and vocabulary, and no more layers, heads or neurons.
        teacher: both on one device and with packed attention, see `attention`; not modified.
        batches: packed batches with masked tokens and `labels`, as phase 3 makes them, some 30,000 tokens.
        parts: what to do.

    Returns:
        P (D_S, D_T) float64, with which the student's stream is P times the teacher's; and which of the teacher's
        layers were kept.

    Raises:
        ValueError: sizes do not fit.
    """
    S, T = student.config, teacher.config
    head_dim = T.hidden_size // T.num_attention_heads
    if S.hidden_size // S.num_attention_heads != head_dim:
        raise ValueError(f"student head_dim {S.hidden_size // S.num_attention_heads}, teacher {head_dim}: must agree")
    kept = choose_layers(T.layer_types, S.layer_types)
    recorder = _Recorder(teacher.model)
    recorder.run(batches[::2])  # moments need fewer tokens than regressions do
    if parts.stream_basis:
        P = stream_basis(recorder.stream.sum(0), S.hidden_size)
    else:
        table = _normalised(teacher.get_input_embeddings().weight.double().cpu())
        P = stream_basis(table.T @ table, S.hidden_size)
    _cut_embeddings(student, teacher, P)
    for index, source in enumerate(kept):
        _cut_layer(student, teacher, index, source, P, recorder if parts.importance else None)
    h_S, h_T = _walk(student.model, teacher.model, batches, kept, P, parts.heal)
    _fit_head(student, teacher, batches, h_S, h_T, P)
    return P, kept


def _cut_embeddings(student: ModernBertForMaskedLM, teacher: ModernBertForMaskedLM, P: Tensor) -> None:
    """The table such that the student's embeddings, normed, are P times the teacher's up to their length."""
    table_S, norm_S = student.get_input_embeddings().weight, student.model.embeddings.norm
    table_T, norm_T = teacher.get_input_embeddings().weight.double(), teacher.model.embeddings.norm
    if P.shape[0] == P.shape[1]:
        table_S.copy_(table_T)
        norm_S.weight.copy_(norm_T.weight)
        return
    stream = _normalised(table_T) * norm_T.weight.double() @ P.to(table_T).T
    table_S.copy_(stream * table_T.std(1, correction=0, keepdim=True))
    norm_S.weight.fill_(float(stream.square().mean().sqrt()))


def _cut_layer(
    student: ModernBertForMaskedLM,
    teacher: ModernBertForMaskedLM,
    index: int,
    source: int,
    P: Tensor,
    recorder: _Recorder | None,
) -> None:
    """Fill one of the student's layers from one of the teacher's."""
    S, T = student.config, teacher.config
    layer_S, layer_T = student.model.layers[index], teacher.model.layers[source]
    Wqkv, attn_Wo, Wi, mlp_Wo = (
        W.weight.double().cpu() for W in (layer_T.attn.Wqkv, layer_T.attn.Wo, layer_T.mlp.Wi, layer_T.mlp.Wo)
    )
    head_dim = T.hidden_size // T.num_attention_heads
    if recorder is None:
        heads = select_uniformly(T.num_attention_heads, S.num_attention_heads)
        neurons = select_uniformly(T.intermediate_size, S.intermediate_size)
    else:
        heads = select_heads(recorder.heads[source], P @ attn_Wo, S.num_attention_heads)
        neurons = select_neurons(recorder.neurons[source], P @ mlp_Wo, S.intermediate_size)
    full_width = P.shape[0] == P.shape[1]
    if index == 0:  # reads the embeddings, not normed again
        read_attn = torch.eye(len(P), dtype=torch.float64) if full_width else P.T
    else:
        read_attn = layer_T.attn_norm.weight.double().cpu()[:, None] * P.T * (P.shape[1] / P.shape[0]) ** 0.5
        layer_S.attn_norm.weight.fill_(1)
    read_mlp = layer_T.mlp_norm.weight.double().cpu()[:, None] * P.T * (P.shape[1] / P.shape[0]) ** 0.5
    layer_S.mlp_norm.weight.fill_(1)
    rows = torch.cat([torch.arange(h * head_dim, (h + 1) * head_dim) for h in heads])
    qkv = Wqkv.view(3, -1, Wqkv.shape[1])[:, rows].reshape(-1, Wqkv.shape[1])
    layer_S.attn.Wqkv.weight.copy_(qkv @ read_attn)
    layer_S.attn.Wo.weight.copy_(P @ attn_Wo[:, rows])
    chosen = torch.tensor(neurons)
    pairs = Wi.view(2, -1, Wi.shape[1])[:, chosen].reshape(-1, Wi.shape[1])
    layer_S.mlp.Wi.weight.copy_(pairs @ read_mlp)
    layer_S.mlp.Wo.weight.copy_(P @ mlp_Wo[:, chosen])


def _refit(weight: Tensor, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Move a weight (D, K) to the ridge regression from inputs (T, K) to targets (T, D), staying near where it is."""
    W = weight.double()
    K = W.shape[1]
    gram = torch.zeros(K, K, dtype=torch.float64, device=W.device)
    residual = torch.zeros_like(W)
    for x, y in zip(inputs, targets, strict=True):
        x = x.double()
        gram += x.T @ x
        residual += (y.double() - x @ W.T).T @ x
    gram += _RIDGE * gram.diagonal().mean() * torch.eye(K, dtype=torch.float64, device=W.device)
    weight.copy_(W + torch.linalg.solve(gram, residual.T).T)


def _walk(
    S: ModernBertModel, T: ModernBertModel, batches: Sequence[dict[str, Any]], kept: list[int], P: Tensor, heal: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Carry the sample through both models side by side; heal each of the student's layers when it is reached.

    Returns:
        Both streams (1, T, D) of each batch after the last layer.
    """
    P = P.to(S.device, torch.float32)
    h_S = [S.embeddings(batch["input_ids"]) for batch in batches]
    h_T = [T.embeddings(batch["input_ids"]) for batch in batches]
    with ProgressBar(len(kept), "fitting the student", "layer") as bar:
        for index, (source, following) in enumerate(zip(kept, [*kept[1:], len(T.layers)], strict=True)):
            layer = S.layers[index]
            middle = [h + _attention(T, source, h, batch)[1] for h, batch in zip(h_T, batches, strict=True)]
            inputs = [_attention(S, index, h, batch)[0] for h, batch in zip(h_S, batches, strict=True)]
            h_S = _write(layer.attn.Wo, h_S, inputs, middle if heal else None, P)

            h_T = [h + T.layers[source].mlp.Wo(_mlp_input(T.layers[source], h)) for h in middle]
            for skipped in range(source + 1, following):
                h_T = [h + _attention(T, skipped, h, batch)[1] for h, batch in zip(h_T, batches, strict=True)]
                h_T = [h + T.layers[skipped].mlp.Wo(_mlp_input(T.layers[skipped], h)) for h in h_T]
            inputs = [_mlp_input(layer, h) for h in h_S]
            h_S = _write(layer.mlp.Wo, h_S, inputs, h_T if heal else None, P)
            bar.update(1)
    return h_S, h_T


def _write(
    Wo: torch.nn.Linear, h: list[Tensor], inputs: list[Tensor], targets_T: list[Tensor] | None, P: Tensor
) -> list[Tensor]:
    """The streams after Wo wrote to them; with the teacher's streams, Wo is refitted first."""
    if targets_T is not None:
        targets = [(t @ P.T - old)[0] for t, old in zip(targets_T, h, strict=True)]
        _refit(Wo.weight, [x[0] for x in inputs], targets)
    return [old + Wo(x) for old, x in zip(h, inputs, strict=True)]


def _fit_head(
    student: ModernBertForMaskedLM,
    teacher: ModernBertForMaskedLM,
    batches: Sequence[dict[str, Any]],
    h_S: list[Tensor],
    h_T: list[Tensor],
    P: Tensor,
) -> None:
    """The MLM head: copied at full width, else regressed so that the logits come nearest."""
    S, T = student, teacher
    if P.shape[0] == P.shape[1]:
        S.model.final_norm.weight.copy_(T.model.final_norm.weight)
        S.head.load_state_dict(T.head.state_dict())
        S.decoder.bias.copy_(T.decoder.bias)
        return
    S.model.final_norm.weight.fill_(1)
    hidden = [batch["labels"][0] != IGNORED for batch in batches]
    z = torch.cat([S.model.final_norm(h)[0][at] for h, at in zip(h_S, hidden, strict=True)]).double()
    y_T = torch.cat([T.head(T.model.final_norm(h)[0][at]) for h, at in zip(h_T, hidden, strict=True)]).double()
    E_S, E_T = (model.get_input_embeddings().weight.double() for model in (S, T))
    gram = E_S.T @ E_S
    gram += 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    targets = y_T @ torch.linalg.solve(gram, E_S.T @ E_T).T
    dense = torch.zeros(len(gram), len(gram), dtype=torch.float64, device=gram.device)
    _refit(dense, [z], [targets])
    outputs = z @ dense.T
    S.head.dense.weight.copy_(dense * (_LINEAR_SCALE / outputs.square().mean().sqrt()))
    S.head.norm.weight.fill_(float(targets.square().mean().sqrt()))
    y_S = S.head(z.float()).double()
    S.decoder.bias.copy_(T.decoder.bias.double() + E_T @ y_T.mean(0) - E_S @ y_S.mean(0))
