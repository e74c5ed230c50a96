"""The token store against the tokenizer, row by row."""

import os
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import SENTENCES, tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_durable import WAYS, contents, spoil

from modernbert_small.packed import tokens
from modernbert_small.packed.tokens import cache_folder, made_once, text_tokenizer, tokenize_split
from modernbert_small.run.errors import UserError
from modernbert_small.run.shards import read_table, split_files


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write(folder, texts, column="text"):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: pa.array(texts, pa.string())}), folder / "train-00000-of-00001.parquet")
    return folder


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), min_size=1, max_size=8))
def test_rows_are_the_tokenizers_ids(tokenizer, tmp_path_factory, texts):
    store = tokenize_split(write(tmp_path_factory.mktemp("data"), texts), "train", "text", tokenizer, 32)
    assert store.tokens.dtype == np.uint16
    assert len(store) == len(texts)
    for row, text in enumerate(texts):
        ids, lengths = store.gather(np.array([row]))
        assert ids.tolist() == tokenizer(text, truncation=True, max_length=32, split_special_tokens=True)["input_ids"]
        assert lengths.tolist() == [store.lengths[row]]
    assert store.truncated == sum(len(tokenizer(text, split_special_tokens=True)["input_ids"]) > 32 for text in texts)


def test_rows_gather_in_any_order(tokenizer, tmp_path):
    store = tokenize_split(write(tmp_path / "data", SENTENCES), "train", "text", tokenizer, 64)
    ids, lengths = store.gather(np.array([2, 0]))
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    assert [part.tolist() for part in parts] == [tokenizer(SENTENCES[row])["input_ids"] for row in (2, 0)]


def test_special_tokens_in_a_text_stay_text(tokenizer):
    ids = text_tokenizer(tokenizer, 64).encode("a [MASK] and a [SEP]").ids
    assert tokenizer.mask_token_id not in ids
    assert ids.count(tokenizer.sep_token_id) == 1
    assert tokenizer.decode(ids[1:-1]) == "a [MASK] and a [SEP]"


def test_a_store_is_found_again_until_text_tokenizer_or_length_change(tokenizer, tmp_path):
    data = write(tmp_path / "data", SENTENCES)
    stores = tmp_path / "data.tokens"
    tokenize_split(data, "train", "text", tokenizer, 64)
    (made,) = (path for path in stores.iterdir() if path.is_dir())
    written = (made / "tokens.npy").stat().st_mtime_ns
    tokenize_split(data, "train", "text", tokenizer, 64)
    assert (made / "tokens.npy").stat().st_mtime_ns == written
    tokenize_split(data, "train", "text", tokenizer, 32)
    tokenize_split(data, "train", "text", tiny_tokenizer(tmp_path / "other", 300), 64)
    write(data, SENTENCES[:2])
    assert len(tokenize_split(data, "train", "text", tokenizer, 64)) == 2
    assert sum(path.is_dir() for path in stores.iterdir()) == 4


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", ["tokens.npy", "offsets.npy", "counts.json", "manifest.json"])
def test_a_damaged_store_is_named_and_made_again(tokenizer, tmp_path, caplog, name, how):
    data = write(tmp_path / "data", SENTENCES)
    tokenize_split(data, "train", "text", tokenizer, 64)
    (made,) = (path for path in (tmp_path / "data.tokens").iterdir() if path.is_dir())
    before = contents(made)
    spoil(made / name, how)
    store = tokenize_split(data, "train", "text", tokenizer, 64)
    assert contents(made) == before
    assert store.gather(np.array([0]))[0].tolist() == tokenizer(SENTENCES[0])["input_ids"]
    (said,) = [message for message in caplog.messages if "is made again" in message]
    assert name in said


def test_a_store_of_before_the_manifest_is_made_again(tokenizer, tmp_path):
    data = write(tmp_path / "data", SENTENCES)
    tokenize_split(data, "train", "text", tokenizer, 64)
    (made,) = (path for path in (tmp_path / "data.tokens").iterdir() if path.is_dir())
    (made / "manifest.json").unlink()
    assert len(tokenize_split(data, "train", "text", tokenizer, 64)) == len(SENTENCES)
    assert (made / "manifest.json").exists()


def test_bad_data_is_refused_with_its_place(tokenizer, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        split_files("nowhere", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no train-\*\.parquet"):
        split_files(tmp_path / "empty", "train")
    data = write(tmp_path / "null", ["a", None, "b"])
    with pytest.raises(UserError, match="column 'text' is null in row 1"):
        tokenize_split(data, "train", "text", tokenizer, 64)
    with pytest.raises(UserError, match="no column 'passage'; found text"):
        tokenize_split(data, "train", "passage", tokenizer, 64)
    file = data / "train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match="not a whole Parquet file"):
        list(read_table([file], ["text"]))
    file.rename(data / "train-00000-of-00002.parquet")
    with pytest.raises(UserError, match="1 train shards, expected 2"):
        split_files(data, "train")
    with pytest.raises(UserError, match="no rows"):
        tokenize_split(write(tmp_path / "none", []), "train", "text", tokenizer, 64)


def test_data_that_cannot_be_written_beside_is_cached_for_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder(tmp_path / "data", "a") == tmp_path / "data.tokens" / "a"
    monkeypatch.setattr("os.access", lambda path, mode: False)
    cached = cache_folder(tmp_path / "data", "a")
    assert cached.parent.parent == tmp_path / "cache" / "modernbert-small"
    assert cached != cache_folder(tmp_path / "other" / "data", "a"), "one cache for each data folder"


def test_a_whole_store_beside_data_is_used_where_nothing_can_be_written(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = write(tmp_path / "data", SENTENCES)
    tokenize_split(data, "train", "text", tokenizer, 64)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert len(tokenize_split(data, "train", "text", tokenizer, 64)) == len(SENTENCES)
    assert not (tmp_path / "cache").exists()
    (made,) = (path for path in (tmp_path / "data.tokens").iterdir() if path.is_dir())
    spoil(made / "tokens.npy", "truncate")
    assert len(tokenize_split(data, "train", "text", tokenizer, 64)) == len(SENTENCES)
    assert (tmp_path / "cache").exists()


def test_a_run_that_waits_for_another_one_says_for_whom(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tokens, "_SILENT_SECONDS", 0.1)
    made = []

    def wait():
        with made_once(tmp_path / "store") as partial:
            made.append(partial)

    with made_once(tmp_path / "store") as partial:
        (partial / "tokens.npy").touch()
        waiting = threading.Thread(target=wait)
        waiting.start()
        while not caplog.messages:
            assert waiting.is_alive()
            time.sleep(0.01)
    waiting.join()
    (said,) = caplog.messages
    assert said.startswith(f"waiting for another run, which holds {tmp_path / 'store.lock'}: process {os.getpid()} on ")
    assert made == [None], "it went on waiting, and found what the other one made"


def test_a_damaged_part_of_a_shared_tokenisation_is_not_joined(tokenizer, tmp_path, monkeypatch):
    """Two processes were killed before the parts were joined, and the run goes on in one process."""
    data = tmp_path / "data"
    data.mkdir()
    for number in range(2):
        table = pa.table({"text": [f"{number} {sentence}" for sentence in SENTENCES]})
        pq.write_table(table, data / f"train-0000{number}-of-00002.parquet")
    monkeypatch.setattr(tokens, "world_size", lambda: 2)
    monkeypatch.setattr(tokens, "dealt", range)
    tokens.tokenize_shares(data, "train", "text", tokenizer, 64)
    parts = [path for path in (tmp_path / "data.tokens").iterdir() if path.is_dir()]
    assert len(parts) == 2
    spoil(parts[0] / "tokens.npy", "zero")
    store = tokenize_split(data, "train", "text", tokenizer, 64)
    ids, _ = store.gather(np.arange(len(store)))
    expected = [text for file in split_files(data, "train") for text in pq.read_table(file)["text"].to_pylist()]
    assert ids.tolist() == [token for text in expected for token in tokenizer(text)["input_ids"]]
    assert not any(part.exists() for part in parts)
