"""``qpack serve --check``: all that a start would do before the engine is imported, and would refuse, without a start.

Nothing is changed: the port is let go again, and adapters are checked as at an upload by adding them to a registry that
is thrown away. First what options, headers and the environment say; if that is well, what is in the files.
"""

import os
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpack.adapters.adapter import WEIGHTS_NAME
from qpack.adapters.record import Base
from qpack.checkpoint import CONFIG_NAME, Checkpoint
from qpack.errors import CheckpointError, ServeError
from qpack.estimate import Model, Need, serving
from qpack.estimate.model import in_layer, layer_of
from qpack.problems import Problems
from serve.config import ServeConfig, watched
from serve.gate.keys import FILE_NAME as KEYS_NAME
from serve.gate.keys import Keys
from serve.launch import api_url, engine_environment, listen, require_plugins
from serve.registry import Alias, Limits, Registry, Version
from serve.registry.registry import DATABASE_NAME


@dataclass(frozen=True, slots=True)
class Preflight:
    """What would be served."""

    config: ServeConfig
    url: str
    """Where it would listen; PORT for a port that is only found at the start."""
    base: Base
    base_bytes: int
    """Of all its tensors."""
    given: tuple[Version, ...]
    """The versions that the options and the watched directory would add; the registry may have them already."""
    aliases: tuple[Alias, ...]
    """What the names in the registry point at."""
    unservable: tuple[Version, ...]
    """What the registry has besides, of a larger rank than there would be room for."""
    keys: int | None
    """API keys that are not revoked; None if there has never been one, so that none is needed."""
    need: Need
    """Memory of the engine, for one sequence."""


def preflight(*, host: str, port: int, **options: Any) -> Preflight:
    """Check the fields of a `ServeConfig`, and what they name.

    Raises:
        QpackError: what would keep it from starting; `SeveralErrors` if there is more than one reason.
    """
    problems = Problems()
    config = None
    with problems.noted():
        config = ServeConfig(host=host, port=port, **options)
    with problems.noted():
        engine_environment(os.environ, verbose=False)
    with problems.noted():
        require_plugins()
    with problems.noted(), listen(host, port):
        pass
    problems.raise_found()
    assert config is not None, "or there was a problem"

    checkpoint = Checkpoint.open(config.base)
    given: list[Version] = []
    with problems.noted():
        _require_layers(checkpoint)
    with problems.noted():
        given = _validated(config, problems)
    registered, aliases = _registered(config.registry, problems)
    rank = config.max_lora_rank or 0
    problems.raise_found()
    return Preflight(
        config=config,
        url=api_url(config.host, config.port or "PORT"),
        base=Base.of(checkpoint),
        base_bytes=checkpoint.tensor_bytes,
        given=tuple(given),
        aliases=tuple(alias for alias in aliases if alias.live.rank <= rank),
        unservable=tuple(version for version in registered if version.rank > rank),
        keys=_count_keys(config.registry),
        need=serving(Model.open(checkpoint), length=config.max_model_len, slots=config.max_loras or 0, rank=rank),
    )


def _require_layers(checkpoint: Checkpoint) -> None:
    """Refuse a base whose tensors are not those of its config's layers, which the engine finds out when it loads."""
    expected = Model.open(checkpoint).layers
    found = {layer_of(name) for name in checkpoint.weights if in_layer(name)}
    if missing := sorted(set(range(expected)) - found):
        raise CheckpointError(
            f"{checkpoint.directory / CONFIG_NAME}: {expected} layers, but no tensor is of layer {missing[0]}"
        )


def _validated(config: ServeConfig, problems: Problems) -> list[Version]:
    """Check the adapters that would come into the registry, one after the other."""
    adapters = dict(config.adapters) | (watched(config.watch) if config.watch else {})
    if not adapters or config.max_lora_rank is None:
        return []
    limits = Limits(max_rank=config.max_lora_rank, any_base=config.force)
    versions = []
    with tempfile.TemporaryDirectory(prefix="qpack-check-") as directory:
        with Registry.open(Path(directory), base=config.base, limits=limits) as registry:
            for name, path in adapters.items():
                with problems.noted():
                    versions.append(registry.add(name, path, by="check"))
                    registry.remove(name)  # so that there is one copy at a time
    return versions


def _registered(directory: Path | None, problems: Problems) -> tuple[tuple[Version, ...], tuple[Alias, ...]]:
    """What the registry holds, which must be there."""
    if directory is None or not (directory / DATABASE_NAME).is_file():
        return (), ()
    with Registry.open(directory) as registry:
        for version in registry.versions():
            with problems.noted(), registry.hold(version) as path:
                if not (path / WEIGHTS_NAME).is_file():
                    raise ServeError(f"{path}: no {WEIGHTS_NAME}, but the registry lists {version.id}")
        return registry.versions(), tuple(registry.aliases().values())


def _count_keys(directory: Path | None) -> int | None:
    if directory is None or not (directory / KEYS_NAME).is_file():
        return None
    with closing(Keys(directory)) as keys:
        return sum(key.revoked is None for key in keys.list()) if keys.required else None
