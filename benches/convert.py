"""`qpack convert` end to end, cold, beside the disk alone: reading the input and writing the output.

    python benches/convert.py [--size 8GB] [--runs 3] [--dir DIR] [--modes exact best] [options of convert]

Makes a checkpoint of random weights in the shape of Llama-3-8B's layers, and before every timing empties the page cache
(as root by /proc/sys/vm/drop_caches, else file by file by posix_fadvise). Each run times, one after the other: reading
all input files with one thread, 8 MiB at a time; writing as many bytes as the output has, and flushing them; and
`qpack convert` in each mode, start-up included. The ratio is convert's time over that of the slower of the two.
Memory is the largest RssAnon of the process in /proc, looked at every 20 ms: the page cache is not counted.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from qpack.sizes import format_size, parse_size

LAYER = {"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096)}
LAYER |= {"self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096)}
LAYER |= {"mlp.up_proj": (14336, 4096), "mlp.down_proj": (4096, 14336)}
PIECE = 8 << 20


def write_checkpoint(directory: Path, size: int) -> None:
    """Layers of bf16 weights, near Gaussian, one a file, until there are ``size`` bytes; and an embedding of 128 MB."""
    directory.mkdir(parents=True)
    random = np.random.default_rng(0)
    noise = (random.standard_normal(1 << 24).astype(np.float32) * 0.02).view(np.uint32) >> 16
    pool = noise.astype(np.uint16)
    placed: dict[str, str] = {}
    total = layer = 0
    while total < size:
        file = f"model-{layer:05}.safetensors"
        shapes = {f"model.layers.{layer}.{name}.weight": shape for name, shape in LAYER.items()}
        if layer == 0:
            shapes["model.embed_tokens.weight"] = (16384, 4096)
        header, end = {}, 0
        for name, (rows, columns) in shapes.items():
            header[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [end, end + 2 * rows * columns]}
            end += 2 * rows * columns
        text = json.dumps(header).encode()
        with (directory / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for rows, columns in shapes.values():
                left = rows * columns
                while left:
                    start = int(random.integers(0, 1 << 20))
                    piece = pool[start : start + min(left, (1 << 24) - start)]
                    out.write(piece.tobytes())
                    left -= len(piece)
        placed |= dict.fromkeys(shapes, file)
        total += end
        layer += 1
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": layer}))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


def empty_page_cache(*directories: Path) -> None:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        for path in (path for directory in directories for path in directory.glob("*")):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(directory: Path) -> float:
    buffer = bytearray(PIECE)
    begin = time.monotonic()
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.monotonic() - begin


def write(path: Path, size: int) -> float:
    piece = os.urandom(PIECE)
    begin = time.monotonic()
    with path.open("wb", buffering=0) as file:
        for offset in range(0, size, PIECE):
            file.write(piece[: size - offset])
        os.fsync(file.fileno())
    seconds = time.monotonic() - begin
    path.unlink()
    return seconds


def convert(source: Path, output: Path, options: list[str]) -> tuple[float, int]:
    """As `run`."""
    return run([sys.executable, "-m", "qpack", "convert", str(source), str(output), "-q", *options])


def run(command: list[str]) -> tuple[float, int]:
    """Seconds that a command takes, and the largest number of anonymous bytes seen."""
    begin = time.monotonic()
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
                peak = max([peak, *(int(line.split()[1]) << 10 for line in status.splitlines() if "RssAnon" in line)])
            except OSError:
                break
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(process.returncode)
    return time.monotonic() - begin, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=parse_size, default="8GB")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "qpack-bench")
    parser.add_argument("--modes", nargs="+", default=["exact", "best"])
    arguments, options = parser.parse_known_args()
    source, output = arguments.dir / f"source-{arguments.size}", arguments.dir / "packed"
    if not source.exists():
        write_checkpoint(source, arguments.size)
    ratios: dict[str, list[float]] = {mode: [] for mode in arguments.modes}
    seconds: dict[str, list[float]] = {mode: [] for mode in arguments.modes}
    for _ in range(arguments.runs):
        empty_page_cache(source)
        reading = read(source)
        peaks = {}
        for mode in arguments.modes:
            shutil.rmtree(output, ignore_errors=True)
            empty_page_cache(source)
            taken, peaks[mode] = convert(source, output, ["--mode", mode, *options])
            seconds[mode].append(taken)
        size = sum(path.stat().st_size for path in output.iterdir())
        empty_page_cache(source, output)
        writing = write(arguments.dir / "written", size)
        line = f"read {reading:.2f} s, write {format_size(size)} {writing:.2f} s"
        for mode in arguments.modes:
            ratios[mode].append(seconds[mode][-1] / max(reading, writing))
            line += f"; {mode} {seconds[mode][-1]:.2f} s, ratio {ratios[mode][-1]:.2f}, {format_size(peaks[mode])}"
        print(line, flush=True)
    first = statistics.median(seconds[arguments.modes[0]])
    for mode in arguments.modes:
        median = statistics.median(seconds[mode])
        ratio = statistics.median(ratios[mode])
        beside = f"{ratio:.2f} of the slower of reading and writing, {median / first:.2f} of the first mode"
        print(f"{mode}: {median:.2f} s, {beside}")


if __name__ == "__main__":
    main()
