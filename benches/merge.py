"""`qpack merge` end to end, cold, beside the disk alone: reading the base and writing the merged model.

    python -m benches.merge [--size 8GB] [--rank 16] [--runs 3] [--dir DIR] [options of merge]

Makes a packed base of random codes in the shape of Llama-3-8B's layers, whose merged form has ``--size`` bytes, and an
adapter of all its linear layers. Before every timing it empties the page cache. Each run times, one after the other:
reading all files of the base with one thread, 8 MiB at a time; `qpack merge`, start-up included; and writing as many
bytes as the merged model has, and flushing them. The ratio is merge's time over that of the slower of reading and
writing. Memory is the largest RssAnon of the process in /proc: the page cache is not counted.
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from benches.convert import LAYER, empty_page_cache, read, run, write
from qpack import _core
from qpack.sizes import format_size, parse_size

BLOCKSIZE, NESTED_BLOCKSIZE = 64, 256


def packed(name: str, shape: tuple[int, int], random: np.random.Generator) -> dict[str, NDArray[np.generic]]:
    """A weight of random codes and scales, near Gaussian with a deviation of 0.01."""
    blocks = shape[0] * shape[1] // BLOCKSIZE
    state = {"quant_type": "nf4", "blocksize": BLOCKSIZE, "dtype": "bfloat16", "shape": shape}
    state |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32", "nested_offset": 0.025}
    return {
        name: random.integers(0, 256, (blocks * BLOCKSIZE // 2, 1), np.uint8),
        f"{name}.absmax": random.integers(64, 192, blocks, np.uint8),
        f"{name}.quant_map": np.array(_core.LEVELS, np.float32),
        f"{name}.nested_absmax": np.full(-(-blocks // NESTED_BLOCKSIZE), 0.01, np.float32),
        f"{name}.nested_quant_map": np.frombuffer(_core.nested_quant_map(), np.float32),
        f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }


def write_base(directory: Path, size: int) -> int:
    """Layers, one a file, until their merged form has ``size`` bytes. Returns their number."""
    directory.mkdir(parents=True)
    random = np.random.default_rng(0)
    placed: dict[str, str] = {}
    layers = math.ceil(size / sum(2 * rows * columns for rows, columns in LAYER.values()))
    for layer in range(layers):
        tensors: dict[str, NDArray[np.generic]] = {}
        for name, shape in LAYER.items():
            tensors |= packed(f"model.layers.{layer}.{name}.weight", shape, random)
        file = f"model-{layer:05}.safetensors"
        save_file(tensors, directory / file)
        placed |= dict.fromkeys(tensors, file)
    config = {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "quantization_config": {"quant_method": "bitsandbytes"},
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return layers


def write_adapter(directory: Path, layers: int, rank: int) -> None:
    """Factors for every linear layer."""
    directory.mkdir(parents=True)
    random = np.random.default_rng(1)
    factors: dict[str, NDArray[np.generic]] = {}
    for layer in range(layers):
        for name, (rows, columns) in LAYER.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            factors[f"{module}.lora_A.weight"] = random.standard_normal((rank, columns), np.float32) * np.float32(0.02)
            factors[f"{module}.lora_B.weight"] = random.standard_normal((rows, rank), np.float32) * np.float32(0.01)
    save_file(factors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=parse_size, default="8GB")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "qpack-bench")
    arguments, options = parser.parse_known_args()
    base, output = arguments.dir / f"base-{arguments.size}", arguments.dir / "merged"
    adapter = arguments.dir / f"adapter-{arguments.size}-{arguments.rank}"
    if not adapter.exists():
        shutil.rmtree(base, ignore_errors=True)
        write_adapter(adapter, write_base(base, arguments.size), arguments.rank)
    ratios = []
    for _ in range(arguments.runs):
        empty_page_cache(base)
        reading = read(base)
        shutil.rmtree(output, ignore_errors=True)
        empty_page_cache(base, adapter)
        command = [sys.executable, "-m", "qpack", "merge", str(base), str(adapter), str(output), "-q", *options]
        seconds, peak = run(command)
        size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
        empty_page_cache(base, output)
        writing = write(arguments.dir / "written", size)
        ratios.append(seconds / max(reading, writing))
        line = f"read {reading:.2f} s, write {format_size(size)} {writing:.2f} s; merge {seconds:.2f} s"
        print(f"{line}, ratio {ratios[-1]:.2f}, {format_size(peak)}", flush=True)
    print(f"{statistics.median(ratios):.2f} of the slower of reading and writing")


if __name__ == "__main__":
    main()
