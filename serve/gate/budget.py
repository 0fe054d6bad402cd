"""What a key may still use: requests and tokens a minute, requests at a time.

Token buckets: a minute's worth may be used at once and grows back evenly. Tokens are taken by estimate when a request
comes, and what was estimated wrong is taken or given back when its answer has ended, so that a bucket may owe. Buckets
are in memory: a restart fills them.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

from serve.gate.keys import Key
from serve.gate.refusal import Refusal

_MINUTE = 60.0


class Bucket:
    """``limit`` a minute, and at most a minute's worth."""

    def __init__(self, limit: int, now: float) -> None:
        self.limit = limit
        self._level, self._at = float(limit), now

    def take(self, amount: float, now: float) -> int:
        """Take it and return 0, or take nothing and return the whole seconds after which it can be had.

        More than a full bucket is had from a full one, which then owes the rest.
        """
        self._fill(now)
        missing = min(amount, self.limit) - self._level
        if missing > 0:
            return max(1, math.ceil(missing * _MINUTE / self.limit))
        self._level -= amount
        return 0

    def correct(self, amount: float, now: float) -> None:
        """Take ``amount`` whatever is there; give back what is below 0."""
        self._fill(now)
        self._level = min(self.limit, self._level - amount)

    def _fill(self, now: float) -> None:
        self._level = min(self.limit, self._level + (now - self._at) * self.limit / _MINUTE)
        self._at = now


class Budget:
    """One key's."""

    def __init__(self, key: Key, now: float) -> None:
        self._key = key
        self._requests = Bucket(key.requests_per_minute, now) if key.requests_per_minute else None
        self._tokens = Bucket(key.tokens_per_minute, now) if key.tokens_per_minute else None
        self._running = 0

    @contextmanager
    def request(self, now: float) -> Iterator[None]:
        """Count a request for as long as the block lasts.

        Raises:
            Refusal: 429, if there are too many, at a time or a minute.
        """
        if self._key.concurrency is not None and self._running >= self._key.concurrency:
            raise Refusal(429, f"this key may have {self._key.concurrency} requests at a time", retry_after=1)
        if self._requests and (seconds := self._requests.take(1, now)):
            raise Refusal(429, f"this key may send {self._requests.limit} requests a minute", retry_after=seconds)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def take(self, tokens: float, now: float) -> None:
        """Take the tokens that a request will need.

        Raises:
            Refusal: 429, if they aren't there.
        """
        if self._tokens and (seconds := self._tokens.take(tokens, now)):
            raise Refusal(429, f"this key may use {self._tokens.limit} tokens a minute", retry_after=seconds)

    def correct(self, tokens: float, now: float) -> None:
        """Take more tokens, or give some back."""
        if self._tokens:
            self._tokens.correct(tokens, now)


class Budgets:
    """Those of all keys that were used."""

    def __init__(self) -> None:
        self._of: dict[str, Budget] = {}

    def of(self, key: Key, now: float) -> Budget:
        """The key's; it is full at first."""
        return self._of.setdefault(key.id, Budget(key, now))
