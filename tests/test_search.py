"""Searching one's own texts: what is read, what is found, the command, and the page over HTTP."""

import sys
import threading
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

import numpy as np
import pytest
from helpers import SENTENCES, tiny_sentence_transformer

from modernbert_small import search
from modernbert_small.run.errors import UserError
from modernbert_small.search import Index, Passage, parse_arguments, read_passages, server

LONG = [f"{number}. {sentence}" for number, sentence in enumerate(SENTENCES * 3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_sentence_transformer(tmp_path_factory.mktemp("model"), "bert")


@pytest.fixture
def texts(tmp_path):
    """A folder with a long text, one that says nothing, and pairs, whose queries are no texts to search."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "long.txt").write_text("\n\n".join(LONG))
    (folder / "nothing.txt").write_text("--")
    (folder / "pairs.csv").write_text("query,positive\nwhat is it,<b>An   answer</b>\n")
    return folder


def test_passages_are_documents_split_where_the_model_ends(model, texts):
    passages = read_passages([str(texts), str(texts / "pairs.csv")], model)
    assert passages[-1] == Passage(str(texts / "pairs.csv"), "<b>An answer</b>")
    parts = [text for file, text in passages[:-1] if file == str(texts / "long.txt")]
    assert len(parts) == len(passages) - 1 > 1
    assert " ".join(parts).split() == " ".join(LONG).split()
    assert all(len(model.tokenizer(text)["input_ids"]) <= model.max_seq_length for text in parts)


@pytest.mark.parametrize(("path", "said"), [("nowhere", "nowhere: no such file or folder"), (".", "no text to search")])
def test_nothing_to_search_is_one_line(model, tmp_path, monkeypatch, path, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match=said):
        read_passages([path], model)


def test_the_nearest_come_first(model):
    index = Index(model, [Passage("file", text) for text in SENTENCES * 4])
    vectors = model.encode(SENTENCES, normalize_embeddings=True)
    query = model.encode("the train", normalize_embeddings=True)
    hits = index.search("the train")
    assert len(hits) == search.HITS
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(np.tile(vectors @ query, 4))[::-1][:10], atol=1e-6)
    assert hits[0].passage.text == SENTENCES[int((vectors @ query).argmax())]


def test_the_command(model, texts, monkeypatch, capsys):
    (texts / "red.txt").write_text("a \x9b31mred text")  # which the reading cleans; its file's name stays
    (texts / "red.txt").rename(texts / "re\x1bd.txt")
    monkeypatch.setattr(search, "load_sentence_transformer", lambda *_: model)
    monkeypatch.setattr(sys, "argv", ["search", "model", str(texts), "a 31mred text"])
    search.main()
    first, text, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith(" 1  ")
    assert first.endswith("re\\x1bd.txt")
    assert text.strip() == "a 31mred text"


@pytest.mark.parametrize("words", [["model", "a query"], ["model", "texts", "texts"], ["model", "texts", " "]])
def test_without_a_query_the_page_is_named(texts, monkeypatch, words):
    monkeypatch.chdir(texts.parent)
    monkeypatch.setattr(sys, "argv", ["search", *words])
    with pytest.raises(UserError, match=r"found no query after the paths.*expected one, in quotes, or --page"):
        parse_arguments()


def test_the_page_answers_queries_and_only_here(model, texts):
    with server("small", Index(model, read_passages([str(texts)], model))) as pages:
        threading.Thread(target=pages.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{pages.server_port}"
        empty = urlopen(address).read().decode()
        assert "rank 1" not in empty
        with urlopen(f"{address}/?q={quote('is <i>it</i> an answer?')}") as response:
            found = response.read().decode()
            assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert 'value="is &lt;i&gt;it&lt;/i&gt; an answer?"' in found
        assert "&lt;b&gt;An answer&lt;/b&gt;" in found
        assert "rank 1, cosine " in found
        assert f"{texts}/pairs.csv" in found
        for url, host in ((f"{address}/etc/passwd", None), (address, "evil.example")):
            with pytest.raises(HTTPError, match="404"):
                urlopen(Request(url, headers={"Host": host} if host else {}))
        pages.shutdown()
