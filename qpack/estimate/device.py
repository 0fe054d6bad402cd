"""Where training runs, and how much memory is free there."""

from dataclasses import dataclass
from pathlib import Path

from qpack.estimate.need import ALLOWANCE

_LIBRARIES = 900 * 10**6
"""What a process holds when torch, transformers, bitsandbytes and PEFT are imported: not derived, as seen on Linux."""

_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""Bytes that the processes of a control group (version 2) may take together, or ``max``."""


@dataclass(frozen=True, slots=True)
class Device:
    """Where training runs."""

    name: str
    """As it is called in a report."""
    kind: str
    """``cuda`` or ``cpu``."""
    bytes: int
    """Of its memory."""
    value_bytes: int = 2
    """Of a value in the dtype of the computation."""

    @property
    def allowance(self) -> int:
        """What is taken before there is a model."""
        return ALLOWANCE if self.kind == "cuda" else _LIBRARIES

    @classmethod
    def gpu(cls, size: int) -> "Device":
        """Return a GPU of ``size`` bytes that computes in 16 bits."""
        return cls("a GPU of that size", "cuda", size)

    @classmethod
    def here(cls) -> "Device":
        """The device that `qpack.train` takes on this machine, with the memory that it has free now."""
        import torch

        from qpack.training.compute import choose_compute

        compute = choose_compute()
        if compute.device == "cuda":
            return cls(torch.cuda.get_device_name(), "cuda", torch.cuda.mem_get_info()[0], compute.dtype.itemsize)
        return cls("memory free on this machine", "cpu", free_memory() + resident_memory(), compute.dtype.itemsize)


def resident_memory() -> int:
    """Bytes that this process has now, which a run in it goes on with."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def free_memory() -> int:
    """Bytes that a process can take without swapping, at most what its control group may take."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    limit = _LIMIT.read_text(encoding="ascii").strip() if _LIMIT.is_file() else "max"
    return sizes["MemAvailable"] if limit == "max" else min(sizes["MemAvailable"], int(limit))
