"""Why the registry refuses something, with the HTTP status by which an API says so."""

from qpack.errors import ServeError

_KINDS = {400: "name", 404: "missing", 409: "conflict", 413: "too large", 422: "malformed", 502: "hub", 507: "no room"}


class RegistryError(ServeError):
    """A request that the registry refuses; nothing was changed.

    ``status`` is 400 for a name that cannot be one, 404 for what is not there, 409 for what the registry's state does
    not allow, 413 for too large, 422 for an adapter that cannot be served, 502 for a hub that does not give it, 507
    for a full disk. ``kind`` says the same in a word, and of what can't be served what is wrong with it
    (`serve.registry.checks`).
    """

    def __init__(self, message: str, status: int = 422, kind: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind or _KINDS[status]
