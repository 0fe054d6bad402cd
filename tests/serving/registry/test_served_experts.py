"""Adapters of routed experts: all of a layer in one rank a projection, or none."""

from pathlib import Path

import factors
import pytest
from moe import write_source

import qpack
from serve.registry import Registry, RegistryError

W1 = "base_model.model.model.layers.0.block_sparse_moe.experts.1.w1"


def test_experts_are_taken_by_layers(tmp_path: Path) -> None:
    base = tmp_path / "base"
    qpack.convert(write_source("mixtral", tmp_path / "source"), base)
    layer = {
        name: value for name, value in factors.draw(base, modules=("w1", "w2", "w3")).items() if ".0.block" in name
    }
    with Registry.open(tmp_path / "registry", base=base) as registry:
        assert registry.add("all", factors.write(tmp_path / "all", layer), by="me").rank == 4

        fewer = {name: value for name, value in layer.items() if not name.startswith(W1)}
        with pytest.raises(
            RegistryError, match=r"but not model\.layers\.0\.block_sparse_moe\.experts\.1\.w1; an engine"
        ):
            registry.add("fewer", factors.write(tmp_path / "fewer", fewer), by="me")

        halves = {f"{W1}.lora_A.weight": layer[f"{W1}.lora_A.weight"][:2].clone()}
        halves[f"{W1}.lora_B.weight"] = layer[f"{W1}.lora_B.weight"][:, :2].clone()
        mixed = factors.write(tmp_path / "mixed", layer | halves, rank_pattern={r"experts\.1\.w1": 2})
        with pytest.raises(RegistryError, match=r"experts\.1\.w1 has rank 2, expected 4 as of the layer's others"):
            registry.add("mixed", mixed, by="me")
