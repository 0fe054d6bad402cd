"""The device to train on, and the dtype in which its processor multiplies fastest.

========================================  ========  ====================================================
processor                                 dtype
========================================  ========  ====================================================
CUDA with native bfloat16                 bfloat16
CUDA without                              float16   with gradient scaling
CPU with AVX512-BF16 or AMX               bfloat16
any other CPU                             float32   it would emulate bfloat16
========================================  ========  ====================================================

Without bf16 instructions a bf16 product is emulated and a training step takes thirty times as long as in float32; with
AVX512-BF16 it takes three quarters (docs/benchmarks.md, `benches/test_train.py`).
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Compute:
    """Where and in which dtype the model runs; LoRA weights are float32 whatever the dtype."""

    device: str
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """The dtype as config.json and the report spell it, without ``torch.``."""
        return str(self.dtype).removeprefix("torch.")


def choose_compute() -> Compute:
    """Return the first CUDA device if there is one, else the CPU, with the dtype of the table above."""
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return Compute("cuda", torch.bfloat16 if native else torch.float16)
    return Compute("cpu", cpu_dtype())


def cpu_dtype() -> torch.dtype:
    """Return the dtype of the table above for this machine's CPU."""
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    # The capability that torch dispatches to: the environment can hold it below what the processor has.
    dispatched = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.bfloat16 if native and dispatched else torch.float32
