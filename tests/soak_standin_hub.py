"""The stand-in hub, asked by the real clients in processes of their own: what they get, retry and refuse."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from standin_hub import StandInHub

# Waits between retries are noted rather than waited for: six attempts would take five seconds.
START = """
import json, time
from huggingface_hub import HfApi, HfFileSystem, file_exists, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import get_session
waits, told = [], {}
time.sleep = waits.append

def error(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as raised:
        return type(raised).__name__
"""
END = "\nprint(json.dumps(told))"
MEGABYTE = 2**20


def ask(hub: StandInHub, home: Path, script: str, **changes: str) -> dict:
    """What a client's process, whose caches are below `home`, wrote into `told`."""
    environment = hub.environment(home, OMP_NUM_THREADS="1", **changes)
    command = [sys.executable, "-c", START + script + END]
    client = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert client.returncode == 0, client.stderr
    return json.loads(client.stdout.splitlines()[-1])


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture
def hub(tmp_path):
    with StandInHub(tmp_path / "hub") as hub:
        yield hub


FILES = {"config.json": b'{"a": 1}', "model.safetensors": bytes(range(256)) * 48 * 1024, "sub/notes.txt": b"0123456789"}


def test_files_are_downloaded_once_and_then_found_offline(hub, tmp_path):
    write(hub.root / "models/them/model", FILES | {"README.md": b"---\nlicense: mit\ntags: [tiny]\n---\n# It\n"})
    script = """
from hashlib import sha256
from pathlib import Path
folder = Path(snapshot_download("them/model"))
told["files"] = {str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.*")}
told["one"] = open(hf_hub_download("them/model", "notes.txt", subfolder="sub")).read()
"""
    first = ask(hub, tmp_path / "home", script)
    assert first["one"] == "0123456789"
    assert sorted(first["files"]) == ["README.md", "config.json", "model.safetensors", "sub/notes.txt"]
    gets = [path.rsplit("/", 1)[-1] for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert sorted(gets) == ["README.md", "config.json", "model.safetensors", "notes.txt"]
    hub.requests.clear()
    assert ask(hub, tmp_path / "home", script, HF_HUB_OFFLINE="1") == first
    assert hub.requests == []

    script = """
api, fs = HfApi(), HfFileSystem()
info = api.model_info("them/model", files_metadata=True, securityStatus=True)
told["info"] = [info.sha, info.card_data.license, info.tags, info.gated, {s.rfilename: s.size for s in info.siblings}]
told["at sha"] = api.repo_info("them/model", revision=info.sha).sha
told["lfs"] = [file.path for file in api.list_repo_tree("them/model", recursive=True, expand=True)
               if isinstance(file, RepoFile) and file.lfs]
told["paths"] = [item.path for item in api.get_paths_info("them/model", ["sub", "config.json", "none"], expand=True)]
told["glob"] = fs.glob("them/model/**/*.txt")
told["part"] = fs.cat_file("them/model/sub/notes.txt", 3, 6).decode()
def ranged(value):
    answer = get_session().get(hf_hub_url("them/model", "sub/notes.txt"), headers={"Range": value})
    return answer.status_code, answer.headers["Content-Range"], answer.text if answer.status_code == 206 else ""
told["ranges"] = [ranged(f"bytes={value}") for value in ("2-4", "8-", "-3", "5-99", "10-")]
"""
    told = ask(hub, tmp_path / "home", script)
    sizes = {name: len(content) for name, content in FILES.items()} | {"README.md": 39}
    assert told["info"] == [told["at sha"], "mit", ["tiny"], False, sizes]
    assert (told["lfs"], told["paths"]) == (["model.safetensors"], ["sub", "config.json"])
    assert (told["glob"], told["part"]) == (["them/model/sub/notes.txt"], "345")
    assert told["ranges"] == [
        [206, "bytes 2-4/10", "234"],
        [206, "bytes 8-9/10", "89"],
        [206, "bytes 7-9/10", "789"],
        [206, "bytes 5-9/10", "56789"],
        [416, "bytes */10", ""],
    ]


def test_what_is_missing_or_gated_raises_what_the_hub_makes_its_clients_raise(hub, tmp_path):
    write(hub.root / "models/them/model", FILES)
    write(hub.root / "models/them/closed", FILES)
    hub.gated.add("them/closed")
    script = """
api = HfApi()
told["repository"] = [error(f, "me/none", token=t) for f in (snapshot_download, api.model_info) for t in (None, "t")]
told["file"] = error(hf_hub_download, "them/model", "none.json"), file_exists("them/model", "none.json")
told["folder"] = error(lambda: list(api.list_repo_tree("them/model", "none")))
told["revision"] = [error(f, "them/model", revision="v9") for f in (snapshot_download, api.model_info)]
told["gated"] = [error(hf_hub_download, "them/closed", "config.json", token=t) for t in (None, "t")]
told["snapshot"] = error(snapshot_download, "them/closed")
told["who"] = api.whoami("t")["name"], error(api.whoami), api.model_info("them/closed").gated
"""
    assert ask(hub, tmp_path / "home", script) == {
        "repository": ["RepositoryNotFoundError"] * 4,
        "file": ["RemoteEntryNotFoundError", False],
        "folder": "RemoteEntryNotFoundError",
        "revision": ["RevisionNotFoundError"] * 2,
        "gated": ["GatedRepoError"] * 2,
        "snapshot": "GatedRepoError",
        "who": ["somebody", "LocalTokenNotFoundError", "auto"],
    }


def test_broken_connections_and_rate_limits_are_tried_again(hub, tmp_path):
    write(hub.root / "models/them/model", FILES)
    hub.breaks = {"model.safetensors": [11 * MEGABYTE], "config.json": [3] * 50, "notes.txt": [4]}
    script = """
from pathlib import Path
fetch = lambda name, **kwargs: Path(hf_hub_download("them/model", name, **kwargs)).read_bytes()
told["big"] = fetch("model.safetensors") == bytes(range(256)) * 48 * 1024, list(waits)
waits.clear()
told["always"] = error(fetch, "config.json"), list(waits)
waits.clear()
told["small"] = fetch("sub/notes.txt").decode(), list(waits)
"""
    told = ask(hub, tmp_path / "home", script)
    assert told["big"] == [True, [1]]
    assert told["always"] == ["RemoteProtocolError", [1] * 5]
    assert told["small"] == ["0123456789", [1]]
    assert len(hub.breaks.pop("config.json")) == 44
    assert set(map(len, hub.breaks.values())) == {0}

    hub.busy = {"*/resolve/*/config.json": 3, "/api/models/them/model/tree/*": 1, "/api/*/revision/main": 1}
    script = """
told["file"] = open(hf_hub_download("them/model", "config.json")).read(), list(waits)
waits.clear()
told["tree"] = error(lambda: list(HfApi().list_repo_tree("them/model"))), list(waits)
waits.clear()
told["snapshot"] = error(snapshot_download, "them/none"), error(snapshot_download, "them/model"), list(waits)
"""
    told = ask(hub, tmp_path / "again", script)
    assert told["file"] == ['{"a": 1}', [1.0, 1.0]]  # the first HEAD is not repeated but asked anew, more patiently
    assert told["tree"] == [None, [1.0]]
    assert told["snapshot"] == ["LocalEntryNotFoundError", None, []]  # this is not tried again at all
    assert set(hub.busy.values()) == {0}


def shards(folder: Path, text: str) -> None:
    folder.mkdir(parents=True)
    for number in range(3):
        rows = [f"{text} {number} {row}" for row in range(100)]
        table = pa.table({"text": rows, "row": list(range(100))})
        pq.write_table(table, folder / f"train-{number:05}-of-00003.parquet")


def test_datasets_are_loaded_and_streamed_by_id(hub, tmp_path):
    pairs, bare = hub.root / "datasets/them/pairs", hub.root / "datasets/them/bare"
    shards(pairs / "en", "english")
    shards(pairs / "de", "deutsch")
    shards(bare / "data", "bare")
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n" for name in ("en", "de")
    )
    (pairs / "README.md").write_text(f"---\nconfigs:\n{configs}---\n# Pairs\n")
    write(hub.root / "datasets/them/closed", {"README.md": b"# Closed"})
    hub.gated.add("them/closed")
    hub.breaks["en/train-00001-of-00003.parquet"] = [200]
    hub.busy["*/bare/resolve/*/train-00002-of-00003.parquet"] = 1
    script = """
from datasets import load_dataset
def tell(name, *args, **kwargs):
    rows = [row["text"] for row in load_dataset(*args, split="train", **kwargs)]
    told[name] = len(rows), rows[0], rows[-1]
tell("streamed", "them/pairs", "de", streaming=True, columns=["text"])
tell("broken", "them/pairs", "en", streaming=True)
told["waits"] = list(waits)
tell("loaded", "them/pairs", "de")
tell("bare", "them/bare", streaming=True)
tell("bare, loaded", "them/bare")
told["missing"] = [error(load_dataset, name, split="train") for name in ("them/none", "them/closed")]
"""
    told = ask(hub, tmp_path / "home", script)
    assert told["streamed"] == told["loaded"] == [300, "deutsch 0 0", "deutsch 2 99"]
    assert told["broken"] == [300, "english 0 0", "english 2 99"]
    assert told["waits"] == [1]
    assert told["bare"] == told["bare, loaded"] == [300, "bare 0 0", "bare 2 99"]
    assert told["missing"] == ["DatasetNotFoundError"] * 2


def test_models_and_tokenizers_are_loaded_by_id(hub, tmp_path):
    # The client's process also makes the model: it has imported what that needs.
    script = f"""
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast
folder = {str(hub.root / "models/them/model")!r}
tokenizer = Tokenizer(models.WordLevel({{"[UNK]": 0, "one": 1, "two": 2}}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
sizes = dict(vocab_size=3, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
made = BertModel(BertConfig(**sizes))
made.save_pretrained(folder)
told["config"] = AutoConfig.from_pretrained("them/model").hidden_size
told["tokens"] = AutoTokenizer.from_pretrained("them/model")("two three one")["input_ids"]
loaded = AutoModel.from_pretrained("them/model").state_dict()
told["same"] = all(bool((loaded[name] == value).all()) for name, value in made.state_dict().items())
told["missing"] = error(AutoConfig.from_pretrained, "them/none")
"""
    told = ask(hub, tmp_path / "home", script)
    assert told == {"config": 4, "tokens": [2, 0, 1], "same": True, "missing": "OSError"}


def test_a_push_leaves_its_files(hub, tmp_path):
    kept = {
        "README.md": b"# Mine\n",
        "model.safetensors": b"tensors",
        "log.txt": b"x" * 11 * MEGABYTE,
        "a/b.json": b"{}",
    }
    write(
        tmp_path / "folder", kept | {"checkpoint-5/optimizer.pt": b"no", "runs/events": b"no", "copy.bin": b"tensors"}
    )
    kept["copy.bin"] = b"tensors"
    script = f"""
api = HfApi(token="t")
told["anonymous"] = error(HfApi().create_repo, "mine")
repository = api.create_repo("mine", private=True, exist_ok=True).repo_id
push = lambda: api.upload_folder(repo_id=repository, folder_path={str(tmp_path / "folder")!r}, commit_message="Done",
                                 ignore_patterns=["checkpoint-*", "runs/*"])
told["oid"] = push().oid
told["again"] = [api.create_repo("mine", exist_ok=True).repo_id, error(api.create_repo, "mine"), push().oid]
told["sha"] = api.model_info(repository).sha
api.delete_file("a/b.json", repository)
told["dataset"] = api.create_repo("data", repo_type="dataset").repo_id
api.upload_file(path_or_fileobj=b"x", path_in_repo="x.parquet", repo_id="somebody/data", repo_type="dataset")
"""
    told = ask(hub, tmp_path / "home", script)
    assert told["anonymous"] is not None
    assert told["again"] == ["somebody/mine", "HfHubHTTPError", told["oid"]]
    assert told["sha"] == told["oid"]
    (first, message, paths), *later = hub.commits
    assert (first, message, sorted(paths)) == ("somebody/mine", "Done", sorted(kept))
    assert [name for name, *_ in later] == ["somebody/mine", "somebody/data"]
    del kept["a/b.json"]
    assert hub.uploads == {"somebody/mine": kept, "somebody/data": {"x.parquet": b"x"}}
    assert {path.name for path in (hub.root / "models/somebody/mine").rglob("*.*")} == set(kept)
