"""The routes by which adapters are managed while they are served. The gate opens them to admins only.

=======  ==================================  =========================================================
GET      ``/v1/adapters``                    names and versions, which of them the engine holds, live figures
POST     ``/v1/adapters/NAME``               upload the files of a version, as multipart; checked first.
                                             As JSON: ``{"source": "ORG/NAME", "revision": null}`` of the hub
POST     ``/v1/adapters/NAME/promote``       ``{"version": DIGEST}``: let the name point at it
POST     ``/v1/adapters/NAME/rollback``      let it point at what it pointed at before
POST     ``/v1/adapters/NAME/pin``           ``{"version": DIGEST, "pinned": true}``: keep it in the engine
POST     ``/v1/adapters/NAME/canary``        ``{"percents": {DIGEST: 5}}``: share the name; ``{}`` ends it
POST     ``/v1/adapters/NAME/shadow``        ``{"version": DIGEST}``: copy requests to it; null ends it
DELETE   ``/v1/adapters/MODEL``              a name with its versions, or ``NAME@DIGEST``
=======  ==================================  =========================================================

No route takes a path: what is served was uploaded, comes from the hub, or is in a directory that the server was started
with. Every change is the registry's, and is seen by the next request. ``by`` says who makes it, for the list; whoever
may make it may say what he likes.
"""

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, StringConstraints, ValidationError
from starlette.datastructures import UploadFile

from serve.fetching import fetch
from serve.registry import Alias, Registry, RegistryError, Version
from serve.routes import ADAPTERS

# More than an adapter has, and for the borders between the parts.
_FILES = 8
_SLACK_BYTES = 1 << 16

_BY = "the API"

router = APIRouter(prefix=ADAPTERS)


By: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]{1,128}$")]


class Chosen(BaseModel):
    """A version of a name, by its digest or the beginning of it."""

    version: str
    by: By = _BY


class Wanted(BaseModel, extra="forbid"):
    """An adapter of the hub."""

    source: str
    revision: str | None = None


class Pinned(BaseModel):
    """Whether a version stays in the engine."""

    version: str
    pinned: bool = True


class Percents(BaseModel):
    """What share of its users each version of a name answers, by digest."""

    percents: dict[str, float] = {}


class Shadow(BaseModel):
    """The version that gets copies."""

    version: str | None


@router.get("")
async def list_adapters(request: Request) -> JSONResponse:
    """Names, versions, which of them the engine holds, and the figures of now (`serve.gate.figures`)."""
    running = request.app.state.qpack
    registry: Registry = running.registry
    resident = set(running.residency.resident)
    versions = [_version(version) | {"resident": version.id in resident} for version in registry.versions()]
    aliases = [_alias(alias) for alias in registry.aliases().values()]
    return JSONResponse({"aliases": aliases, "versions": versions, "figures": running.gate.figures()})


@router.post("/{name}")
async def add(name: str, request: Request, promote: bool = True, by: By = _BY) -> JSONResponse:
    """Check the uploaded files, or what the hub has, and serve them, under ``name`` too unless ``promote`` is false."""
    registry: Registry = request.app.state.qpack.registry
    if not request.app.state.qpack.takes_adapters:
        return _refused("this server was started without room for adapters: start it with --registry DIR", 409)
    length = request.headers.get("content-length", "")
    if not length.isdigit():
        return _refused("the length of an upload must be said: Content-Length", 411)
    of_hub = request.headers.get("content-type", "").startswith("application/json")
    limit = 0 if of_hub else registry.limits.max_bytes
    if int(length) > limit + _SLACK_BYTES:
        return _refused(f"an adapter may have {limit or _SLACK_BYTES} bytes, not {length}", 413)
    if of_hub:
        try:
            wanted = Wanted.model_validate_json(await request.body())
        except ValidationError as error:
            return _refused(f"the body is not as expected: {error.errors()[0]['msg'].lower()}", 400)
        return await _answer(lambda: _version(_fetched(registry, name, wanted, promote, by)), 201)
    async with request.form(max_files=_FILES, max_fields=0) as form:
        files = [part for _, part in form.multi_items() if isinstance(part, UploadFile)]
        return await _answer(lambda: _version(_uploaded(registry, name, files, promote, by)), 201)


def _uploaded(registry: Registry, name: str, files: list[UploadFile], promote: bool, by: str) -> Version:
    with tempfile.TemporaryDirectory(prefix="qpack-upload-") as directory:
        for file in files:
            _save(file, Path(directory))
        with _called(name, directory):
            return registry.add(name, Path(directory), by=by, promote=promote)


def _fetched(registry: Registry, name: str, wanted: Wanted, promote: bool, by: str) -> Version:
    with tempfile.TemporaryDirectory(prefix="qpack-upload-") as directory:
        snapshot = fetch(wanted.source, wanted.revision, Path(directory), registry.limits)
        with _called(wanted.source, str(snapshot)):
            return registry.add(name, snapshot, by=by, promote=promote)


@contextmanager
def _called(name: str, directory: str) -> Iterator[None]:
    """Tell a client what is wrong with files by the names that it knows them by."""
    try:
        yield
    except RegistryError as error:
        message = str(error).replace(f"{directory}/", "").replace(directory, name)
        raise RegistryError(message, error.status) from error


@router.post("/{name}/promote")
async def promote(name: str, chosen: Chosen, request: Request) -> JSONResponse:
    """Let the name point at a version."""
    registry: Registry = request.app.state.qpack.registry
    return await _answer(lambda: _alias(registry.promote(name, chosen.version, by=chosen.by)))


@router.post("/{name}/rollback")
async def rollback(name: str, request: Request) -> JSONResponse:
    """Let the name point at what it pointed at before."""
    registry: Registry = request.app.state.qpack.registry
    return await _answer(lambda: _alias(registry.rollback(name)))


@router.post("/{name}/pin")
async def pin(name: str, pinned: Pinned, request: Request) -> JSONResponse:
    """Keep a version in the engine, or no longer."""
    registry: Registry = request.app.state.qpack.registry
    return await _answer(lambda: _version(registry.pin(name, pinned.version, pinned.pinned)))


@router.post("/{name}/canary")
async def canary(name: str, shares: Percents, request: Request) -> JSONResponse:
    """Share the name between versions."""
    registry: Registry = request.app.state.qpack.registry
    return await _answer(lambda: _alias(registry.canary(name, shares.percents)))


@router.post("/{name}/shadow")
async def shadow(name: str, chosen: Shadow, request: Request) -> JSONResponse:
    """Copy the name's requests to a version."""
    registry: Registry = request.app.state.qpack.registry
    return await _answer(lambda: _alias(registry.shadow(name, chosen.version)))


@router.delete("/{model}")
async def remove(model: str, request: Request) -> JSONResponse:
    """Take a name or a version out; requests that run on it end on it."""
    registry: Registry = request.app.state.qpack.registry
    return await _answer(lambda: {"removed": [version.id for version in registry.remove(model)]})


async def _answer(work: Callable[[], dict[str, Any]], status: int = 200) -> JSONResponse:
    """Do the work in a thread, for it waits for disks, and return what it returns or why it is refused."""
    try:
        return JSONResponse(await asyncio.to_thread(work), status)
    except RegistryError as error:
        return _refused(str(error), error.status)


def _refused(message: str, status: int) -> JSONResponse:
    kind = HTTPStatus(status).phrase.replace(" ", "") + "Error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


def _save(file: UploadFile, directory: Path) -> None:
    name = file.filename or ""
    if Path(name).name != name or name.startswith("."):
        raise RegistryError(f"the file name {name!r} is not a plain one", 400)
    with (directory / name).open("xb") as target:
        shutil.copyfileobj(file.file, target)


def _version(version: Version) -> dict[str, Any]:
    return {"id": version.id} | {key: value for key, value in asdict(version).items() if key != "path"}


def _alias(alias: Alias) -> dict[str, Any]:
    return {
        "name": alias.name,
        "live": alias.live.id,
        "since": alias.since,
        "by": alias.by,
        "canaries": {version.id: percent for version, percent in alias.canaries.items()},
        "shadow": alias.shadow and alias.shadow.id,
    }
