"""--push_to_hub: the finished folder, once, and never the Trainer's half of it."""

from types import SimpleNamespace

import pytest
from huggingface_hub.utils._headers import get_token_to_send
from transformers import TrainingArguments

from modernbert_small.run import hub
from modernbert_small.run.errors import UserError
from modernbert_small.run.hub import prepare_upload
from modernbert_small.settings.parse import parse_settings


class FakeApi:
    """The two calls of HfApi that are used; uploads list the files that huggingface_hub would send."""

    calls: list = []  # noqa: RUF012, emptied by the fixture
    fails_at = None

    def create_repo(self, name, private=None, exist_ok=False):
        if self.fails_at == "create_repo":
            raise ValueError("401 Unauthorized")
        self.calls.append(("create", name, private))
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, repo_id, folder_path, revision, commit_message, ignore_patterns):
        from pathlib import Path

        from huggingface_hub.utils import filter_repo_objects

        if self.fails_at == "upload_folder":
            raise ConnectionError("offline")
        files = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        self.calls.append(("upload", repo_id, sorted(filter_repo_objects(files, ignore_patterns=ignore_patterns))))


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "calls", [])
    monkeypatch.setattr(FakeApi, "fails_at", None)
    return FakeApi


def arguments(**changes):
    settings = {"push_to_hub": True, "should_save": True, "output_dir": "out/model"}
    settings |= dict.fromkeys(("hub_model_id", "hub_private_repo", "hub_revision"))
    return SimpleNamespace(**(settings | changes))


def test_only_what_a_user_loads_is_uploaded(api, tmp_path):
    kept = ["model.safetensors", "README.md", "1_Pooling/config.json"]
    for name in [
        *kept,
        "checkpoint-5/optimizer.pt",
        "runs/a/events.out",
        "eval/scores.csv",
        "run.json.tmp",
        "run.json",
    ]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    args = arguments()
    upload = prepare_upload(args)
    assert args.push_to_hub is False
    assert api.calls == [("create", "model", None)]
    upload(str(tmp_path))
    assert api.calls[1] == ("upload", "me/model", sorted(kept))


@pytest.mark.parametrize("changes", [{"push_to_hub": False}, {"should_save": False}])
def test_off_by_default_and_on_one_process_only(api, changes):
    prepare_upload(arguments(**changes))("nowhere")
    assert api.calls == []


def test_failures_say_what_to_do(api, monkeypatch):
    upload = prepare_upload(arguments(hub_model_id="me/x"))
    monkeypatch.setattr(api, "fails_at", "upload_folder")
    with pytest.raises(
        UserError, match=r"out is finished, but was not uploaded \(ConnectionError: offline\); run the same command"
    ):
        upload("out")
    monkeypatch.setattr(api, "fails_at", "create_repo")
    with pytest.raises(UserError, match=r"did not open me/x \(ValueError: 401 Unauthorized\); log in"):
        prepare_upload(arguments(hub_model_id="me/x"))


def test_the_token_of_the_flag_is_the_one_that_the_hubs_client_sends(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "another")
    args = parse_settings(TrainingArguments, "pre_train", None, ["--hub_token", "hf_secret"])
    assert args.hub_token is None
    assert get_token_to_send(None) == "hf_secret"
