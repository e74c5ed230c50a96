"""Search your own texts with a model, from the command line or on a page in your browser.

    python -m modernbert_small.search checkpoints/ModernBERT-small-v2 notes/ manual.txt "how do I reset the password"
    python -m modernbert_small.search checkpoints/ModernBERT-small-v2 notes/ manual.txt --page

Files and folders are read as phase 1 reads them, and texts that are longer than the model reads are split into passages
in the same way. The page is served to this machine only, on a free port, until you press Ctrl-C. It is served, and not
a file with the vectors in it, since only the model can embed a query.
"""

import argparse
from pathlib import Path

from modernbert_small.run.errors import UserError
from modernbert_small.run.script import check_early, run_script


def parse_arguments() -> argparse.Namespace:
    """The command line: `model`, `paths`, `query` (None with --page), `page`.

    Raises:
        UserError: there is no query, or one beside --page is not given.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s MODEL PATH [PATH ...] QUERY\n       %(prog)s MODEL PATH [PATH ...] --page",
    )
    parser.add_argument("model", metavar="MODEL", help="model folder or hub id")
    parser.add_argument("paths", metavar="PATH", nargs="+", help="files and folders of texts, and last the query")
    parser.add_argument("--page", action="store_true", help="serve a page to type queries in, and print its address")
    args = parser.parse_args()
    args.query = None if args.page else args.paths.pop()
    if args.query is not None and (not args.paths or not args.query.strip() or Path(args.query).exists()):
        raise UserError(f"found no query after the paths, but {args.query!r}; expected one, in quotes, or --page")
    return args


if __name__ == "__main__":
    check_early(parse_arguments)  # before the imports below, which take seconds

import logging
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

import numpy as np
from sentence_transformers import SentenceTransformer

from modernbert_small.corpus.files import find_files
from modernbert_small.corpus.sources import DOCUMENT, open_sources
from modernbert_small.corpus.text import Chunker, is_trivial, normalise
from modernbert_small.evaluation.embedder import Embedder
from modernbert_small.evaluation.searches import excerpt
from modernbert_small.reporting.render import render
from modernbert_small.run.loading import load_sentence_transformer
from modernbert_small.run.tables import counted, printable

logger = logging.getLogger(__name__)

HITS = 10  # passages shown
_CHARACTERS = {"terminal": 160, "page": 600}  # shown of a passage
_LOOPBACK = "127.0.0.1"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'self'"


class Passage(NamedTuple):
    """A text, or a part of one, and the file that it stands in."""

    file: str
    text: str


class Hit(NamedTuple):
    """A passage that was found, and its cosine to the query."""

    score: float
    passage: Passage


class Index:
    """Passages and their vectors, in memory.

    Args:
        model: any SentenceTransformer.
        passages: at least one.
    """

    def __init__(self, model: SentenceTransformer, passages: Sequence[Passage]) -> None:
        self.passages = passages
        self._embed = Embedder(model)
        self._documents = self._embed([passage.text for passage in passages], "document", "passages")  # (N, D)
        self._lock = threading.Lock()  # a tokenizer serves one thread at a time

    def search(self, query: str) -> list[Hit]:
        """The passages that are nearest to a query, the nearest first."""
        with self._lock:
            vector = self._embed.encode([query], "query")[0]
        scores = self._documents @ (vector / np.linalg.norm(vector))
        return [Hit(float(scores[row]), self.passages[row]) for row in np.argsort(-scores, kind="stable")[:HITS]]


def read_passages(paths: Sequence[str], model: SentenceTransformer) -> list[Passage]:
    """The documents of files and folders, each once, split where they are longer than the model reads.

    Raises:
        UserError: a path does not exist, cannot be read, or all texts are empty.
    """
    chunker = Chunker(model.tokenizer, model.max_seq_length)
    passages: list[Passage] = []
    for path in paths:
        if not Path(path).exists():
            raise UserError(f"{path}: no such file or folder; expected texts to search, and the query last, in quotes")
        for file in map(str, find_files("texts", Path(path))):
            (source,) = open_sources({file: file})
            rows = source.rows(max_rows=None, seed=0)
            texts = [normalise(text) for row in rows for kind, text in row if kind == DOCUMENT]
            chunks = chunker.split([text for text in texts if not is_trivial(text)])
            passages += [Passage(file, chunk) for of_text in chunks for chunk in of_text]
    if not passages:
        raise UserError(f"{', '.join(paths)}: found no text to search")
    return list(dict.fromkeys(passages))


def page(name: str, index: Index, query: str) -> str:
    """The page with the hits of a query, or without any if it is empty."""
    began = time.perf_counter()
    hits = index.search(query) if query else []
    milliseconds = 1000 * (time.perf_counter() - began)
    shown = [(hit.score, hit.passage.file, excerpt(hit.passage.text, _CHARACTERS["page"])) for hit in hits]
    return render(
        "search.html", name=name, query=query, hits=shown, passages=len(index.passages), milliseconds=milliseconds
    )


def server(name: str, index: Index) -> ThreadingHTTPServer:
    """A server of the page for this machine, on a free port."""

    class Handler(BaseHTTPRequestHandler):
        """Answers GET / and GET /?q=QUERY."""

        def do_GET(self) -> None:
            """Send the page; other paths, and other sites' names for this machine, get an error."""
            address = urlsplit(self.path)
            if address.path != "/" or self.headers.get("Host") != host:
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            query = parse_qs(address.query).get("q", [""])[0].strip()
            body = page(name, index, query).encode()
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Security-Policy", _POLICY)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Keep the terminal quiet."""

    pages = ThreadingHTTPServer((_LOOPBACK, 0), Handler)
    host = f"{_LOOPBACK}:{pages.server_port}"
    return pages


def main() -> None:
    """Embed the texts, and answer one query or serve the page."""
    args = parse_arguments()
    model = load_sentence_transformer("model", args.model)
    index = Index(model, read_passages(args.paths, model))
    logger.info("%s", counted(len(index.passages), "passage"))
    if args.query is None:
        with server(Path(args.model).name, index) as pages:
            print(f"http://{_LOOPBACK}:{pages.server_port}", flush=True)
            pages.serve_forever()
    for rank, (score, passage) in enumerate(index.search(args.query), 1):
        print(printable(f"{rank:2d}  {score:.2f}  {passage.file}"))
        print(printable(f"          {excerpt(passage.text, _CHARACTERS['terminal'])}"))


if __name__ == "__main__":
    run_script(main)
