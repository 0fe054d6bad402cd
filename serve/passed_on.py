"""Options of vLLM's own that are passed on to it: ``--vllm NAME`` or ``--vllm NAME=VALUE``, as often as need be.

They are vLLM's long options without the dashes, such as ``tool-call-parser=hermes`` or ``enable-auto-tool-choice``, and
win over what `serve.engine` would choose. Refused are those that would break what is promised here; vLLM itself
refuses what it does not know, in its serving process and before it loads the engine.
"""

import re
from collections.abc import Mapping

from qpack.errors import ServeError

_FORM = re.compile(r"(?P<name>[a-z][a-z0-9-]*(?:\.[A-Za-z0-9_.+-]+)?)(?:=(?P<value>.*))?", re.DOTALL)

_ADAPTERS = "adapters come from the registry: --adapter, --adapters, --registry"
_OWN = "is qpack serve's own"
_ONE_SERVER = "one server and one engine answer, on the port that their parent keeps"
_WITHOUT_SECRETS = "what is asked and answered is in no log"

REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("model", "served-model-name"), "the base is the argument of qpack serve"),
    **dict.fromkeys(("lora-modules", "default-mm-loras", "enable-lora"), _ADAPTERS),
    **dict.fromkeys(("max-loras", "max-cpu-loras", "max-lora-rank", "max-model-len"), _OWN),
    **dict.fromkeys(("host", "port", "otlp-traces-endpoint"), _OWN),
    **dict.fromkeys(("worker-cls", "worker-extension-cls", "middleware"), "qpack's own part of vLLM goes in there"),
    "lora-target-modules": "an adapter would do nothing on the modules that are left out",
    "config": "options come from the command line",
    "api-key": "keys are made with qpack keys add",
    "override-generation-config": "is set by --max-output-tokens",
    "shutdown-timeout": "is set by --drain-timeout",
    **dict.fromkeys(("uvicorn-log-level", "disable-uvicorn-access-log", "use-tqdm-on-load"), "is set by --verbose"),
    **dict.fromkeys(("enable-log-requests", "enable-log-outputs"), _WITHOUT_SECRETS),
    "disable-log-stats": "/metrics has vLLM's figures, and traces need them",
    **dict.fromkeys(("runner", "convert", "pooler-config", "tokens-only"), "what is served answers with text"),
    **dict.fromkeys(("uds", "grpc", "grpc-port", "headless", "api-server-count"), _ONE_SERVER),
    **dict.fromkeys(("nnodes", "node-rank", "master-addr", "master-port", "enable-elastic-ep"), _ONE_SERVER),
    "root-path": "routes are known by their whole paths",
    **dict.fromkeys(
        ("ssl-keyfile", "ssl-certfile", "ssl-ca-certs", "ssl-cert-reqs", "ssl-ciphers", "enable-ssl-refresh"),
        "the parent process answers without TLS while the engine loads; put a proxy in front",
    ),
    **dict.fromkeys(
        ("allowed-origins", "allowed-methods", "allowed-headers", "allow-credentials"),
        "pages of other origins are not let in",
    ),
}
"""Why each of these is not passed on, by name."""

_REFUSED_ALL_OF = {"data-parallel-": _ONE_SERVER, "dp-supervisor-": _ONE_SERVER}


def passed_on(option: str) -> tuple[str, str | None]:
    """Return name and value of an option, None for one without a value.

    Raises:
        ServeError: for another form, and for an option that is refused.
    """
    match = _FORM.fullmatch(option)
    if match is None:
        raise ServeError(f"vllm option {option!r}: expected NAME or NAME=VALUE, vLLM's name without the dashes")
    name = match["name"].partition(".")[0]
    for one in (name, name.removeprefix("no-")):
        why = REFUSED.get(one) or next((why for start, why in _REFUSED_ALL_OF.items() if one.startswith(start)), None)
        if why:
            raise ServeError(f"vllm option {name}: is not passed on: {why}")
    return match["name"], match["value"]
