"""The reduced teacher: a SentenceTransformer with its projection to the student's width."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize

from modernbert_small.algebra import unit_vectors
from modernbert_small.evaluation.systems import WIDTHS
from modernbert_small.label.labeller import Labeller, require_vectors, text_prompts
from modernbert_small.label.projection import fit_projection, projection_quality
from modernbert_small.label.sample import Sample, sample_texts
from modernbert_small.run.devices import best_device
from modernbert_small.run.errors import UserError
from modernbert_small.run.processes import gathered, rank, world_size
from modernbert_small.run.progress import ProgressBar

logger = logging.getLogger(__name__)

_TEXTS_PER_BLOCK = 1024  # that one process embeds at a time
QUALITY_ROWS = 2_000  # held-out texts whose cosines and neighbours measure the projection


class EmbeddedSample(NamedTuple):
    """What the projection is fitted on and measured with.

    rows: (n,) of the train split. vectors: (n, D_T) float32, theirs. heldout: (m, D_T), of validation texts.
    """

    rows: NDArray[np.int64]
    vectors: NDArray[np.float32]
    heldout: NDArray[np.float32]


def embed_sample(labeller: Labeller, data: str, sample_size: int, seed: int) -> EmbeddedSample:
    """Embed a sample of the corpus; every process must call this, and they share the work.

    Args:
        labeller: the teacher's.
        data: the corpus's folder.
        sample_size: texts of the training split, all of them if there are fewer.
        seed: fixes the sample.

    Raises:
        UserError: vectors without a finite length, or all alike.
    """
    _, texts, kinds = sample_texts(data, "validation", QUALITY_ROWS, seed)
    heldout = _embed_together(labeller, texts, kinds, f"{data}, validation split")
    rows, texts, kinds = sample_texts(data, "train", sample_size, seed)
    logger.info("embedding a sample of %s texts, for the projection", f"{len(rows):,}")
    return EmbeddedSample(rows, _embed_together(labeller, texts, kinds, f"{data}, training split"), heldout)


def _embed_together(labeller: Labeller, texts: list[str], kinds: list[str], where: str) -> NDArray[np.float32]:
    """The vectors (N, D_T) of texts, in all processes. Blocks of texts, which depend on nothing else, are dealt."""
    made: dict[int, NDArray[np.float32]] = {}
    starts = range(0, len(texts), _TEXTS_PER_BLOCK)
    with ProgressBar(len(texts), "embedding the sample", "text") as bar:
        for first in starts[rank() :: world_size()]:
            part = slice(first, first + _TEXTS_PER_BLOCK)
            made[first] = labeller.embed(labeller.tokenize(texts[part], kinds[part]), bar)
    for others in gathered(made):
        made |= others
    vectors = np.concatenate([made[first] for first in starts])
    require_vectors(vectors, texts, where)
    _require_variety(vectors, where)
    return vectors


def reduce_teacher(
    labeller: Labeller, sample: EmbeddedSample, width: int, sample_file: Path
) -> tuple[SentenceTransformer, dict[str, Any]]:
    """Fit the projection on a sample of the corpus and add it to the teacher.

    Args:
        labeller: the teacher's.
        sample: of `embed_sample`.
        width: D, below the teacher's own D_T.
        sample_file: where the sample's reduced vectors go, which are labels already.

    Returns:
        The reduced teacher, and the report: how many texts it was fitted on, the energy explained, what held-out
        vectors keep of their cosines and neighbours, and the speed.
    """
    logger.info("fitting the projection %d -> %d", sample.vectors.shape[1], width)
    basis, energy = fit_projection(sample.vectors, width)
    logger.info("explained energy: %.2f %%", 100 * energy.sum())
    Sample(sample.rows, (sample.vectors @ basis).astype(np.float32)).save(sample_file)
    report = {
        "sample_texts": len(sample.rows),
        "explained_energy": round(float(energy.sum()), 6),
        "heldout_texts": len(sample.heldout),
        "quality": measure_quality(sample.heldout, basis),
        "spectrum": [round(float(share), 8) for share in energy],
        **labeller.speed,
    }
    return with_projection(labeller.teacher, basis), report


def _require_variety(vectors: NDArray[np.float32], where: str) -> None:
    """Refuse vectors (n, D_T) that are all alike, which have no directions to fit and no cosines to compare.

    Raises:
        UserError: all texts are equal, or mean the same to the teacher.
    """
    if np.ptp(vectors, axis=0).max() < 1e-6:
        raise UserError(f"--train_file {where}: the teacher's vectors of all texts are equal; expected different texts")


def measure_quality(heldout: NDArray[np.float32], basis: NDArray[np.float64]) -> dict[int, dict[str, float]]:
    """What the projection keeps of held-out vectors, at its full width and cut shorter; logged too.

    Args:
        heldout: (N, D_T).
        basis: (D_T, D).

    Returns:
        By width, what `projection_quality` measures.
    """
    after = unit_vectors(heldout) @ basis
    D = basis.shape[1]
    widths = [D, *(width for width in WIDTHS if width < D)]
    quality = {width: projection_quality(heldout, after[:, :width]) for width in widths}
    logger.info("on %d held-out texts:", len(heldout))
    for width, kept in quality.items():
        correlation, neighbours = kept["cosine_correlation"], 100 * kept["neighbour_recall"]
        logger.info(
            "  %4d values: correlation of cosines %.4f, neighbours kept %.1f %%", width, correlation, neighbours
        )
    return quality


def with_projection(teacher: SentenceTransformer, basis: NDArray[np.float64] | None) -> SentenceTransformer:
    """The teacher with its vectors reduced to unit length D.

    A teacher that cuts its vectors by itself (`truncate_dim`) does so after its last module. Here the projection reads
    the first values alone, which is the same.

    Args:
        teacher: any.
        basis: (D_T, D), None for a teacher whose vectors are D wide already.
    """
    modules = list(teacher)
    while isinstance(modules[-1], Normalize):
        modules.pop()
    if basis is None and teacher.truncate_dim is not None:
        basis = np.eye(teacher.truncate_dim)
    if basis is not None:
        with teacher.truncate_embeddings(None):
            width = teacher.get_embedding_dimension()
        dense = Dense(width, basis.shape[1], bias=False, activation_function=torch.nn.Identity())
        dense.linear.weight.data.zero_()[:, : len(basis)] = torch.from_numpy(basis.T).float()
        modules.append(dense)
    if getattr(teacher[0], "do_lower_case", False):
        # sentence-transformers keeps it in tokenizer.json alone, whose normalizer a BertTokenizer replaces by its own.
        teacher[0].config_keys = [*teacher[0].config_keys, "do_lower_case"]
    return SentenceTransformer(
        modules=[*modules, Normalize()],
        prompts=teacher.prompts | text_prompts(teacher),  # under the names that encode_query and encode_document use
        default_prompt_name=teacher.default_prompt_name,
        similarity_fn_name="cosine",
        device=str(best_device()),
    )
