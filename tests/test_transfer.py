"""The transfer of all layers: identities that hold exactly, and optimality against brute force."""

import itertools

import numpy as np
import pytest
import torch
from transformers import ModernBertConfig, ModernBertForMaskedLM

from modernbert_small.algebra import mean_free_basis
from modernbert_small.initialise.all_layers import (
    TeacherMoments,
    _refit,
    choose_layers,
    cut,
    fit_head,
    heal,
    select_by_output,
    select_heads,
    select_neurons,
    stream_basis,
    transfer_all_layers,
    unmasked,
)
from modernbert_small.packed.attention import use_packed_attention
from modernbert_small.packed.batches import packed_features
from modernbert_small.pretrain.masking import IGNORED

V = 60
TYPES = {n: ["full_attention" if i % 3 == 0 else "sliding_attention" for i in range(n)] for n in range(1, 25)}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def model(width, layers=4, heads=4, neurons=20, seed=0, norms=True):
    torch.manual_seed(seed)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "pad_token_id"), 0)
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    config = ModernBertConfig(
        vocab_size=V,
        intermediate_size=neurons,
        local_attention=8,
        initializer_range=0.3,
        norm_eps=1e-12,
        **sizes,
        **ids,
    )
    made = ModernBertForMaskedLM(config).eval()
    with torch.no_grad():
        for name, value in made.named_parameters():
            if norms and "norm" in name:
                value.uniform_(0.5, 1.5)
            if "bias" in name:
                value.normal_()
    use_packed_attention(made, "auto", torch.device("cpu"), torch.float32)
    return made


def batches(n=3, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(n):
        lengths = rng.integers(3, 30, 12)
        features = packed_features(rng.integers(0, V, lengths.sum()), lengths)
        labels = np.where(rng.random(lengths.sum()) < 0.5, 1, IGNORED)
        made.append(features | {"labels": torch.from_numpy(labels)[None]})
    return made


def inputs(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


@torch.no_grad()
def logits(of, batch):
    return of(**inputs(batch)).logits


@torch.no_grad()
def last_hidden_states(of, sample):
    return [of.model(**inputs(batch)).last_hidden_state for batch in sample]


def transfer(student, teacher, sample, healed):
    """`transfer_all_layers`, or the same without healing; returns P."""
    if healed:
        return transfer_all_layers(student, teacher, sample)[0]
    kept = choose_layers(teacher.config.layer_types, student.config.layer_types)
    moments = TeacherMoments(teacher.model)
    moments.add(sample[::2])
    S = student.config
    P = stream_basis(moments.stream.sum(0), S.hidden_size)
    selection = select_by_output(teacher, moments, kept, P, S.num_attention_heads, S.intermediate_size)
    cut(student, teacher, kept, P, selection)
    fit_head(student, teacher, sample, *(last_hidden_states(each, sample) for each in (student, teacher)))
    return P


def test_with_full_width_and_all_layers_the_student_is_the_teacher():
    teacher, student = model(16), model(16, seed=1)
    P, kept = transfer_all_layers(student, teacher, batches())
    batch = batches(1, seed=5)[0]
    torch.testing.assert_close(logits(student, batch), logits(teacher, batch), atol=1e-4, rtol=0)
    assert kept == [0, 1, 2, 3]
    np.testing.assert_allclose(P, np.eye(16) - 1 / 16, atol=1e-12)


def in_a_subspace():
    """A teacher of width 24 that lives in 11 dimensions, with half its heads silent; and a basis of these."""
    teacher = model(24, heads=6, norms=False)
    basis = mean_free_basis(24) @ torch.linalg.qr(torch.randn(23, 11, dtype=torch.float64))[0]
    into = (basis @ basis.T).float()
    with torch.no_grad():
        teacher.get_input_embeddings().weight.copy_(torch.randn(V, 24) @ into)
        for layer in teacher.model.layers:
            layer.attn.Wo.weight.copy_(into @ layer.attn.Wo.weight)
            layer.attn.Wo.weight.view(24, 6, 4)[:, [1, 2, 5]] = 0
            layer.mlp.Wo.weight.copy_(into @ layer.mlp.Wo.weight)
    return teacher, basis


@pytest.mark.parametrize("healed", [True, False])
def test_a_stream_in_the_subspace_is_cut_without_loss(healed):
    teacher, basis = in_a_subspace()
    student = model(12, heads=3, seed=1)
    P = transfer(student, teacher, batches(), healed)
    np.testing.assert_allclose(P.T @ P, basis @ basis.T, atol=1e-5)
    batch = inputs(batches(1, seed=5)[0])
    with torch.no_grad():
        h_S, h_T = (m.model(**batch).last_hidden_state[0] for m in (student, teacher))
    # Both have the length sqrt(D): all inner products agree but for that.
    torch.testing.assert_close(h_S @ h_S.T / 12, h_T @ h_T.T / 24, atol=1e-4, rtol=0)


def embeddings(of, batch, pooling):
    """Each row's embedding, row by row, of length one (B, D)."""
    [states] = last_hidden_states(of, [batch])
    rows = states[0].split(batch["cu_seq_lens_q"].diff().tolist())
    vectors = torch.stack([row[0] if pooling == "cls" else row.mean(0) for row in rows])
    return vectors / vectors.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_an_embedding_model_in_the_subspace_keeps_its_cosines(pooling):
    """The student, which nobody has trained, has the cosines of the teacher, a bare encoder."""
    teacher, _ = in_a_subspace()
    student = model(12, heads=3, seed=1)
    head = {name: value.clone() for name, value in student.head.state_dict().items()}
    transfer_all_layers(student, teacher.model, batches(), pooling)
    batch = batches(1, seed=5)[0]
    of_student, of_teacher = (embeddings(each, batch, pooling) for each in (student, teacher))
    torch.testing.assert_close(of_student @ of_student.T, of_teacher @ of_teacher.T, atol=1e-4, rtol=0)
    for name, value in student.head.state_dict().items():
        assert torch.equal(value, head[name])


def test_an_embedding_model_that_hides_its_stream_is_refused():
    """As one does that began as a static model: two axes with most of the stream's length have no weight."""
    teacher, _ = in_a_subspace()
    with torch.no_grad():
        teacher.model.final_norm.weight[: len(teacher.model.final_norm.weight) * 3 // 4] = 0.001
    with pytest.raises(ValueError, match=r"final norm hides \d+% of its stream, as in models that .* use init: random"):
        transfer_all_layers(model(12, heads=3, seed=1), teacher.model, batches(), "mean")


def test_pooled_moments_are_those_of_the_rows_embeddings():
    teacher, sample = model(24, heads=6), batches(2)
    for pooling in ("cls", "mean"):
        moments = TeacherMoments(teacher.model, pooling)
        moments.add(sample)
        expected = np.zeros((24, 24))
        for batch, [states] in zip(sample, last_hidden_states(teacher, sample), strict=True):
            for row in states.double().split(batch["cu_seq_lens_q"].diff().tolist()):
                vector = (row[0] if pooling == "cls" else row.mean(0)).numpy()
                expected += np.outer(vector, vector)
        np.testing.assert_allclose(moments.pooled, expected, rtol=1e-4, atol=1e-4)
        added = moments.all() - moments.stream.sum(0)
        np.testing.assert_allclose(added / added.trace(), expected / np.trace(expected), rtol=1e-4, atol=1e-6)
        assert float(added.trace()) == pytest.approx(float(moments.stream.sum(0).trace()))


def test_a_second_model_gives_the_head():
    """With full width, a student of the encoder of one model has the logits of the model that its head is of."""
    teacher, student = model(16), model(16, seed=1)
    transfer_all_layers(student, teacher.model, batches(), "mean", head_teacher=teacher)
    batch = batches(1, seed=5)[0]
    torch.testing.assert_close(logits(student, batch), logits(teacher, batch), atol=1e-4, rtol=0)


def test_a_sample_is_read_without_its_masks():
    batch = batches(1)[0]
    original = unmasked(batch)
    hidden = batch["labels"] != IGNORED
    assert torch.equal(original["input_ids"][hidden], batch["labels"][hidden])
    assert torch.equal(original["input_ids"][~hidden], batch["input_ids"][~hidden])
    assert hidden.any()


def test_permuted_heads_and_neurons_change_nothing():
    teacher, permuted = model(24, heads=6), model(24, heads=6)
    heads, neurons = torch.randperm(6), torch.randperm(20)
    with torch.no_grad():
        for layer in permuted.model.layers:
            Wqkv = layer.attn.Wqkv.weight
            Wqkv.copy_(Wqkv.view(3, 6, 4, 24)[:, heads].reshape(72, 24).clone())
            layer.attn.Wo.weight.copy_(layer.attn.Wo.weight.view(24, 6, 4)[:, heads].reshape(24, 24).clone())
            layer.mlp.Wi.weight.copy_(layer.mlp.Wi.weight.view(2, 20, 24)[:, neurons].reshape(40, 24).clone())
            layer.mlp.Wo.weight.copy_(layer.mlp.Wo.weight[:, neurons].clone())
    students = []
    for source in (teacher, permuted):
        students.append(model(12, layers=3, heads=3, neurons=10, seed=1))
        transfer_all_layers(students[-1], source, batches())
    batch = batches(1, seed=5)[0]
    torch.testing.assert_close(logits(students[0], batch), logits(students[1], batch), atol=1e-3, rtol=1e-3)


def test_the_same_again_is_the_same():
    students = [model(12, layers=3, heads=3, seed=1) for _ in range(2)]
    for student in students:
        transfer_all_layers(student, model(24, heads=6), batches())
    for a, b in zip(students[0].state_dict().values(), students[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_healing_brings_the_logits_nearer():
    teacher = model(24, layers=7, heads=6)
    held_out = batches(2, seed=9)
    distance = {}
    for healed in (True, False):
        student = model(12, layers=4, heads=3, neurons=16, seed=1)
        transfer(student, teacher, batches(16), healed)
        distance[healed] = sum(
            float((logits(student, b).log_softmax(-1) - logits(teacher, b).log_softmax(-1)).square().mean())
            for b in held_out
        )
    assert distance[True] < distance[False]


def test_healing_ends_at_the_models_own_hidden_states():
    teacher, student, sample = model(24, layers=7, heads=6), model(12, heads=3, seed=1), batches()
    P = stream_basis(torch.eye(24, dtype=torch.float64), 12)
    states = heal(student.model, teacher.model, sample, [0, 1, 2, 6], P)
    for got, of in zip(states, (student, teacher), strict=True):
        for a, b in zip(got, last_hidden_states(of, sample), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_moments_are_those_of_the_models_own_forward():
    teacher, sample = model(24, heads=6, norms=False), batches(2)
    read = {}  # the inputs of each Wo
    for name, module in teacher.model.named_modules():
        if name.endswith("Wo"):
            read[name] = []
            module.register_forward_pre_hook(lambda _, x, to=read[name]: to.append(x[0][0].double().numpy()))
    with torch.no_grad():
        outputs = [teacher.model(**inputs(batch), output_hidden_states=True) for batch in sample]
    read = {name: np.concatenate(x) for name, x in read.items()}
    moments = TeacherMoments(teacher.model)
    moments.add(sample)
    for index in range(5):  # the last of hidden_states is LN(h) already, the norms' weights being 1
        h = np.concatenate([output.hidden_states[index][0].double().numpy() for output in outputs])
        h = (h - h.mean(1, keepdims=True)) / h.std(1, keepdims=True)
        np.testing.assert_allclose(moments.stream[index], np.einsum("ti,tj->ij", h, h), rtol=1e-4, atol=1e-2)
    for index in range(4):
        for head in range(6):
            o = read[f"layers.{index}.attn.Wo"][:, 4 * head : 4 * head + 4]
            np.testing.assert_allclose(moments.heads[index, head], np.einsum("ti,tj->ij", o, o), rtol=1e-4, atol=1e-3)
        a = read[f"layers.{index}.mlp.Wo"]
        np.testing.assert_allclose(moments.neurons[index], np.einsum("ti,ti->i", a, a), rtol=1e-4)


@pytest.mark.parametrize(("teacher", "student"), [(7, 4), (9, 5), (10, 10), (8, 1), (10, 6)])
def test_the_chosen_layers_are_the_nearest_to_even_spacing(teacher, student):
    def distance(choice):
        return sum(abs(layer - i * (teacher - 1) / max(1, student - 1)) for i, layer in enumerate(choice))

    allowed = [
        choice
        for choice in itertools.combinations(range(teacher), student)
        if choice[0] == 0 and [TYPES[teacher][layer] for layer in choice] == TYPES[student]
    ]
    chosen = choose_layers(TYPES[teacher], TYPES[student])
    assert tuple(chosen) in allowed
    assert distance(chosen) == pytest.approx(min(map(distance, allowed)))


def test_the_seeds_sizes_have_their_layers():
    chosen = choose_layers(TYPES[22], TYPES[12])
    assert [TYPES[22][layer] for layer in chosen] == TYPES[12]
    with pytest.raises(ValueError, match="cannot choose 12 layers of 6"):
        choose_layers(TYPES[6], TYPES[12])
    with pytest.raises(ValueError, match="too few sliding_attention layers"):
        choose_layers(["full_attention"] * 5, TYPES[3])


def test_the_basis_explains_most_among_mean_free_ones():
    x = torch.randn(500, 10, dtype=torch.float64) * torch.linspace(3, 0.1, 10, dtype=torch.float64)
    x = x - x.mean(1, keepdim=True)
    P = stream_basis(x.T @ x, 4)
    np.testing.assert_allclose(P @ P.T, np.eye(4) - 1 / 4, atol=1e-12)
    kept = float((x @ P.T).square().sum())
    best = np.linalg.svd(x.numpy(), compute_uv=False)[:3]
    assert kept == pytest.approx((best**2).sum(), rel=1e-9)


def test_importance_is_the_mean_square_of_what_is_written():
    rng = np.random.default_rng(0)
    o, Wo = rng.normal(size=(200, 12)) * np.repeat([1.0, 3, 2], 4), rng.normal(size=(5, 12))
    written = [((o[:, b] @ Wo[:, b].T) ** 2).sum() for b in (slice(0, 4), slice(4, 8), slice(8, 12))]
    two = sorted(np.argsort(written)[-2:].tolist())
    moments = torch.stack([torch.from_numpy(o[:, b].T @ o[:, b]) for b in (slice(0, 4), slice(4, 8), slice(8, 12))])
    assert select_heads(moments, torch.from_numpy(Wo), 2) == two
    neurons = [np.square(np.outer(o[:, i], Wo[:, i])).sum() for i in range(12)]
    expected = sorted(np.argsort(neurons)[-5:].tolist())
    assert select_neurons(torch.from_numpy((o**2).sum(0)), torch.from_numpy(Wo), 5) == expected


def test_refit_is_ridge_regression_around_the_weight():
    rng = np.random.default_rng(0)
    x, y, W = rng.normal(size=(300, 6)), rng.normal(size=(300, 4)), rng.normal(size=(4, 6))
    ridge = 1e-3 * np.trace(x.T @ x) / 6
    rows = np.vstack([x, np.sqrt(ridge) * np.eye(6)])
    expected = np.linalg.lstsq(rows, np.vstack([y, np.sqrt(ridge) * W.T]), rcond=None)[0].T
    weight = torch.from_numpy(W.copy())
    _refit(weight, [torch.from_numpy(x[:100]), torch.from_numpy(x[100:])], [*torch.from_numpy(y).split([100, 200])])
    np.testing.assert_allclose(weight.numpy(), expected, atol=1e-10)
