"""A small Hugging Face hub on this machine, for tests of what talks to one.

It stands in for huggingface.co where no test may depend on it, and answers what huggingface_hub 2.4 asks for when it
downloads: ``/api/models/ID[/revision/REV]``, ``/api/models/ID/tree/REV`` and ``/ID/resolve/REV/FILE``, and the same of
data sets, with ranges, ETag, X-Repo-Commit and the X-Error-Code of each refusal. Not imitated: redirects to a content
network, Xet, pages of long listings. Weights are listed as git LFS files, with their SHA-256.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What is served, and what was asked for."""

    models: dict[str, Path]
    """The directory of each repository's commit on main, a data set's as a model's."""
    url: str = ""
    token: str | None = None
    """If set, nothing is there without it."""
    gated: bool = False
    cuts: dict[str, int] = field(default_factory=dict)
    """Close the next connection that sends this file after so many bytes."""
    corrupt: set[str] = field(default_factory=set)
    """Send the last byte of these files wrong."""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and range of every request."""
    on_request: Callable[[str], object] | None = None
    """Called with the last part of the path before a request is answered."""

    def ranges(self, file: str) -> list[str]:
        """The ranges of ``file`` that were asked for ("" for the whole), in order."""
        return [asked for method, path, asked in self.requests if method == "GET" and path.endswith(f"/{file}")]


@contextmanager
def serve(**models: Path) -> Iterator[Hub]:
    """Serve the model ``org/KEY`` from each directory until the block ends."""
    hub = Hub({f"org/{name}": directory for name, directory in models.items()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, hub))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    """Answers for one connection."""

    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        if self.hub.on_request:
            self.hub.on_request(path.rpartition("/")[2])
        api = re.fullmatch(
            r"/api/(models|datasets)/(?P<name>org/\w+)(/(?P<kind>revision|tree)/(?P<revision>[^/]+))?", path
        )
        found = api or re.fullmatch(r"/(datasets/)?(?P<name>org/\w+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", path)
        directory = self.hub.models.get(found["name"]) if found else None
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self.refuse(401, "GatedRepo" if self.hub.gated else "RepoNotFound")
        elif not found or not directory:
            self.refuse(401, "RepoNotFound")
        elif found["revision"] not in (None, "main", COMMIT):
            self.refuse(404, "RevisionNotFound")
        elif api:
            self.send_listing(found["name"], directory, tree=found["kind"] == "tree")
        elif found["file"] in files(directory):
            self.send_file(directory / found["file"])
        else:
            self.refuse(404, "EntryNotFound")

    def send_listing(self, name: str, directory: Path, *, tree: bool) -> None:
        siblings = [{"rfilename": path} for path in files(directory)]
        listing = [listed(directory, path) for path in files(directory)]
        self.send(json.dumps(listing if tree else {"id": name, "sha": COMMIT, "siblings": siblings}).encode())

    def send_file(self, path: Path) -> None:
        content = path.read_bytes()
        if path.name in self.hub.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        headers = {"ETag": f'"{etag(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            self.send(content, headers, cut=path.name)
            return
        start, end = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        self.send(content[start:end], headers, status=206, cut=path.name)

    def send(self, body: bytes, headers: dict[str, str] | None = None, *, status: int = 200, cut: str = "") -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            kept = self.hub.cuts.get(cut, len(body))
            self.wfile.write(body[:kept])
            if kept < len(body):
                del self.hub.cuts[cut]
                self.close_connection = True

    def refuse(self, status: int, code: str) -> None:
        self.send(b"", {"X-Error-Code": code, "X-Error-Message": code}, status=status)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


def files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def is_lfs(path: Path) -> bool:
    return path.suffix in (".safetensors", ".bin")


def etag(path: Path) -> str:
    return hashlib.new("sha256" if is_lfs(path) else "sha1", path.read_bytes(), usedforsecurity=False).hexdigest()


def listed(directory: Path, name: str) -> dict[str, object]:
    path = directory / name
    entry: dict[str, object] = {"type": "file", "path": name, "size": path.stat().st_size, "oid": "0" * 40}
    if is_lfs(path):
        entry["lfs"] = {"oid": etag(path), "size": path.stat().st_size, "pointerSize": 134}
    return entry
