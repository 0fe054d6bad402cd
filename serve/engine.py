"""vLLM's engine and OpenAI server, built from a config. Importing this module imports vLLM.

The arguments go through vLLM's own parser, and the server is put together from the parts of vLLM's own `run_server`,
which cannot be called whole: it would take the port a second time, and it does not tell a dead engine from a stop.
"""

import json
import socket
from argparse import Namespace
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NoReturn

import psutil
import uvloop
from vllm.entrypoints.launchers.api_server.entry import build_and_serve, build_async_engine_client
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import validate_api_server_args
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.logger import configure_logging_from_args
from vllm.platforms import current_platform
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.system_utils import set_ulimit

from qpack.errors import ServeError
from serve.config import ServeConfig
from serve.control import Parent
from serve.endpoint import Serving
from serve.gate.keys import Keys
from serve.passed_on import passed_on
from serve.registry import Registry
from serve.staging import open_stage

_GIB = 1 << 30


class Parser(FlexibleArgumentParser):
    """vLLM's parser, which would end the process; and whose abbreviations would get past `serve.passed_on`."""

    def __init__(self) -> None:
        super().__init__(allow_abbrev=False)  # type: ignore[no-untyped-call]

    def error(self, message: str) -> NoReturn:
        raise ServeError(f"vllm option: {message}")


def run(config: ServeConfig, directory: Path, listener: socket.socket, parent: Parent) -> None:
    """Load the engine and serve the registry in ``directory`` on the bound socket, until the parent asks for the end.

    Raises:
        ServeError: if vLLM refuses an option, or the engine does not load, or dies later.
    """
    cli_env_setup()
    args = parse(engine_arguments(config, listener.getsockname()[1]))
    configure_logging_from_args(args)
    set_ulimit()
    with Registry.open(directory) as registry, closing(Keys(directory)) as keys, open_stage() as stage:
        args.qpack = Serving(config, parent, registry, keys, stage)
        try:
            uvloop.run(_serve(args, listener))
        except Exception as error:
            raise ServeError(f"the engine did not start: {' '.join(str(error).split())}") from error
    if not parent.draining.is_set():
        raise ServeError("the engine died; what it wrote last, above, says why")


def parse(arguments: Sequence[str]) -> Namespace:
    """Read the arguments as ``vllm serve`` does, and check them as it does before it takes a port.

    Raises:
        ServeError: for what vLLM refuses.
    """
    args: Namespace = make_arg_parser(Parser()).parse_args([*arguments])
    try:
        validate_parsed_serve_args(args)
        if args.tool_parser_plugin:
            ToolParserManager.import_tool_parser(args.tool_parser_plugin)
        if args.reasoning_parser_plugin:
            ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
        validate_api_server_args(args)
    except Exception as error:
        raise ServeError(f"vllm option: {' '.join(str(error).split())}") from error
    return args


def engine_arguments(config: ServeConfig, port: int) -> list[str]:
    """Return what ``vllm serve`` would have to be given for this config on this machine."""
    given = [passed_on(option) for option in config.vllm_options]
    options: dict[str, object] = {  # None is an option without a value
        "model": config.base,
        "served-model-name": config.name,
        "host": config.host,
        "port": port,
        "max-model-len": config.max_model_len or "auto",
        "uvicorn-log-level": "info" if config.verbose else "warning",
    }
    if not config.verbose:
        options |= {"disable-uvicorn-access-log": None, "no-use-tqdm-on-load": None}
    if current_platform.is_cpu():
        # With adapters vLLM never compiles on CPU; without, it costs 40 s of start and the answers came no faster.
        options["enforce-eager"] = None
        # The 4-bit layer fails in f32, which is what a base's config may say.
        options["dtype"] = "bfloat16"
        if not any(name.endswith("-parallel-size") for name, _ in given):
            options["distributed-executor-backend"] = "serve.executor.OneProcess"
        # vLLM's default is nearly all the memory of the machine, and a start is 4 s longer for each GiB.
        # VLLM_CPU_KVCACHE_SPACE (GiB), if set, takes precedence.
        options["kv-cache-memory-bytes"] = min(2 * _GIB, psutil.virtual_memory().available // 4)
    if config.max_loras:
        options["enable-lora"] = None
        options["max-loras"] = config.max_loras
        options["max-cpu-loras"] = config.max_cpu_loras
        options["max-lora-rank"] = config.max_lora_rank
        options["worker-extension-cls"] = "serve.engine_adapters.AdapterWorker"
    if config.limits.max_output_tokens:  # of requests that name no number; the gate sees to those that do
        options["override-generation-config"] = json.dumps({"max_new_tokens": config.limits.max_output_tokens})
    if config.otlp_traces_endpoint:
        options["otlp-traces-endpoint"] = config.otlp_traces_endpoint
    for name, _ in given:
        options.pop(name.removeprefix("no-"), None)
    # The last one is the outermost.
    middleware = [("middleware", "serve.routes.AllowedRoutes"), ("middleware", "serve.gate.gate.GateMiddleware")]
    return [
        f"--{name}" if value is None else f"--{name}={value}" for name, value in (*options.items(), *given, *middleware)
    ]


async def _serve(args: Namespace, listener: socket.socket) -> None:
    async with build_async_engine_client(args) as engine:
        closing = await build_and_serve(engine, "qpack", listener, args)
    await closing
