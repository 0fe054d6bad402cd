"""A version's way into vLLM's engine and out, while every stream goes on.

vLLM's ``add_lora`` reads the files between two steps of the engine: nothing is generated until the disk has answered.
Here a thread of the engine process reads and converts them, while the engine steps; when it is done, a call that takes
well under a millisecond puts the result among the adapters that the engine knows. Slots are not touched: the step that
first needs the version copies it into one.

Two halves talk through vLLM's ``collective_rpc``:

- `AdapterWorker` is mixed into vLLM's worker (``--worker-extension-cls``), in each process that holds weights;
- `EngineAdapters` asks for it in the API process, and tells vLLM's routes which names they may serve.
"""

import asyncio
import itertools
import threading
import time
from pathlib import Path
from typing import Any, Final

from prometheus_client import Histogram

from qpack.errors import ServeError

_READING: Final = "reading"
_LOADED: Final = "loaded"

HELD = Histogram(
    "qpack_adapter_engine_seconds",
    "Time that the engine spent on a load between its steps, and no stream got a token.",
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1),
)

# How often a load is asked for: each time costs the engine some 0.1 ms between two steps.
_POLL_SECONDS = 0.01


class AdapterWorker:
    """What vLLM's worker can do besides. No constructor: vLLM adds this class to the bases of its own."""

    model_runner: Any
    _qpack_read: "_Read"

    def start_adapter(self, name: str, number: int, path: str) -> None:
        """Begin to read a version in a thread, one at a time; `finish_adapter` tells when it is done."""
        from vllm.lora.request import LoRARequest

        began = time.perf_counter()
        self._qpack_read = read = _Read(self.model_runner.lora_manager, LoRARequest(name, number, path))
        read.start()
        read.held = time.perf_counter() - began

    def finish_adapter(self) -> tuple[str, float]:
        """Return ``reading``, or ``loaded`` if the engine knows the version from now on, or why it cannot be read.

        Beside it, the seconds that this load has kept the engine from its next step so far.
        """
        began = time.perf_counter()
        read = self._qpack_read
        if read.lora is not None:
            self.model_runner.lora_manager._adapter_manager.add_adapter(read.lora)
            read.lora, read.state = None, _LOADED
        read.held += time.perf_counter() - began
        return read.state, read.held


class _Read(threading.Thread):
    """Read an adapter and pack it as the layers want it: all of vLLM's ``add_adapter`` but the entry in its table."""

    def __init__(self, manager: Any, request: Any) -> None:
        super().__init__(name=f"qpack-read-{request.lora_name}", daemon=True)
        self._manager = manager
        self._request = request
        self.state = _READING
        self.lora: Any = None
        self.held = 0.0

    def run(self) -> None:
        try:
            lora = self._manager._load_adapter(self._request)
            # Packing is done again when the adapter is added, and then finds nothing to do.
            self._manager._adapter_manager._create_merged_loras_inplace(lora)
            self.lora = lora
        except Exception as error:
            self.state = f"{type(error).__name__}: {' '.join(str(error).split())}"


class EngineAdapters:
    """vLLM's engine as it is seen from the API process, for `serve.residency`."""

    def __init__(self, engine_client: Any, models: Any) -> None:
        """Take vLLM's ``EngineClient`` and its ``OpenAIServingModels``."""
        self._engine = engine_client
        self._models = models
        self._numbers = itertools.count(1)
        # Never two numbers for a name: the worker takes requests of one name for one adapter and would miss the other.
        self._number: dict[str, int] = {}

    async def load(self, name: str, path: Path) -> None:
        """Read the version at ``path`` into the engine's memory; from then on requests may name it. One at a time.

        Raises:
            ServeError: if vLLM cannot read it. The engine is as it was.
        """
        from vllm.lora.request import LoRARequest

        number = self._number.setdefault(name, next(self._numbers))
        await self._engine.collective_rpc("start_adapter", args=(name, number, str(path)))
        while _READING in (states := await self._finish()):
            await asyncio.sleep(_POLL_SECONDS)
        if failures := [state for state in states if state != _LOADED]:
            await self._engine.remove_lora(number)
            raise ServeError(f"adapter {name}: the engine cannot read it: {failures[0]}")
        self._models.lora_requests[name] = LoRARequest(name, number, str(path))

    async def _finish(self) -> list[str]:
        """What each worker says of the load."""
        answers = await self._engine.collective_rpc("finish_adapter")
        states = [state for state, _ in answers]
        if _READING not in states:
            HELD.observe(max(held for _, held in answers))
        return states

    async def unload(self, name: str) -> None:
        """Take a version out of the engine. No request may be running on it."""
        del self._models.lora_requests[name]
        await self._engine.remove_lora(self._number[name])
