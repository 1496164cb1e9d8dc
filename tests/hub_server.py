"""
A Hub on this machine: as much of its protocol as uploads and downloads of `huggingface_hub` use, in memory.

Commits have ids and stay readable by them, branches and pull requests are refs, private repositories ask for a token,
and a connection can be cut at any request.
"""

import base64
import hashlib
import json
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http

from icae.hub_upload.layout import CODE


BASE = "org/tiny-base"
# Of a pushed ICAE.
LAYOUT = {
    "README.md",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "icae_card.json",
    "icae_slots.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    *CODE,
}
TOKEN = "hf_tester"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # id -> path -> content
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.commit(
            "main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, "initial commit"
        )

    def commit(self, ref: str, files: dict[str, bytes], message: str) -> str:
        identity = json.dumps([ref, message, len(self.commits), sorted(map(repr, files.items()))])
        sha = hashlib.sha1(identity.encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        self.messages.append(message)
        return sha

    def sha(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.sha(revision)]


class HubServer(ThreadingHTTPServer):
    """
    Runs in a thread of its own: `with HubServer() as hub:`.

    `delay` is what each request takes, in seconds. `cut_at = n` cuts the connection at the n-th request from then on
    (counted from 1) and at all that follow; with `cut_late` that one request is still carried out, only its answer is
    lost.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.delay = 0.0
        self.cut_at: int | None = None
        self.cut_late = False
        self.lock = threading.Lock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def put(self, repo_id: str, files: dict[str, bytes], ref: str = "main") -> str:
        """Adds files to a repository without the protocol; returns the commit's id."""
        repository = self.repositories.setdefault(repo_id, Repository())
        return repository.commit(ref, repository.files() | files, "by hand")

    def log_in(self, patch) -> None:
        """Makes this process, which is offline in tests, a client with a token, by a pytest `MonkeyPatch`."""
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setattr(constants, "ENDPOINT", self.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr("transformers.utils.hub._hf_api", None)  # made when needed, with the endpoint of that moment
        for module in (_http, file_download):  # retries at once
            patch.setattr(module, "time", SimpleNamespace(time=time.time, sleep=lambda seconds: None))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args):
        pass

    def do_GET(self):
        with self.server.lock:
            if self.path != "/api/agent-harnesses":  # which clients ask for once a day
                self.server.requests.append(f"{self.command} {self.path}")
            number, cut_at = len(self.server.requests), self.server.cut_at
        time.sleep(self.server.delay)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        cut = cut_at is not None and number >= cut_at
        if not cut or (self.server.cut_late and number == cut_at):
            with self.server.lock:
                status, headers, content = self.answer(body)
        if cut:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        query = parse_qs(url.query)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        hub = self.server
        if parts[0] == "lfs":
            if self.command == "PUT":
                hub.blobs[parts[1]] = body
            return 200, {}, hub.blobs[parts[1]]
        if (
            self.command == "POST"
            and parts[:2] != ["api", "validate-yaml"]
            and "paths-info" not in parts
            and not known
        ):
            return error(401, "Unauthorized", "Invalid username or password.")
        if parts[:2] == ["api", "whoami-v2"]:
            if not known:
                return error(401, "Unauthorized", "Invalid username or password.")
            return json_answer({"type": "user", "name": "tester", "orgs": [{"name": "org"}]})
        if parts[:2] == ["api", "validate-yaml"]:
            return json_answer({"errors": [], "warnings": []})
        if parts == ["api", "repos", "create"]:
            wanted = json.loads(body)
            repo_id = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
            if repo_id in hub.repositories:
                return json_answer({"error": "exists", "url": f"{hub.url}/{repo_id}"}, 409)
            hub.repositories[repo_id] = Repository(private=wanted.get("visibility") == "private")
            return json_answer({"url": f"{hub.url}/{repo_id}"})

        if api := parts[:2] == ["api", "models"]:
            parts = parts[2:]
        repo_id, rest = f"{parts[0]}/{parts[1].removesuffix('.git')}", parts[2:]
        repository = hub.repositories.get(repo_id)
        if repository is None or (repository.private and not known):
            return error(404 if known else 401, "RepoNotFound", "Repository not found")
        if rest[:1] == ["info"]:
            return self.lfs_batch(json.loads(body))
        if not rest:
            rest = ["revision", "main"]
        what, revision, path = rest[0], rest[1], "/".join(rest[2:])
        if what == "branch":
            if revision in repository.refs:
                return error(409, "Conflict", "exists already")
            repository.refs[revision] = repository.refs["main"]
            return json_answer({})
        sha = repository.sha(revision)
        if sha is None:
            return error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if not api:
            return self.resolve(path, repository.commits[sha].get(path), sha)
        if what == "revision":
            names = [{"rfilename": name} for name in repository.commits[sha]]
            return json_answer({"id": repo_id, "sha": sha, "private": repository.private, "siblings": names})
        if what == "tree":
            found = [item for item in repository.commits[sha].items() if item[0].startswith(path and path + "/")]
            return json_answer([entry(*item) for item in found])
        if what == "paths-info":
            names = set(json.loads(body)["paths"])
            return json_answer([entry(*item) for item in repository.commits[sha].items() if item[0] in names])
        if what == "preupload":
            return json_answer(
                {"files": [self.preupload(file, repository.commits[sha]) for file in json.loads(body)["files"]]}
            )
        if what == "commit":
            return self.commit(repository, repo_id, revision, sha, body, create_pr="create_pr" in query)
        return error(404, "EntryNotFound", f"no route {self.path}")

    def preupload(self, file: dict, files: dict[str, bytes]) -> dict:
        old = files.get(file["path"])
        lfs = file["path"].endswith(LFS_SUFFIXES)
        oid = None if old is None else (sha256(old) if lfs else git_oid(old))
        return {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}

    def lfs_batch(self, wanted: dict) -> tuple[int, dict[str, str], bytes]:
        objects = []
        for one in wanted["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}
            objects.append(one | ({} if one["oid"] in self.server.blobs else {"actions": upload}))
        return json_answer({"transfer": "basic", "objects": objects})

    def commit(self, repository, repo_id, revision, sha, body, create_pr) -> tuple[int, dict[str, str], bytes]:
        header, *operations = [json.loads(line) for line in body.splitlines()]
        parent = header["value"].get("parentCommit")
        if parent is not None and parent != sha:
            return error(412, "PreconditionFailed", "A commit has happened since. Please refresh and try again.")
        files = dict(repository.commits[sha])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif value["path"] not in files:
                return error(404, "EntryNotFound", "A file with this name doesn't exist")
            else:
                del files[value["path"]]
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
        new = repository.commit(f"refs/pr/{number}" if create_pr else revision, files, header["value"]["summary"])
        answer = {"commitUrl": f"{self.server.url}/{repo_id}/commit/{new}", "commitOid": new}
        return json_answer(answer | {"pullRequestUrl": f"{self.server.url}/{repo_id}/discussions/{number}"})

    def resolve(self, path: str, content: bytes | None, sha: str) -> tuple[int, dict[str, str], bytes]:
        headers = {"X-Repo-Commit": sha}
        if content is None:
            status, more, text = error(404, "EntryNotFound", "Entry not found")
            return status, headers | more, text
        if not path.endswith(LFS_SUFFIXES):
            return 200, headers | {"ETag": f'"{git_oid(content)}"'}, content
        self.server.blobs[sha256(content)] = content
        linked = {"X-Linked-ETag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
        location = f"http://localhost:{self.server.server_port}/lfs/{sha256(content)}"  # another host, as on the Hub
        return 302, headers | linked | {"Location": location}, b""


def contents(folder: str | Path) -> dict[str, bytes]:
    """The files of a folder."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def entry(path: str, content: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}


def json_answer(value, status: int = 200) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


def error(status: int, code: str, message: str) -> tuple[int, dict[str, str], bytes]:
    return status, {"X-Error-Code": code, "X-Error-Message": message}, json.dumps({"error": message}).encode()
