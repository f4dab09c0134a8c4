"""A model hub on loopback: serves repositories of a local folder to the real clients of a real hub.

    root/models/owner/name/config.json ...              a model, its branch main
    root/datasets/owner/name/data/train-0.parquet ...   a data set
    root/datasets/owner/name@refs/convert/parquet/...   another branch or tag of it

    with HubServer(root) as hub:
        subprocess.run([...], env=os.environ | hub.environment(home))

The clients read HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE when they are imported: set them for a new process, not in one
that has imported huggingface_hub, datasets or transformers. Commits are hashes of the files, so they change when a file
does. What is served: repository info, trees, paths, refs, and files by GET (also a range) and HEAD. What is taken: new
model repositories and commits to their main branch, with a token.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info|refs)(?:/([^/]+))?(?:/(.*))?)?")
UPLOAD = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main")
NEW = re.compile(r"/api/(?:repos/create|validate-yaml)")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
CHUNK = 2**20


class HubServer:
    """Serve the repositories under `root` until the block ends.

    url: where; log: the requests so far, as "GET /path"; private: names of the repositories that were made so.
    fail() lets the next requests fail.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.log: list[str] = []
        self.private: set[str] = set()
        self._failures: list[tuple[re.Pattern, int]] = []
        self._lock = threading.Lock()
        self._hashes: dict[tuple, str] = {}

    def __enter__(self) -> "HubServer":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def environment(self, home: str | Path, offline: bool = False) -> dict[str, str]:
        """Variables for a client process whose hub is this one and whose caches lie under `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
        }

    def fail(self, count: int, status: int = 503, path: str = "") -> None:
        """Answer `status` to the next `count` requests whose "METHOD /path" holds the pattern `path`."""
        with self._lock:
            self._failures += [(re.compile(path), status)] * count

    def commit(self, kind: str, name: str, revision: str = "main") -> str | None:
        """The commit that a branch, a tag or a commit of a repository is at (kind: models or datasets), if any."""
        folder = self._folder(kind, name, revision)
        return folder and self._commit(folder)

    def _failure(self, request: str) -> int | None:
        with self._lock:
            self.log.append(request)
            for place, (path, status) in enumerate(self._failures):
                if path.search(request):
                    del self._failures[place]
                    return status
        return None

    def _branches(self, kind: str, name: str) -> dict[str, Path]:
        folder = self.root / kind / name
        found = {"main": folder} if folder.is_dir() else {}
        for other in sorted(folder.parent.glob(f"{folder.name}@*")):
            ends = other.glob("*/*") if other.name.endswith("@refs") else [other]
            found |= {str(end.relative_to(folder.parent)).split("@", 1)[1]: end for end in ends}
        return found

    def _folder(self, kind: str, name: str, revision: str) -> Path | None:
        branches = self._branches(kind, name)
        commits = (folder for folder in branches.values() if self._commit(folder) == revision)
        return branches.get(revision) or next(commits, None)

    def _commit(self, folder: Path) -> str:
        listing = "".join(f"{name} {self.hash_of(file)}\n" for name, file in files_of(folder))
        return hashlib.sha1(listing.encode()).hexdigest()

    def hash_of(self, file: Path) -> str:
        """sha256 of a file, computed once while it does not change."""
        state = file.stat()
        key = (file, state.st_size, state.st_mtime_ns)
        if key not in self._hashes:
            with file.open("rb") as stream:
                self._hashes[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        return self._hashes[key]


def files_of(folder: Path) -> Iterator[tuple[str, Path]]:
    """Paths inside a repository, with slashes, and the files there, in order."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            yield file.relative_to(folder).as_posix(), file


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        address = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length).decode()
        if status := self.hub._failure(f"{self.command} {address.path}"):
            return self._refuse(status, "Failing")
        if self.command == "POST" and (match := UPLOAD.fullmatch(address.path) or NEW.fullmatch(address.path)):
            return self._take(body, *match.groups())
        form = parse_qs(body)
        if match := API.fullmatch(address.path):
            kind, name, verb, revision, path = (unquote(part) if part else part for part in match.groups())
            return self._api(kind, name, verb, revision or "main", path or "", form, parse_qs(address.query))
        if match := FILE.fullmatch(address.path):
            prefix, name, revision, path = (unquote(part) if part else part for part in match.groups())
            return self._file("datasets" if prefix else "models", name, revision, path)
        self._refuse(404, "NotFound")

    def _take(self, body: str, name: str | None = None, verb: str | None = None) -> None:
        """Make a repository; say how files are to be sent (as they are); take a commit."""
        if not self.headers.get("Authorization"):
            return self._refuse(401, "Unauthorized")
        if verb == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            return self._json({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        if verb is None:
            asked = json.loads(body or "{}")
            if "name" in asked:
                name = f"{asked['organization']}/{asked['name']}"
                if not self.hub._folder("models", name, "main"):
                    (self.hub.root / "models" / name).mkdir(parents=True)
                    self.hub.private |= {name} if asked.get("visibility") == "private" else set()
            return self._json({"url": f"{self.hub.url}/{name}", "errors": [], "warnings": []})
        folder = self.hub.root / "models" / name
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                file = folder / line["value"]["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(line["value"]["content"]))
        commit = self.hub._commit(folder)
        self._json({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"})

    def _repository(self, kind: str, name: str, revision: str) -> tuple[Path, str] | None:
        folder = self.hub._folder(kind, name, revision)
        if folder:
            return folder, self.hub._commit(folder)
        self._refuse(404, "RevisionNotFound" if self.hub._branches(kind, name) else "RepoNotFound")
        return None

    def _api(self, kind: str, name: str, verb: str | None, revision: str, path: str, form: dict, query: dict) -> None:
        if verb == "refs":
            branches = self.hub._branches(kind, name)
            rows = [
                {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": self.hub._commit(folder)}
                for branch, folder in branches.items()
            ]
            return self._json({"branches": rows, "converts": [], "tags": []})
        found = self._repository(kind, name, revision)
        if not found:
            return
        folder, commit = found
        if verb in (None, "revision"):
            files = [{"rfilename": file} for file, _ in files_of(folder)]
            info = {"id": name, "sha": commit, "siblings": files, "private": False, "gated": False, "tags": []}
            return self._json(info | {"downloads": 0, "likes": 0})
        entries = self._entries(folder)
        if verb == "paths-info":
            return self._json([entries[path] for path in form.get("paths", []) if path in entries])
        inside = f"{path.rstrip('/')}/" if path else ""
        if inside and path not in entries:
            return self._refuse(404, "EntryNotFound")
        deep = query.get("recursive", ["false"])[0].lower() == "true"
        below = [entry for at, entry in entries.items() if at.startswith(inside)]
        self._json([entry for entry in below if deep or "/" not in entry["path"][len(inside) :]])

    def _entries(self, folder: Path) -> dict[str, dict]:
        entries = {}
        for name, file in files_of(folder):
            for parent in reversed(Path(name).parents[:-1]):
                entries[str(parent)] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": str(parent)}
            oid = self.hub.hash_of(file)
            entries[name] = {"type": "file", "oid": oid[:40], "size": file.stat().st_size, "path": name}
        return entries

    def _file(self, kind: str, name: str, revision: str, path: str) -> None:
        found = self._repository(kind, name, revision)
        if not found:
            return
        folder, commit = found
        file = dict(files_of(folder)).get(path)
        if file is None:
            return self._refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        size = file.stat().st_size
        start, end = 0, size - 1
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            start, end = int(asked[1]), min(int(asked[2] or end), end)
            if start > end:
                return self._refuse(416, "RangeNotSatisfiable", {"Content-Range": f"bytes */{size}"})
        headers = {
            "ETag": f'"{self.hub.hash_of(file)}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        self._head(206 if asked else 200, end + 1 - start, headers | self._span(asked, start, end, size))
        if self.command == "HEAD":
            return
        with file.open("rb") as stream:
            stream.seek(start)
            left = end + 1 - start
            while left:
                chunk = stream.read(min(CHUNK, left))
                self.wfile.write(chunk)
                left -= len(chunk)

    @staticmethod
    def _span(asked: re.Match | None, start: int, end: int, size: int) -> dict[str, str]:
        return {"Content-Range": f"bytes {start}-{end}/{size}"} if asked else {}

    def _json(self, value: object) -> None:
        data = json.dumps(value).encode()
        self._head(200, len(data), {"Content-Type": "application/json"})
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._head(status, 0, {"X-Error-Code": code, "X-Error-Message": code} | (headers or {}))

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(length)}).items():
            self.send_header(name, value)
        self.end_headers()
