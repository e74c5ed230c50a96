import bz2
import csv
import gzip
import io
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modernbert_small.corpus.sources import DOCUMENT, QUERY, open_sources, recognise, source_locations
from modernbert_small.run.columns import find_columns
from modernbert_small.run.errors import UserError

ROWS = {"query": ["who?", "where?"], "positive": ["she", "here"], "negative": ["he", "there"]}
FLAT = [
    [(QUERY, "who?"), (DOCUMENT, "she"), (DOCUMENT, "he")],
    [(QUERY, "where?"), (DOCUMENT, "here"), (DOCUMENT, "there")],
]


PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": lambda data: pa.compress(data, "zstd", asbytes=True)}
ENDINGS = [".parquet", ".arrow", ".stream.arrow", ".jsonl", ".json", ".lines.json", ".jsonl.zst", ".json.bz2"]
ENDINGS += [".csv", ".semicolons.csv", ".tsv.gz"]


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, columns):
    """Columns as a file of the format that its suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    ending = path.name.partition(".")[2]
    if ending == "parquet":
        pq.write_table(pa.table(columns), path)
    elif ending in ("arrow", "stream.arrow"):
        table = pa.table(columns)
        with (pa.ipc.new_file if ending == "arrow" else pa.ipc.new_stream)(path, table.schema) as writer:
            writer.write_table(table)
    elif "json" in ending:
        lines = "\n\n".join(json.dumps(row) for row in rows)
        text = json.dumps(rows, indent=1) if ending == "json" else lines
        path.write_bytes(PACKED.get(path.suffix, bytes)(text.encode()))
    elif "sv" in ending:
        delimiter = {"csv": ",", "semicolons.csv": ";", "tsv.gz": "\t"}[ending]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(columns), delimiter=delimiter, quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
        path.write_bytes(PACKED.get(path.suffix, bytes)(text.getvalue().encode("utf-8-sig")))
    return path


def read(spec, max_rows=None, seed=0):
    return list(open_sources(source_locations([spec]))[0].rows(max_rows, seed))


@pytest.mark.parametrize("suffix", ENDINGS)
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    assert read(f"own={write(tmp_path / f'data{suffix}', ROWS)}") == FLAT


@pytest.mark.parametrize("suffix", ENDINGS)
def test_text_survives_quotes_newlines_and_length(tmp_path, suffix):
    texts = ['a "quoted", text', "two\n\nparagraphs", "ü😀", "long " * 50_000]
    assert read(f"own={write(tmp_path / f'data{suffix}', {'text': texts})}") == [[(DOCUMENT, t)] for t in texts]


def test_a_folder_mixes_formats_and_layouts_in_the_order_of_names(tmp_path):
    write(tmp_path / "own/b.jsonl", {"title": ["T"], "body": ["B"], "url": ["ignored"]})
    write(tmp_path / "own/a/x.parquet", {"text": ["first"]})
    (tmp_path / "own/c.txt").write_text("one file,\n\none document", encoding="utf-8")
    (tmp_path / "own/picture.png").touch()
    texts = ["first", "# T\n\nB", "one file,\n\none document"]
    assert read(f"own={tmp_path / 'own'}") == [[(DOCUMENT, text)] for text in texts]


def test_a_folder_laid_out_like_a_hub_dataset_keeps_its_config(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    folder = tmp_path / "hub"
    write(folder / "triplet/train-00000-of-00001.parquet", ROWS)
    write(folder / "pair/train-00000-of-00001.parquet", {"text": ["another config"]})
    configs = [{"config_name": n, "data_files": [{"split": "train", "path": f"{n}/*"}]} for n in ("triplet", "pair")]
    (folder / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n# A dataset\n")
    assert read(f"msmarco={folder}") == FLAT
    assert sorted(read(f"msmarco={folder}", max_rows=2)) == sorted(FLAT)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["id", "text", "title", "body"], [(("title", "text"), DOCUMENT)]),  # as in BEIR
        (["url", "Content"], [(("Content",), DOCUMENT)]),
        (["question", "answers"], [(("question",), QUERY), (("answers",), DOCUMENT)]),
        (["anchor", "context"], [(("anchor",), QUERY), (("context",), DOCUMENT)]),
        (["title", "passage", "query"], [(("query",), QUERY), (("passage",), DOCUMENT)]),
        (["passage"], [(("passage",), DOCUMENT)]),
        (["query", "positive"], [(("query",), QUERY), (("positive",), DOCUMENT)]),
        (
            ["positive", "query", "text_chunk"],
            [(("query",), QUERY), (("positive",), DOCUMENT), (("text_chunk",), DOCUMENT)],
        ),
        (["body", "title"], [(("title", "body"), DOCUMENT)]),
    ],
)
def test_layouts_are_recognised_by_name(columns, expected):
    assert recognise(columns, "file") == expected


def test_a_limited_source_is_sampled_not_cut_and_the_seed_decides(tmp_path):
    texts = [f"text {i}" for i in range(500)]
    spec = f"own={write(tmp_path / 'data.parquet', {'text': texts})}"
    taken = [row[0][1] for row in read(spec, max_rows=50, seed=1)]
    assert len(set(taken)) == 50
    assert not set(taken) <= set(texts[:100])
    assert taken == [row[0][1] for row in read(spec, max_rows=50, seed=1)]
    assert taken != [row[0][1] for row in read(spec, max_rows=50, seed=2)]
    assert len(read(spec, max_rows=1000)) == 500


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"words": ["a"]}, "found columns words; expected one of text, content"),
        ({"text": [1, 2]}, "row 1, column 'text': int 1; expected a string; none of its 2 rows can be used"),
        ({"title": ["a"], "body": [None]}, "row 1, column 'body': null"),
        ({"query": ["a"], "positive": [["b", None]]}, "row 1, column 'positive': null"),
    ],
)
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_bad_columns_and_values_are_named(tmp_path, suffix, columns, message):
    path = write(tmp_path / f"data{suffix}", columns)
    with pytest.raises(UserError) as caught:
        read(f"own={path}")
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("half.parquet", b"PAR1 and then nothing", "cannot be read"),
        ("bad.json", b'[{"text": "a"}, {"text": ', "cannot be read"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-9], "cannot be read"),
        ("list.jsonl", b"[1]", "expected a JSON object, found [1]"),
        ("short.csv", b"query,positive\nonly one field\n", "row 1, column 'positive': null"),
        ("empty.jsonl", b"", "is empty: it has neither columns nor rows; expected one of text"),
        ("empty.csv", b"", "empty.csv: is empty: it has neither columns nor rows; expected one of text"),
        ("lines.tsv", b'"first\n\nsecond"\tthird\n', "found columns first second, third"),
        (
            "commas.csv",
            b"text\nwhole\nHello, and this too\n",
            "row 2: 2 cells, but the header has 1; texts with commas",
        ),
        ("many.csv", b"title,body\na,b\na,b,c,d\n", "row 2: 4 cells, but the header has 2"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        read(f"own={tmp_path / name}")
    assert name in str(caught.value)
    assert message in str(caught.value)


BROKEN = b'{"text": "one"}\n{"text": null}\n{"text": \n[2]\n{"text": ["two", "three"]}\n{"words": "none"}\n'


def test_rows_that_cannot_be_used_are_skipped_and_counted_or_refused(tmp_path):
    (tmp_path / "own.jsonl").write_bytes(BROKEN)
    locations = source_locations([f"own={tmp_path / 'own.jsonl'}"])
    (source,) = open_sources(locations)
    for _ in range(2):  # a second reading counts anew
        assert list(source.rows(None, 0)) == [[(DOCUMENT, "one")], [(DOCUMENT, "two"), (DOCUMENT, "three")]]
        assert source.skipped.count == 4
    assert source.skipped.first == f"{tmp_path / 'own.jsonl'}: row 2, column 'text': null; expected a string"
    assert len(list(source.rows(2, 0))) == 2  # the skipped ones are not among the rows that were asked for
    with pytest.raises(UserError, match=r"row 2, column 'text': null.*; without --strict such rows are skipped"):
        list(open_sources(locations, is_strict=True)[0].rows(None, 0))


def test_of_a_folder_what_holds_no_text_is_left_out_unless_that_is_refused(tmp_path, caplog):
    write(tmp_path / "a.jsonl", {"text": ["one"], "url": ["u"]})
    write(tmp_path / "settings.json", {"words": ["none"]})
    (tmp_path / "empty.html").write_text("<html></html>")
    with caplog.at_level("INFO"):
        assert read(f"own={tmp_path}") == [[(DOCUMENT, "one")]]
    assert "settings.json: found columns words" in caplog.text
    assert "own: read: text as document; not used: url" in caplog.text
    assert read(f"own={tmp_path}:text=url") == [[(DOCUMENT, "u")]]
    assert "settings.json: no column 'url'; found words" in caplog.text
    with pytest.raises(UserError, match=r"settings.json: found columns words"):
        open_sources(source_locations([f"own={tmp_path}"]), is_strict=True)


def test_a_row_may_lack_negatives_but_not_its_answer(tmp_path):
    rows = [{"query": "q", "positive": [], "negative": ["n"]}, {"query": "r", "positive": ["p"], "negative": []}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (source,) = open_sources(source_locations([f"own={tmp_path / 'own.jsonl'}"]))
    assert list(source.rows(None, 0)) == [[(QUERY, "r"), (DOCUMENT, "p")]]
    assert source.skipped.first.endswith("row 1, column 'positive': an empty list; expected a text")


def test_a_mapping_that_a_recipe_cut_at_its_comma_is_named():
    with pytest.raises(UserError, match="'positive=a': looks like a part of the mapping before it; in a recipe put"):
        source_locations(["faq=faq.csv:query=q", "positive=a"])


@pytest.mark.parametrize(
    ("column", "kind"), [("Queries", "query"), ("bodies", "text"), ("answers", "positive"), ("passages", "positive")]
)
def test_columns_are_known_in_the_plural(column, kind):
    assert find_columns([column], "own", {})[kind] == [column]


def test_a_byte_order_mark_is_no_text_whatever_encoding_is_named(tmp_path):
    (tmp_path / "own.csv").write_text("text\nwörd\n", encoding="utf-8-sig")
    assert read(f"own={tmp_path / 'own.csv'}:encoding=utf-8") == [[(DOCUMENT, "wörd")]]


def test_a_mapping_names_columns_and_encoding(tmp_path):
    columns = {"Frage": ["wer?"], "gute Antwort": ["sie, für immer"], "text": ["anderes"], "Titel": ["T"]}
    path = write(tmp_path / "a b.csv", columns)
    assert read(f"own={path}:query=Frage,positive=gute Antwort") == [[(QUERY, "wer?"), (DOCUMENT, "sie, für immer")]]
    assert read(f"own={path}:query=Frage") == [[(QUERY, "wer?")]]
    assert read(f"own={path}:text=gute Antwort,title=Titel") == [[(DOCUMENT, "# T\n\nsie, für immer")]]
    path.write_bytes("text;x\nПривет;1\n".encode("koi8-r"))
    assert read(f"own={path}:encoding=koi8-r") == [[(DOCUMENT, "Привет")]]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ("query=q", "no column 'q'; found question, answer"),
        ("query=question,answer=answer", "found 'answer=answer'; expected query, positive, negative, text, title"),
        ("query=,positive=answer", "found 'query='"),
        ("encoding=klingon", "Python knows no encoding klingon"),
        ("positive=answer", "found columns question, answer; expected one of text"),
    ],
)
def test_a_wrong_mapping_is_one_line(tmp_path, mapping, message):
    path = write(tmp_path / "data.csv", {"question": ["a"], "answer": ["b"]})
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        read(f"own={path}:{mapping}")
    assert message in str(caught.value)


def test_a_title_stands_above_its_text_once(tmp_path):
    rows = {"title": ["T", "T", "", None], "text": ["one", "# T\n\ntwo", "three", "four"]}
    texts = [row[0][1] for row in read(f"own={write(tmp_path / 'data.jsonl', rows)}")]
    assert texts == ["# T\n\none", "# T\n\ntwo", "three", "four"]


ONE_PAGE = b"""%PDF-1.4
1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj
2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj
3 0 obj<</Type/Page/Parent 2 0 R/Contents 4 0 R/Resources<</Font<</F 5 0 R>>>>>>endobj
4 0 obj<</Length 48>>stream
BT /F 12 Tf 72 720 Td (Hello from a page) Tj ET
endstream endobj
5 0 obj<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>endobj
trailer<</Root 1 0 R>>
startxref
0
%%EOF"""
FRENCH = "Où est le garçon ? Il a été reçu à l'école."


def test_documents_of_several_kinds_and_encodings(tmp_path, caplog):
    """Each file is one document; of a page the text without its menu."""
    (tmp_path / "a.md").write_text(FRENCH, encoding="utf-8-sig")
    for name in ("b.txt", "b2.txt"):
        (tmp_path / name).write_bytes(FRENCH.encode("cp1252"))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(FRENCH.encode("utf-16")))
    lines = [f"text\nÀ l'été\n{'x' * 70_000}\n".encode(), f"{FRENCH}\n".encode("cp1252"), "À l'été\n".encode()]
    (tmp_path / "d.csv").write_bytes(b"".join(lines))  # of two encodings
    menu = "<nav><ul><li><a href='/'>Home</a></li><li><a href='/b'>Products</a></li></ul></nav>"
    body = f"<body>{menu}<main>{f'<p>{FRENCH}</p>' * 6}</main><footer>© 2024</footer></body>"
    page = f"<html><head><meta charset='iso-8859-1'><title>A page</title></head>{body}</html>"
    (tmp_path / "e.html").write_bytes(page.encode("cp1252"))
    (tmp_path / "f.htm").write_text("<html><body></body></html>")
    (source,) = open_sources(source_locations([f"own={tmp_path}"]))
    texts = [text for ((_, text),) in source.rows(None, 0) if text[0] != "x"]
    assert [set(text.splitlines()) for text in texts] == [
        {text} for text in [*[FRENCH] * 4, "À l'été", FRENCH, "À l'été", FRENCH]
    ]
    assert source.skipped.count == 1
    assert "f.htm: cannot be read: ValueError: no main text found" in source.skipped.first
    assert caplog.text.count("*.txt: what is not UTF-8 is read as cp1252") == 1  # not for each file


def test_pdf_needs_an_extra(tmp_path, monkeypatch):
    pytest.importorskip("pypdf")
    (tmp_path / "own.pdf").write_bytes(ONE_PAGE)
    (tmp_path / "broken.pdf").write_bytes(ONE_PAGE[:99])
    (tmp_path / "scan.pdf").write_bytes(ONE_PAGE.replace(b"Tj", b"  "))
    (source,) = open_sources(source_locations([f"own={tmp_path}"]))
    assert list(source.rows(None, 0)) == [[(DOCUMENT, "Hello from a page")]]
    assert source.skipped.count == 2
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(UserError, match=r"pip install -e \.\[pdf\]"):
        read(f"own={tmp_path}")


def test_a_parquet_file_cut_short_is_found_before_anything_is_read(tmp_path):
    path = write(tmp_path / "data.parquet", {"text": ["a"] * 1000})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"data\.parquet: cannot be read"):
        open_sources(source_locations([f"own={path}"]))


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["wiki"], "wiki: not a known source (msmarco, sep, npr, finewiki, python_docs)"),
        (["own=./nowhere"], "own=./nowhere: no such file or folder"),
        (["own=/no/such/file.csv"], "no such file or folder"),
        (["own="], "expected NAME or NAME=PATH_OR_HUB_ID"),
        (["a b=x"], "expected NAME or NAME=PATH_OR_HUB_ID"),
        (["npr", "npr=x"], "npr is named twice"),
        (["query=q"], "in a recipe put quotes around a whole source with a mapping"),
    ],
)
def test_bad_sources_are_refused(specs, message):
    with pytest.raises(UserError) as caught:
        open_sources(source_locations(specs))
    assert message in str(caught.value)


def test_a_folder_without_readable_files_lists_what_it_has(tmp_path):
    (tmp_path / "notes.docx").touch()
    with pytest.raises(UserError, match=r"found \.docx in the folder; expected \.jsonl, .*\.html, .*\.parquet, .*\.gz"):
        open_sources(source_locations([f"own={tmp_path}"]))


def declare(folder, path):
    """A folder whose README.md declares one split, as datasets on the hub do."""
    folder.mkdir(exist_ok=True)
    configs = [{"config_name": "default", "data_files": [{"split": "train", "path": path}]}]
    (folder / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n")


@pytest.mark.parametrize(
    "reach",
    [
        "../*.jsonl",
        "data/../../secret.jsonl",
        "{folder}/secret.jsonl",
        "file://{folder}/secret.jsonl",
        "https://example.org/secret.jsonl",
        "zip://secret.jsonl::{folder}/secret.zip",
        ["inside.jsonl", "../secret.jsonl"],
    ],
)
def test_a_readme_does_not_reach_out_of_its_folder(tmp_path, reach):
    write(tmp_path / "secret.jsonl", {"text": ["a secret"]})
    write(tmp_path / "own/inside.jsonl", {"text": ["not a secret"]})
    filled = [path.format(folder=tmp_path) for path in ([reach] if isinstance(reach, str) else reach)]
    declare(tmp_path / "own", filled if isinstance(reach, list) else filled[0])
    with pytest.raises(UserError, match=r"^--sources own=.*README\.md names files outside the folder \(.*secret|\.\./"):
        read(f"own={tmp_path / 'own'}")
    assert read(f"own={tmp_path / 'secret.jsonl'}") == [[(DOCUMENT, "a secret")]]  # named itself


@pytest.mark.parametrize("has_readme", [True, False])
@pytest.mark.parametrize("is_folder", [True, False])
def test_links_do_not_lead_out_of_a_folder(tmp_path, has_readme, is_folder):
    write(tmp_path / "secret/a.jsonl", {"text": ["a secret"]})
    write(tmp_path / "own/inside.jsonl", {"text": ["not a secret"]})
    place = tmp_path / ("own/linked" if is_folder else "own/linked.jsonl")
    place.symlink_to(tmp_path / ("secret" if is_folder else "secret/a.jsonl"))
    if has_readme:
        declare(tmp_path / "own", "linked/*.jsonl" if is_folder else "linked.jsonl")
    if is_folder and not has_readme:  # folders that are links are not entered
        assert read(f"own={tmp_path / 'own'}") == [[(DOCUMENT, "not a secret")]]
        return
    with pytest.raises(UserError, match=r"^--sources own=.* leads to .*secret/a\.jsonl, outside this folder"):
        read(f"own={tmp_path / 'own'}")


def test_links_within_a_folder_and_within_the_hubs_cache_are_followed(tmp_path):
    repository = tmp_path / "datasets--me--own"
    blob = write(repository / "blobs/0123.jsonl", {"text": ["a"]})
    snapshot = repository / "snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "data.jsonl").symlink_to(blob)
    (snapshot / "again.jsonl").symlink_to("data.jsonl")
    assert read(f"own={snapshot}") == [[(DOCUMENT, "a")]] * 2
    (tmp_path / "link").symlink_to(snapshot)
    assert read(f"own={tmp_path / 'link'}") == [[(DOCUMENT, "a")]] * 2


@pytest.mark.parametrize("is_there", [True, False])
def test_offline_a_dataset_of_the_hub_is_read_from_the_hubs_cache(tmp_path, monkeypatch, is_there):
    """The cache is laid out as the hub's client does; only an open_sources that looks there finds the text."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "datasets--me--own"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("a" * 40)
    declare(snapshot, "data/*.jsonl")  # a stream leaves this file in the cache, and no data
    if is_there:
        blob = write(repository / "blobs/0123.jsonl", {"text": ["a", "b"]})
        (snapshot / "data").mkdir()
        (snapshot / "data/part.jsonl").symlink_to(blob)
        assert read("own=me/own") == [[(DOCUMENT, "a")], [(DOCUMENT, "b")]]
        return
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, and the hub's cache holds no copy; fetch one with `hf"):
        read("own=me/own")
