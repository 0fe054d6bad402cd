"""The page at ``/``: adapters with their live figures, uploads, and a playground. Plain files, no build step.

The browser gets the files of this folder as they are, by the paths of `serve.routes.PAGE`, and asks the same API as
everybody. It gets nothing from elsewhere: the policy below lets it load from, and send to, this server only, and run no
script that is not one of these files. ``house.css`` is what `qpack.reports` writes into its pages.
"""

from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from fastapi import APIRouter, Request, Response

from qpack.reports.page.document import STYLE
from serve.routes import PAGE

_FOLDER = Path(__file__).parent
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    "cache-control": "no-cache",  # but to be asked for by its tag: a server of another version has other files
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " object-src 'none'; require-trusted-types-for 'script'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
}


class _File(NamedTuple):
    content: bytes
    media_type: str
    tag: str


@cache
def _file(path: str) -> _File:
    name = path.removeprefix("/page/").removeprefix("/") or "index.html"
    file = STYLE if name == "house.css" else _FOLDER / name
    content = file.read_bytes()
    return _File(content, f"{_TYPES[file.suffix]}; charset=utf-8", f'"{sha256(content).hexdigest()[:16]}"')


async def send(request: Request) -> Response:
    """Answer with the file of a path, or 304 if the browser has it."""
    file = _file(request.scope["path"])
    headers = {**_HEADERS, "etag": file.tag}
    known = request.headers.get("if-none-match", "").split(",")
    if file.tag in (tag.strip().removeprefix("W/") for tag in known):
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


router = APIRouter()
for _path in PAGE:
    router.add_api_route(_path, send, methods=["GET"])
