"""A student that starts as the best static model of its labels.

A static model embeds a text as the mean of one vector e_t for each of its tokens. Which vectors come nearest to given
labels is a linear problem, so it needs no training:

    e_t = M f_t + b + d_t

f_t is what the teacher says of a token by itself: its vector of that token alone, and its input embedding. M and b are
the least-squares fit of the labels to the mean f_t of each text, so they also speak for tokens that no text holds. d_t
is the ridge regression of what is left on the texts' tokens, and is near zero for tokens that few texts hold.

`write_static` puts the e_t into a ModernBERT's token embeddings so that the model, but for its layers, computes just
this mean. docs/initialisation.md has the mathematics, and what it is worth.

V: vocabulary. D: width of the labels and of the student. F: features of a token. N: texts.

References:
    Model2Vec, https://github.com/MinishLab/model2vec: static models from a teacher's vectors of single tokens.
"""

import logging

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sentence_transformers import SentenceTransformer
from sklearn.linear_model import LinearRegression
from transformers import ModernBertModel

from modernbert_small.algebra import sparse_ridge
from modernbert_small.distil.alignment import cosine_to_labels
from modernbert_small.distil.labels import DistillationDataset
from modernbert_small.packed.tokens import TokenStore
from modernbert_small.run.devices import bf16_autocast
from modernbert_small.run.errors import UserError
from modernbert_small.run.progress import ProgressBar

logger = logging.getLogger(__name__)

_SAMPLE_ROWS = 65_536
_RIDGE = 0.03  # in texts: chosen on held-out labels (docs/LOG.md)
_KEPT_LENGTHS = 0.9  # the share of all tokens whose vectors keep their lengths; longer ones are shortened


def start_static(
    student: SentenceTransformer,
    teacher: SentenceTransformer,
    dataset: DistillationDataset,
    heldout: DistillationDataset,
    tokens_per_batch: int,
) -> dict[str, float]:
    """Make the student the best static model of the labels; its layers write nothing at first.

    Args:
        student: ModernBERT, mean pooling, Normalize; modified.
        teacher: the reduced teacher of the labels, with the student's vocabulary.
        dataset: texts and labels (N, D). The sample is its first 65,536 rows, which are in random order.
        heldout: other texts and labels, on which the start is measured: it fits its own sample too well.
        tokens_per_batch: of the student's forward passes.

    Returns:
        The mean cosine to the held-out labels, `before` and `after`.

    Raises:
        UserError: the student does not pool by the mean, or has another vocabulary than the teacher.
    """
    encoder: ModernBertModel = student[0].auto_model
    if student[1].pooling_mode != "mean":
        raise UserError(f"start: static needs mean pooling, found {student[1].pooling_mode}; use --pooling mean")
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise UserError(
            "start: static needs a student with its teacher's tokenizer, found another one; make the student with "
            "phase 4's teacher as --teacher_name_or_path of phase 2"
        )
    known = teacher[0].auto_model.get_input_embeddings().num_embeddings
    if known < encoder.config.vocab_size:
        raise UserError(
            f"start: static: the teacher embeds {known} tokens and the student {encoder.config.vocab_size}; make the "
            "student with phase 4's teacher as --teacher_name_or_path of phase 2"
        )
    cosines = {"before": cosine_to_labels(student, heldout, tokens_per_batch)}
    rows = min(len(dataset), _SAMPLE_ROWS)
    logger.info("fitting a static model to the labels of %s texts", f"{rows:,}")
    texts = token_shares(dataset.store, rows, encoder.config.vocab_size)
    labels = dataset.labels[:rows].astype(np.float32)
    static = fit_static(texts, labels, token_features(teacher, encoder.config.vocab_size))
    occurrences = np.bincount(dataset.store.tokens[: dataset.store.offsets[rows]], minlength=len(static))
    write_static(encoder, static, labels, occurrences)
    cosines["after"] = cosine_to_labels(student, heldout, tokens_per_batch)
    logger.info("cosine to the held-out labels %(before).3f, as the best static model %(after).3f", cosines)
    return cosines


def token_shares(store: TokenStore, rows: int, vocab_size: int) -> csr_array:
    """What share of each text's tokens each entry of the vocabulary is: (rows, V), whose rows sum to 1."""
    lengths = store.lengths[:rows]
    shares = np.repeat((1 / lengths).astype(np.float32), lengths)
    tokens = store.tokens[: store.offsets[rows]].astype(np.int64)
    return csr_array((shares, tokens, store.offsets[: rows + 1]), shape=(rows, vocab_size))


@torch.no_grad()
def token_features(teacher: SentenceTransformer, vocab_size: int, batch_size: int = 1024) -> NDArray[np.float32]:
    """The teacher's vector of each token alone, and its input embedding, both of unit length: (V, F)."""
    specials = teacher.tokenizer("")["input_ids"]
    before, after = specials[: len(specials) // 2], specials[len(specials) // 2 :]
    teacher.eval()
    alone = []
    with ProgressBar(vocab_size, "the teacher's vectors of single tokens", "token") as bar:
        for ids in torch.arange(vocab_size).split(batch_size):
            tokens = torch.tensor([*before, 0, *after], device=teacher.device).repeat(len(ids), 1)
            tokens[:, len(before)] = ids
            with bf16_autocast(teacher.device):
                output = teacher({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
            alone.append(output["sentence_embedding"].float().cpu())
            bar.update(len(ids))
    embeddings = teacher[0].auto_model.get_input_embeddings().weight[:vocab_size].float().cpu()
    features = [torch.cat(alone), embeddings - embeddings.mean(0)]
    return torch.cat([torch.nn.functional.normalize(part, dim=1) for part in features], 1).numpy()


def fit_static(texts: csr_array, labels: NDArray[np.float32], features: NDArray[np.float32]) -> NDArray[np.float32]:
    """The token vectors whose means come nearest to the labels.

    Args:
        texts: (N, V), rows that sum to 1.
        labels: (N, D).
        features: (V, F).

    Returns:
        (V, D).
    """
    expected = LinearRegression().fit(texts @ features, labels).predict(features)
    return (expected + sparse_ridge(texts, labels - texts @ expected, _RIDGE)).astype(np.float32)


@torch.no_grad()
def write_static(
    encoder: ModernBertModel, static: NDArray[np.float32], labels: NDArray[np.float32], occurrences: NDArray[np.int64]
) -> None:
    """Write token vectors into the embeddings, and silence the layers, so that a text's vector is their mean.

    Between the table and the final state are two LayerNorms, which subtract a vector's mean and set its length. Two of
    the D axes make up for both: with them every row has mean 0 and the same length, so that the norms change nothing.
    They are the two axes in which the labels are smallest, and the final norm's weight hides them.

    Args:
        encoder: modified. The layers keep the weights that read the stream, and lose those that write to it.
        static: (V, D).
        labels: (N, D).
        occurrences: (V,) of each token in the texts.
    """
    fillers = np.argsort(np.square(labels).sum(0))[:2]
    kept = np.delete(np.arange(static.shape[1]), fillers)
    vectors = static[:, kept].astype(np.float64)
    # Rows x with fillers -s/2 +- h, s being their sum, have mean 0 and the squared length x^2 + s^2 / 2 + 2 h^2.
    needed = np.square(vectors).sum(1) + vectors.sum(1) ** 2 / 2
    order = np.argsort(needed)
    most = needed[order][np.searchsorted(np.cumsum(occurrences[order]), _KEPT_LENGTHS * occurrences.sum())]
    vectors *= np.sqrt(most / np.maximum(needed, most))[:, None]
    half_sum = vectors.sum(1) / 2
    h = np.sqrt(np.maximum(most - np.square(vectors).sum(1) - 2 * half_sum**2, 0) / 2)

    rows = np.empty(static.shape)
    rows[:, kept], rows[:, fillers] = vectors, np.stack([h - half_sum, -h - half_sum], 1)
    # As long as the norm makes them. With shorter rows the same learning rate would undo the fit (docs/LOG.md).
    rows *= (static.shape[1] / most) ** 0.5
    encoder.embeddings.tok_embeddings.weight.copy_(torch.from_numpy(rows))
    encoder.embeddings.norm.weight.fill_(1)
    for layer in encoder.layers:
        layer.attn.Wo.weight.zero_()
        layer.mlp.Wo.weight.zero_()
    encoder.final_norm.weight.fill_(1)
    encoder.final_norm.weight[torch.from_numpy(fillers)] = 0
