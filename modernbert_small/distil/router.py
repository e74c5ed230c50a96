"""Student and teacher in one model: queries are embedded by the student, documents by the teacher."""

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router

from modernbert_small.run.errors import UserError


def join(student: SentenceTransformer, teacher: SentenceTransformer) -> SentenceTransformer:
    """One model whose `encode_query` is the student's and whose `encode_document` and `encode` are the teacher's.

    Each text gets the prompt that the model which embeds it would give it.

    Args:
        student: phase 5's model.
        teacher: the reduced teacher that made its labels.

    Raises:
        UserError: they are not equally wide.
    """
    widths = student.get_embedding_dimension(), teacher.get_embedding_dimension()
    if widths[0] != widths[1]:
        raise UserError(
            f"--teacher: its vectors have {widths[1]} dimensions, the student's {widths[0]}; expected the reduced "
            "teacher that made the student's labels, which phase 4 wrote to --teacher_output_dir"
        )
    prompts = {"query": _prompt(student, "query"), "document": _prompt(teacher, "document")}
    return SentenceTransformer(
        modules=[Router.for_query_document(list(student), list(teacher), default_route="document")],
        prompts=prompts,
        default_prompt_name="document" if prompts["document"] else None,
        similarity_fn_name="cosine",
        device=str(student.device),
    )


def _prompt(model: SentenceTransformer, kind: str) -> str:
    """What a model puts before a text of a kind: the prompt of that name, or else its default prompt, or nothing."""
    return model.prompts.get(kind) or model.prompts.get(model.default_prompt_name or "", "")
