"""What a DATA argument names: a file, a directory or a data set of the hub, and its weight.

``PATH``                        a file
``DIRECTORY``                   its files of data in the order of their names, subfolders too; if it has none, its texts
``ORG/NAME[@REVISION][/PART]``  a data set of the hub, or the file or folder PART of it
``...:WEIGHT``                  how often each row is used in one epoch, 1 if not given: 3 is three times, 0.5 is half
                                of the rows, 1.5 is once or twice; drawn by the seed

Of a hub's data set the training split is read: the files that its card declares for it, else those with ``train`` in
their path, else all if no other split is named. The files go to the client's cache.
"""

import glob
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from qpack.data.files import READERS, TEXTS
from qpack.errors import DataError

_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[^/]+))?(/(?P<part>.+))?")
_SPLITS = re.compile(r"(?<![a-z])(train|test|valid|validation|dev|eval)(?![a-z])")


@dataclass(frozen=True, slots=True)
class Source:
    """The files of one argument, each with what messages call it."""

    name: str
    files: tuple[tuple[Path, str], ...]
    weight: float = 1.0


def find(argument: Path | str) -> Source:
    """Find what the argument names; a data set of the hub is downloaded.

    Raises:
        DataError: there is no such thing, it holds no data, or the weight is not more than 0.
        HubError: the hub cannot be reached, or has no such data set.
    """
    name, weight = _split_weight(str(argument))
    path = Path(name)
    if path.is_dir():
        files = [str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()]
        chosen = _data(files) or sorted(file for file in files if _is_visible(file) and Path(file).suffix in TEXTS)
        if not chosen:
            raise DataError(f"{name}: no file of kind {', '.join(READERS)} in the directory")
        return Source(name, tuple((path / file, str(path / file)) for file in chosen), weight)
    hub = _HUB_ID.fullmatch(name)
    is_id = hub and (hub["part"] or hub["revision"] or path.suffix not in READERS)
    if not hub or not is_id or path.exists():
        return Source(name, ((path, name),), weight)
    return Source(name, _download(hub["id"], hub["revision"], hub["part"]), weight)


def _split_weight(argument: str) -> tuple[str, float]:
    name, colon, weight = argument.rpartition(":")
    if not colon or Path(argument).exists():
        return argument, 1.0
    try:
        number = float(weight)
    except ValueError:
        return argument, 1.0
    if not 0 < number < float("inf"):
        raise DataError(f"{name}: expected a weight of more than 0, found {weight}")
    return name, number


def _is_visible(file: str) -> bool:
    return not any(part.startswith(".") for part in Path(file).parts)


def _data(files: Iterable[str]) -> list[str]:
    """Those that hold rows, in the order of their names."""
    return sorted(
        file for file in files if _is_visible(file) and Path(file).suffix in READERS and Path(file).suffix not in TEXTS
    )


def _download(name: str, revision: str | None, part: str | None) -> tuple[tuple[Path, str], ...]:
    import huggingface_hub

    from qpack.sources.hub import one_line

    with one_line(name, revision, kind="data set"):
        card = huggingface_hub.snapshot_download(
            name, revision=revision, repo_type="dataset", allow_patterns=["README.md"]
        )
        commit = Path(card).name
        tree = huggingface_hub.get_cached_repo_tree(name, revision=commit, repo_type="dataset")
        files = _data(file.path for file in tree)
        if part:
            chosen = [file for file in files if file == part or file.startswith(part.rstrip("/") + "/")]
        else:
            chosen = _training(name, files, _declared(name, Path(card) / "README.md"))
        if not chosen:
            where = f" in {part}" if part else ""
            raise DataError(f"{name}: no file of kind {', '.join(READERS)}{where}; it has {', '.join(files) or 'none'}")
        snapshot = huggingface_hub.snapshot_download(
            name, revision=commit, repo_type="dataset", allow_patterns=[glob.escape(file) for file in chosen]
        )
    return tuple((Path(snapshot) / file, f"{name}/{file}") for file in chosen)


def _declared(name: str, card: Path) -> list[str]:
    """The patterns of the training split that the card's header declares, if it does.

    Raises:
        DataError: it declares several configurations and none as default.
    """
    header = re.match(r"---\s*\n(.*?)\n---", card.read_text(encoding="utf-8"), re.DOTALL) if card.is_file() else None
    if not header:
        return []
    import yaml

    try:
        configs: list[Mapping[str, Any]] = yaml.safe_load(header[1])["configs"]
    except (yaml.YAMLError, KeyError, TypeError):
        return []
    default = [config for config in configs if config.get("default") or config.get("config_name") == "default"]
    if len(configs) > 1 and not default:
        found = ", ".join(f"{config.get('config_name')} ({' '.join(_patterns(config))})" for config in configs)
        raise DataError(f"{name}: several configurations, name the files of one as {name}/PART: {found}")
    return _patterns((default or configs)[0])


def _patterns(config: Mapping[str, Any]) -> list[str]:
    """The patterns of a configuration's training split; they are declared in several ways."""
    declared = config.get("data_files", [])
    if isinstance(declared, str):
        return [declared]
    if all(isinstance(entry, str) for entry in declared):
        return list(declared)
    paths = [entry.get("path", []) for entry in declared if entry.get("split") == "train"]
    return [pattern for path in paths for pattern in ([path] if isinstance(path, str) else path)]


def _training(name: str, files: list[str], declared: list[str]) -> list[str]:
    """The files of the training split."""
    if declared:
        return [file for file in files if any(fnmatchcase(file, pattern) for pattern in declared)]
    splits = {file: {found[1] for found in _SPLITS.finditer(file.lower())} for file in files}
    training = [file for file in files if "train" in splits[file]]
    if not training and any(splits.values()):
        raise DataError(f"{name}: no training split, name the files as {name}/PART: {', '.join(files)}")
    return training or files
