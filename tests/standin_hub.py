"""A small stand-in for the Hugging Face hub, on loopback: the real clients run unmodified against plain folders."""

import base64
import hashlib
import json
import os
import re
import socket
import threading
from fnmatch import fnmatch
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

# What the hub keeps in LFS: these kinds of file, and all large ones. It tells their sha256 rather than git's hash.
LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".onnx", ".pt", ".arrow", ".npy", ".gz", ".zip")
LFS_SIZE = 10 * 1024 * 1024
_DATE = "2026-01-01T00:00:00.000Z"
_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/([a-z-]+)(?:/([^/]+)(?:/(.+))?)?)?")
_RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_LFS_BATCH = re.compile(r"/(?:datasets/)?[^/]+/[^/]+\.git/info/lfs/objects/batch")
_NO_HEADERS = MappingProxyType({})


class StandInHub:
    """Serves `root`/models/<owner>/<name>/ and `root`/datasets/<owner>/<name>/ as they are; a push writes there too.

    The only revisions are "main" and the repository's present sha. All but `endpoint` may be changed while it serves.
    """

    def __init__(self, root: Path):
        self.root = Path(root)
        self.requests: list[tuple[str, str]] = []  # (method, path without the query), in order
        self.gated: set[str] = set()  # ids whose files are refused: 401 without a token, 403 with one
        self.breaks: dict[str, list[int]] = {}  # end of a file's name -> after how many bytes each next GET breaks off
        self.busy: dict[str, int] = {}  # fnmatch pattern of a path -> how many more requests get 429
        self.uploads: dict[str, dict[str, bytes]] = {}  # repository id -> {path: content} of all that was pushed
        self.commits: list[tuple[str, str, list[str]]] = []  # (repository id, message, paths added)
        self.objects: dict[str, bytes] = {}  # sha256 -> content of LFS files on their way
        self.lock = threading.Lock()
        self.server = _Server(("127.0.0.1", 0), _Handler)
        self.server.hub = self
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "StandInHub":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path, **changes: str) -> dict[str, str]:
        """The environment of a client's process: this hub, caches under `home`, nobody logged in."""
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_", "SENTENCE_TRANSFORMERS_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        own = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        # Downloads use xet only where the server offers it. Uploads of LFS files do wherever hf_xet is installed, and
        # no answer of a server sends them to LFS instead.
        return kept | own | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"} | changes


class _Refusal(Exception):  # noqa: N818, an answer rather than an error here
    def __init__(self, status: int, code: str, message: str, headers=_NO_HEADERS):
        self.status, self.body = status, json.dumps({"error": message}).encode()
        self.headers = ({"X-Error-Code": code} if code else {}) | {"X-Error-Message": message} | dict(headers)


class _Repository:
    """One repository's files, read from disk once for each request."""

    def __init__(self, kind: str, name: str, folder: Path):
        self.kind, self.name, self.folder = kind, name, folder
        found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        self.files = {name: _entry(name, found[name]) for name in sorted(found)}
        self.folders = {str(parent) for name in found for parent in Path(name).parents} - {"."}
        tree = "\n".join(f"{name} {file['oid']}" for name, file in self.files.items())
        self.sha = hashlib.sha1(tree.encode()).hexdigest()

    def check(self, revision: str) -> None:
        """404 for all but the one branch and its sha."""
        if revision not in ("main", self.sha):
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def info(self, gated: bool, blobs: bool) -> dict:
        siblings = [{"rfilename": name} for name in self.files]
        if blobs:
            for sibling, file in zip(siblings, self.files.values(), strict=True):
                sibling |= {"size": file["size"], "blobId": file["oid"]}
                if lfs := file.get("lfs"):
                    sibling["lfs"] = lfs | {"sha256": lfs["oid"]}
        card = self.card()
        fixed = {"private": False, "disabled": False, "downloads": 0, "likes": 0, "lastModified": _DATE}
        told = {"id": self.name, "author": self.name.split("/")[0], "sha": self.sha, "tags": card.get("tags") or []}
        return fixed | told | {"gated": "auto" if gated else False, "cardData": card, "siblings": siblings}

    def card(self) -> dict:
        """The metadata at the head of README.md."""
        if "README.md" not in self.files:
            return {}
        head = re.match(r"---\r?\n(.*?)\r?\n---", (self.folder / "README.md").read_text(), re.DOTALL)
        return (yaml.safe_load(head[1]) or {}) if head else {}

    def listing(self, below: str, recursive: bool) -> list[dict]:
        """The files and folders under a folder ("" is the root)."""
        if below and below not in self.folders:
            raise _Refusal(404, "EntryNotFound", f"{below} does not exist on {self.sha}")
        depth = len(Path(below).parts)
        inside = [path for path in [*self.folders, *self.files] if not below or path.startswith(f"{below}/")]
        return [self.describe(path) for path in sorted(inside) if recursive or len(Path(path).parts) == depth + 1]

    def describe(self, path: str) -> dict:
        last = {"lastCommit": {"id": self.sha, "title": "commit", "date": _DATE}}
        if path in self.files:
            return self.files[path] | last
        return {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path} | last


def _entry(name: str, path: Path) -> dict:
    """What /tree says of a file."""
    status = path.stat()
    blob, sha256 = _hashes(path, status.st_size, status.st_mtime_ns)
    entry = {"type": "file", "oid": blob, "size": status.st_size, "path": name}
    if _in_lfs(name, status.st_size):
        entry["lfs"] = {"oid": sha256, "size": status.st_size, "pointerSize": 134}
    return entry


@lru_cache(maxsize=10_000)
def _hashes(path: Path, size: int, changed: int) -> tuple[str, str]:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), hashlib.sha256(content).hexdigest()


def _in_lfs(name: str, size: int) -> bool:
    return size > 0 and (name.endswith(LFS_SUFFIXES) or size > LFS_SIZE)


class _Server(ThreadingHTTPServer):
    request_queue_size = 64  # the clients open many connections at once; a full queue would cost them a second
    hub: StandInHub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits for the acknowledgement of its headers

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        hub, parts = self.server.hub, urlsplit(self.path)
        self.query = parse_qs(parts.query)
        self.content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.cut: int | None = None
        hub.requests.append((self.command, parts.path))
        try:
            self._refuse_if_busy(parts.path)
            status, headers, body = self._route(parts.path)
        except _Refusal as refusal:
            status, headers, body = refusal.status, refusal.headers, refusal.body
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            self.wfile.write(body[: self.cut])
            if self.cut is not None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # the client went away first
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _refuse_if_busy(self, path: str) -> None:
        busy = self.server.hub.busy
        with self.server.hub.lock:
            for pattern, left in busy.items():
                if left > 0 and fnmatch(unquote(path), pattern):
                    busy[pattern] = left - 1
                    # The clients add a second of their own to what this asks for.
                    raise _Refusal(429, "", "We had to rate limit you", {"Retry-After": "0"})

    def _route(self, path: str) -> tuple[int, dict, bytes]:
        hub = self.server.hub
        if match := _RESOLVE.fullmatch(path):
            kind = "datasets" if match[1] else "models"
            return self._file(self._repository(kind, match[2]), unquote(match[3]), unquote(match[4]))
        if path.startswith("/lfs/"):
            hub.objects[path.removeprefix("/lfs/")] = self.content
            return 200, {}, b""
        if _LFS_BATCH.fullmatch(path):
            return self._json(self._lfs_batch())
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/whoami-v2":
            self._log_in()
            return self._json({"type": "user", "id": "0", "name": "somebody", "fullname": "Somebody", "orgs": []})
        if path == "/api/repos/create":
            return self._create()
        if match := _API.fullmatch(path):
            rest = [unquote(part or "") for part in match.groups()[2:]]
            return self._json(self._api(self._repository(match[1], match[2]), *rest))
        raise _Refusal(404, "", f"Nothing is served at {path}")

    def _json(self, value: object, status: int = 200) -> tuple[int, dict, bytes]:
        return status, {}, json.dumps(value).encode()

    def _log_in(self) -> None:
        if "Authorization" not in self.headers:
            raise _Refusal(401, "", "Invalid username or password.")

    def _repository(self, kind: str, name: str) -> _Repository:
        """The repository; one that is missing looks like a private one, so 401 until a token is shown."""
        folder = self.server.hub.root / kind / unquote(name)
        if folder.is_dir():
            return _Repository(kind, unquote(name), folder)
        if "Authorization" in self.headers:
            raise _Refusal(404, "RepoNotFound", "Repository not found")
        # The hub itself sends no code with this 401; its clients infer it, but from https addresses only.
        raise _Refusal(401, "RepoNotFound", "Invalid username or password.")

    def _file(self, repository: _Repository, revision: str, path: str) -> tuple[int, dict, bytes]:
        hub = self.server.hub
        if repository.name in hub.gated:
            status = 403 if "Authorization" in self.headers else 401
            raise _Refusal(status, "GatedRepo", f"Access to {repository.name} is restricted.")
        repository.check(revision)
        headers = {"X-Repo-Commit": repository.sha, "Accept-Ranges": "bytes", "Content-Type": "binary/octet-stream"}
        if path not in repository.files:
            raise _Refusal(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": repository.sha})
        entry, content = repository.files[path], (repository.folder / path).read_bytes()
        headers["ETag"] = f'"{entry["oid"]}"'
        if "lfs" in entry:
            etag = f'"{entry["lfs"]["oid"]}"'
            headers |= {"ETag": etag, "X-Linked-Etag": etag, "X-Linked-Size": str(entry["size"])}
        status, size = 200, len(content)
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            start = int(asked[1]) if asked[1] else max(size - int(asked[2]), 0)
            stop = min(int(asked[2]) + 1, size) if asked[1] and asked[2] else size
            if start >= size:
                raise _Refusal(416, "", "Range not satisfiable", {"Content-Range": f"bytes */{size}"})
            status, content = 206, content[start:stop]
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        if self.command == "GET":
            with hub.lock:
                self.cut = next((cuts.pop(0) for end, cuts in hub.breaks.items() if cuts and path.endswith(end)), None)
        return status, headers, content

    def _api(self, repository: _Repository, what: str, revision: str, path: str) -> object:
        if what in ("", "revision"):
            repository.check(revision or "main")
            return repository.info(repository.name in self.server.hub.gated, "blobs" in self.query)
        repository.check(revision)
        if what == "tree":
            return repository.listing(path, self.query.get("recursive", [""])[0].lower() in ("1", "true"))
        if what == "paths-info":
            known = repository.folders | set(repository.files)
            paths = [path.strip("/") for path in parse_qs(self.content.decode()).get("paths", [])]
            return [repository.describe(path) for path in paths if path in known]
        self._log_in()
        if what == "preupload":
            return {"files": [self._upload_mode(repository, file) for file in json.loads(self.content)["files"]]}
        if what == "commit":
            return self._commit(repository)
        raise _Refusal(404, "", f"Nothing is served at {self.path}")

    def _create(self) -> tuple[int, dict, bytes]:
        self._log_in()
        asked = json.loads(self.content)
        kind, name = f"{asked.get('type') or 'model'}s", f"{asked.get('organization') or 'somebody'}/{asked['name']}"
        folder = self.server.hub.root / kind / name
        exists = folder.is_dir()
        folder.mkdir(parents=True, exist_ok=True)
        self.server.hub.uploads.setdefault(name, {})
        told = {"url": f"{self.server.hub.endpoint}/{'' if kind == 'models' else f'{kind}/'}{name}", "name": name}
        return self._json(told | {"error": "You already created this repo"} if exists else told, 409 if exists else 200)

    def _upload_mode(self, repository: _Repository, file: dict) -> dict:
        path, present = file["path"], repository.files.get(file["path"], {})
        oid = present.get("lfs", present).get("oid")  # an unchanged file is not sent again
        mode = "lfs" if _in_lfs(path, file["size"]) else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _lfs_batch(self) -> dict:
        self._log_in()
        objects = json.loads(self.content)["objects"]
        for item in objects:
            item["actions"] = {"upload": {"href": f"{self.server.hub.endpoint}/lfs/{item['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def _commit(self, repository: _Repository) -> dict:
        hub, lines = self.server.hub, [json.loads(line) for line in self.content.splitlines()]
        arrived, message, added = hub.uploads.setdefault(repository.name, {}), "", []
        for key, value in ((line["key"], line["value"]) for line in lines):
            path = value.get("path", "")
            if key == "header":
                message = value["summary"]
            elif key in ("deletedFile", "deletedFolder"):
                for gone in [name for name in repository.files if name == path or name.startswith(f"{path}/")]:
                    arrived.pop(gone, None)
                    (repository.folder / gone).unlink()
            else:
                content = base64.b64decode(value["content"]) if key == "file" else hub.objects[value["oid"]]
                arrived[path] = content
                added.append(path)
                (repository.folder / path).parent.mkdir(parents=True, exist_ok=True)
                (repository.folder / path).write_bytes(content)
        hub.commits.append((repository.name, message, added))
        sha = _Repository(repository.kind, repository.name, repository.folder).sha
        url = f"{hub.endpoint}/{repository.name}/commit/{sha}"
        return {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""}
