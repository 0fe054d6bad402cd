"""Options of vLLM's own: which of them are passed on, and that vLLM's parser gets them as they were given."""

import re
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qpack
from qpack.errors import ServeError
from serve import ServeConfig
from serve.gate.limits import RequestLimits
from serve.passed_on import REFUSED, passed_on


@pytest.fixture(scope="module")
def packed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that knows nothing."""
    qpack.convert(llama, packed := tmp_path_factory.mktemp("models") / "packed")
    return packed


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("enable-auto-tool-choice", ("enable-auto-tool-choice", None)),
        ("tool-call-parser=hermes", ("tool-call-parser", "hermes")),
        ("no-enable-prefix-caching", ("no-enable-prefix-caching", None)),
        ('hf-overrides={"a": "="}', ("hf-overrides", '{"a": "="}')),
        ("compilation-config.mode=0", ("compilation-config.mode", "0")),
    ],
)
def test_name_and_value(option: str, parts: tuple[str, str | None]) -> None:
    assert passed_on(option) == parts


@pytest.mark.parametrize("option", ["", "=", "--seed=1", "-O3", "seed 1", "seed:1", "Seed=1", "max_num_seqs=1"])
def test_other_forms_are_refused(option: str) -> None:
    with pytest.raises(ServeError, match=re.escape(f"vllm option {option!r}: expected NAME or NAME=VALUE")):
        passed_on(option)


@pytest.mark.parametrize("name", [*REFUSED, "data-parallel-size", "data-parallel-hybrid-lb"])
def test_what_would_break_a_promise_is_refused(name: str) -> None:
    for option in (name, f"{name}=1", f"{name}.x=1", f"no-{name}"):
        with pytest.raises(ServeError, match=rf"vllm option (no-)?{name}: is not passed on: ."):
            passed_on(option)


def test_a_config_refuses_them(packed: Path) -> None:
    with pytest.raises(ServeError, match="vllm option api-key: is not passed on: keys are made with qpack keys add"):
        ServeConfig(packed, vllm_options=("seed=1", "api-key=secret"))


# ---- what vLLM's own parser makes of them -------------------------------------------------------


@pytest.fixture(scope="module")
def parsed(packed: Path) -> Callable[..., Namespace]:
    """What vLLM is told for a config; importing it takes a while."""
    pytest.importorskip("vllm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what vLLM imports
        from serve.engine import engine_arguments, parse

    def parse_config(*vllm_options: str, **options: Any) -> Namespace:
        return parse(engine_arguments(ServeConfig(packed, vllm_options=vllm_options, **options), 8000))

    return parse_config


def test_vllm_gets_what_was_given(parsed: Callable[..., Namespace], packed: Path, tmp_path: Path) -> None:
    plain = parsed(registry=tmp_path / "none", otlp_traces_endpoint="http://localhost:4317")
    assert (plain.model, plain.served_model_name, plain.port) == (str(packed), ["packed"], 8000)
    assert (plain.enable_lora, plain.max_loras, plain.max_cpu_loras, plain.max_lora_rank) == (True, 4, 16, 16)
    assert plain.middleware == ["serve.routes.AllowedRoutes", "serve.gate.gate.GateMiddleware"]
    assert plain.otlp_traces_endpoint == "http://localhost:4317"
    assert parsed(limits=RequestLimits(max_output_tokens=7)).override_generation_config == {"max_new_tokens": 7}
    options = ("enable-auto-tool-choice", "tool-call-parser=hermes", "seed=7", "compilation-config.mode=0")
    given = parsed(*options, "dtype=float16", "no-enforce-eager", "kv-cache-memory-bytes=1000000")
    assert (given.enable_auto_tool_choice, given.tool_call_parser, given.seed) == (True, "hermes", 7)
    assert given.compilation_config.mode == 0
    assert (given.dtype, given.enforce_eager, given.kv_cache_memory_bytes) == ("float16", False, 1_000_000)


def test_one_process_has_one_worker(parsed: Callable[..., Namespace]) -> None:
    from vllm.platforms import current_platform

    ours = "serve.executor.OneProcess" if current_platform.is_cpu() else None
    assert parsed().distributed_executor_backend == ours
    assert parsed("distributed-executor-backend=mp").distributed_executor_backend == "mp"
    assert parsed("tensor-parallel-size=2").distributed_executor_backend is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nothing=1"], "unrecognized arguments: --nothing=1"),
        (["tool-call-pars=hermes"], "unrecognized arguments: --tool-call-pars=hermes"),  # no abbreviations
        (["seed=x"], "argument --seed: invalid"),
        (["enable-auto-tool-choice"], "--enable-auto-tool-choice requires --tool-call-parser"),
        (["enable-auto-tool-choice", "tool-call-parser=nobody"], "invalid tool call parser: nobody"),
    ],
)
def test_what_vllm_refuses_is_an_error_of_ours(
    parsed: Callable[..., Namespace], options: list[str], message: str
) -> None:
    with pytest.raises(ServeError, match=f"vllm option: .*{message}"):
        parsed(*options)


def test_the_list_of_what_is_refused_is_vllms(parsed: Callable[..., Namespace]) -> None:
    """Each of its names is an option of this release, and no other name means the same."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser

    from serve.engine import Parser

    actions = make_arg_parser(Parser())._option_string_actions
    for name in REFUSED:
        [*others] = {option for option in actions[f"--{name}"].option_strings if option.startswith("--")}
        for option in others:
            with pytest.raises(ServeError, match="is not passed on"):
                passed_on(option.removeprefix("--"))
