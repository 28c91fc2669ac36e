"""The few routes of the Hugging Face Hub that its library takes to read a model and to push one, over HTTP on loopback."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories: name → revision (a branch, or a commit) → path → bytes."""

    def __init__(self):
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.url = ""

    def commit(self, name: str, directory: Path, branch: str = "main") -> str:
        """Makes what a directory holds the newest commit of a branch; returns its hash."""
        files = {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
        return self.put(name, branch, files)

    def put(self, name, branch, content):
        sha = hashlib.sha1(
            json.dumps([name, sorted((k, _git_oid(v)) for k, v in content.items())]).encode()
        ).hexdigest()
        self.repositories.setdefault(name, {}).update({branch: content, sha: content})
        return sha

    def sha(self, name: str, revision: str) -> str:
        content = self.repositories[name][revision]
        return next(key for key, value in self.repositories[name].items() if value is content and len(key) == 40)


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._get()

    def do_GET(self):
        self._get()

    def _answer(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status, code, message):
        self._answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def _get(self):
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        self.hub.requests.append(f"{self.command} {self.path}")
        if parts[:2] == ["api", "models"]:
            name, what = "/".join(parts[2:4]), parts[4:]
        elif len(parts) > 3 and parts[2] == "resolve":
            name, what = "/".join(parts[:2]), parts[2:]
        else:
            return self._refuse(404, "EntryNotFound", "no such route")
        revisions = self.hub.repositories.get(name)
        if revisions is None:
            return self._refuse(401, "RepoNotFound", "Repository not found")
        revision = what[1] if len(what) > 1 else "main"
        if revision not in revisions:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files, sha = revisions[revision], self.hub.sha(name, revision)
        if what[:1] == ["tree"]:
            return self._answer(
                200, [{"type": "file", "path": k, "size": len(v), "oid": _git_oid(v)} for k, v in files.items()]
            )
        if what[:1] != ["resolve"]:
            return self._answer(200, {"id": name, "sha": sha, "siblings": [{"rfilename": key} for key in files]})
        if name in self.hub.gated:
            return self._refuse(403, "GatedRepo", "Access to this model is restricted")
        path = "/".join(what[2:])
        if path not in files:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        etag = f'"{_git_oid(files[path])}"'
        return self._answer(200, files[path], ETag=etag, X_Repo_Commit=sha, Accept_Ranges="none")

    def do_POST(self):
        self.hub.requests.append(f"POST {self.path}")
        text = self._body()
        if "Bearer hf_writer" not in self.headers.get("Authorization", ""):
            return self._refuse(401, "", "Invalid username or password.")
        if self.path == "/api/repos/create":
            given = json.loads(text)
            name = f"{given['organization']}/{given['name']}"
            if name in self.hub.repositories:
                return self._answer(
                    409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}
                )
            self.hub.put(name, "main", {})
            return self._answer(200, {"url": f"{self.hub.url}/{name}"})
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        parts = urlsplit(self.path).path.strip("/").split("/")
        if parts[-1] == "batch":
            objects = [
                {
                    "oid": o["oid"],
                    "size": o["size"],
                    "actions": {"upload": {"href": f"{self.hub.url}/blobs/{o['oid']}"}},
                }
                for o in json.loads(text)["objects"]
            ]
            return self._answer(200, {"transfer": "basic", "objects": objects})
        name = "/".join(parts[2:4])
        if parts[4] == "preupload":
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith("safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(text)["files"]
            ]
            return self._answer(200, {"files": modes})
        files = dict(self.hub.repositories[name][parts[5]])
        for line in map(json.loads, text.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.hub.put(name, parts[5], files)
        return self._answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})

    def do_PUT(self):
        self.hub.blobs[self.path.rpartition("/")[2]] = self._body()
        self._answer(200)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub on a free port for the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
