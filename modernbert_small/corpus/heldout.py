"""An evaluation set made of the corpus's own pairs of a query and a document, which are kept out of training."""

from collections.abc import Iterable, Iterator

import xxhash

from modernbert_small.corpus.sources import DOCUMENT, QUERY, Source
from modernbert_small.corpus.text import is_trivial, normalise
from modernbert_small.evaluation.own_sets import HELDOUT, Parts
from modernbert_small.run.errors import UserError

# Assumptions: enough queries to tell models apart, and few enough documents to embed within minutes.
QUERIES, DOCUMENTS = 500, 10_000
_QUERIES_PER_DRAWN = 10  # of a small corpus most queries must stay for training


def hold_out(sources: Iterable[Source], max_rows: int | None, seed: int) -> Parts:
    """Draw queries with their documents, and other documents to search among.

    What is drawn depends on the seed and on the texts, not on their order: the smallest seeded hashes win. A row's
    query is answered by the first document after it.

    Args:
        sources: those without pairs are not read.
        max_rows: read from each source, as for the corpus.
        seed: as for the corpus.

    Returns:
        Up to 500 queries, at most a tenth of all, and up to 10,000 documents, theirs among them.

    Raises:
        UserError: there are too few queries with a document.
    """
    answers: dict[str, dict[str, None]] = {}  # of a query; dictionaries for their order
    documents: dict[str, None] = {}
    enough = QUERIES * _QUERIES_PER_DRAWN  # with so many, the number that is drawn no longer depends on theirs
    for source in sources:
        for query, document in _pairs(source, max_rows, seed) if source.has_pairs else ():
            answers.setdefault(query, {})[document] = None
            documents[document] = None
            if len(answers) > 2 * enough:
                answers = {kept: answers[kept] for kept in _first(answers, enough, seed)}
            if len(documents) > 2 * DOCUMENTS:
                documents = dict.fromkeys(_first(documents, DOCUMENTS, seed))
    if len(answers) < _QUERIES_PER_DRAWN:
        raise UserError(
            f"--eval_datasets {HELDOUT}: the sources have {len(answers)} different queries with a document, expected "
            f"at least {_QUERIES_PER_DRAWN}; name another evaluation set"
        )
    queries = _first(answers, min(QUERIES, len(answers) // _QUERIES_PER_DRAWN), seed)
    relevant = dict.fromkeys(document for query in queries for document in answers[query])
    found = [*relevant, *_first(documents.keys() - relevant.keys(), max(0, DOCUMENTS - len(relevant)), seed)]
    ids = {document: f"d{number}" for number, document in enumerate(found)}
    return Parts(
        {f"q{number}": query for number, query in enumerate(queries)},
        {key: document for document, key in ids.items()},
        {(f"q{number}", ids[document]): 1.0 for number, query in enumerate(queries) for document in answers[query]},
    )


def require_pairs(sources: Iterable[Source]) -> None:
    """Refuse sources of which none has pairs, before any is read.

    Raises:
        UserError: no source has queries with their documents.
    """
    if not any(source.has_pairs for source in sources):
        raise UserError(
            f"--eval_datasets {HELDOUT}: no source has queries with their documents; name another evaluation set"
        )


def kept_out_texts(parts: Parts) -> Iterator[str]:
    """The queries of a set, and the documents that are relevant to them."""
    yield from parts.queries.values()
    for document in dict.fromkeys(document for _, document in parts.gains):
        yield parts.corpus[document]


def _pairs(source: Source, max_rows: int | None, seed: int) -> Iterator[tuple[str, str]]:
    """The queries of a source with their documents, as the corpus would have them before it is split into chunks."""
    for row in source.rows(max_rows, seed):
        if [kind for kind, _ in row[:2]] == [QUERY, DOCUMENT]:
            query, document = (normalise(text) for _, text in row[:2])
            if not is_trivial(query) and not is_trivial(document):
                yield query, document


def _first(texts: Iterable[str], count: int, seed: int) -> list[str]:
    """The texts with the smallest seeded hashes."""
    return sorted(texts, key=lambda text: (xxhash.xxh3_64_intdigest(text.encode(), seed), text))[:count]
