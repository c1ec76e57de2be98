"""Both hubs on loopback, for the real client libraries: the part of their protocols that is used, and faults on demand.

One `HubServer` answers Hugging Face's paths (/api/models/…, /org/name/resolve/…) and ModelScope's (/api/v1/models/…).
Large files are redirected to a second server under another host name, as both hubs do with their storage.

    with HubServer() as server:
        server.publish("org/name", folder)
        server.strike("cut", "model-00001*")  # once
        run_dsv4(server, home, "download", "org/name", "out")
        server.requests  # what was asked, with headers

The libraries read HF_ENDPOINT and the like when they are imported, so every run is a process of its own.
"""

import fnmatch
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

from patience import LONG
from program import Ended, run_warm

from dsv4.errors import Dsv4Error


def git_sha1(data: bytes) -> str:
    """git's name for a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def commit_of(folder: Path) -> str:
    """A commit hash that depends on the content, as git's does."""
    digest = hashlib.sha1()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


@dataclass
class Repository:
    """Commits (hash -> folder), branches (name -> hash), and names that the listing adds without having them."""

    commits: dict[str, Path] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    last_changed: str = ""  # the commit that ModelScope's listing names for every file; "" for the one that is listed
    extra_listed: dict[str, int] = field(default_factory=dict)

    def folder(self, revision: str) -> tuple[str, Path] | None:
        commit = self.branches.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None


@dataclass(frozen=True)
class Request:
    """One request as it arrived: `host` is "hub" or "storage"."""

    host: str
    method: str
    path: str
    headers: dict[str, str]


def is_large(path: Path) -> bool:
    """Kept outside git, with a SHA-256, behind a redirect."""
    return path.suffix == ".safetensors" or path.name == "tokenizer.json"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer is a head and a body, and nobody waits for an acknowledgement between
    hub: "HubServer"
    host = "hub"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        # As a proxy, the hub's server is asked for storage too.
        host = "storage" if self.path.startswith(self.hub.storage_url) else self.host
        request = Request(host, self.command, self.path, dict(self.headers))
        self.hub.requests.append(request)
        self.hub.watch(request)
        instead = self.hub.portal(request)
        if instead is not None:
            return self._send(200, instead, Content_Type="text/html" if instead[:1] == b"<" else "application/json")
        if self._sabotaged(request):
            return None
        for old, new in self.hub.renamed.items():
            if old in self.path and host == "hub":
                return self._send(307, Location=self.path.replace(old, new))
        parts = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(parts.query).items()}
        path = unquote(parts.path)
        if host == "storage":
            self._storage(path)
        elif path.startswith("/api/v1/models/"):
            self._modelscope(path.removeprefix("/api/v1/models/"), query)
        elif path.startswith("/openapi/v1/models"):
            self._modelscope_search(path.removeprefix("/openapi/v1/models"), query)
        elif path == "/api/models":
            self._search(query)
        elif path == "/api/xet-token":
            self._xet_token()
        elif path.startswith("/api/models/"):
            self._metadata(path.removeprefix("/api/models/"))
        elif "/resolve/" in path:
            self._resolve(path)
        else:
            self._error(404)

    def _sabotaged(self, request: Request) -> bool:
        """Whether this request gets no proper answer: an error, or a connection that is closed."""
        fault = self.hub.sabotage(request)
        if fault == "close":
            self.close_connection = True
        elif fault == "cut":
            self.hub.strike("cut", times=1)
            return False
        elif fault:
            self._error(int(fault))
        return bool(fault)

    # Answers

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), Content_Type="application/json")

    def _error(self, status: int, code: str = "") -> None:
        message = {"Code": status, "Message": code or "error", "Success": False}
        headers = {"X_Error_Code": code, "X_Error_Message": code} if code else {}
        if status == 429 and self.hub.retry_after:
            headers["Retry_After"] = str(self.hub.retry_after)
        self._send(status, json.dumps(message).encode(), Content_Type="application/json", **headers)

    def _struck(self, fault: str, name: str) -> bool:
        return self.hub.struck(fault, name, whole=not self.headers.get("Range"))

    def _busy(self, name: str) -> bool:
        for status in (429, 500):
            if self._struck(str(status), name):
                self._error(status)
                return True
        if self._struck("stall", name):
            self.hub.stalled.set()
            self.hub.healed.wait()  # longer than any test waits
        return False

    # Hugging Face

    def _xet_token(self) -> None:
        tomorrow = str(int(time.time()) + 86400)
        self._send(
            200, b"{}", X_Xet_Cas_Url=self.hub.storage_url, X_Xet_Access_Token="x", X_Xet_Token_Expiration=tomorrow
        )  # fmt: skip

    def _repository(self, name: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._error(404 if self.headers.get("Authorization") else 401, "RepoNotFound")
        return repository

    def _search(self, query: dict[str, str]) -> None:
        wanted = query.get("search", "").lower()
        owner = query.get("author")
        names = [n for n in self.hub.repositories if wanted in n.lower() and owner in (None, n.split("/")[0])]
        self._json([{"id": n, "_id": n, "modelId": n, "private": False, "tags": [], "downloads": 0} for n in names])

    def _metadata(self, rest: str) -> None:
        owner, name, kind, *path = rest.split("/")
        if self._busy(kind):
            return
        repository = self._repository(f"{owner}/{name}")
        if repository is None:
            return
        found = repository.folder("/".join(path))
        if found is None:
            return self._error(404, "RevisionNotFound")
        commit, folder = found
        if kind == "revision":
            return self._json({"id": f"{owner}/{name}", "_id": "0", "sha": commit, "siblings": [], "tags": []})
        self._json(self.hub.tree(repository, folder))
        self.hub.after_listing()

    def _resolve(self, path: str) -> None:
        name, _, rest = path[1:].partition("/resolve/")
        revision, _, file = rest.partition("/")
        repository = self._repository(name)
        if repository is None:
            return
        if repository.gated:
            return self._error(403, "GatedRepo")
        found = repository.folder(revision)
        if found is None:
            return self._error(404, "RevisionNotFound")
        commit, folder = found
        if not (folder / file).is_file():
            return self._error(404, "EntryNotFound")
        if self.command == "GET" and self._busy(file):
            return
        self._file(folder / file, file, commit, f"/{name}/{commit}/{file}")

    def _file(self, path: Path, name: str, commit: str, storage_path: str) -> None:
        data = path.read_bytes()
        if not is_large(path):
            return self._body(data, name, X_Repo_Commit=commit, ETag=f'"{git_sha1(data)}"')
        xet = {"X_Xet_Hash": "ab" * 32, "X_Xet_Refresh_Route": f"{self.hub.url}/api/xet-token"} if self.hub.xet else {}
        size = len(data) - 7 if self.hub.lies_about_size(name) else len(data)
        self._send(
            302, X_Repo_Commit=commit, X_Linked_Size=str(size), Location=self.hub.signed(storage_path),
            X_Linked_ETag=f'"{hashlib.sha256(data).hexdigest()}"', ETag=f'"{hashlib.sha256(data).hexdigest()}"',
            **xet,
        )  # fmt: skip

    def _storage(self, path: str) -> None:
        if path.startswith(("/v1/", "/v2/")):  # Xet
            return self._error(404)
        if self.hub.has_expired(self.path):
            return self._error(403)
        owner, name, commit, file = path[1:].split("/", 3)
        if self.command == "GET" and self._busy(file):
            return
        self._body((self.hub.repositories[f"{owner}/{name}"].commits[commit] / file).read_bytes(), file)

    def _body(self, data: bytes, name: str, **headers: str) -> None:
        if self.command == "GET" and self._struck("wrong", name):
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        if self._struck("short", name):
            data = data[:-7]
        status, start = 200, 0
        wanted = self.headers.get("Range", "")
        if wanted and not self._struck("norange", name):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or len(data) - 1), len(data) - 1)
            status, headers["Content_Range"] = 206, f"bytes {start}-{end}/{len(data)}"
            data = data[start : end + 1]
            if self._struck("flip", name):
                data = bytes([data[0] ^ 1]) + data[1:]
        if self.command == "GET" and self._struck("cut", name):
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            return
        self._send(status, data, Accept_Ranges="bytes", **headers)

    # ModelScope

    def _modelscope_search(self, rest: str, query: dict[str, str]) -> None:
        if rest:
            known = rest[1:] in self.hub.repositories
            return self._json({"data": {"id": rest[1:]}, "success": True}) if known else self._error(404)
        wanted, owner = query.get("search", "").lower(), query.get("owner")
        names = [n for n in self.hub.repositories if wanted in n.lower() and owner in (None, n.split("/")[0])]
        self._json({"success": True, "data": {"models": [{"id": n} for n in names], "total_count": len(names)}})

    def _modelscope(self, rest: str, query: dict[str, str]) -> None:
        owner, name, *tail = rest.split("/")
        repository = self.hub.repositories.get(f"{owner}/{name}")
        if repository is None:
            return self._error(404, "record not found")
        found = repository.folder(query.get("Revision", "master"))
        if found is None:
            return self._error(404, "no such revision")
        commit, folder = found
        if tail == ["repo", "files"]:
            if self._busy("files"):
                return
            self._json({"Code": 200, "Data": {"Files": self.hub.modelscope_files(repository, folder, commit)}})
            return self.hub.after_listing()
        if tail == ["repo"]:
            file = query["FilePath"]
            if repository.gated:
                return self._error(403, "access denied")
            if not (folder / file).is_file():
                return self._error(404, "no such file")
            if self._busy(file):
                return
            if is_large(folder / file):
                return self._send(302, Location=self.hub.storage_url + quote(f"/{owner}/{name}/{commit}/{file}"))
            return self._body((folder / file).read_bytes(), file)
        self._error(404)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a client that closed the connection: some tests do."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class HubServer:
    """Both hubs and their storage host, running until the `with` block ends."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.xet = False  # announce large files as kept in Xet storage, which answers 404 to everything
        self.healed, self.stalled = threading.Event(), threading.Event()
        self.watch: Callable[[Request], None] = lambda request: None
        self.portal: Callable[[Request], bytes | None] = lambda request: None  # what somebody else answers instead
        self.sabotage: Callable[[Request], str] = lambda request: ""  # "close", "cut" or a status instead of an answer
        self.renamed: dict[str, str] = {}  # old name -> new name: the hub redirects
        self.retry_after = 0  # seconds, said with each 429
        self.expire_after = 0  # answers that an address of the storage gives; 0: any number
        self._lock = threading.Lock()  # several requests are answered at once
        self._addresses: list[str] = []
        self._strikes: list[list[Any]] = []
        self._moves: list[tuple[str, str, str]] = []
        self._servers = []
        for host in ("hub", "storage"):
            handler = type("Handler", (_Handler,), {"hub": self, "host": host})
            server = _Server(("127.0.0.1", 0), handler)
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            self._servers.append(server)
        self.url = f"http://127.0.0.1:{self._servers[0].server_address[1]}"
        self.storage_url = f"http://localhost:{self._servers[1].server_address[1]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def publish(self, name: str, folder: Path) -> str:
        """A new commit of `name` with the files of `folder`, on the branches main and master."""
        repository = self.repositories.setdefault(name, Repository())
        commit = commit_of(folder)
        repository.commits[commit] = folder
        repository.branches |= {"main": commit, "master": commit}
        return commit

    def move_after_listing(self, name: str, branch: str, commit: str) -> None:
        """Let a branch move as soon as somebody has listed the files."""
        self._moves.append((name, branch, commit))

    def after_listing(self) -> None:
        """Run the actions that wait for a listing."""
        for name, branch, commit in self._moves:
            self.repositories[name].branches[branch] = commit
        self._moves.clear()

    def strike(self, fault: str, pattern: str = "*", times: int = 1, whole_only: bool = False) -> None:
        """Switch on a fault for the next `times` requests of files (or `revision`, `tree`, `files`) that match.

        Faults: 429, 500, stall, cut, norange, wrong, short; flip (the first byte of a range).
        `whole_only`: requests without a range.
        """
        self.healed.clear()
        self._strikes.append([fault, pattern, times, whole_only])

    def struck(self, fault: str, name: str, whole: bool) -> bool:
        """Whether this request is to fail, counted down."""
        with self._lock:
            for strike in self._strikes:
                meant = strike[0] == fault and fnmatch.fnmatch(name, strike[1]) and (whole or not strike[3])
                if meant and strike[2] > 0:
                    strike[2] -= 1
                    return True
        return False

    def signed(self, path: str) -> str:
        """A new address of a file in the storage."""
        with self._lock:
            self._addresses.append("")
            number = len(self._addresses)
        return f"{self.storage_url}{quote(path)}" + (f"?signature={number}" if self.expire_after else "")

    def has_expired(self, address: str) -> bool:
        """Whether an address of the storage has given all its answers."""
        self._addresses.append(address)
        return 0 < self.expire_after < self._addresses.count(address)

    def heal(self) -> None:
        """Switch off every fault, and continue stalled answers."""
        self._strikes.clear()
        self.healed.set()

    def lies_about_size(self, name: str) -> bool:
        """A file that is served short is also announced short."""
        return any(s[0] == "short" and s[2] > 0 and fnmatch.fnmatch(name, s[1]) for s in self._strikes)

    def tree(self, repository: Repository, folder: Path) -> list[dict[str, Any]]:
        """Hugging Face's listing."""
        entries: list[dict[str, Any]] = []
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_dir():
                entries.append({"type": "directory", "oid": "0" * 40, "size": 0, "path": name})
                continue
            data = path.read_bytes()
            entry: dict[str, Any] = {"type": "file", "oid": git_sha1(data), "size": len(data), "path": name}
            if is_large(path):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            entries.append(entry)
        for name, size in repository.extra_listed.items():
            entries.append({"type": "file", "oid": "0" * 40, "size": size, "path": name})
        return entries

    def modelscope_files(self, repository: Repository, folder: Path, commit: str) -> list[dict[str, Any]]:
        """ModelScope's listing: SHA-256 for every file, and the commit that last changed each."""
        entries = []
        for path in sorted(folder.rglob("*")):
            kind = "tree" if path.is_dir() else "blob"
            data = b"" if path.is_dir() else path.read_bytes()
            entries.append(
                {
                    "Name": path.name, "Path": path.relative_to(folder).as_posix(), "Type": kind, "Size": len(data),
                    "Sha256": "" if path.is_dir() else hashlib.sha256(data).hexdigest(),
                    "Revision": repository.last_changed or commit,
                    "CommittedDate": 1750000000, "IsLFS": is_large(path), "Mode": "33188",
                }
            )  # fmt: skip
        for name, size in repository.extra_listed.items():
            entries.append({"Name": name, "Path": name, "Type": "blob", "Size": size, "Sha256": "0" * 64})
        return entries

    def whole_shards(self) -> list[str]:
        """Names of the shards that were asked for whole, one entry a request."""
        asked = [r for r in self.requests if r.host == "storage" and r.method == "GET"]
        return [r.path.rsplit("/", 1)[1] for r in asked if not any(h.lower() == "range" for h in r.headers)]

    def fetched(self, pattern: str) -> int:
        """How many GET requests for whole or partial files matched."""
        return sum(
            r.method == "GET" and fnmatch.fnmatch(unquote(r.path), f"*{pattern}") and "/tree/" not in r.path
            for r in self.requests
        )


def outcome(action: Callable[[], object]) -> object:
    """What an action returns, or the exit code and the words of its error; 70 for one that is no error of dsv4."""
    try:
        return action()
    except Dsv4Error as error:
        return f"{error.exit_code} {error} {error.hint}"
    except Exception as error:
        return f"70 {error!r}"


def hub_environment(server: HubServer, home: Path, modelscope: HubServer | None = None, **more: str) -> dict[str, str]:
    """An environment in which the libraries find only these servers, and caches and logins only under `home`."""
    keep = {k: v for k, v in os.environ.items() if not k.upper().startswith(("HF_", "HUGGING", "MODELSCOPE", "DSV4"))}
    keep = {k: v for k, v in keep.items() if not k.upper().endswith("_PROXY")}
    return keep | {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DOWNLOAD_TIMEOUT": f"{LONG:.0f}",
        "HF_HUB_ETAG_TIMEOUT": f"{LONG:.0f}",
        "MODELSCOPE_ENDPOINT": (modelscope or server).url,
        "MODELSCOPE_CACHE": str(home / "ms"),
        "MODELSCOPE_HOME": str(home / "ms-home"),
        **more,
    }


def run_dsv4(
    server: HubServer, home: Path, *arguments: object, modelscope: HubServer | None = None, **more: str
) -> Ended:
    """`dsv4 …` in the folder `home` and a process of its own, with both hubs at `server` or ModelScope elsewhere."""
    return run_warm(home, *arguments, environment=hub_environment(server, home, modelscope, **more))
