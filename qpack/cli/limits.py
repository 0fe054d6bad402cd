"""The options of ``qpack serve`` that limit requests; each is a field of `serve.gate.limits.RequestLimits`."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import wraps
from typing import Any, TypeVar, cast

import click

from qpack.cli.options import Size
from qpack.sizes import format_size
from serve.gate.limits import RequestLimits

Command = TypeVar("Command", bound=Callable[..., Any])

_DEFAULTS = RequestLimits()

_AT_LEAST_ONE, _SECONDS = click.IntRange(1), click.FloatRange(0, min_open=True)

_OPTIONS: Mapping[str, tuple[click.ParamType[Any], str]] = {
    "max_body_bytes": (Size(), f"Largest request.  [default: {format_size(_DEFAULTS.max_body_bytes)}]"),
    "max_output_tokens": (_AT_LEAST_ONE, "Longest answer, in tokens.  [default: what the context allows]"),
    "max_choices": (_AT_LEAST_ONE, "Answers of one request: n times its prompts."),
    "max_waiting": (_AT_LEAST_ONE, "Requests that may wait; more get 429."),
    "queue_timeout": (_SECONDS, "Seconds that a request may wait."),
    "request_timeout": (_SECONDS, "Seconds to the end of an answer."),
    "turn_seconds": (_SECONDS, "Seconds of a turn while another adapter waits for a slot."),
}


class _Weight(click.ParamType[tuple[str, float]]):
    name = "name=weight"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        name, _, weight = value.rpartition("=")
        try:
            number = float(weight)
        except ValueError:
            number = 0.0
        if not name or not number > 0:
            self.fail(f"{value!r}: expected NAME=NUMBER, the number more than 0", param, ctx)
        return name, number


def request_limits(command: Command) -> Command:
    """Add the options. The command gets ``limits``."""

    @wraps(command)
    def collected(**options: Any) -> Any:
        chosen = {option.name: options.pop(option.name) for option in fields(RequestLimits)}
        return command(limits=RequestLimits(**{**chosen, "weights": dict(chosen["weights"])}), **options)

    text = "Share of an adapter, or of the base; repeatable.  [default: 1]"
    decorators = [click.option("--weight", "weights", type=_Weight(), multiple=True, help=text)]
    for name, (kind, text) in _OPTIONS.items():
        flag = f"--{name.removesuffix('_bytes').replace('_', '-')}"
        default, shown = getattr(_DEFAULTS, name), "[default" not in text
        decorators.insert(0, click.option(flag, name, type=kind, default=default, show_default=shown, help=text))
    for decorator in decorators:
        collected = decorator(collected)
    return cast(Command, collected)
