"""A small Hugging Face Hub on the loopback interface: it keeps what it gets, and speaks what huggingface_hub speaks.

Routes that it does not know fail and are noted in `unknown`. Any endpoint can be made to fail, see `fault`.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

WRITER, READER = "hf_writerToken", "hf_readerToken"
TOKENS = {WRITER: "write", READER: "read"}  # both of the user below
USER = "user"
LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".png")

KIND, REPO, REVISION = r"api/(?P<kind>models|datasets)", r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
FILES = rf"(?:(?P<kind>datasets)/)?{REPO}"
ROUTES = {
    "create": ("POST", r"api/repos/create"),
    "validate_yaml": ("POST", r"api/validate-yaml"),
    "preupload": ("POST", rf"{KIND}/{REPO}/preupload/{REVISION}"),
    "lfs_batch": ("POST", rf"{FILES}\.git/info/lfs/objects/batch"),
    "lfs_put": ("PUT", r"lfs/(?P<oid>[0-9a-f]{64})"),
    "commit": ("POST", rf"{KIND}/{REPO}/commit/{REVISION}"),
    "info": ("GET", rf"{KIND}/{REPO}(?:/revision/{REVISION})?"),
    "tree": ("GET", rf"{KIND}/{REPO}/tree/{REVISION}(?:/(?P<path>.+))?"),
    "resolve": ("HEAD|GET", rf"{FILES}/resolve/{REVISION}/(?P<path>.+)"),
}


@dataclass
class Repo:
    """A repository: a list of commits, each a whole set of files."""

    repo_id: str
    url: str
    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def commit(self, files):
        sha = hashlib.sha1(f"{len(self.commits)} {time.monotonic_ns()}".encode()).hexdigest()
        self.commits.append((sha, files))
        return sha

    def at(self, revision):
        """The name and the files of a commit; None if there is no such revision."""
        found = [commit for commit in self.commits if revision in ("main", commit[0])]
        return found[-1] if found else None


class LoopbackHub:
    """The server and what it keeps."""

    def __init__(self):
        self.server = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.reset()
        self.start()

    def reset(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: dict[str, int | str] = {}
        self.requests = Counter()
        self.unknown: list[str] = []

    def add(self, repo_id, kind="models", private=False, files=None):
        """Make a repository, with some files."""
        url = f"{self.url}/{'datasets/' if kind == 'datasets' else ''}{repo_id}"
        repo = self.repos[kind, repo_id] = Repo(repo_id, url, private)
        repo.commit({".gitattributes": b""} | (files or {}))
        return repo

    def start(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.daemon_threads = True
        self.server.hub = self
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    @contextlib.contextmanager
    def refusing_connections(self):
        self.stop()
        try:
            yield
        finally:
            self.start()

    @contextlib.contextmanager
    def fault(self, endpoint, kind):
        """Let an endpoint fail: by a status, by dropping the connection ("drop"), half-way ("cut"), or be "slow"."""
        assert endpoint in ROUTES
        self.faults[endpoint] = kind
        try:
            yield
        finally:
            del self.faults[endpoint]

    def files(self, repo_id, kind="models"):
        """What a repository's main branch holds."""
        return self.repos[kind, repo_id].commits[-1][1]


class Handler(BaseHTTPRequestHandler):
    """Answers one request: finds the route, checks the token, and calls the method named like the endpoint.

    As HTTP/1.0 has it, each request has its own connection: none outlives `LoopbackHub.stop`.
    """

    def log_message(self, *args):
        pass

    def do(self):
        hub = self.server.hub
        path = unquote(urlsplit(self.path).path).removeprefix("/")
        matches = {
            endpoint: match
            for endpoint, (methods, pattern) in ROUTES.items()
            if self.command in methods.split("|") and (match := re.fullmatch(pattern, path))
        }
        if not matches:
            hub.unknown.append(f"{self.command} /{path}")
            self.read()
            return self.error(501, "unknown route")
        endpoint, match = matches.popitem()
        hub.requests[endpoint] += 1
        fault = hub.faults.get(endpoint)
        if fault == "slow":
            threading.Event().wait(0.2)
        elif fault in ("drop", "cut"):
            if fault == "cut":
                self.rfile.read(self.length() // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            return None
        body = self.read()
        if isinstance(fault, int):
            return self.error(fault, "an injected fault")
        arguments = match.groupdict()
        if "kind" in arguments:
            arguments["kind"] = arguments["kind"] or "models"
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        role = TOKENS.get(token)
        if token and not role:
            return self.error(401, "Invalid credentials in Authorization header")
        if endpoint in ("create", "preupload", "lfs_batch", "commit") and role != "write":
            return self.error(403 if role else 401, "this token may not write" if role else "no token")
        if repo_id := arguments.get("repo"):
            repo = hub.repos.get((arguments["kind"], repo_id))
            if repo is None or (repo.private and not role):
                return self.error(404 if role else 401, "Repository not found", code="RepoNotFound")
            if self.command in ("POST", "PUT") and not repo_id.startswith(f"{USER}/"):
                return self.error(403, "this token may not write there")
            arguments["repo"] = repo
        return getattr(self, endpoint)(body, **arguments)

    do_GET = do_HEAD = do_POST = do_PUT = do

    def length(self):
        return int(self.headers.get("Content-Length") or 0)

    def read(self):
        return self.rfile.read(self.length())

    def reply(self, content=b"", status=200, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def error(self, status, message, code=None):
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.reply({"error": message}, status, **headers)

    # The endpoints

    def create(self, body):
        asked = json.loads(body)
        kind = f"{asked.get('type') or 'model'}s"
        repo_id = f"{asked['organization'] or USER}/{asked['name']}"
        if not repo_id.startswith(f"{USER}/"):
            return self.error(403, "this token may not create repositories there")
        if repo := self.server.hub.repos.get((kind, repo_id)):
            return self.reply({"error": "You already created this repository", "url": repo.url}, 409)
        repo = self.server.hub.add(repo_id, kind, private=asked.get("visibility") == "private")
        return self.reply({"url": repo.url})

    def validate_yaml(self, body):
        content = json.loads(body)["content"]
        valid = content.startswith("---\n") and "\n---\n" in content
        self.reply({"errors": [] if valid else [{"message": "no front matter"}], "warnings": []})

    def preupload(self, body, kind, repo, revision):
        def mode(path):
            return "lfs" if path.endswith(LFS_SUFFIXES) else "regular"

        paths = [file["path"] for file in json.loads(body)["files"]]
        self.reply({"files": [{"path": p, "uploadMode": mode(p), "shouldIgnore": False} for p in paths]})

    def lfs_batch(self, body, kind, repo):
        def answer(asked):
            if asked["oid"] in self.server.hub.objects:
                return asked
            return asked | {"actions": {"upload": {"href": f"{self.server.hub.url}/lfs/{asked['oid']}"}}}

        objects = [answer(asked) for asked in json.loads(body)["objects"]]
        self.reply({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def lfs_put(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self.error(422, "the content does not have the SHA-256 sum that was announced")
        self.server.hub.objects[oid] = body
        return self.reply()

    def commit(self, body, kind, repo, revision):
        files = dict(repo.at(revision)[1])
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.server.hub.objects.get(value["oid"])
                if content is None or len(content) != value["size"]:
                    return self.error(422, f"{value['path']} was not uploaded as announced")
                files[value["path"]] = content
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
            else:
                assert line["key"] == "header", line
        sha = repo.commit(files)
        return self.reply({"commitOid": sha, "commitUrl": f"{repo.url}/commit/{sha}", "success": True})

    def info(self, body, kind, repo, revision):
        found = repo.at(revision or "main")
        if found is None:
            return self.error(404, "no such revision", code="RevisionNotFound")
        siblings = [{"rfilename": path} for path in found[1]]
        return self.reply(
            {"id": repo.repo_id, "sha": found[0], "private": repo.private, "tags": [], "siblings": siblings}
        )

    def tree(self, body, kind, repo, revision, path):
        found = repo.at(revision)
        if found is None:
            return self.error(404, "no such revision", code="RevisionNotFound")
        folder = f"{path}/" if path else ""
        files = {name: content for name, content in found[1].items() if name.startswith(folder)}
        if path and not files:
            return self.error(404, "no such folder", code="EntryNotFound")
        if "recursive=true" in urlsplit(self.path).query.lower():
            return self.reply([row(name, content) for name, content in files.items()])
        parts = {name: name.removeprefix(folder).partition("/") for name in files}
        folders = {folder + first for first, slash, _ in parts.values() if slash}
        rows = [row(name, files[name]) for name, (_, slash, _) in parts.items() if not slash]
        return self.reply([{"type": "directory", "path": name, "oid": "0" * 40} for name in sorted(folders)] + rows)

    def resolve(self, body, kind, repo, revision, path):
        found = repo.at(revision)
        if found is None:
            return self.error(404, "no such revision", code="RevisionNotFound")
        if path not in found[1]:
            return self.error(404, "no such file", code="EntryNotFound")
        content = found[1][path]
        headers = {"X-Repo-Commit": found[0], "ETag": f'"{row(path, content)["oid"]}"', "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(wanted[1]), int(wanted[2] or len(content) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            return self.reply(content[start:stop], 206, **headers)
        return self.reply(content, **headers)


def row(path, content):
    """A file as the tree endpoint lists it."""
    sha256 = hashlib.sha256(content).hexdigest()
    entry = {"type": "file", "path": path, "size": len(content)}
    if path.endswith(LFS_SUFFIXES):
        return entry | {"oid": sha256, "lfs": {"oid": sha256, "size": len(content), "pointerSize": 130}}
    return entry | {"oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
