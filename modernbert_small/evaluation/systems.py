"""The systems that are compared, step by step from the teacher down to the student's smaller vectors.

Q: queries. N: documents, or pairs of sentences. D_T, D: width of the teacher before phase 4, and of the student.
"""

from pathlib import Path

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense

from modernbert_small.algebra import unit_vectors
from modernbert_small.evaluation.embedder import Vectors
from modernbert_small.evaluation.metrics import PRECISIONS, FloatArray, rescored, similarities, truncated
from modernbert_small.run.records import read_run

TEACHER, PROJECTED, STUDENT = "teacher", "teacher, projected", "student"
MIXED = "student's queries, teacher's documents"
WIDTHS = (256, 128, 64, 32)  # to which vectors are truncated, besides half of their own width

# Vectors of queries (Q, D) and documents (N, D), or of the first (N, D) and second (N, D) sentences of pairs.
VectorPair = tuple[Vectors, Vectors]


def is_reduced_teacher(folder: str) -> bool:
    """Whether phase 4 made this folder and added a projection."""
    return (Path(folder) / "run.json").exists() and bool(read_run(folder).get("projection"))


def split_projection(teacher: SentenceTransformer, is_reduced: bool) -> tuple[SentenceTransformer, Vectors | None]:
    """Take a reduced teacher apart.

    Args:
        teacher: any model.
        is_reduced: whether its last Dense module is phase 4's projection.

    Returns:
        The teacher as it was before phase 4, and the projection (D_T, D); the model itself and None if it is not
        reduced.
    """
    dense = [module for module in teacher if isinstance(module, Dense)]
    if not is_reduced or not dense:
        return teacher, None
    weight = dense[-1].linear.weight.detach().float().cpu().numpy()  # (D, D_T)
    whole = SentenceTransformer(
        modules=[module for module in teacher if module is not dense[-1]],
        prompts=teacher.prompts,
        default_prompt_name=teacher.default_prompt_name,
        device=str(teacher.device),
    )
    return whole, weight.T


def project(T: VectorPair, projection: Vectors) -> VectorPair:
    """The teacher's vectors (., D_T) after phase 4's projection (D_T, D): (., D), unit length."""
    return unit_vectors(T[0] @ projection), unit_vectors(T[1] @ projection)


def teacher_scores(T: VectorPair, projected: VectorPair | None) -> dict[str, FloatArray]:
    """Scores (Q, N) of the teacher, and of the teacher after its projection if it has one.

    Args:
        T: vectors (Q, D_T) and (N, D_T), unit length.
        projected: see `project`.
    """
    scores = {TEACHER: similarities(*T)}
    if projected is not None:
        scores[PROJECTED] = similarities(*projected)
    return scores


def student_scores(S: VectorPair, T: VectorPair) -> dict[str, FloatArray]:
    """Scores (Q, N) of the student, alone, with the teacher's documents, truncated and quantised.

    A quantised search is also measured with its first documents ordered again by their float32 vectors.

    Args:
        S: the student's vectors (Q, D) and (N, D), unit length.
        T: the teacher's, projected if it has a projection. A teacher of another width than the student's is not mixed
            with it.
    """
    D = S[0].shape[1]
    scores = {STUDENT: similarities(*S)}
    if T[0].shape[1] == D:
        scores[MIXED] = similarities(S[0], T[1])
    for size in truncated_widths(D)[1:]:
        scores[f"student, {size} values"] = similarities(truncated(S[0], size), truncated(S[1], size))
    for precision in PRECISIONS[1:]:
        scores[f"student, {precision}"] = similarities(*S, precision)
        scores[f"student, {precision}, rescored"] = rescored(scores[f"student, {precision}"], scores[STUDENT])
    return scores


def truncated_widths(D: int) -> list[int]:
    """The widths that vectors of D values are measured at: D itself, its half and the smaller WIDTHS, widest first."""
    return sorted({D, D // 2, *(size for size in WIDTHS if size < D)}, reverse=True)
