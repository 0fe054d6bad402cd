"""`_core.merge` against sums in f64 by numpy, rounded once: every kind of change, of every kind of source."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from qpack import _core
from qpack.adapters.changes import AnyChange, Change, LowRank, Replace, ReplaceRows, Stored, View
from qpack.errors import CheckpointError
from qpack.policy.plan import Packing, Part, Recipe

F64 = NDArray[np.float64]

KEPT_BITS = {"bfloat16": 8, "float16": 11, "float32": 24}
"""Of an f64's 53 significant bits."""


def rounded(values: F64, dtype: str) -> torch.Tensor:
    """``values`` to nearest with ties to even, by integers. The steps of f16 do not shrink below 2**-14."""
    bits = np.ascontiguousarray(values).view(np.uint64)
    cut = np.uint64(53 - KEPT_BITS[dtype])
    even = (bits >> cut) & np.uint64(1)
    kept = ((bits + ((np.uint64(1) << (cut - np.uint64(1))) - np.uint64(1) + even)) >> cut) << cut
    found = kept.view(np.float64)
    if dtype == "float16":
        found = np.where(np.abs(values) < 2**-14, np.rint(values * 2**24) / 2**24, found)
    return torch.from_numpy(found).to(getattr(torch, dtype))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Weights and factors, a third of them whole steps of bfloat16, so that sums are ties."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    values = torch.randn(shape, generator=generator) * 0.05
    steps = torch.rand(shape, generator=generator) < 0.3
    return torch.where(steps, (values * 4096).round() / 4096, values)


def f64(tensor: torch.Tensor) -> F64:
    array: F64 = tensor.double().numpy()
    return array


def pack(tensors: Mapping[str, torch.Tensor], path: Path, **packing: Any) -> None:
    """Two-dimensional tensors packed, all others kept."""
    save_file(dict(tensors), path / "source.safetensors")
    recipes = [
        Recipe(name, (Part(name, tuple(tensor.shape), Packing(**packing) if tensor.ndim == 2 else None),))
        for name, tensor in tensors.items()
    ]
    shards = [path / "source.safetensors"]
    _core.pack(
        shards, path, recipes, mode="exact", quant_storage="uint8", inputs="", max_shard_bytes=1 << 40, threads=1
    )


def unpacked(path: Path, name: str) -> F64:
    """By bitsandbytes, in f32."""
    parts = load_file(path)
    beside = {key.removeprefix(f"{name}."): value for key, value in parts.items() if key.startswith(f"{name}.")}
    state = bnb.QuantState.from_dict(beside, torch.device("cpu"))
    state.dtype = torch.float32
    return f64(bnb.dequantize_4bit(parts[name], state))


def merge(
    source: Path,
    directory: Path,
    parts: Mapping[str, tuple[Part, ...]],
    changes: Mapping[str, AnyChange],
    *,
    mode: str = "exact",
    threads: int = 2,
    **encoding: Any,
) -> tuple[dict[str, torch.Tensor], _core.Written]:
    directory.mkdir(exist_ok=True)
    recipes = [Recipe(name, made, **encoding) for name, made in parts.items()]
    options: dict[str, Any] = {"quant_storage": "uint8", "max_shard_bytes": 1 << 40}
    planned = _core.plan_merge([source], recipes, changes, **options)
    written = _core.merge([source], directory, recipes, changes, mode=mode, inputs="", threads=threads, **options)
    assert planned == [("model.safetensors", (directory / "model.safetensors").stat().st_size)]
    return load_file(directory / "model.safetensors"), written


def matrix(file: Path, name: str, columns: int) -> View:
    return View(Stored(file, name), (columns, 1))


def transposed(file: Path, name: str, columns: int) -> View:
    return View(Stored(file, name), (1, columns))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Factors of rank 3 and 2 for a weight of 40 x 192, both ways round, and what takes the place of others."""
    path = tmp_path / "adapter.safetensors"
    tensors = {"A": random(3, 192), "B": random(40, 3), "A2": random(192, 2).bfloat16(), "B2": random(2, 40).half()}
    tensors |= {"m": random(40).abs() + 0.5, "m_columns": random(192).abs() + 0.5, "rows": random(2, 192)}
    save_file(tensors | {"whole": random(40, 192, seed=1), "bias": random(40)}, path)
    return path


def terms(file: Path) -> tuple[LowRank, ...]:
    second = LowRank(transposed(file, "B2", 40), transposed(file, "A2", 2), 2, -0.3)
    return (LowRank(matrix(file, "B", 3), matrix(file, "A", 192), 3, 2.0), second)


def delta(file: Path) -> F64:
    t = {name: f64(tensor) for name, tensor in load_file(file).items()}
    change: F64 = 2.0 * (t["B"] @ t["A"]) - 0.3 * (t["B2"].T @ t["A2"].T)
    return change


@pytest.mark.parametrize("dtype", KEPT_BITS)
@pytest.mark.parametrize("packing", [{"blocksize": 64}, {"blocksize": 32, "double_quant": False}], ids=str)
def test_a_packed_weight_is_changed_in_every_way(
    dtype: str, packing: dict[str, Any], adapter: Path, tmp_path: Path
) -> None:
    pack({"w": random(40, 192).bfloat16(), "n": random(7).bfloat16()}, tmp_path, **packing)
    source = tmp_path / "model.safetensors"
    weight, change = unpacked(source, "w"), delta(adapter)
    magnitudes = {name: f64(tensor) for name, tensor in load_file(adapter).items()}
    changed = weight + change
    by_rows = magnitudes["m"][:, None] / np.linalg.norm(changed, axis=1, keepdims=True) * changed
    by_columns = magnitudes["m_columns"] / np.linalg.norm(changed, axis=0) * changed
    replaced = weight.copy()
    replaced[[31, 4]] = magnitudes["rows"]
    kinds: dict[str, tuple[AnyChange, F64]] = {
        "low rank": (Change(terms(adapter)), changed),
        "dora": (Change(terms(adapter), magnitude=Stored(adapter, "m")), by_rows),
        "dora by columns": (Change(terms(adapter), Stored(adapter, "m_columns"), by_columns=True), by_columns),
        "rows": (ReplaceRows(Stored(adapter, "rows"), (31, 4)), replaced),
        "whole": (Replace(Stored(adapter, "whole")), magnitudes["whole"]),
    }
    parts = {name: (Part(name, shape, dtype=dtype),) for name, shape in {"w": (40, 192), "n": (7,)}.items()}
    for kind, (change_of_w, expected) in kinds.items():
        merged, written = merge(source, tmp_path / kind, parts, {"w": change_of_w})
        assert torch.equal(merged["w"], rounded(expected, dtype)), kind
        assert torch.equal(merged["n"], load_file(source)["n"].to(getattr(torch, dtype)))
        if kind == "whole":
            assert not written.changes
            continue
        norms = [np.linalg.norm(expected - weight), np.linalg.norm(weight)]
        assert written.changes.keys() == {"w"}
        assert np.allclose(written.changes["w"], norms, rtol=1e-6)
    # The other way round, as 16-bit checkpoints of some families hold their matrices.
    parts["w"] = (Part("w", (192, 40), dtype=dtype, transpose=True),)
    merged, _ = merge(source, tmp_path / "transposed", parts, {"w": kinds["dora"][0]})
    assert torch.equal(merged["w"], rounded(by_rows.T, dtype))


def test_experts_of_a_fused_tensor_have_factors_in_one(tmp_path: Path) -> None:
    # PEFT's ParamWrapper: lora_A is (r * experts, in), expert by expert; lora_B (out, r * experts), rank by rank.
    experts, r, out, inner = 3, 2, 20, 33
    file, source = tmp_path / "adapter.safetensors", tmp_path / "source.safetensors"
    a, b, weight = random(r * experts, inner), random(out, r * experts), random(experts, out, inner).bfloat16()
    save_file({"a": a, "b": b}, file)
    save_file({"w": weight, "v": weight.transpose(1, 2).contiguous()}, source)
    product = np.einsum("ore,eri->eoi", f64(b).reshape(out, r, experts), f64(a).reshape(experts, r, inner))
    left = [View(Stored(file, "b"), (r * experts, experts), expert) for expert in range(experts)]
    right = [View(Stored(file, "a"), (inner, 1), expert * r * inner) for expert in range(experts)]
    flipped = [View(view.tensor, (view.strides[1], view.strides[0]), view.offset) for view in (*left, *right)]
    changes: dict[str, AnyChange] = {
        "w": Change(tuple(LowRank(left[e], right[e], r, 0.5, (e * out, (e + 1) * out)) for e in (0, 2))),
        "v": Change(
            tuple(LowRank(flipped[experts + e], flipped[e], r, 0.5, (e * inner, (e + 1) * inner)) for e in (0, 2))
        ),
    }
    expected = f64(weight) + 0.5 * product * np.array([1, 0, 1])[:, None, None]
    kept = {name: (Part(name, tuple(t.shape)),) for name, t in (("w", weight), ("v", weight.transpose(1, 2)))}
    merged, written = merge(source, tmp_path / "kept", kept, changes)
    assert torch.equal(merged["w"], rounded(expected, "bfloat16"))
    assert torch.equal(merged["v"], rounded(expected.transpose(0, 2, 1).copy(), "bfloat16"))
    assert written.changes["w"] == pytest.approx(written.changes["v"])
    # Cut into experts and packed from the f32 sum, from either way round.
    packing = Packing(blocksize=32, double_quant=False)
    for transpose, name in ((False, "w"), (True, "v")):
        cut = tuple(Part(f"{e}", (out, inner), packing, matrix=e, transpose=transpose) for e in range(experts))
        other = "v" if name == "w" else "w"
        made, written = merge(source, tmp_path / name, {name: cut, other: kept[other]}, changes)
        for e in range(experts):
            total = rounded(expected[e], "float32")
            codes, absmax = _core.quantize_nf4(total.numpy().tobytes(), "float32", 32)
            assert made[f"{e}"].numpy().tobytes() == codes
            assert made[f"{e}.absmax"].numpy().tobytes() == absmax
            state = json.loads(made[f"{e}.quant_state.bitsandbytes__nf4"].numpy().tobytes())
            assert (state["dtype"], state["shape"]) == ("bfloat16", [out, inner])
        error = np.linalg.norm(f64(total) - unpacked(tmp_path / name / "model.safetensors", "2"))
        assert written.errors["2"][0] == pytest.approx(error / np.linalg.norm(expected[2]), rel=1e-4)


def test_best_mode_packs_the_sum_too(adapter: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.safetensors"
    save_file({"w": random(40, 192)}, source)
    parts = {"w": (Part("w", (40, 192), Packing()),)}
    change = {"w": Change(terms(adapter), Stored(adapter, "m"))}
    errors = {mode: merge(source, tmp_path / mode, parts, change, mode=mode)[1].errors for mode in ("exact", "best")}
    assert 0 < errors["best"]["w"][0] < errors["exact"]["w"][0] < 0.12
    assert errors["best"]["w"][1] == pytest.approx(np.linalg.norm(f64(load_file(adapter)["m"])), rel=1e-6)


def test_encoded_sources_are_changed_as_what_they_decode_to(adapter: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.safetensors"
    codes = random(40, 192).mul(20).to(torch.float8_e4m3fn)
    scales = random(2, 2).abs() + 0.1
    save_file({"w": codes, "s": scales}, source)
    grid = (32, 128)
    decoded = _core.decode_fp8(
        codes.view(torch.uint8).numpy().tobytes(), scales.numpy().tobytes(), "F32", (40, 192), grid
    )
    weight = torch.frombuffer(bytearray(decoded), dtype=torch.bfloat16).reshape(40, 192)
    parts = {"w": (Part("w", (40, 192)),)}
    merged, _ = merge(source, tmp_path / "merged", parts, {"w": Change(terms(adapter))}, scale="s", block=grid)
    assert torch.equal(merged["w"], rounded(f64(weight) + delta(adapter), "bfloat16"))


def test_a_weight_that_was_tied_gets_its_own_and_missing_ones_are_added(adapter: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.safetensors"
    embedding = random(40, 192).bfloat16()
    save_file({"embedding": embedding}, source)
    parts = {name: (Part(name, (40, 192), dtype="bfloat16"),) for name in ("embedding", "head")}
    parts |= {"bias": (Part("bias", (40,), dtype="bfloat16"),)}
    changes: dict[str, AnyChange] = {
        "head": Change(terms(adapter), of="embedding"),
        "bias": Replace(Stored(adapter, "bias")),
    }
    merged, written = merge(source, tmp_path / "merged", parts, changes)
    assert torch.equal(merged["embedding"], embedding)
    assert torch.equal(merged["head"], rounded(f64(embedding) + delta(adapter), "bfloat16"))
    assert torch.equal(merged["bias"], load_file(adapter)["bias"].bfloat16())
    assert written.changes.keys() == {"head"}


PROGRAM = """
import sys
from pathlib import Path
from qpack import _core
from qpack.adapters.changes import Change, LowRank, Stored, View
from qpack.policy.plan import Part, Recipe
here, out, dtype, threads = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
out.mkdir()
left, right = (Stored(here / "adapter.safetensors", name) for name in "BA")
term = LowRank(View(left, (24, 1)), View(right, (1153, 1)), 24, 0.7)
recipes = [Recipe("w", (Part("w", (1000, 1153), dtype=dtype),))]
options = dict(mode="exact", quant_storage="uint8", inputs="", max_shard_bytes=1 << 40)
written = _core.merge([here / "model.safetensors"], out, recipes, {"w": Change((term,))}, threads=threads, **options)
print(_core.ISA, written.fingerprint, written.changes)
"""


def test_bytes_and_norms_are_the_same_on_every_instruction_set_and_any_number_of_threads(tmp_path: Path) -> None:
    # Rows that are no whole blocks and no whole strips; several chunks.
    pack({"w": random(1000, 1153).half()}, tmp_path)
    save_file({"A": random(24, 1153), "B": random(1000, 24) * 0.1}, tmp_path / "adapter.safetensors")
    for dtype in KEPT_BITS:
        found = {}
        for isa, threads in (("portable", 1), ("avx2", 1), ("avx512", 1), ("avx512", 3)):
            command: list[Any] = [
                sys.executable,
                "-c",
                PROGRAM,
                tmp_path,
                tmp_path / f"{dtype}-{isa}-{threads}",
                dtype,
                f"{threads}",
            ]
            done = subprocess.run(
                command, env=os.environ | {"QPACK_ISA": isa}, capture_output=True, text=True, check=True
            )
            found[isa, threads] = done.stdout.split(maxsplit=1)[1]
        assert len(set(found.values())) == 1, found


def test_changes_that_do_not_fit_are_refused_before_anything_is_written(adapter: Path, tmp_path: Path) -> None:
    pack({"w": random(40, 192).bfloat16(), "n": random(7).bfloat16()}, tmp_path)
    source, out = tmp_path / "model.safetensors", tmp_path / "out"
    w, n = Part("w", (40, 192), dtype="bfloat16"), Part("n", (7,))
    first, second = terms(adapter)
    right = matrix(adapter, "A", 192)

    def low_rank(**fields: Any) -> Change:
        given: dict[str, Any] = {"left": first.left, "right": right, "r": 3, "scale": 1.0}
        return Change((LowRank(**(given | fields)),))

    def stored(name: str) -> Stored:
        return Stored(adapter, name)

    refused: list[tuple[dict[str, AnyChange], str]] = [
        ({"x": low_rank()}, "x is changed, and in no recipe"),
        ({"w": low_rank(right=matrix(adapter, "nothing", 192))}, "no tensor nothing"),
        ({"w": low_rank(right=matrix(adapter, "A", 193))}, r"tensor A: of shape \[3, 192\] does not hold a matrix"),
        ({"w": low_rank(r=4)}, "does not hold a matrix of 40 x 4"),
        ({"w": low_rank(r=0)}, "has rank 0"),
        ({"w": low_rank(scale=float("inf"))}, "scale inf"),
        ({"w": low_rank(rows=(20, 41))}, "changes rows 20 to 41 of w, which has 40"),
        ({"w": Change((first,), stored("m_columns"))}, r"has 192 magnitudes for w of shape \[40, 192\]"),
        ({"w": ReplaceRows(stored("rows"), (1,))}, r"has shape \[2, 192\], expected \[1, 192\]"),
        ({"w": ReplaceRows(stored("rows"), (1, 1))}, r"replaces rows \[1, 1\] of w"),
        ({"w": ReplaceRows(stored("rows"), (1, 40))}, "of w, which has 40"),
        ({"n": Replace(stored("whole"))}, "tensor whole: row 7 of matrix 0 is in no part"),
        ({"w": Change((first, second), of="n")}, "is there, and is to be made of n"),
    ]
    for changes, message in refused:
        with pytest.raises(CheckpointError, match=message):
            merge(source, out, {"w": (w,), "n": (n,)}, changes)
    with pytest.raises(CheckpointError, match="is packed, and w no float of all of it"):
        merge(source, out, {"w": (Part("w", (40, 192), Packing()),), "n": (n,)}, {"w": Change((first,))})
    assert not list(out.iterdir())
    # What only the values tell: a norm of zero.
    save_file({"w": torch.zeros(40, 192)}, tmp_path / "zero.safetensors")
    save_file(load_file(adapter) | {"B": torch.zeros(40, 3)}, adapter)
    with pytest.raises(CheckpointError, match="row 0 of w has norm 0, which no magnitude can scale"):
        merge(tmp_path / "zero.safetensors", out, {"w": (w,)}, {"w": Change((first,), stored("m"))})
