"""What a server takes of the machine, and what it leaves behind: memory, threads, descriptors, shared files."""

import re
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import psutil

_SHARED = re.compile(r"/dev/shm/[^/\n]+")


@dataclass(frozen=True, slots=True)
class Footprint:
    """Of one process at one moment."""

    anonymous: int
    """Bytes of memory that are no file's (RssAnon)."""
    threads: int
    descriptors: int


def processes(parent: int) -> dict[str, psutil.Process]:
    """The server's processes by what they are: the parent, vLLM's API server, its engine, and its workers."""
    first = psutil.Process(parent)
    found = {"parent": first}
    for child in first.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if child.name().startswith("VLLM::"):
                found[child.name().removeprefix("VLLM::")] = child
            elif "serve.child" in child.cmdline():
                found["API server"] = child
    return found


def footprint(process: psutil.Process) -> Footprint:
    """Look at a process."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    kilobytes = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    assert kilobytes is not None
    return Footprint(int(kilobytes[1]) << 10, process.num_threads(), process.num_fds())


def shared_files(parent: int) -> set[Path]:
    """The files and directories in /dev/shm that the server's processes have mapped or open."""
    found: set[str] = set()
    first = psutil.Process(parent)
    for process in (first, *first.children(recursive=True)):
        proc = Path(f"/proc/{process.pid}")
        with suppress(OSError):
            found.update(_SHARED.findall((proc / "maps").read_text()))
            for descriptor in (proc / "fd").iterdir():
                with suppress(OSError):
                    found.update(_SHARED.findall(str(descriptor.readlink())))
    return {Path(name) for name in found if not name.endswith(" (deleted)")}


def growth(times: Sequence[float], values: Sequence[float]) -> float:
    """How much ``values`` have grown from the first time to the last, by the median of all slopes (Theil and Sen).

    Spikes, and steps that are taken back, change it little.
    """
    slopes = [(values[j] - values[i]) / (times[j] - times[i]) for i, j in combinations(range(len(times)), 2)]
    return statistics.median(slopes) * (times[-1] - times[0])
