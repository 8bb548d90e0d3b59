"""A Hub inside the test's process: the part of the Hub's HTTP API with which models are pushed and loaded.

It serves huggingface_hub's unmodified client (`HF_ENDPOINT`): repositories of models, commits, branches and tags, large
files by git-LFS with a redirect to a storage host for their download, tokens, private repositories, byte ranges. It
keeps what was asked of it in `requests`, and can cut connections in the middle of an upload or a download.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")  # stored by git-LFS whatever their size, as on the Hub
LARGE_BYTES = 10 * 2**20
DATE = "2026-01-01T00:00:00.000Z"


class HubError(Exception):
    """An answer other than success; `code` is what the client tells errors apart by."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass(frozen=True)
class StoredFile:
    oid: str  # sha256 of a large file, git's sha1 of another
    size: int
    is_large: bool


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    files: dict[str, StoredFile]


@dataclass
class Repository:
    repo_id: str
    private: bool
    commits: list[Commit] = field(default_factory=list)  # of all branches, in the order they were made
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.repo_id.split("/")[0]

    def commit(self, branch: str, title: str, files: dict[str, StoredFile]) -> Commit:
        content = json.dumps([self.repo_id, branch, title, len(self.commits)])
        commit = Commit(hashlib.sha1(content.encode()).hexdigest(), title, files)
        self.commits.append(commit)
        self.branches[branch] = commit
        return commit

    def find(self, revision: str) -> Commit:
        by_oid = {commit.oid: commit for commit in self.commits}
        commit = {**by_oid, **self.tags, **self.branches}.get(revision)
        if commit is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: Message
    body: bytes = b""

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Response:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Cut:
    """Connections that break `after_bytes` into the body, of the request or else of the answer."""

    method: str
    path: str  # regular expression
    after_bytes: int
    times: int
    done: int = 0


class LocalHub(ThreadingHTTPServer):
    """`with LocalHub(folder, tokens={"hf_secret": "acme"}) as hub:` serves at `hub.endpoint`; acme owns `acme/...`."""

    daemon_threads = True

    def __init__(self, folder: Path, tokens: dict[str, str]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.tokens = folder, tokens
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.unknown: list[str] = []  # requests without a route
        self.lock = threading.Lock()
        self._cuts: list[Cut] = []
        # The client keeps its token from any other host than the Hub's, and this name is another to it.
        self.storage = f"http://localhost:{self.server_port}/storage"
        self.endpoint = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    # ---- for tests ----

    @contextmanager
    def cutting(self, method: str, path: str, after_bytes: int, times: int) -> Iterator[Cut]:
        """Cut the first `times` connections that are used for this method and path (a regular expression)."""
        cut = Cut(method, path, after_bytes, times)
        self._cuts.append(cut)
        try:
            yield cut
        finally:
            self._cuts.remove(cut)

    def asked(self, method: str, path: str) -> list[Request]:
        return [request for request in self.requests if request.method == method and re.search(path, request.path)]

    def titles(self, repo_id: str) -> list[str]:
        return [commit.title for commit in self.repositories[repo_id].commits]

    # ---- what requests share ----

    def take_cut(self, method: str, path: str) -> Cut | None:
        with self.lock:
            for cut in self._cuts:
                if cut.method == method and re.search(cut.path, path) and cut.done < cut.times:
                    cut.done += 1
                    return cut
        return None

    def user(self, request: Request) -> str | None:
        """Whose token a request carries; `None` without one."""
        authorization = request.headers.get("Authorization")
        if authorization is None:
            return None
        token = authorization.removeprefix("Bearer ")
        if token not in self.tokens:
            raise HubError(401, "Unauthorized", "Invalid credentials in Authorization header")
        return self.tokens[token]

    def repository(self, request: Request, repo_id: str) -> Repository:
        """A repository that this request may read. A private one does not exist for others than its owner."""
        user, repository = self.user(request), self.repositories.get(repo_id)
        if repository is None or (repository.private and user != repository.owner):
            raise HubError(401 if user is None else 404, "RepoNotFound", "Repository not found")
        return repository

    def writable(self, request: Request, repo_id: str) -> Repository:
        repository = self.repository(request, repo_id)
        self.check_owner(request, repository.owner)
        return repository

    def signed_in(self, request: Request) -> str:
        user = self.user(request)
        if user is None:
            raise HubError(401, "Unauthorized", "Invalid username or password.")
        return user

    def check_owner(self, request: Request, owner: str) -> None:
        user = self.signed_in(request)
        if user != owner:
            raise HubError(403, "Forbidden", f"{user} may not write to {owner}")

    def object_path(self, oid: str) -> Path:
        return self.folder / oid

    def answer(self, request: Request) -> Response:
        with self.lock:
            self.requests.append(request)
            for methods, path, function in ROUTES:
                match = re.fullmatch(path, request.path)
                if match and request.method in methods.split():
                    return function(self, request, **{name: unquote(part) for name, part in match.groupdict().items()})
            unknown = f"{request.method} {request.path}"
            self.unknown.append(unknown)
        raise HubError(404, "NotFound", f"this Hub has no {unknown}")


class _Handler(BaseHTTPRequestHandler):
    """Bytes in, bytes out; `LocalHub.answer` decides."""

    protocol_version = "HTTP/1.1"
    server: LocalHub

    def handle_request(self) -> None:
        path = urlsplit(self.path).path
        cut = self.server.take_cut(self.command, path)
        if cut is not None and self.command in ("POST", "PUT"):
            self.rfile.read(cut.after_bytes)
            self.close_connection = True  # unread bytes and no answer: the client sees a reset
            return
        try:
            response = self.server.answer(Request(self.command, path, self.headers, self.read_body()))
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            response = Response(json.dumps({"error": error.message}).encode(), error.status, headers)
        self.send(response, cut)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, response: Response, cut: Cut | None) -> None:
        self.send_response(response.status)
        for name, value in {"Content-Length": str(len(response.body)), **response.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut is not None:
            self.close_connection = True
        self.wfile.write(response.body if cut is None else response.body[: cut.after_bytes])

    def log_message(self, *arguments: object) -> None:
        """Silent: tests read `LocalHub.requests`."""


def as_json(value: Any) -> Response:
    return Response(json.dumps(value).encode(), headers={"Content-Type": "application/json"})


# ---- accounts and repositories ----


def whoami(hub: LocalHub, request: Request) -> Response:
    user = hub.signed_in(request)
    return as_json({"type": "user", "name": user, "fullname": user, "orgs": [], "auth": {"type": "access_token"}})


def validate_card(hub: LocalHub, request: Request) -> Response:
    """Any card is taken: what the Hub makes of front matter is not modelled."""
    return as_json({"errors": [], "warnings": []})


def create_repository(hub: LocalHub, request: Request) -> Response:
    asked = request.json()
    owner = asked.get("organization") or hub.signed_in(request)
    hub.check_owner(request, owner)
    repo_id = f"{owner}/{asked['name']}"
    answer = {"url": f"{hub.endpoint}/{repo_id}", "name": repo_id}
    if repo_id in hub.repositories:
        message = "You already created this model repo"
        return Response(json.dumps({"error": message, **answer}).encode(), 409)
    # Clients have said it in both ways.
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    repository = hub.repositories[repo_id] = Repository(repo_id, private)
    repository.commit("main", "initial commit", {})
    return as_json(answer)


def repository_info(hub: LocalHub, request: Request, repo_id: str, revision: str = "main") -> Response:
    repository = hub.repository(request, repo_id)
    commit = repository.find(revision)
    siblings = [{"rfilename": path, "size": file.size} for path, file in sorted(commit.files.items())]
    about = {"private": repository.private, "tags": [], "lastModified": DATE, "createdAt": DATE}
    return as_json({"_id": "0" * 24, "id": repo_id, "sha": commit.oid, "siblings": siblings, **about})


def list_refs(hub: LocalHub, request: Request, repo_id: str) -> Response:
    repository = hub.repository(request, repo_id)

    def as_refs(kind: str, refs: dict[str, Commit]) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": refs[name].oid} for name in refs]

    return as_json(
        {"branches": as_refs("heads", repository.branches), "tags": as_refs("tags", repository.tags), "converts": []}
    )


def create_branch(hub: LocalHub, request: Request, repo_id: str, branch: str) -> Response:
    repository = hub.writable(request, repo_id)
    if branch in repository.branches:
        raise HubError(409, "Conflict", f"the branch {branch} exists")
    repository.branches[branch] = repository.find(request.json().get("startingPoint") or "main")
    return Response()


def create_tag(hub: LocalHub, request: Request, repo_id: str, revision: str) -> Response:
    repository = hub.writable(request, repo_id)
    repository.tags[request.json()["tag"]] = repository.find(revision)
    return Response()


def list_tree(hub: LocalHub, request: Request, repo_id: str, revision: str, folder: str = "") -> Response:
    """All files below a folder, as for `recursive=True`; no client here needs the folders themselves."""
    files = hub.repository(request, repo_id).find(revision).files
    inside = {path: file for path, file in sorted(files.items()) if path.startswith(f"{folder}/" if folder else "")}
    if folder and not inside:
        raise HubError(404, "EntryNotFound", f"{folder} does not exist on {revision}")
    return as_json([_tree_entry(path, file) for path, file in inside.items()])


def _tree_entry(path: str, file: StoredFile) -> dict[str, Any]:
    large = {"lfs": {"oid": file.oid, "size": file.size, "pointerSize": 134}} if file.is_large else {}
    return {"type": "file", "path": path, "oid": file.oid[:40], "size": file.size, **large}


# ---- upload: ask how, send the large files, then commit all at once ----


def choose_upload_modes(hub: LocalHub, request: Request, repo_id: str, revision: str) -> Response:
    present = hub.writable(request, repo_id).find(revision).files

    def answer_for(path: str, size: int) -> dict[str, Any]:
        is_large = size > LARGE_BYTES or path.endswith(LARGE_SUFFIXES)
        oid = present[path].oid if path in present else None
        return {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, "oid": oid}

    return as_json({"files": [answer_for(file["path"], file["size"]) for file in request.json()["files"]]})


def large_file_actions(hub: LocalHub, request: Request, repo_id: str) -> Response:
    """git-LFS' batch API: where to send each object; nowhere, if it is stored already."""
    hub.writable(request, repo_id)
    objects = request.json()["objects"]
    for large in objects:
        if not hub.object_path(large["oid"]).exists():
            large["actions"] = {"upload": {"href": f"{hub.storage}/{large['oid']}"}}
    return as_json({"transfer": "basic", "objects": objects})


def store_large_file(hub: LocalHub, request: Request, oid: str) -> Response:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, "BadDigest", f"these {len(request.body)} bytes are not {oid}")
    hub.object_path(oid).write_bytes(request.body)
    return Response()


def commit_files(hub: LocalHub, request: Request, repo_id: str, branch: str) -> Response:
    """One line of JSON an operation; all of them or none."""
    repository = hub.writable(request, repo_id)
    title, files = "", dict(repository.find(branch).files)
    for line in request.body.splitlines():
        operation = json.loads(line)
        key, value = operation["key"], operation["value"]
        if key == "header":
            title = value["summary"]
        elif key == "file":
            files[value["path"]] = _store_file(hub, base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if not hub.object_path(value["oid"]).exists():
                raise HubError(400, "MissingObject", f"{value['path']} was not uploaded")
            files[value["path"]] = StoredFile(value["oid"], value["size"], is_large=True)
        elif key == "deletedFile":
            del files[value["path"]]
        else:
            raise HubError(400, "BadRequest", f"this Hub knows no operation {key}")
    oid = repository.commit(branch, title, files).oid
    return as_json({"success": True, "commitOid": oid, "commitUrl": f"{hub.endpoint}/{repo_id}/commit/{oid}"})


def _store_file(hub: LocalHub, content: bytes) -> StoredFile:
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    hub.object_path(oid).write_bytes(content)
    return StoredFile(oid, len(content), is_large=False)


# ---- download ----


def resolve_file(hub: LocalHub, request: Request, repo_id: str, revision: str, path: str) -> Response:
    """A file, or for a large one the redirect to where it is stored."""
    commit = hub.repository(request, repo_id).find(revision)
    if path not in commit.files:
        raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}")
    file = commit.files[path]
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.oid}"'}
    if not file.is_large:
        return _content(hub, request, file.oid, headers)
    linked = {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(file.size)}
    return Response(status=302, headers={"Location": f"{hub.storage}/{file.oid}", **headers, **linked})


def read_large_file(hub: LocalHub, request: Request, oid: str) -> Response:
    return _content(hub, request, oid, {"ETag": f'"{oid}"'})


def _content(hub: LocalHub, request: Request, oid: str, headers: dict[str, str]) -> Response:
    """The bytes of an object, or of the one range that is asked for."""
    content = hub.object_path(oid).read_bytes()
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
    if asked is None:
        return Response(content, headers=headers)
    first = int(asked[1])
    last = min(int(asked[2] or len(content)), len(content) - 1)
    if first >= len(content):
        return Response(status=416, headers={"Content-Range": f"bytes */{len(content)}"})
    return Response(
        content[first : last + 1], 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
    )


REPO = r"(?P<repo_id>[^/]+/[^/]+)"
API = rf"/api/models/{REPO}"
REVISION = r"(?P<revision>[^/]+)"
BRANCH = r"(?P<branch>[^/]+)"
ROUTES: tuple[tuple[str, str, Callable[..., Response]], ...] = (
    ("GET", r"/api/whoami-v2", whoami),
    ("POST", r"/api/validate-yaml", validate_card),
    ("POST", r"/api/repos/create", create_repository),
    ("GET", API, repository_info),
    ("GET", rf"{API}/revision/{REVISION}", repository_info),
    ("GET", rf"{API}/refs", list_refs),
    ("POST", rf"{API}/branch/{BRANCH}", create_branch),
    ("POST", rf"{API}/tag/{REVISION}", create_tag),
    ("GET", rf"{API}/tree/{REVISION}", list_tree),
    ("GET", rf"{API}/tree/{REVISION}/(?P<folder>.+)", list_tree),
    ("POST", rf"{API}/preupload/{REVISION}", choose_upload_modes),
    ("POST", rf"{API}/commit/{BRANCH}", commit_files),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", large_file_actions),
    ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})", store_large_file),
    ("GET", r"/storage/(?P<oid>[0-9a-f]{64})", read_large_file),
    ("GET HEAD", rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)", resolve_file),
)
