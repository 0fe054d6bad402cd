"""How much is let in, checked when it is made."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from qpack.errors import ServeError


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Limits on every request, whoever sends it; those of a key are its own.

    Raises:
        ServeError: for a limit that nothing could pass.
    """

    max_body_bytes: int = 4_000_000
    """Bytes of a request's body."""
    max_output_tokens: int | None = None
    """Tokens that a request may ask for. By default what the model's context allows."""
    max_choices: int = 16
    """Answers of one request: ``n`` times its prompts."""
    max_waiting: int = 1024
    """Requests before the engine."""
    queue_timeout: float = 60.0
    """Seconds that a request waits for its turn and its adapter."""
    request_timeout: float = 600.0
    """Seconds from a request to the end of its answer. A client may ask for less, by the header x-request-timeout."""
    turn_seconds: float = 2.0
    """Seconds that an adapter lets requests in while another waits for its slot."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Shares of adapters, and of the base, by their names; 1 for all others."""

    def __post_init__(self) -> None:
        numbers = {option.name: getattr(self, option.name) for option in fields(self) if option.name != "weights"}
        numbers |= {f"weight of {name!r}:": weight for name, weight in self.weights.items()}
        for name, number in numbers.items():
            if number is not None and not 0 < number < math.inf:
                raise ServeError(f"{name} {number}: expected more than 0")
