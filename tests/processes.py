"""Several processes that know of each other, as torchrun starts them, forked from one that has imported everything."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

PRELOADED = ["peft", "qpack.loading.sharded", "transformers.trainer", "transformers.models.llama.modeling_llama"]


def run_together(function: Callable[..., Any], *arguments: Any, size: int = 2, on_gpus: bool = False) -> list[Any]:
    """Call ``function`` in ``size`` new processes and return the results by rank; without GPUs they talk over gloo."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    with ProcessPoolExecutor(size, mp_context=context, max_tasks_per_child=1) as pool:
        ranks = [pool.submit(_as_rank, rank, size, port, on_gpus, function, arguments) for rank in range(size)]
        return [rank.result() for rank in ranks]


def _as_rank(
    rank: int, size: int, port: int, on_gpus: bool, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    if not on_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch

    torch.set_num_threads(1)
    return function(*arguments)
