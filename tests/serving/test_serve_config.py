"""What is refused before the engine is loaded, and that nothing heavy is imported for it."""

import pickle
import re
import shutil
import socket
import subprocess
import sys
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import factors
import pytest
from moe import write_source
from tiny import write_llama

import qpack
from qpack.errors import AdapterError, CheckpointError, QpackError, ServeError, SeveralErrors
from serve import ServeConfig, collect_adapters
from serve.config import LORA_RANKS
from serve.gate.keys import Keys
from serve.launch import engine_environment, listen
from serve.registry import Registry


@pytest.fixture(scope="module")
def packed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, packed: what it has learned does not matter here. Read only."""
    directory = tmp_path_factory.mktemp("models") / "packed"
    qpack.convert(llama, directory)
    return directory


@pytest.fixture(scope="module")
def adapters(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters for it, of different ranks. Read only."""
    folder, ranks = tmp_path_factory.mktemp("adapters"), {"alpha": 8, "beta": 4}
    return {name: factors.write(folder / name, factors.draw(packed, r=r), r=r) for name, r in ranks.items()}


def test_defaults_hold_every_adapter_and_some_more(packed: Path, adapters: dict[str, Path]) -> None:
    config = ServeConfig(packed, adapters)
    assert (config.name, config.max_loras, config.max_cpu_loras, config.max_lora_rank) == ("packed", 4, 16, 16)
    many = ServeConfig(packed, {f"{name}-{copy}": path for name, path in adapters.items() for copy in range(9)})
    assert (many.max_loras, many.max_cpu_loras) == (16, 18)


def test_a_registry_brings_its_own(packed: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    config = ServeConfig(packed, registry=tmp_path / "new")
    assert (config.max_loras, config.max_lora_rank) == (4, 16)
    assert not (tmp_path / "new").exists()
    with Registry.open(tmp_path / "old", base=packed) as registry:
        registry.add("alpha", adapters["alpha"], by="a test")
    assert ServeConfig(packed, registry=tmp_path / "old").max_lora_rank == 16
    assert ServeConfig(packed, registry=tmp_path / "old", max_lora_rank=1).max_lora_rank == 1


def test_a_config_reaches_another_process_whole(packed: Path, adapters: dict[str, Path]) -> None:
    config = ServeConfig(packed, adapters)
    assert pickle.loads(pickle.dumps(config)) == config


def test_other_machines_need_keys(packed: Path, tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    with pytest.raises(ServeError, match=r"host 0\.0\.0\.0: others could use the server without a key"):
        ServeConfig(packed, host="0.0.0.0", registry=registry)
    ServeConfig(packed, host="0.0.0.0", without_keys=True)
    registry.mkdir()
    with closing(Keys(registry)) as keys:
        keys.add("someone")
    ServeConfig(packed, host="0.0.0.0", registry=registry)


def test_a_base_needs_no_adapters(packed: Path) -> None:
    assert ServeConfig(packed).max_loras is None


def test_adapters_beside_packed_experts_are_refused(tmp_path: Path) -> None:
    """vLLM fails on them while it loads; a base alone it serves."""
    base = tmp_path / "base"
    qpack.convert(write_source("mixtral", tmp_path / "source"), base)
    assert ServeConfig(base).max_loras is None
    with pytest.raises(ServeError, match=r"experts\.0\.w1\.weight is a packed expert.*`qpack merge`"):
        ServeConfig(base, registry=tmp_path / "registry")


def test_an_unpacked_base_is_refused(llama: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected quant_method .bitsandbytes. .* found None"):
        ServeConfig(llama)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model\.safetensors\.index\.json and no model\.safetensors"):
        ServeConfig(tmp_path)


@pytest.mark.parametrize("name", ["", "../x", "a b", ".hidden", "a@1", "x" * 129])
def test_illegal_names_are_refused(packed: Path, adapters: dict[str, Path], name: str) -> None:
    with pytest.raises(ServeError, match=re.escape(f"the name {name!r} is not 1 to 128 letters")):
        ServeConfig(packed, {name: adapters["alpha"]})


def test_the_name_of_the_base_is_taken(packed: Path, adapters: dict[str, Path]) -> None:
    with pytest.raises(ServeError, match="the name 'packed' is the base's own"):
        ServeConfig(packed, {"packed": adapters["alpha"]})


def test_a_bad_adapter_is_refused(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="none: not a directory"):
        ServeConfig(packed, {"none": tmp_path / "none"})


def test_an_adapter_of_another_base_is_refused(packed: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "wider"
    qpack.convert(write_llama(tmp_path / "source", hidden_size=384), other)
    with pytest.raises(AdapterError, match="changes model"):
        ServeConfig(other, {"alpha": adapters["alpha"]})
    with pytest.raises(SeveralErrors) as error:
        ServeConfig(other, adapters)
    assert [*map(type, error.value.errors)] == [AdapterError, AdapterError]
    assert [*map(str, pickle.loads(pickle.dumps(error.value)).errors)] == str(error.value).splitlines()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 65536}, "port 65536: expected 0 to 65535"),
        ({"max_loras": 0}, "max_loras 0: expected at least 1"),
        ({"max_model_len": 0}, "max_model_len 0: expected at least 1"),
        ({"max_cpu_loras": 3}, "max_cpu_loras 3: expected at least max_loras, 4"),
        ({"drain_timeout": -1}, "drain_timeout -1: expected 0 or more seconds"),
        ({"max_lora_rank": 4}, "max_lora_rank 4: expected one of 1, 8, 16"),
        ({"max_lora_rank": 1}, "rank 8 does not fit in max_lora_rank 1"),
    ],
)
def test_bad_numbers_are_refused(
    packed: Path, adapters: dict[str, Path], options: dict[str, int], message: str
) -> None:
    with pytest.raises(QpackError, match=message):
        ServeConfig(packed, adapters, **options)  # type: ignore[arg-type]  # mypy reads the options as any field


@pytest.mark.parametrize("endpoint", ["localhost:4317", "http://", "file:///spans"])
def test_an_endpoint_for_traces_is_a_url(packed: Path, endpoint: str) -> None:
    assert ServeConfig(packed, otlp_traces_endpoint="http://localhost:4317").otlp_traces_endpoint
    with pytest.raises(ServeError, match=re.escape(f"otlp_traces_endpoint {endpoint}: expected a URL")):
        ServeConfig(packed, otlp_traces_endpoint=endpoint)


def test_traces_need_their_protocol_and_packages(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(ServeError, match=r"PROTOCOL http/json: expected grpc or http/"):
        patch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json")
        ServeConfig(packed, otlp_traces_endpoint="http://localhost:4318")
    monkeypatch.setattr("serve.config.TRACING_PACKAGES", ("opentelemetry-sdk", "opentelemetry-nowhere"))
    with pytest.raises(ServeError, match="otlp_traces_endpoint needs the package opentelemetry-nowhere: install it"):
        ServeConfig(packed, otlp_traces_endpoint="http://localhost:4317")


@pytest.mark.parametrize("option", ["max_loras", "max_lora_rank"])
def test_slots_without_adapters_are_refused(packed: Path, option: str) -> None:
    with pytest.raises(ServeError, match="need an adapter, or a registry"):
        ServeConfig(packed, **{option: 8})  # type: ignore[arg-type]


def test_a_watched_directory_counts(packed: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    assert ServeConfig(packed, watch=tmp_path).max_loras == 4  # empty yet
    (tmp_path / "not-an-adapter").mkdir()
    shutil.copytree(adapters["alpha"], tmp_path / "gamma")
    assert ServeConfig(packed, adapters, watch=tmp_path).max_lora_rank == 16
    with pytest.raises(ServeError, match=r"gamma: the name 'gamma' is already used by .*beta"):
        ServeConfig(packed, {"gamma": adapters["beta"]}, watch=tmp_path)
    with pytest.raises(ServeError, match="missing: not a directory of adapters"):
        ServeConfig(packed, watch=tmp_path / "missing")
    (tmp_path / "gamma" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(QpackError, match="gamma"):
        ServeConfig(packed, watch=tmp_path)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["alpha"], "adapter 'alpha': expected NAME=DIR"),
        (["alpha="], "adapter 'alpha=': expected NAME=DIR"),
        (["a=x", "a=y"], "adapter y: the name 'a' is already used by x"),
    ],
)
def test_bad_pairs_are_refused(pairs: list[str], message: str) -> None:
    with pytest.raises(ServeError, match=message):
        collect_adapters(pairs)


def test_a_port_is_taken_from_the_start() -> None:
    with listen("127.0.0.1", 0) as listener, pytest.raises(ServeError, match="address already in use"):
        with listen("127.0.0.1", listener.getsockname()[1]):
            pass


def test_the_environment_keeps_what_is_set() -> None:
    plugins = {"VLLM_PLUGINS": "bitsandbytes,qpack"}
    assert engine_environment({}, verbose=True) == {"VLLM_NO_USAGE_STATS": "1"} | plugins
    quiet = engine_environment({"VLLM_LOGGING_LEVEL": "DEBUG", "PYTHONWARNINGS": "error"}, verbose=False)
    assert quiet == {"VLLM_NO_USAGE_STATS": "1"} | plugins


def test_a_list_of_plugins_is_completed() -> None:
    assert engine_environment({"VLLM_PLUGINS": "mine"}, verbose=True)["VLLM_PLUGINS"] == "mine,bitsandbytes,qpack"


def test_runtime_loading_by_clients_is_refused() -> None:
    with pytest.raises(ServeError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING is set"):
        engine_environment({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}, verbose=True)


def test_the_ranks_are_vllms() -> None:
    vllm = find_spec("vllm")  # found, not imported: that takes half a minute
    if vllm is None or vllm.origin is None:
        pytest.skip("vllm is not installed")
    source = (Path(vllm.origin).parent / "config/lora.py").read_text()
    literal = re.search(r"^MaxLoRARanks = Literal\[([\d, ]+)\]$", source, re.MULTILINE)
    assert literal is not None
    assert tuple(map(int, literal[1].split(","))) == LORA_RANKS


_REFUSALS = """
import sys
from pathlib import Path
from qpack.errors import QpackError
from serve import ServeConfig, collect_adapters, serve

packed, unpacked, adapter = map(Path, sys.argv[1:4])
port = int(sys.argv[4])
for attempt in (
    lambda: ServeConfig(unpacked),
    lambda: ServeConfig(packed, {"a b": adapter}),
    lambda: collect_adapters(["alpha"]),
    lambda: serve(ServeConfig(packed, {"alpha": adapter}, port=port)),
    lambda: serve(ServeConfig(packed, host="256.0.0.1", without_keys=True)),
):
    try:
        attempt()
    except QpackError as error:
        print(error)
print(sorted({"torch", "vllm"} & set(sys.modules)))
"""


def test_refusals_import_neither_vllm_nor_torch(packed: Path, llama: Path, adapters: dict[str, Path]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        command: list[str | Path] = [sys.executable, "-c", _REFUSALS, packed, llama, adapters["alpha"], str(port)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    *messages, imported = run.stdout.splitlines()
    assert len(messages) == 5
    assert messages[3] == f"cannot listen on 127.0.0.1:{port}: address already in use"
    assert messages[4].startswith("cannot listen on 256.0.0.1:8000: ")
    assert imported == "[]"
