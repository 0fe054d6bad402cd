"""``--config FILE``: the options of a command from a YAML file, so that a deployment is one file, to review and keep.

A key is the name of a flag without its dashes, or of an argument. Its value is what would stand on the command line:
the file makes the command's defaults, so the types of its options check both, and a flag that is given takes the place
of what the file says. Options that may be repeated take a list, those of pairs (``NAME=DIR``) a mapping too. Relative
paths start where the file is.

Refused, all at once and by line: keys that are none or come twice, values that the command line would refuse, and those
that are not what they look like, such as ``registry: no``, which to YAML is false.
"""

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import click
import yaml

from qpack.cli.options import NamedDirectory
from qpack.errors import DataError
from qpack.problems import Problems

Command = TypeVar("Command", bound=Callable[..., Any])

_NO_SETTINGS = frozenset({"config", "check", "help"})
"""Flags that say what to do with the settings."""

_KINDS = {yaml.ScalarNode: "one value", yaml.SequenceNode: "a list", yaml.MappingNode: "a mapping"}


def config_file(command: Command) -> Command:
    """Add ``--config``."""
    option = click.option(
        "--config",
        type=click.Path(path_type=Path),
        metavar="FILE.yaml",
        is_eager=True,
        expose_value=False,
        callback=_take_over,
        help="YAML file of BASE and options; flags take precedence.",
    )
    return option(command)


def _take_over(context: click.Context, _param: click.Parameter, path: Path | None) -> None:
    if path is not None:
        context.default_map = read_options(path, context)


def settings(command: click.Command) -> dict[str, click.Parameter]:
    """The keys that a file for this command may have, and what they set."""
    keys = {max(param.opts, key=len).removeprefix("--"): param for param in command.params}
    return {key: param for key, param in keys.items() if key not in _NO_SETTINGS}


def read_options(path: Path, context: click.Context) -> dict[str, Any]:
    """Return what the file says, as texts, by the names that click has for the options of the context's command.

    Raises:
        DataError: if it cannot be read; for what is wrong in it, with the line.
        SeveralErrors: if there is more than one thing wrong.
    """
    known = settings(context.command)
    problems = Problems()
    lines: dict[str, int] = {}
    found: dict[str, Any] = {}
    for key, value in _compose(path):
        name = key.value
        try:
            if name in lines:
                raise _UnfitError(key, f"is in line {lines[name]} already")
            lines[name] = key.start_mark.line + 1
            if name not in known:
                close = get_close_matches(name, known, 1)
                hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}"
                raise _UnfitError(key, f"is no option; {hint}")
            param = known[name]
            found[param.name or name] = _read(value, param, context, path.parent)
        except _UnfitError as error:
            problems.note([DataError(f"{path}:{error.line}: {name}: {error}")])
    problems.raise_found()
    return found


class _UnfitError(Exception):
    """A node that is not what is expected in its place."""

    def __init__(self, node: yaml.Node, message: str) -> None:
        super().__init__(message)
        self.line = node.start_mark.line + 1


def _compose(path: Path) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
    """The keys and values of the file, not yet made into anything; an empty one has none."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except OSError as error:
        raise DataError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode) or not all(isinstance(key, yaml.ScalarNode) for key, _ in root.value):
        raise DataError(f"{path}: expected lines of OPTION: VALUE")
    return list(root.value)


def _read(node: yaml.Node, param: click.Parameter, context: click.Context, folder: Path) -> str | list[str]:
    """The text or texts that would stand on the command line."""
    if not (param.multiple or param.nargs == -1):
        return _text(node, param, context, folder)
    if isinstance(node, yaml.SequenceNode):
        return [_text(one, param, context, folder) for one in node.value]
    of_pairs = "=" in param.make_metavar(context)
    if not (isinstance(node, yaml.MappingNode) and of_pairs):
        raise _UnfitError(node, f"expected a list{' or a mapping' * of_pairs}, found {_KINDS[type(node)]}")
    texts: dict[str, str] = {}
    for key, value in node.value:
        name = _single(key)
        if name in texts:
            raise _UnfitError(key, f"{name!r} comes twice")
        texts[name] = _text(value, param, context, folder, f"{name}=")
    return [*texts.values()]


def _text(node: yaml.Node, param: click.Parameter, context: click.Context, folder: Path, before: str = "") -> str:
    said = _single(node)
    is_flag = isinstance(param, click.Option) and param.is_flag
    if is_flag != (node.tag == "tag:yaml.org,2002:bool"):
        raise _UnfitError(node, f"expected {'true or false' if is_flag else 'a value'}, found {said}")
    text = _placed(before + said, param.type, folder)
    try:
        param.type(text, param, context)
    except click.BadParameter as error:
        raise _UnfitError(node, error.message.rstrip(".")) from None
    return text


def _single(node: yaml.Node) -> str:
    """One value, as it is written."""
    if not isinstance(node, yaml.ScalarNode):
        raise _UnfitError(node, f"expected one value, found {_KINDS[type(node)]}")
    if node.tag == "tag:yaml.org,2002:null":
        raise _UnfitError(node, "has no value")
    return str(node.value)


def _placed(text: str, kind: click.ParamType[Any], folder: Path) -> str:
    """A path, or a pair of a name and a path, with the path from where the file is."""
    if isinstance(kind, click.Path):
        return str(folder / text)
    name, _, directory = text.partition("=")
    return f"{name}={folder / directory}" if isinstance(kind, NamedDirectory) and directory else text
