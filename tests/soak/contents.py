"""Adapters whose greedy answers are known, each in as many versions as are asked for.

A version is another one as soon as a byte differs. Rows of A times powers of two and columns of B divided by them are
other bytes, and to the last bit the same products: so versions can come for ever without one being trained.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from taught import PROMPTS


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """What an adapter computes, and so answers to each of `taught.PROMPTS`."""

    answers: Mapping[str, str]
    config: bytes
    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def read(cls, adapter: Path, answers: Sequence[str]) -> "Content":
        """Read an adapter that was taught ``answers``."""
        return cls(
            dict(zip(PROMPTS, answers, strict=True)),
            (adapter / "adapter_config.json").read_bytes(),
            load_file(adapter / "adapter_model.safetensors"),
        )

    def version(self, number: int) -> dict[str, bytes]:
        """The files of one version; ``number`` may be up to 4 to the power of the rank."""
        a = next(name for name in sorted(self.tensors) if name.endswith(".lora_A.weight"))
        b = a.replace(".lora_A.", ".lora_B.")
        r = json.loads(self.config)["r"]
        powers = torch.tensor([2.0 ** (number >> 2 * row & 3) for row in range(r)])  # (r,)
        tensors = {**self.tensors, a: powers[:, None] * self.tensors[a], b: self.tensors[b] / powers}
        return {"adapter_config.json": self.config, "adapter_model.safetensors": save(tensors)}
