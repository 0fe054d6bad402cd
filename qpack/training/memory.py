"""How much memory a run has taken at most, as `qpack.estimate` counts it: with what the libraries take.

On a GPU what torch has reserved, on a CPU the most that the process ever had resident.
"""

from pathlib import Path

from qpack.estimate.need import ALLOWANCE

_STATUS = Path("/proc/self/status")


def peak_memory(device: str) -> int:
    """Bytes, so far, on ``cuda`` or ``cpu``."""
    if device == "cuda":
        import torch

        return ALLOWANCE + torch.cuda.max_memory_reserved()
    lines = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines())
    return 1024 * int(lines["VmHWM"].split()[0])
