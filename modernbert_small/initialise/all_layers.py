"""All layers of a ModernBERT cut to a student's width and depth, in closed form, without training.

The student's residual stream is h_S = P h_T. LayerNorm subtracts the mean over the width, so only the part of h_T that
has mean zero is ever read. B (D_T, D_S - 1) holds the leading mean-zero directions of h_T, and the columns of R
(D_S, D_S - 1) are orthonormal and orthogonal to the vector of ones. With P = R B^T, h_S has mean zero as well. If h_T
lies in the span of B,

    LN(h_T) = sqrt(D_T / D_S) P^T LN(h_S).

So a weight W that reads LN(h_T) * w becomes sqrt(D_T / D_S) W diag(w) P^T, a weight that writes to the stream becomes
P W, and the norms' own weights become 1.

The cut loses what lies outside the span of B. `heal` makes up for a part of it: layer after layer, it refits each
weight that writes to the student's stream by ridge regression on the student's own inputs. The target is what the
teacher's stream becomes before the next layer that is kept, so the layers that are left out count as well.

The embeddings' norm gives every token's vector the same length, so the length of a row in the table is free. The
decoder, which is tied to the table, keeps the lengths that it has in the teacher. The teacher's logits are E_T y_T, and
y_S = pinv(E_S) E_T y_T gives the student's nearest logits E_S y_S. The head's dense layer is regressed to this y_S,
scaled down so far that GELU is nearly linear; the weight of the norm after GELU undoes the scale.

The teacher may be an embedding model instead. Its vectors are the pooled final states. Their second moments then enter
the choice of B beside the stream's, and the sample is read without masks.

D_T, D_S: hidden_size. L_T, L_S: layers. I_T: the teacher's intermediate_size. H: heads. d: head_dim.
T: tokens of a packed batch. E (V, D): token embeddings. y (D,): the head's output. LN: LayerNorm without a weight.

References:
    Ashkboos et al. 2024, SliceGPT, arXiv:2401.15024; Muralidharan et al. 2024, Minitron, arXiv:2407.14679;
    Trinh et al. 2025, GUIDE, arXiv:2510.06502
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import layer_norm
from transformers import ModernBertForMaskedLM, ModernBertModel

from modernbert_small.algebra import leading_eigenvectors, mean_free_basis
from modernbert_small.initialise.guide import project_attention, project_mlp, require_same_head_dim
from modernbert_small.pretrain.masking import IGNORED
from modernbert_small.run.loading import PoolingMode
from modernbert_small.run.progress import ProgressBar

# Relative to the mean square of the inputs. Small, because there are dozens of tokens for each weight of a row.
_RIDGE = 1e-3
# Root mean square of the inputs to the head's GELU. GELU(u) = u / 2 + 0.4 u^2 - ..., so at this size the square is 4 %
# of the linear part.
_LINEAR_SCALE = 0.05

# Of the final norm's mean weight: an axis with less is hidden.
_HIDING_WEIGHT = 0.1

# Weight of the pooled vectors' second moments in the basis, relative to those of the stream in all layers.
_POOLED_WEIGHT = 1.0

Teacher: TypeAlias = ModernBertForMaskedLM | ModernBertModel
Batches = Sequence[Mapping[str, Any]]  # as `sample_batches` makes them: tensors (1, T) and what packed attention needs
Selection = Sequence[tuple[list[int], list[int]]]  # for each of the student's layers the teacher's heads and neurons


@torch.no_grad()
def transfer_all_layers(
    student: ModernBertForMaskedLM,
    teacher: Teacher,
    batches: Batches,
    pooling: PoolingMode | None = None,
    head_teacher: ModernBertForMaskedLM | None = None,
) -> tuple[Tensor, list[int]]:
    """Fill a student's weights from a teacher: all of them, or all but the masked-LM head.

    Args:
        student: modified; has the teacher's head_dim and vocabulary, and no more layers, heads or neurons than it.
        teacher: not modified. All models are on one device and use packed attention, see `use_packed_attention`.
        batches: packed batches with masked tokens and `labels`, as phase 3 makes them, some 30,000 tokens.
        pooling: how an embedding model pools its final states; None for a masked language model.
        head_teacher: the masked language model whose head the student's is fitted to; by default the teacher, if it
            has a head. Without either, the student's head stays as it is.

    Returns:
        P (D_S, D_T) float64, with which the student's stream is P times the teacher's; and the L_S layers of the
        teacher that were kept.

    Raises:
        ValueError: the sizes do not fit, the teacher computes values that are not finite, or an embedding model's final
            norm hides most of its stream.
    """
    S, T = student.config, teacher.config
    require_same_head_dim(S, T)
    encoder = teacher.base_model
    kept = choose_layers(T.layer_types, S.layer_types)
    sample = [unmasked(batch) for batch in batches] if pooling else batches
    moments = TeacherMoments(encoder, pooling)
    moments.add(sample[::2])  # moments need fewer tokens than regressions do
    if pooling and S.hidden_size < T.hidden_size:
        _require_shown(moments.stream[-1].diagonal(), encoder.final_norm.weight)
    P = stream_basis(moments.all(), S.hidden_size)
    selection = select_by_output(teacher, moments, kept, P, S.num_attention_heads, S.intermediate_size)
    cut(student, teacher, kept, P, selection)
    states_S, states_T = heal(student.model, encoder, sample, kept, P)
    if head_teacher is None and isinstance(teacher, ModernBertForMaskedLM):
        head_teacher = teacher
    if head_teacher is not None:
        if pooling or head_teacher is not teacher:
            states_S, states_T = (_final_states(model.base_model, batches) for model in (student, head_teacher))
        fit_head(student, head_teacher, batches, states_S, states_T)
    return P, kept


def _require_shown(energy: Tensor, weight: Tensor) -> None:
    """Refuse a teacher whose vectors leave out most of its last stream, which the student's would show.

    The student's axes are other ones, so its final norm has no weights that hide the same. A masked language model's
    head is fitted to what the student shows, but an embedding model has none.

    Args:
        energy: (D_T,) of LN(h) on each axis, after the last layer.
        weight: (D_T,) of the final norm.

    Raises:
        ValueError: axes with less than a tenth of the mean weight hold half of the energy or more.
    """
    hidden = weight.abs().double().cpu() < _HIDING_WEIGHT * weight.abs().mean().item()
    share = float(energy[hidden].sum() / energy.sum())
    if share >= 0.5:
        raise ValueError(
            f"the teacher's final norm hides {share:.0%} of its stream, as in models that were started with --start "
            "static; use init: random here and start: static in phase 5"
        )


def unmasked(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A masked batch with its original tokens."""
    labels = batch["labels"]
    return {**batch, "input_ids": torch.where(labels == IGNORED, batch["input_ids"], labels)}


def _final_states(model: ModernBertModel, batches: Batches) -> list[Tensor]:
    """The last hidden states (1, T, D) of each batch."""
    inputs = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    return [model(**batch).last_hidden_state for batch in inputs]


def pool(states: Tensor, cu_seq_lens: Tensor, pooling: PoolingMode) -> Tensor:
    """Each row's first state, or the mean of its states.

    Args:
        states: (T, D) of B rows that lie end to end.
        cu_seq_lens: (B + 1,), where the rows begin and end.

    Returns:
        (B, D).
    """
    if pooling == "cls":
        return states[cu_seq_lens[:-1].long()]
    return torch.segment_reduce(states, "mean", lengths=cu_seq_lens.diff().long())


def choose_layers(teacher_types: Sequence[str], student_types: Sequence[str]) -> list[int]:
    """The teacher's layer for each of the student's layers.

    The chosen layers have the student's types of attention and keep their order. Layer 0 is always chosen first, since
    it alone has no norm before its attention. Among these choices, the one with the least sum of distances to even
    spacing is taken.

    Args:
        teacher_types: (L_T,) such as "full_attention", "sliding_attention".
        student_types: (L_S,).

    Returns:
        L_S layers of the teacher, ascending.

    Raises:
        ValueError: there is no such choice.
    """
    L_T, L_S = len(teacher_types), len(student_types)
    if L_S > L_T or teacher_types[0] != student_types[0]:
        raise ValueError(f"cannot choose {L_S} layers of {L_T} that begin with {student_types[0]}")
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [0])}  # last layer chosen -> distance, choice
    for index in range(1, L_S):
        ideal = index * (L_T - 1) / (L_S - 1)
        longer = {}
        for layer in range(index, L_T):
            shorter = [choice for last, choice in best.items() if last < layer]
            if shorter and teacher_types[layer] == student_types[index]:
                distance, choice = min(shorter)
                longer[layer] = (distance + abs(layer - ideal), [*choice, layer])
        if not longer:
            raise ValueError(f"the teacher has too few {student_types[index]} layers for {L_S} in this order")
        best = longer
    return min(best.values())[1]


class TeacherMoments:
    """Second moments of what a teacher computes over a sample, all zero until `add`.

    Attributes:
        stream: (L_T + 1, D_T, D_T) float64, of LN(h) before each layer and after the last.
        heads: (L_T, H, d, d) float64, of the part of attention's Wo's input that each head gives.
        neurons: (L_T, I_T) float64, sums of squares of the inputs of the MLP's Wo.
        pooled: (D_T, D_T) float64, of the pooled final states, if the teacher pools.
    """

    def __init__(self, model: ModernBertModel, pooling: PoolingMode | None = None) -> None:
        D, L, H = model.config.hidden_size, len(model.layers), model.config.num_attention_heads
        self.model, self.pooling = model, pooling
        self.pooled = torch.zeros(D, D, dtype=torch.float64)
        self.stream = torch.zeros(L + 1, D, D, dtype=torch.float64)
        self.heads = torch.zeros(L, H, D // H, D // H, dtype=torch.float64)
        self.neurons = torch.zeros(L, model.config.intermediate_size, dtype=torch.float64)

    @torch.no_grad()
    def add(self, batches: Batches) -> None:
        """Run the teacher over packed batches and add their moments."""
        model = self.model
        with ProgressBar(len(batches) * len(model.layers), "reading the teacher", "layer") as bar:
            for batch in batches:
                h = model.embeddings(batch["input_ids"])
                for index, layer in enumerate(model.layers):
                    self.stream[index] += _second_moment(_normalised(h)[0])
                    x, written = _attention(model, index, h, batch)
                    by_head = x[0].unflatten(1, self.heads.shape[1:3]).transpose(0, 1)  # (H, T, d)
                    self.heads[index] += _second_moment(by_head)
                    h = h + written
                    x = _mlp_input(layer, h)
                    self.neurons[index] += x[0].double().square().sum(0).cpu()
                    h = h + layer.mlp.Wo(x)
                    bar.update(1)
                self.stream[-1] += _second_moment(_normalised(h)[0])
                if self.pooling:
                    self.pooled += _second_moment(pool(model.final_norm(h)[0], batch["cu_seq_lens_q"], self.pooling))

    def all(self) -> Tensor:
        """The stream's moments, summed over the layers, and the pooled ones with their weight: (D_T, D_T) float64."""
        stream = self.stream.sum(0)
        if self.pooling is None:
            return stream
        return stream + self.pooled * (_POOLED_WEIGHT * stream.trace() / self.pooled.trace())


def _second_moment(x: Tensor) -> Tensor:
    """The sum of x x^T over the tokens of x (..., T, D): (..., D, D) float64, on the CPU."""
    x = x.double()
    return (x.mT @ x).cpu()


def _normalised(h: Tensor) -> Tensor:
    """LN(h), of the shape of h (..., D)."""
    return layer_norm(h, h.shape[-1:])


def _attention(model: ModernBertModel, index: int, h: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The input and the output of attention's Wo in one layer, both (1, T, D), for a stream h (1, T, D)."""
    layer = model.layers[index]
    seen: list[Tensor] = []
    hook = layer.attn.Wo.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    packed = {name: value for name, value in batch.items() if name.startswith(("cu_seq", "max_length"))}
    rotary = model.rotary_emb(h, batch["position_ids"], layer.attention_type)
    written, _ = layer.attn(layer.attn_norm(h), position_embeddings=rotary, attention_mask=None, **packed)
    hook.remove()
    return seen[0], written


def _mlp_input(layer: torch.nn.Module, h: Tensor) -> Tensor:
    """The input of the MLP's Wo (1, T, I) for a stream h (1, T, D)."""
    inputs, gate = layer.mlp.Wi(layer.mlp_norm(h)).chunk(2, dim=-1)
    return layer.mlp.act(inputs) * gate


def stream_basis(moments: Tensor, size: int) -> Tensor:
    """P (D_S, D_T) float64, made of the leading mean-zero directions of a stream's second moments.

    Args:
        moments: (D_T, D_T) float64 on the CPU, of LN(h), which has mean zero over the width.
        size: D_S. If it equals D_T, nothing is cut and P only subtracts the mean.

    Raises:
        ValueError: moments are not finite.
    """
    D = len(moments)
    if size == D:
        return torch.eye(D, dtype=torch.float64) - 1 / D
    R_T = mean_free_basis(D)
    directions, _ = leading_eigenvectors((R_T.T @ moments @ R_T).numpy(), size - 1)
    B = R_T @ torch.from_numpy(directions)
    return mean_free_basis(size) @ B.T


def select_heads(moments: Tensor, Wo: Tensor, wanted: int) -> list[int]:
    """The heads with the largest output: E|Wo_h o_h|^2 = tr(Wo_h E[o_h o_h^T] Wo_h^T).

    Args:
        moments: (H, d, d), second moments of o_h, each head's part of Wo's input.
        Wo: (D, H * d).
        wanted: how many to select, at most H.

    Returns:
        The selected heads in ascending order.
    """
    by_head = Wo.unflatten(1, moments.shape[:2]).transpose(0, 1)  # (H, D, d)
    sizes = ((by_head @ moments) * by_head).sum((1, 2))
    return sorted(sizes.topk(wanted).indices.tolist())


def select_neurons(mean_square: Tensor, Wo: Tensor, wanted: int) -> list[int]:
    """The neurons with the largest output: E a_i^2 |Wo_i|^2.

    Args:
        mean_square: (I,), of a_i, each neuron's input to Wo; a common factor makes no difference.
        Wo: (D, I).
        wanted: how many to select, at most I.

    Returns:
        The selected neurons in ascending order.
    """
    return sorted((mean_square * Wo.square().sum(0)).topk(wanted).indices.tolist())


def select_by_output(
    teacher: Teacher, moments: TeacherMoments, kept: Sequence[int], P: Tensor, heads: int, neurons: int
) -> Selection:
    """The heads and neurons of each kept layer that write most to the student's stream, see `select_heads`.

    Args:
        teacher: not modified.
        moments: the teacher's, over a sample.
        kept: (L_S,) layers of the teacher.
        P: (D_S, D_T) float64 on the CPU.
        heads, neurons: how many to select in each layer.
    """
    selection = []
    for source in kept:
        layer = teacher.base_model.layers[source]
        attn_Wo, mlp_Wo = (P @ Wo.weight.double().cpu() for Wo in (layer.attn.Wo, layer.mlp.Wo))
        kept_heads = select_heads(moments.heads[source], attn_Wo, heads)
        selection.append((kept_heads, select_neurons(moments.neurons[source], mlp_Wo, neurons)))
    return selection


@torch.no_grad()
def cut(
    student: ModernBertForMaskedLM,
    teacher: Teacher,
    kept: Sequence[int],
    P: Tensor,
    selection: Selection,
) -> None:
    """Fill the student's embeddings, layers and final norm; the masked-LM head stays as it is.

    Args:
        student: modified.
        teacher: not modified.
        kept: (L_S,) layers of the teacher.
        P: (D_S, D_T) float64 on the CPU, see `stream_basis`.
        selection: L_S pairs of the heads and neurons to keep.
    """
    _cut_embeddings(student, teacher, P)
    head_dim = require_same_head_dim(student.config, teacher.config)
    for index, (source, (heads, neurons)) in enumerate(zip(kept, selection, strict=True)):
        _cut_layer(
            student.model.layers[index], teacher.base_model.layers[source], index == 0, P, heads, neurons, head_dim
        )
    if P.shape[0] == P.shape[1]:
        student.model.final_norm.weight.copy_(teacher.base_model.final_norm.weight)
    else:
        student.model.final_norm.weight.fill_(1)


def _cut_embeddings(student: ModernBertForMaskedLM, teacher: Teacher, P: Tensor) -> None:
    """Fill the table (V, D_S) so that the normed embeddings are P times the teacher's, but for their lengths."""
    table_S, norm_S = student.get_input_embeddings().weight, student.model.embeddings.norm
    table_T, norm_T = teacher.get_input_embeddings().weight.double(), teacher.base_model.embeddings.norm
    if P.shape[0] == P.shape[1]:
        table_S.copy_(table_T)
        norm_S.weight.copy_(norm_T.weight)
        return
    stream = _normalised(table_T) * norm_T.weight.double() @ P.to(table_T).T
    table_S.copy_(stream * table_T.std(1, correction=0, keepdim=True))
    norm_S.weight.fill_(float(stream.square().mean().sqrt()))


def _cut_layer(
    layer_S: torch.nn.Module,
    layer_T: torch.nn.Module,
    is_first: bool,
    P: Tensor,
    heads: Sequence[int],
    neurons: Sequence[int],
    head_dim: int,
) -> None:
    """Fill a layer of the student from a layer of the teacher. P: (D_S, D_T) float64 on the CPU."""
    Wqkv, attn_Wo, Wi, mlp_Wo = (
        W.weight.double().cpu() for W in (layer_T.attn.Wqkv, layer_T.attn.Wo, layer_T.mlp.Wi, layer_T.mlp.Wo)
    )
    D_S, D_T = P.shape
    scale = (D_T / D_S) ** 0.5
    basis = P.T
    if not is_first:
        Wqkv = scale * Wqkv * layer_T.attn_norm.weight.double().cpu()
        layer_S.attn_norm.weight.fill_(1)
    elif D_S == D_T:
        # No norm precedes the first attention, so it reads the embeddings' mean too, and the table is copied whole.
        basis = torch.eye(D_T, dtype=torch.float64)
    Wi = scale * Wi * layer_T.mlp_norm.weight.double().cpu()
    layer_S.mlp_norm.weight.fill_(1)
    modules = (layer_S.attn.Wqkv, layer_S.attn.Wo, layer_S.mlp.Wi, layer_S.mlp.Wo)
    attention = project_attention(Wqkv, attn_Wo, basis, heads, head_dim)
    mlp = project_mlp(Wi, mlp_Wo, P.T, neurons)
    for module, weight in zip(modules, (*attention, *mlp), strict=True):
        module.weight.copy_(weight)


@torch.no_grad()
def heal(
    student: ModernBertModel, teacher: ModernBertModel, batches: Batches, kept: Sequence[int], P: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Refit the weights that write to the student's stream, from the first layer to the last.

    The sample runs through both models side by side. When a layer of the student is reached, its attention's Wo and
    then its MLP's Wo are moved to where the student's stream comes nearest to P times the teacher's.

    Args:
        student: modified.
        teacher: not modified.
        batches: packed batches on the models' device.
        kept: (L_S,) layers of the teacher.
        P: (D_S, D_T).

    Returns:
        The last hidden states of the student (1, T, D_S) and of the teacher (1, T, D_T) for each batch.
    """
    P = P.to(student.device, torch.float32)
    h_S = [student.embeddings(batch["input_ids"]) for batch in batches]
    h_T = [teacher.embeddings(batch["input_ids"]) for batch in batches]
    with ProgressBar(len(kept), "fitting the student", "layer") as bar:
        for index, (source, following) in enumerate(zip(kept, [*kept[1:], len(teacher.layers)], strict=True)):
            layer = student.layers[index]
            h_T = _after_attention(teacher, source, h_T, batches)
            inputs = [_attention(student, index, h, batch)[0] for h, batch in zip(h_S, batches, strict=True)]
            h_S = _refit_and_write(layer.attn.Wo, h_S, inputs, h_T, P)
            h_T = _after_mlp(teacher, source, h_T)
            for skipped in range(source + 1, following):
                h_T = _after_mlp(teacher, skipped, _after_attention(teacher, skipped, h_T, batches))
            inputs = [_mlp_input(layer, h) for h in h_S]
            h_S = _refit_and_write(layer.mlp.Wo, h_S, inputs, h_T, P)
            bar.update(1)
    return [student.final_norm(h) for h in h_S], [teacher.final_norm(h) for h in h_T]


def _after_attention(model: ModernBertModel, index: int, streams: list[Tensor], batches: Batches) -> list[Tensor]:
    """The streams (1, T, D) after a layer's attention wrote to them."""
    return [h + _attention(model, index, h, batch)[1] for h, batch in zip(streams, batches, strict=True)]


def _after_mlp(model: ModernBertModel, index: int, streams: list[Tensor]) -> list[Tensor]:
    """The streams (1, T, D) after a layer's MLP wrote to them."""
    layer = model.layers[index]
    return [h + layer.mlp.Wo(_mlp_input(layer, h)) for h in streams]


def _refit_and_write(
    Wo: torch.nn.Linear, streams: list[Tensor], inputs: list[Tensor], targets_T: list[Tensor], P: Tensor
) -> list[Tensor]:
    """Refit Wo, and return the streams (1, T, D_S) after it wrote to them.

    inputs: (1, T, K), what Wo reads. targets_T: (1, T, D_T), the teacher's streams. P: (D_S, D_T) float32.
    """
    targets = [(target @ P.T - h)[0] for target, h in zip(targets_T, streams, strict=True)]
    _refit(Wo.weight, [x[0] for x in inputs], targets)
    return [h + Wo(x) for h, x in zip(streams, inputs, strict=True)]


def _refit(weight: Tensor, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Move a weight (D, K) to the ridge regression from inputs (T, K) to targets (T, D).

    The penalty is on the distance to the weight as it was, so directions without data stay as they are.
    """
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


@torch.no_grad()
def fit_head(
    student: ModernBertForMaskedLM,
    teacher: ModernBertForMaskedLM,
    batches: Batches,
    states_S: Sequence[Tensor],
    states_T: Sequence[Tensor],
) -> None:
    """Fill the masked-LM head: copied at the teacher's width, else regressed so that the logits come nearest.

    Args:
        student: modified; its embeddings and layers are filled.
        teacher: not modified.
        batches: packed batches with `labels` (1, T); the head is fitted on the masked tokens.
        states_S, states_T: last hidden states (1, T, D_S) and (1, T, D_T) for each batch.
    """
    S, T = student, teacher
    if S.config.hidden_size == T.config.hidden_size:
        S.head.load_state_dict(T.head.state_dict())
        S.decoder.bias.copy_(T.decoder.bias)
        return
    hidden = [batch["labels"][0] != IGNORED for batch in batches]
    z = torch.cat([state[0][at] for state, at in zip(states_S, hidden, strict=True)]).double()
    y_T = torch.cat([T.head(state[0][at]) for state, at in zip(states_T, hidden, strict=True)]).double()
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
