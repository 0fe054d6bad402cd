"""`qpack inspect`: the table, one weight in detail, JSON, and the page."""

import json
import math
import os
import pty
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import definitions
import numpy as np
import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import run

import qpack
from qpack import _core
from qpack.errors import CheckpointError, OutputExistsError
from qpack.inspection import TensorReport, examine
from qpack.reports import page

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("name", "kind", "layer", "expert"),
    [
        ("model.layers.12.self_attn.q_proj.weight", "q_proj", 12, None),
        ("model.layers.0.self_attn.q_proj.bias", "q_proj.bias", 0, None),
        ("model.layers.0.post_attention_layernorm.weight", "norm", 0, None),
        ("model.embed_tokens.weight", "embed_tokens", None, None),
        ("lm_head.weight", "lm_head", None, None),
        ("model.layers.3.mlp.experts.17.gate_proj.weight", "experts.gate_proj", 3, 17),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", "shared_experts.up_proj", 3, None),
        ("model.layers.3.mlp.experts.down_proj", "experts.down_proj", 3, None),
        ("model.language_model.layers.5.mlp.gate.weight", "gate", 5, None),
        ("transformer.h.7.attn.c_attn.weight", "c_attn", 7, None),
    ],
)
def test_kinds_follow_from_names(name: str, kind: str, layer: int | None, expert: int | None) -> None:
    tensor = TensorReport(name, (2, 2), "BF16", 8)
    assert (tensor.kind, tensor.layer, tensor.expert) == (kind, layer, expert)


def test_the_table(packed: Path) -> None:
    done = run("inspect", packed)
    assert "\x1b" not in done.stdout
    assert all(line == line.rstrip() for line in done.stdout.splitlines())
    inspection = qpack.inspect(packed)
    manifest = inspection.manifest
    assert manifest is not None
    lines = {line.split()[0]: re.split(r"\s{2,}", line) for line in done.stdout.splitlines() if line.strip()}
    assert lines["model"] == ["model", "llama"]
    assert lines["size"] == ["size", "792 kB in 1 file"]
    assert lines["source"] == ["source", "llama, 2.53 MB"]
    (_, options) = lines["options"]
    assert options.startswith("mode exact, blocksize 64, double quant on, quant storage uint8, rules none, ")
    assert options.endswith(f" (qpack {qpack.__version__})")
    assert lines["fingerprint"] == ["fingerprint", manifest.fingerprint]
    errors = {name: error for name, error in manifest.errors.items() if "up_proj" in name}
    worst = max(errors, key=lambda name: errors[name].relative)
    norm = math.hypot(*(error.norm for error in errors.values()))
    together = f"{100 * math.hypot(*(error.relative * error.norm for error in errors.values())) / norm:.2f} %"
    where = f"{100 * errors[worst].relative:.2f} % layer {worst.split('.')[2]}"
    size, bits = "138 kB", f"{8 * 2 * 69049 / 2 / 512 / 256 / 2 * 2:.3f}"
    assert lines["up_proj"][:6] == ["up_proj", "2", "512 x 256", "NF4/64 nested", "262,144", size]
    assert lines["up_proj"][7:] == [together, where]
    assert lines["embed_tokens"] == ["embed_tokens", "1", "320 x 256", "BF16", "81,920", "164 kB", "16.000"]
    assert lines["norm"][:4] == ["norm", "5", "256", "BF16"]
    assert lines["in"][:2] == ["in all", "20"]
    assert float(lines["up_proj"][6]) == pytest.approx(float(bits), abs=0.02)
    assert [name for name in lines if name in ("embed_tokens", "q_proj", "up_proj", "norm")] == [
        "embed_tokens",
        "q_proj",
        "up_proj",
        "norm",
    ]


def test_without_qpack_json_there_are_no_errors(packed: Path, llama: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(packed, tmp_path / "bare", ignore=shutil.ignore_patterns("qpack.json"))
    text = run("inspect", bare).stdout
    assert "error" not in text
    assert "fingerprint" not in text
    assert "  packed  " not in run("inspect", llama).stdout
    assert "up_proj" not in run("inspect", packed, "--quiet").stdout


@pytest.mark.parametrize(("columns", "headings"), [(200, 9), (80, 7), (60, 5)])
def test_a_terminal_gets_what_fits_with_names_whole(packed: Path, columns: int, headings: int) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "qpack", "inspect", str(packed)]
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "xterm-256color"}
    with subprocess.Popen(command, stdout=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        try:
            while chunk := os.read(ours, 4096):
                shown += chunk
        except OSError:  # how Linux ends a pseudo-terminal whose other side is closed
            pass
    os.close(ours)
    assert process.returncode == 0
    assert b"\x1b[1m" in shown
    lines = re.sub(r"\x1b\[\d*m", "", shown.decode()).split("\r\n")
    (heading,) = (line for line in lines if line.startswith("kind"))
    assert len(re.split(r"\s{2,}", heading.strip())) == headings
    assert any(line.startswith("embed_tokens ") for line in lines)
    assert max(map(len, lines[lines.index(heading) :])) <= columns
    assert not any("…" in line for line in lines)


def test_json_is_complete_and_stable(packed: Path) -> None:
    text = run("inspect", packed, "--json").stdout
    assert text == run("inspect", packed, "--json").stdout
    report = json.loads(text)
    inspection = qpack.inspect(packed)
    manifest = inspection.manifest
    assert manifest is not None
    assert report["qpack"]["fingerprint"] == manifest.fingerprint
    assert report["qpack"]["source"] == manifest.source
    assert [tensor["name"] for tensor in report["tensors"]] == [tensor.name for tensor in inspection.tensors]
    assert sum(kind["count"] for kind in report["kinds"]) == len(report["tensors"])
    assert sum(kind["bytes"] for kind in report["kinds"]) == report["bytes"] == inspection.bytes
    by_name = {tensor["name"]: tensor for tensor in report["tensors"]}
    assert by_name[UP]["error"]["relative"] == manifest.errors[UP].relative
    assert by_name[NORM]["reason"] == "norm"
    assert (by_name[UP]["kind"], by_name[UP]["layer"], by_name[UP]["shape"]) == ("up_proj", 1, [512, 256])


def test_one_weight_in_detail(packed: Path) -> None:
    stored = definitions.tensors(packed)
    codes = np.stack([stored[UP].numpy() >> 4, stored[UP].numpy() & 15]).ravel()
    expected = Counter(codes.tolist())
    found = examine(packed, UP)
    assert found.codes == tuple(expected[code] for code in range(16))
    assert [part.name for part in found.stored] == [UP] + [UP + suffix for suffix in _core.SUFFIXES]
    digests = {name: line.split()[-1] for name, line in definitions.lines(packed).items()}
    assert {part.name: part.digest for part in found.stored} == {part.name: digests[part.name] for part in found.stored}
    offset = json.loads(bytes(stored[f"{UP}.quant_state.bitsandbytes__nf4"].tolist()))["nested_offset"]
    levels, nested = stored[f"{UP}.nested_quant_map"], stored[f"{UP}.nested_absmax"]
    scales = levels[stored[f"{UP}.absmax"].long()] * nested.repeat_interleave(256)[:2048] + offset
    assert found.scales == pytest.approx(
        {"smallest": scales.min().item(), "mean": scales.mean().item(), "largest": scales.max().item(), "negative": 0}
    )
    assert pytest.approx(oracle.LEVELS) == np.array(_core.LEVELS, np.float32)

    text = run("inspect", packed, "--tensor", UP).stdout
    for shown in (
        UP,
        "NF4/64 nested",
        digests[f"{UP}.absmax"],
        "dtype bfloat16, blocksize 64",
        "worst block",
        "-0.6962",
    ):
        assert shown in text
    report = json.loads(run("inspect", packed, "--tensor", UP, "--json").stdout)
    assert report["codes"] == list(found.codes)
    assert report["weight"]["kind"] == "up_proj"
    text = run("inspect", packed, "--tensor", NORM).stdout
    assert digests[NORM] in text
    assert "norm" in text
    assert "quant state" not in text


def test_an_odd_weight_counts_no_padding(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    save_file({"model.layers.0.mlp.up_proj.weight": torch.ones(3, 5)}, source / "model.safetensors")
    qpack.convert(source, tmp_path / "packed", double_quant=False)
    found = examine(tmp_path / "packed", "model.layers.0.mlp.up_proj.weight")
    assert found.codes == (0,) * 15 + (15,)

    path = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight.absmax"].neg_()
    save_file(tensors, path, metadata={"format": "pt"})
    found = examine(tmp_path / "packed", "model.layers.0.mlp.up_proj.weight")
    assert found.scales == {"smallest": -1.0, "mean": -1.0, "largest": -1.0, "negative": 1}


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("layers.1.mlp.up_proj", f"; near it: {UP}"),
        (f"{UP}.absmax", f"; near it: {UP}"),
        ("model.layers.1.mlp.up_porj.weight", f"; near it: {UP}, "),
        ("qqqq", ""),
    ],
)
def test_an_unknown_name_is_refused_with_those_near_it(packed: Path, name: str, near: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"{packed}: no weight {name}{near}")):
        examine(packed, name)


class _Strict(HTMLParser):
    """Refuses what is not well nested; collects tags with their attributes, and text."""

    VOID = frozenset({"meta", "br", "hr", "img", "input", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open, f"<{tag}/> closes itself in SVG only"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.text.append(data)


def test_the_page_is_one_file_that_needs_nothing(packed: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    assert run("inspect", packed, "--html", path).stdout == f"{path}: 20 tensors of {packed}\n"
    text = path.read_text(encoding="utf-8")
    page = _Strict(text)
    assert not re.search(r"(?:https?:)?//|url\(|@import|<script", text.replace("<!DOCTYPE", ""))
    for tag, attributes in page.tags:
        assert not attributes.keys() & {"src", "onclick", "onload"}, tag
        assert (attributes.get("href") or "#").startswith("#"), tag
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        assert attributes.get("aria-labelledby", ids[0]) in ids
    # Every point of the drawing is titled, and stands in the table that is its alternative.
    inspection = qpack.inspect(packed)
    for tensor in inspection.packed:
        assert tensor.error is not None
        value = f"{100 * tensor.error.relative:.2f} %"
        assert f"<title>{tensor.kind}, layer {tensor.layer}: {value}</title>" in text
        assert page.text.count(value) >= 1
    assert sum(1 for tag, _ in page.tags if tag == "polyline") == 7
    assert {tag for tag, _ in page.tags} >= {"main", "h1", "figure", "details", "tfoot"}
    assert (path.stat().st_mode & 0o777) == 0o644


def test_names_are_escaped(packed: Path, tmp_path: Path) -> None:
    directory = tmp_path / "<b>&bold"
    shutil.copytree(packed, directory)
    text = page.page(qpack.inspect(directory))
    _Strict(text)
    assert "<b>&bold" not in text
    assert "&lt;b&gt;&amp;bold" in text


def test_a_page_without_errors_says_so(llama: Path) -> None:
    shown = _Strict(page.page(qpack.inspect(llama)))
    assert any("there is no qpack.json with errors" in text for text in shown.text)


def test_a_page_replaces_nothing_unasked(packed: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("mine")
    message = f"error: {path}: already exists (--force replaces it)\n"
    assert run("inspect", packed, "--html", path, status=1).stderr == message
    assert path.read_text() == "mine"
    run("inspect", packed, "--html", path, "--force")
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OutputExistsError, match="is a directory, expected the name of a file"):
        page.write(qpack.inspect(packed), tmp_path, force=True)
    missing = tmp_path / "missing" / "page.html"
    assert run("inspect", packed, "--html", missing, status=1).stderr.startswith(f"error: {tmp_path / 'missing'}")
    assert "Usage: " in run("inspect", packed, "--html", path, "--json", status=2).stderr


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
@pytest.mark.parametrize("width", [1280, 420])
def test_a_browser_shows_the_page(packed: Path, tmp_path: Path, width: int) -> None:
    assert CHROMIUM is not None
    path = tmp_path / "page.html"
    page.write(qpack.inspect(packed), path, force=False)
    # Writes what it measures into its title, which --dump-dom prints.
    measured = path.read_text(encoding="utf-8").replace(
        "</body>",
        "<script>const wide = document.documentElement.scrollWidth, chart = document.querySelector('.chart');"
        "document.title = [wide <= innerWidth, chart.getBoundingClientRect().width > 200].join()</script></body>",
    )
    path.write_text(measured, encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "<title>true,true</title>" in done.stdout
