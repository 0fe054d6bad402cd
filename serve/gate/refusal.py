"""Why a request is not answered, in the form that OpenAI's clients read."""

import json

# Named as vLLM names its own errors, by the classes of OpenAI's client, or as such a class would be called.
_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    408: "APITimeoutError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
    504: "APITimeoutError",
}


class Refusal(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: for people.
        param: the field of the body that is wrong.
        retry_after: whole seconds after which to come back; the openai package does so by itself.
        headers: more of them.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        *,
        retry_after: int | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        error = {"message": message, "type": _TYPES[status], "param": param, "code": status}
        self.body = json.dumps({"error": error}).encode()
        """The error as JSON."""
        self.event = b"data: " + self.body + b"\n\ndata: [DONE]\n\n"
        """The error as the last events of a stream."""
        self.headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(self.body)).encode()),
            *(() if retry_after is None else ((b"retry-after", str(retry_after).encode()),)),
            *headers,
        ]
