"""Why the registry refuses something, with the HTTP status by which an API says so."""

from qpack.errors import ServeError


class RegistryError(ServeError):
    """A request that the registry refuses; nothing was changed.

    ``status`` is 400 for a name that cannot be one, 404 for what is not there, 409 for what the registry's state does
    not allow, 413 for too large, 422 for an adapter that cannot be served, 507 for a full disk.
    """

    def __init__(self, message: str, status: int = 422) -> None:
        super().__init__(message)
        self.status = status
