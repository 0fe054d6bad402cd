"""Whether an adapter can be served beside a base: what `serve.registry.validation` runs in a process of its own.

An adapter is a stranger's file. So it is read here first, under limits of time and memory, and never by the engine: a
JSON object of the fields of `Order` comes in on stdin, one of `Checked` or `Refused` goes out on stdout. Nothing is
written, and neither torch nor vLLM is imported.

Checked are, in this order, so that nothing large is read before it is known to be of use: settings, header, that every
tensor is a factor of a Linear weight of the base and of its shape, the rank, that all values fit into 16 bits (one NaN
would silence every model of the engine), and at last the digest of it all.

The engine does not get the settings as they came but `canonical_config`: ranks and scales by the modules' full names.
A pattern made to take for ever is thus met here, and settings that say the same in other words have the same digest.
"""

import json
import re
import resource
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from qpack._core import read_header
from qpack.adapters.adapter import MERGE_INSTEAD, WEIGHTS_NAME, Adapter
from qpack.adapters.record import RECORD_NAME, Record
from qpack.adapters.trained import changes, input_embedding
from qpack.checkpoint import Checkpoint
from qpack.errors import AdapterError, QpackError
from qpack.policy.skipping import EXPERT
from serve.registry.limits import HEADER_BYTES

_DTYPES = ("BF16", "F16", "F32")

_LARGEST = 65504.0
"""The largest f16. The engine holds both factors in 16 bits, B already times the scale."""

_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True, slots=True)
class Order:
    """What to check, and within which limits."""

    adapter: str
    """Directory of the adapter's files."""
    base: str
    """Directory of the base."""
    fingerprint: str
    """Of the base, which is too large to read it again."""
    max_rank: int
    seconds: int
    """Of processor time."""
    memory: int
    """Bytes of address space."""
    any_base: bool
    """Whether its record may name another base."""


@dataclass(frozen=True, slots=True)
class Checked:
    """An adapter that can be served."""

    digest: str
    rank: int
    config: str
    """What the engine gets as adapter_config.json."""


@dataclass(frozen=True, slots=True)
class Refused:
    """An adapter that cannot."""

    reason: str
    status: int
    kind: str
    """One word for it: what refusals are counted by."""


class _TooLargeError(QpackError):
    """What could not even be looked at."""


class _OfKindError(AdapterError):
    """What cannot be served, and one word for why."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@contextmanager
def _about(kind: str) -> Iterator[None]:
    """Say of what kind it is that the block refuses."""
    try:
        yield
    except _TooLargeError:
        raise
    except QpackError as error:
        raise _OfKindError(kind, str(error)) from error


def check(order: Order) -> Checked:
    """Check the adapter in ``order``.

    Raises:
        AdapterError: saying what of it cannot be served, and what to do where something can be done.
        CheckpointError: if the base cannot be read.
    """
    directory = Path(order.adapter)
    with _about("malformed"):
        _require_safetensors(directory)
        adapter = Adapter.open_header(directory)
    with _about("unsupported"):
        adapter.require_plain()
    with _about("base"):
        if not order.any_base:
            _require_record_of(order.fingerprint, adapter)
    base = Checkpoint.open(order.base)
    with _about("tensors"):
        changes(adapter, base, ())
        _require_linear(adapter, base)
        _require_whole_experts(adapter, base)
    with _about("rank"):
        if adapter.rank > order.max_rank:
            raise AdapterError(f"{directory}: rank {adapter.rank} is over the limit of {order.max_rank}")
    with _about("values"):
        _require_16_bits(adapter)
    config = canonical_config(adapter)
    digest = sha256(f"{adapter.fingerprint()}\n{config}".encode()).hexdigest()
    return Checked(digest, adapter.rank, config)


def canonical_config(adapter: Adapter) -> str:
    """The settings of a checked adapter, as JSON that depends on nothing but what it computes.

    Modules whose rank or alpha is not the most common one are listed by their full names, in one pattern a value: an
    engine tries every pattern on every module.
    """
    modules = sorted(_modules(adapter))
    ranks = {module: adapter.rank_of(module) for module in modules}
    alphas = {module: _whole(adapter.alpha_of(module)) for module in modules}
    config = {
        "alpha_pattern": _patterns(alphas),
        "bias": "none",
        "init_lora_weights": True,
        "lora_alpha": _most_common(alphas),
        "peft_type": "LORA",
        "r": _most_common(ranks),
        "rank_pattern": _patterns(ranks),
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        "task_type": "CAUSAL_LM",
        "use_rslora": bool(adapter.config.get("use_rslora")),
    }
    return json.dumps(config, indent=1) + "\n"


def _patterns(values: Mapping[str, float]) -> dict[str, float]:
    usual = _most_common(values)
    patterns = {}
    for value in sorted(set(values.values()) - {usual}):
        names = [re.escape(module) for module, of_module in values.items() if of_module == value]
        patterns[f"^(?:{'|'.join(names)})"] = value
    return patterns


def _most_common(values: Mapping[str, float]) -> float:
    return Counter(values.values()).most_common(1)[0][0]


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value


def _modules(adapter: Adapter) -> set[str]:
    return {match["module"] for name in adapter.tensors if (match := _FACTOR.fullmatch(name))}


def _require_safetensors(directory: Path) -> None:
    """Refuse a file whose header would take long to read, before anything of it is read."""
    weights = directory / WEIGHTS_NAME
    with weights.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > HEADER_BYTES and length < weights.stat().st_size:
        raise _TooLargeError(f"{weights}: header of {length} bytes, expected at most {HEADER_BYTES}")
    for info in read_header(weights):
        if info.dtype not in _DTYPES:
            raise AdapterError(f"{weights}: tensor {info.name} is {info.dtype}, expected one of {', '.join(_DTYPES)}")


def _require_record_of(fingerprint: str, adapter: Adapter) -> None:
    record = Record.find(adapter.path)
    if record is not None and record.base.fingerprint != fingerprint:
        raise AdapterError(
            f"{adapter.path / RECORD_NAME}: was trained on the base {record.base}, and this one has fingerprint "
            f"{fingerprint[:12]}; train it on this base, or serve it with its own"
        )


def _require_linear(adapter: Adapter, base: Checkpoint) -> None:
    """Refuse what the engine has no low-rank products for: weights that are not a matrix, and the input embedding."""
    for module in sorted(_modules(adapter)):
        name = f"{module}.weight"
        if name == input_embedding(base) or len(base.weights.get(name, (0, 0))) != 2:
            raise AdapterError(f"{adapter.path}: changes {name}, which is not a Linear weight; {MERGE_INSTEAD}")


def _require_whole_experts(adapter: Adapter, base: Checkpoint) -> None:
    """Refuse changes of some experts of a layer alone: the engine stacks all of a layer, in one rank a projection."""
    changed = _modules(adapter)
    layers = {match["experts"] for module in changed if (match := EXPERT.fullmatch(module))}
    ranks: dict[tuple[str, str], int] = {}
    for name in sorted(base.weights):
        module, _, kind = name.rpartition(".")
        match = EXPERT.fullmatch(module)
        if match is None or kind != "weight" or match["experts"] not in layers:
            continue
        if module not in changed:
            raise AdapterError(
                f"{adapter.path}: changes experts of {match['experts']}, but not {module}; an engine takes the changes "
                f"of all experts or of none; {MERGE_INSTEAD}"
            )
        rank = adapter.rank_of(module)
        usual = ranks.setdefault((match["experts"], module.rpartition(".")[2]), rank)
        if rank != usual:
            raise AdapterError(f"{adapter.path}: {module} has rank {rank}, expected {usual} as of the layer's others")


def _require_16_bits(adapter: Adapter) -> None:
    for name, largest in adapter.largest_values().items():
        match = _FACTOR.fullmatch(name)
        scale = adapter.scale_of(match["module"]) if match and match["side"] == "B" else 1.0
        if largest * scale > _LARGEST:
            raise AdapterError(
                f"{adapter.path}: tensor {name} has values up to {largest * scale:g} with its scale, "
                f"expected at most {_LARGEST:g}, what 16 bits hold"
            )


def main() -> None:
    """Answer one order."""
    order = Order(**json.load(sys.stdin))
    resource.setrlimit(resource.RLIMIT_AS, (order.memory, order.memory))
    resource.setrlimit(resource.RLIMIT_CPU, (order.seconds, order.seconds))
    for none in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(none, (0, 0))
    answer: Checked | Refused
    try:
        answer = check(order)
    except _TooLargeError as error:
        answer = Refused(str(error), 413, "too large")
    except MemoryError:
        answer = Refused(f"{order.adapter}: needs more than {order.memory} bytes of memory to check", 413, "too large")
    except _OfKindError as error:
        answer = Refused(str(error), 422, error.kind)
    except QpackError as error:  # the base cannot be read
        answer = Refused(str(error), 422, "base")
    print(json.dumps(asdict(answer)))
