"""Sources that `qpack.convert` refuses: each with one line that names what is wrong, and nothing is written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny import write_llama

import qpack
from qpack.errors import CheckpointError


def edit_config(source: Path, **changes: object) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | changes))


def edit_index(source: Path, file: str) -> None:
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = file
    path.write_text(json.dumps(index))


def edit_header(source: Path, old: bytes, new: bytes) -> None:
    path = next(source.glob("*-00001-*"))
    assert len(old) == len(new)
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new, 1))


def truncate(source: Path) -> None:
    path = next(source.glob("*-00002-*"))
    path.write_bytes(path.read_bytes()[:-100])


def poison(source: Path, name: str = "model.layers.1.mlp.up_proj.weight", value: float = float("nan")) -> None:
    for path in source.glob("*.safetensors"):
        weights = load_file(path)
        if name in weights:
            weights[name][2, 5] = value
            save_file(weights, path, metadata={"format": "pt"})


def offsets(source: Path, index: int) -> tuple[bytes, int, int]:
    """The text of the data_offsets of the tensor whose bytes come ``index``-th in the first shard."""
    path = next(source.glob("*-00001-*"))
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    header.pop("__metadata__", None)
    start, end = sorted(entry["data_offsets"] for entry in header.values())[index]
    return b"[%d,%d]" % (start, end), start, end


def shift_offsets(source: Path, start_change: int, end_change: int, index: int = 1) -> None:
    text, start, end = offsets(source, index)
    edit_header(source, text, b"[%d,%d]" % (start + start_change, end + end_change))


def write_header(source: Path, change: Callable[[str], str]) -> None:
    """Change the text of the first shard's header, whatever its length becomes."""
    path = next(source.glob("*-00001-*"))
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = change(raw[8:end].decode().rstrip()).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])


def repeat_first(header: str) -> str:
    """The header with its first tensor named once more at its end."""
    entries = json.loads(header)
    name = next(name for name in entries if name != "__metadata__")
    return f"{header[:-1]},{json.dumps(name)}:{json.dumps(entries[name])}}}"


BAD_SOURCES = {
    "no config": (lambda s: (s / "config.json").unlink(), r"source/config\.json: no such file"),
    "config is no JSON": (lambda s: (s / "config.json").write_text("{"), r"config\.json: not valid JSON"),
    "config is a list": (lambda s: (s / "config.json").write_text("[]"), "expected a JSON object, found list"),
    "unknown family": (lambda s: edit_config(s, model_type="bert"), r"config\.json: no tensor for bert\.encoder"),
    "quantized": (
        lambda s: edit_config(s, quantization_config={"quant_method": "fp8"}),
        r"quantized already \(fp8\)",
    ),
    "no weights": (
        lambda s: [path.unlink() for path in s.glob("model*")],
        r"no model\.safetensors\.index\.json and no",
    ),
    "only pickles": (
        lambda s: [path.unlink() for path in s.glob("model*")] and (s / "pytorch_model.bin").touch(),
        r"pytorch_model\.bin: pickled weights",
    ),
    "missing shard": (
        lambda s: next(s.glob("*-00002-*")).unlink(),
        r"model-00002-of-00003\.safetensors: no such file, but model\.safetensors\.index\.json names it",
    ),
    "truncated shard": (truncate, r"model-00002-of-00003\.safetensors: tensor \S+ ends at byte \d+.*truncated\?"),
    "index leaves the directory": (
        lambda s: edit_index(s, "../x.safetensors"),
        r'model\.norm\.weight in "\.\./x\.safetensors", which is not a file of this directory',
    ),
    "absolute index": (
        lambda s: edit_index(s, "/etc/passwd"),
        'in "/etc/passwd", which is not a file of this directory',
    ),
    "index and shard disagree": (
        lambda s: edit_index(s, "model-00001-of-00003.safetensors"),
        r"tensor model\.norm\.weight, which model\.safetensors\.index\.json",
    ),
    "index without a map": (
        lambda s: (s / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
        "weight_map is empty",
    ),
    "overlap": (lambda s: shift_offsets(s, -2, -2), "overlaps the tensor before it"),
    "hole": (lambda s: shift_offsets(s, 2, 2), "hole before tensor"),
    "size and offsets disagree": (lambda s: shift_offsets(s, 0, 2), "needs .* bytes, its offsets are"),
    "unknown dtype": (lambda s: edit_header(s, b'"BF16"', b'"BF61"'), 'unknown dtype "BF61"'),
    "duplicate key": (lambda s: write_header(s, repeat_first), r"model-00001-of-00003\.safetensors: .* is given twice"),
    "shape overflow": (
        lambda s: write_header(s, lambda header: header.replace('"shape":[320,256]', f'"shape":[{2**40},{2**40}]')),
        r"model-00001-of-00003\.safetensors: tensor model\.embed_tokens\.weight of shape .* has too many bytes",
    ),
    "link out of it": (
        lambda s: (s / "config.json").rename(s.parent / ".config") and (s / "config.json").symlink_to("../.config"),
        r"config\.json: is a symbolic link to .*\.config, outside the model",
    ),
    "huge header": (
        lambda s: next(s.glob("*-00001-*")).write_bytes(b"\xff" * 16),
        "header length 18446744073709551615 is over the limit",
    ),
    "empty shard": (lambda s: next(s.glob("*-00001-*")).write_bytes(b""), "0 bytes are too few"),
    "not finite": (poison, r"tensor model\.layers\.1\.mlp\.up_proj\.weight is not finite at flat index 517"),
    "kept and not finite": (
        lambda s: poison(s, "model.embed_tokens.weight", -float("inf")),
        r"tensor model\.embed_tokens\.weight is not finite at flat index 517",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_bad_sources_are_refused_and_nothing_is_written(damage, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    source = write_llama(tmp_path / "source")
    damage(source)
    with pytest.raises(CheckpointError, match=message):
        qpack.convert(source, tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir() if path.name != ".config"] == ["source"]


def test_what_the_type_that_it_is_kept_in_cannot_hold_is_refused(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source")
    poison(source, value=1e6)
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nmatch = "*.mlp.*"\nkeep = true\ndtype = "float16"\n')
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight is not finite at flat index 517"):
        qpack.convert(source, tmp_path / "packed", rules=rules)
    assert not (tmp_path / "packed").exists()


def test_a_source_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing: no such file or directory, and not the id of a model of"):
        qpack.convert(tmp_path / "nothing", tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []
