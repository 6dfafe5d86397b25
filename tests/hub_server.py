"""A small Hugging Face Hub for models and Spaces on 127.0.0.1: it stores what it receives and fails on demand.

It implements the parts of the protocol that huggingface_hub uses to create repositories and branches, to commit with
LFS uploads, and to download. A fault is a rule: a pattern of "METHOD path", how many matching requests to let pass
first, how many to disturb after that, and how.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".png")


@dataclass
class Fault:
    """Disturbs `times` matching requests, after the first `skip`.

    Args:
        pattern: Which requests to disturb.
        act: A status to return; `cut`, `slow`, `deaf` (handled, but no response is sent); or a function to call.
        skip, times: How many requests to let pass first, and how many to disturb.
        late: Whether the function is called after the request has been handled instead of before.
    """

    pattern: str
    act: int | str | Callable[[], None]
    skip: int = 0
    times: int = 1
    late: bool = False


@dataclass
class Repository:
    """Commits by SHA, each path -> (is LFS, sha256); branches by name."""

    private: bool
    commits: dict[str, dict[str, tuple[bool, str]]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub(ThreadingHTTPServer):
    """The server; `log` has every request, `repositories` and `blobs` what was uploaded."""

    daemon_threads = True

    def __init__(self, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.lock = threading.Lock()
        self.reset()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def reset(self):
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.log: list[str] = []
        self.faults: list[Fault] = []

    def create(self, repo_id: str, private: bool, files: dict[str, bytes] | None = None) -> Repository:
        repository = self.repositories[repo_id] = Repository(private)
        # The SHA depends on the content, too: clients cache what they have seen of a commit.
        sha = hashlib.sha1(repo_id.encode() + repr(sorted((files or {}).items())).encode()).hexdigest()
        repository.commits[sha], repository.branches["main"] = {}, sha
        for path, content in (files or {}).items():
            oid = hashlib.sha256(content).hexdigest()
            self.blobs[oid] = content
            repository.commits[sha][path] = (path.endswith(LFS_SUFFIXES), oid)
        return repository

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Path -> content on a branch."""
        repository = self.repositories[repo_id]
        files = repository.commits[repository.branches[revision]]
        return {path: self.blobs[oid] for path, (_, oid) in files.items()}

    def fault_for(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, request):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def handle_error(self, request, client_address):
        """Ignores errors: clients that disconnect are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # Nagle's algorithm holds back each body until the headers are acknowledged
    server: Hub

    def log_message(self, *args):
        pass

    def reply(self, status: int, content=b"", headers: dict[str, str] | None = None, kind="application/json"):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str, **headers: str):
        self.reply(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code, **headers})

    def read_body(self) -> bytes:
        if (length := self.headers.get("Content-Length")) is not None:
            return self.rfile.read(int(length))
        body = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().strip() or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return body

    def answer(self):
        path = unquote(urlsplit(self.path).path).replace("/api/spaces/", "/api/models/spaces/", 1)
        request = f"{self.command} {self.path}"
        self.server.log.append(request)
        fault = self.server.fault_for(request)
        act = fault and fault.act
        if act == "cut":  # in the middle of the body
            self.rfile.read(min(100, int(self.headers.get("Content-Length") or 0)))
            self.close_connection = True
            self.connection.shutdown(2)
            return None
        body = self.read_body() if self.command in ("POST", "PUT") else b""
        if act == "slow":
            threading.Event().wait(0.5)  # unlike time.sleep, which tests may replace
        elif act == "deaf" or (fault and fault.late):
            self.reply = lambda *args, **kwargs: (fault.late and act(), self.connection.shutdown(2))
            self.close_connection = True
        elif callable(act):
            act()
            self.close_connection = True
            return None
        elif act is not None:
            return self.refuse(act, f"told to fail with {act}")
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, path):
                return method(self, body, *found.groups())
        return self.refuse(404, "no such route")

    do_GET = do_POST = do_PUT = do_HEAD = answer

    def whoami(self, body):
        if not self.headers.get("Authorization"):
            return self.refuse(401, "Unauthorized")
        return self.reply(200, {"type": "user", "name": "me", "auth": {"accessToken": {"role": "write"}}})

    def validate_yaml(self, body):
        return self.reply(200, {"errors": [], "warnings": []})

    def create(self, body):
        wanted = json.loads(body)
        repo_id = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if wanted.get("type") == "space":
            if wanted.get("sdk") != "gradio":
                return self.refuse(400, "a Space needs an SDK")
            repo_id = f"spaces/{repo_id}"
        url = f"{self.server.url}/{repo_id}"
        if repo_id in self.server.repositories:
            return self.reply(409, {"error": "exists", "url": url})
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.server.create(repo_id, bool(private))
        return self.reply(200, {"url": url, "id": repo_id})

    def find(self, repo_id: str, revision: str = "main") -> tuple[Repository, str] | None:
        repository = self.server.repositories.get(repo_id)
        if repository is None:
            return self.refuse(404, "RepoNotFound")
        sha = repository.branches.get(revision, revision if revision in repository.commits else None)
        if sha is None:
            return self.refuse(404, "RevisionNotFound")
        return repository, sha

    def info(self, body, repo_id, revision="main"):
        if not (found := self.find(repo_id, revision)):
            return None
        repository, sha = found
        siblings = [{"rfilename": path} for path in repository.commits[sha]]
        about = {
            "id": repo_id.removeprefix("spaces/"),
            "modelId": repo_id,
            "sha": sha,
            "private": repository.private,
            "siblings": siblings,
        }
        return self.reply(200, {**about, "_id": "x", "tags": [], "downloads": 0, "likes": 0})

    def branch(self, body, repo_id, name):
        repository = self.server.repositories[repo_id]
        if name in repository.branches:
            return self.reply(409, {"error": "Reference already exists"})
        repository.branches[name] = repository.branches["main"]
        return self.reply(200, {})

    def preupload(self, body, repo_id, revision):
        if not (found := self.find(repo_id, revision)):
            return None
        files, modes = found[0].commits[found[1]], []
        for file in json.loads(body)["files"]:
            path = file["path"]
            mode = {"path": path, "shouldIgnore": False}
            mode["uploadMode"] = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            if path in files:
                is_lfs, oid = files[path]
                mode["oid"] = oid if is_lfs else git_oid(self.server.blobs[oid])
            modes.append(mode)
        return self.reply(200, {"files": modes})

    def lfs_batch(self, body, repo_id):
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.blobs:
                upload = {"href": f"{self.server.url}/__lfs/{wanted['oid']}"}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.server.url}/__verify"}}
            objects.append(entry)
        return self.reply(200, {"transfer": "basic", "objects": objects})

    def lfs(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self.refuse(400, "the content is not that of the hash")
        self.server.blobs[oid] = body
        return self.reply(200, {})

    def lfs_verify(self, body):
        return self.reply(200 if json.loads(body)["oid"] in self.server.blobs else 404, {})

    def commit(self, body, repo_id, revision):
        if not (found := self.find(repo_id, revision)):
            return None
        repository, sha = found
        files, header = dict(repository.commits[sha]), {}
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                header = value
            elif key == "file":
                content = base64.b64decode(value["content"])
                oid = hashlib.sha256(content).hexdigest()
                self.server.blobs[oid] = content
                files[value["path"]] = (False, oid)
            elif key == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    return self.refuse(400, "an LFS object was never uploaded")
                files[value["path"]] = (True, value["oid"])
            elif key == "deletedFile":
                files.pop(value["path"])
        if header.get("parentCommit") not in (None, sha):
            return self.refuse(412, "the branch has moved")
        new = hashlib.sha1(json.dumps([sha, sorted(files.items()), len(repository.commits)]).encode()).hexdigest()
        repository.commits[new] = files
        reply = {"commitUrl": f"{self.server.url}/{repo_id}/commit/{new}", "commitOid": new, "success": True}
        if parse_qs(urlsplit(self.path).query).get("create_pr"):
            number = sum(name.startswith("refs/pr/") for name in repository.branches) + 1
            repository.branches[f"refs/pr/{number}"] = new
            reply["pullRequestUrl"] = f"{self.server.url}/{repo_id}/discussions/{number}"
        else:
            repository.branches[revision] = new
        repository.messages.append(header.get("summary", ""))
        return self.reply(200, reply)

    def tree(self, body, repo_id, revision):
        if not (found := self.find(repo_id, revision.split("/")[0])):
            return None
        items = []
        for path, (is_lfs, oid) in found[0].commits[found[1]].items():
            data = self.server.blobs[oid]
            item = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
            items.append(item | ({"lfs": {"oid": oid, "size": len(data), "pointerSize": 134}} if is_lfs else {}))
        return self.reply(200, items)

    def resolve(self, body, repo_id, revision, path):
        if not (found := self.find(repo_id, revision)):
            return None
        repository, sha = found
        if path not in repository.commits[sha]:
            return self.refuse(404, "EntryNotFound", **{"X-Repo-Commit": sha})
        is_lfs, oid = repository.commits[sha][path]
        data = self.server.blobs[oid]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{git_oid(data)}"', "Accept-Ranges": "bytes"}
        if is_lfs:
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
        return self.reply(200, data, headers, "application/octet-stream")


REPO = "((?:spaces/)?[^/]+/[^/]+)"
ROUTES = (
    (r"/api/whoami-v2", Handler.whoami),
    (r"/api/validate-yaml", Handler.validate_yaml),
    (r"/api/repos/create", Handler.create),
    (rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"/__lfs/([0-9a-f]{64})", Handler.lfs),
    (r"/__verify", Handler.lfs_verify),
    (rf"/api/models/{REPO}/preupload/(.+)", Handler.preupload),
    (rf"/api/models/{REPO}/commit/(.+)", Handler.commit),
    (rf"/api/models/{REPO}/branch/(.+)", Handler.branch),
    (rf"/api/models/{REPO}/tree/(.+)", Handler.tree),
    (rf"/api/models/{REPO}/revision/(.+)", Handler.info),
    (rf"/api/models/{REPO}", Handler.info),
    (rf"/{REPO}/resolve/(refs/pr/\d+|[^/]+)/(.+)", Handler.resolve),
)
