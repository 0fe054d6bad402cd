"""Adapters that the server fetches from the Hugging Face hub itself, when an admin names one.

An id of the hub and never a path: what this machine has besides is nobody's business. The files' sizes are asked for
first, at one commit, which is then the one that is fetched; nothing is left in the client's cache.
"""

from pathlib import Path

from qpack.errors import HubError
from qpack.sizes import format_size
from qpack.sources import hub, is_hub_id
from serve.registry import Limits, RegistryError


def fetch(source: str, revision: str | None, directory: Path, limits: Limits) -> Path:
    """Download the adapter ``source`` into ``directory`` and return where in it the files are.

    Raises:
        RegistryError: of status 400 if it is no id, 409 if the hub is off, 413 if it is too large, 502 for what the hub
            refuses or does not answer.
    """
    if not is_hub_id(source) or "/" not in source:
        raise RegistryError(f"{source!r} is not the id of an adapter of the hub, expected ORG/NAME", 400)
    if hub.is_offline():
        raise RegistryError(f"{source}: HF_HUB_OFFLINE is set where the server runs; upload the adapter's files", 409)
    hub.show_no_progress()
    try:
        commit, size = hub.adapter_size(source, revision)
        if size > limits.max_bytes:
            most = format_size(limits.max_bytes)
            raise RegistryError(f"{source}: {format_size(size)}, expected at most {most}", 413)
        return hub.download_adapter(source, commit, cache=directory)
    except HubError as error:
        raise RegistryError(str(error), 502) from None
