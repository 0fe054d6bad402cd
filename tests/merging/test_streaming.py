"""Merging is streamed: memory is that of a few pieces of weights, however many weights there are."""

import json
import subprocess
import sys
import time
from pathlib import Path

import factors
import pytest
import torch
from safetensors.torch import save_file

import qpack

MB = 1 << 20
ROWS, COLUMNS = 2048, 8192
LAYER_BYTES = 2 * ROWS * COLUMNS


def write_model(directory: Path, layers: int) -> Path:
    """A bf16 model of one weight a layer, all zeros, in one file."""
    directory.mkdir()
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(layers)]
    save_file(
        {name: torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16) for name in names}, directory / "model.safetensors"
    )
    config = {"model_type": "llama", "num_hidden_layers": layers, "hidden_size": ROWS, "intermediate_size": COLUMNS}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def peak(*arguments: Path | str) -> int:
    """The most anonymous memory that `qpack merge` was seen to have; the page cache is not counted."""
    command = [sys.executable, "-m", "qpack", "merge", "-q", "--threads", "2", *map(str, arguments)]
    found = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    found = max(found, int(line.split()[1]) << 10)
            time.sleep(0.005)
    assert process.returncode == 0
    return found


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    peaks = []
    for layers in (2, 12):
        model, base = write_model(tmp_path / f"model-{layers}", layers), tmp_path / f"base-{layers}"
        qpack.convert(model, base)
        adapter = factors.write(tmp_path / f"adapter-{layers}", factors.draw(base, modules=["down_proj"]))
        peaks.append(peak(base, adapter, tmp_path / f"onto-packed-{layers}"))
        peaks.append(peak(base, adapter, tmp_path / f"onto-original-{layers}", "--onto", "original", "--source", model))
    assert max(peaks) < 512 * MB
    assert max(peaks[2:]) < min(peaks[:2]) + LAYER_BYTES  # of ten more
