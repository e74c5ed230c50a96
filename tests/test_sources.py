import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modernbert_small.corpus.sources import DOCUMENT, QUERY, open_sources, recognise, source_locations
from modernbert_small.run.errors import UserError

ROWS = {"query": ["who?", "where?"], "positive": ["she", "here"], "negative": ["he", "there"]}
FLAT = [
    [(QUERY, "who?"), (DOCUMENT, "she"), (DOCUMENT, "he")],
    [(QUERY, "where?"), (DOCUMENT, "here"), (DOCUMENT, "there")],
]


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, columns):
    """Columns as a file of the format that its suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as stream:
            writer = csv.DictWriter(stream, list(columns))
            writer.writeheader()
            writer.writerows(rows)
    return path


def read(spec, max_rows=None, seed=0):
    return list(open_sources(source_locations([spec]))[0].rows(max_rows, seed))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    assert read(f"own={write(tmp_path / f'data{suffix}', ROWS)}") == FLAT


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
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


def test_a_folder_laid_out_like_a_hub_dataset_keeps_its_config(tmp_path):
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
        (["id", "text", "title", "body"], [(("text",), DOCUMENT)]),
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
        ({"sentence": ["a"]}, "found columns sentence; expected `text`, or `query, positive"),
        ({"text": ["a", None]}, "row 2, column 'text': null; expected a string"),
        ({"text": [1, 2]}, "row 1, column 'text': int 1; expected a string"),
        ({"title": ["a"], "body": [None]}, "row 1, column 'body': null"),
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
        ("bad.jsonl", b'{"text": "a"}\n{"text": ', "cannot be read"),
        ("list.jsonl", b"[1]", "line 1: expected a JSON object"),
        ("latin.txt", "Käse".encode("latin-1"), "cannot be read: UnicodeDecodeError: 'utf-8' codec"),
        ("short.csv", b"query,positive\nonly one field\n", "row 1, column 'positive': null"),
        ("empty.jsonl", b"", "found columns none"),
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
    ],
)
def test_bad_sources_are_refused(specs, message):
    with pytest.raises(UserError) as caught:
        open_sources(source_locations(specs))
    assert message in str(caught.value)


def test_a_folder_without_readable_files_lists_what_it_has(tmp_path):
    (tmp_path / "notes.docx").touch()
    with pytest.raises(UserError, match=r"found \.docx in the folder; expected \.parquet, \.jsonl, \.csv, \.txt"):
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
