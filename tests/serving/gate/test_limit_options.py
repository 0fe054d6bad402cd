"""The options of ``qpack serve`` for limits: every field has one, and defaults are the fields' own."""

from dataclasses import fields, replace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from qpack.cli.limits import request_limits
from serve.gate.limits import RequestLimits


def parse(*arguments: str) -> tuple[Result, list[RequestLimits]]:
    found: list[RequestLimits] = []

    @click.command()
    @request_limits
    def command(limits: RequestLimits) -> None:
        found.append(limits)

    return CliRunner().invoke(command, arguments), found


def test_by_default_the_fields_own() -> None:
    assert parse()[1] == [RequestLimits()]


@pytest.mark.parametrize(
    ("flag", "given", "changed"),
    [
        ("--max-body", "64MiB", {"max_body_bytes": 64 << 20}),
        ("--max-output-tokens", "512", {"max_output_tokens": 512}),
        ("--max-choices", "1", {"max_choices": 1}),
        ("--max-waiting", "10", {"max_waiting": 10}),
        ("--queue-timeout", "0.5", {"queue_timeout": 0.5}),
        ("--request-timeout", "30", {"request_timeout": 30.0}),
        ("--turn-seconds", "1", {"turn_seconds": 1.0}),
        ("--weight", "support=2.5", {"weights": {"support": 2.5}}),
    ],
)
def test_each_option_is_a_field(flag: str, given: str, changed: dict[str, Any]) -> None:
    assert parse(flag, given)[1] == [replace(RequestLimits(), **changed)]
    assert flag in parse("--help")[0].output


def test_no_field_is_without_an_option() -> None:
    assert parse("--help")[0].output.count("\n  --") == len(fields(RequestLimits)) + 1


@pytest.mark.parametrize(
    "wrong",
    [
        ("--max-choices", "0"),
        ("--queue-timeout", "0"),
        ("--max-body", "large"),
        ("--weight", "support"),
        ("--weight", "=1"),
        ("--weight", "support=0"),
        ("--weight", "support=nan"),
    ],
)
def test_what_makes_no_sense_is_wrong_usage(wrong: tuple[str, str]) -> None:
    result, found = parse(*wrong)
    assert (result.exit_code, found) == (2, [])
