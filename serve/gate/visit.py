"""What is written down of a request: a line of JSON in the log ``qpack.serve.access``, and the metrics."""

import asyncio
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve.gate.exchange import Exchange
from serve.gate.keys import Key
from serve.gate.metrics import Metrics
from serve.gate.question import Question

logger = logging.getLogger("qpack.serve.access")

CLIENT_GONE = 499
"""nginx's status for a client that did not wait for its answer."""


@dataclass(slots=True)
class Visit:
    """A request on its way, and what has become of it. Seconds are the event loop's."""

    exchange: Exchange
    came: float
    key: Key | None = None
    completion: bool = False
    model: str | None = None
    """As the client has named it."""
    adapter: str = ""
    """The name of the adapter that answers, or of the base; empty for what is not served."""
    version: str = ""
    """The digits of its digest; empty for the base."""
    queue_seconds: float | None = None
    load_seconds: float | None = None
    entered: float | None = None
    """When it had its turn and its adapter."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    left: bool = False
    """Whether the client did not wait for the end."""
    reason: str | None = None
    """Why there is no answer, or no whole one."""

    @property
    def labels(self) -> tuple[str, str]:
        """Of the metrics."""
        return self.adapter, self.version

    @property
    def tokens(self) -> int:
        """Of prompt and answer."""
        return self.prompt_tokens + self.output_tokens

    @property
    def answered_by(self) -> str | None:
        """The version's id, or the name of the base; None if nothing was to answer."""
        return "@".join(label for label in self.labels if label) or None

    @property
    def status(self) -> int:
        """Of the answer, when all has been sent."""
        return CLIENT_GONE if self.left else self.exchange.status or 500

    def count(self, question: Question, state: Mapping[str, Any]) -> None:
        """Take the tokens from the application's state of the request, or what is known of an answer that broke off."""
        usage = getattr(state.get("request_metadata"), "final_usage_info", None)
        if usage is not None:
            self.prompt_tokens, self.output_tokens = usage.prompt_tokens, usage.completion_tokens or 0
        elif self.exchange.status in (None, 200):
            self.prompt_tokens = question.prompt_tokens
            self.output_tokens = self.exchange.chunks if self.exchange.streaming else 0

    def end(self, metrics: Metrics) -> None:
        """Write it down, when all has been sent."""
        exchange = self.exchange
        status = self.status
        reason = "the client left" if self.left else self.reason or exchange.error
        if self.completion:
            self._count(metrics, "error" if exchange.error else str(status))
        now = asyncio.get_running_loop().time()
        line = {
            "time": time.time(),
            "request_id": exchange.request_id,
            "key": self.key and f"{self.key.name} (qp-{self.key.id})",
            "client": (exchange.scope.get("client") or ("",))[0],
            "method": exchange.scope["method"],
            "path": exchange.scope["path"],
            "status": status,
            "seconds": round(now - self.came, 4),
        }
        if self.completion:
            first = exchange.first_byte if exchange.streaming else None
            line |= {
                "model": self.model,
                "version": self.answered_by,
                "queue_seconds": _rounded(self.queue_seconds),
                "load_seconds": _rounded(self.load_seconds),
                "first_token_seconds": _rounded(first and first - self.came),
                "prompt_tokens": self.prompt_tokens,
                "output_tokens": self.output_tokens,
            }
        if reason:
            line["reason"] = reason
        logger.log(logging.INFO if status < 500 else logging.WARNING, json.dumps(line))

    def _count(self, metrics: Metrics, status: str) -> None:
        exchange, labels = self.exchange, self.labels
        metrics.requests.labels(*labels, status).inc()
        metrics.prompt_tokens.labels(*labels).inc(self.prompt_tokens)
        metrics.output_tokens.labels(*labels).inc(self.output_tokens)
        if self.queue_seconds is not None:
            metrics.queue_seconds.labels(*labels).observe(self.queue_seconds)
        if self.load_seconds is not None:
            metrics.load_seconds.labels(*labels).observe(self.load_seconds)
        if exchange.streaming and exchange.first_byte is not None and exchange.last_byte is not None:
            metrics.first_token_seconds.labels(*labels).observe(exchange.first_byte - self.came)
            if self.output_tokens > 1:
                each = (exchange.last_byte - exchange.first_byte) / (self.output_tokens - 1)
                metrics.token_seconds.labels(*labels, "true").observe(each)
        elif exchange.status == 200 and self.output_tokens and self.entered and exchange.last_byte is not None:
            # The prompt's part is in it: what vLLM tells of a whole answer is its end.
            each = (exchange.last_byte - self.entered) / self.output_tokens
            metrics.token_seconds.labels(*labels, "false").observe(each)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
