"""A span for each completion, in OpenTelemetry: around vLLM's own, inside the client's.

::

    client's span ── traceparent ──> POST /v1/completions ── traceparent ──> llm_request (vLLM's engine)

Ours tells what vLLM cannot know: how long the request waited for its turn and for its adapter, and which version
answered. Attributes have vLLM's names where it has them. What was asked or answered is in none.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.trace import SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serve.gate.visit import Visit

_PROPAGATOR = TraceContextTextMapPropagator()


class Tracing:
    """Makes the spans, by a tracer of the process's provider."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    @contextmanager
    def span(self, visit: Visit) -> Iterator[None]:
        """Trace the block, in which the visit begins and ends; the application is told to go on under this span."""
        exchange = visit.exchange
        name = f"{exchange.scope['method']} {exchange.scope['path']}"
        span = self._tracer.start_span(name, _PROPAGATOR.extract(exchange.headers), SpanKind.SERVER)
        inside: dict[str, str] = {}
        _PROPAGATOR.inject(inside, set_span_in_context(span))
        exchange.trace_headers = {header.encode(): value.encode() for header, value in inside.items()}
        try:
            yield
        finally:
            attributes = {
                "http.response.status_code": visit.status,
                "gen_ai.request.id": exchange.request_id,
                "gen_ai.request.model": visit.model,
                "gen_ai.response.model": visit.answered_by,
                "gen_ai.usage.prompt_tokens": visit.prompt_tokens,
                "gen_ai.usage.completion_tokens": visit.output_tokens,
                "qpack.queue_seconds": visit.queue_seconds,
                "qpack.adapter_wait_seconds": visit.load_seconds,
            }
            span.set_attributes({name: value for name, value in attributes.items() if value is not None})
            if visit.status >= 500 or exchange.error:
                span.set_status(StatusCode.ERROR, visit.reason or exchange.error)
            span.end()
