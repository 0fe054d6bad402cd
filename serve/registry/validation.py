"""Running `serve.registry.checks` in a process that may neither take long nor grow large."""

import json
import signal
import subprocess
import sys
from dataclasses import asdict
from math import ceil
from pathlib import Path

from qpack.sizes import format_size
from serve.registry.checks import Checked, Order
from serve.registry.errors import RegistryError
from serve.registry.limits import Limits

_LONGEST = 2000
"""Characters of a reason, which may quote what an adapter's files hold."""

# How a process ends that the system gives no more memory: Rust aborts; the system's last resort kills.
_OUT_OF_MEMORY = (-signal.SIGABRT, -signal.SIGKILL, -signal.SIGSEGV)


def validate(adapter: Path, base: Path, fingerprint: str, limits: Limits, *, shown: Path) -> Checked:
    """Check the adapter in the directory ``adapter``, and call it ``shown`` in what is wrong with it.

    Raises:
        RegistryError: with the reason; of status 413 if the limits were not enough to tell.
    """
    order = Order(
        adapter=str(adapter),
        base=str(base),
        fingerprint=fingerprint,
        max_rank=limits.max_rank,
        seconds=ceil(limits.seconds),
        memory=limits.memory,
        any_base=limits.any_base,
    )
    command = [sys.executable, "-P", "-c", "from serve.registry.checks import main; main()"]
    try:
        done = subprocess.run(
            command, input=json.dumps(asdict(order)), capture_output=True, text=True, timeout=limits.seconds
        )
    except subprocess.TimeoutExpired:
        raise _took_too_long(shown, limits) from None
    if done.returncode == -signal.SIGXCPU:
        raise _took_too_long(shown, limits)
    if done.returncode in _OUT_OF_MEMORY:
        raise RegistryError(f"{shown}: needs more than {format_size(limits.memory)} of memory to check", 413)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RegistryError(_one_line(f"{shown}: cannot be read as an adapter ({last})"))
    answer = json.loads(done.stdout)
    if "reason" in answer:
        raise RegistryError(
            _one_line(answer["reason"].replace(str(adapter), str(shown))), answer["status"], answer["kind"]
        )
    return Checked(**answer)


def _took_too_long(shown: Path, limits: Limits) -> RegistryError:
    return RegistryError(f"{shown}: takes more than {limits.seconds:g} s to check", 413)


def _one_line(text: str) -> str:
    """What an adapter's files say must not look like lines of a log."""
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
