"""vLLM's worker inside the engine's own process, on a CPU.

vLLM 0.32 starts a process for the engine, which schedules, and from it one for the worker, which multiplies; each
imports all of vLLM, which is a third of the time to ready, and each step goes from one to the other and back. One
process does both as well when there is one worker: they never work at the same time. A CPU gets two only because
OpenMP takes threads and cores from the environment of a new process. Both can be set later, before the first product.

The cores are those that vLLM would choose: ``VLLM_CPU_OMP_THREADS_BIND`` says what it says there.
"""

import os

import torch
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.executor.uniproc_executor import UniProcExecutor


class OneProcess(UniProcExecutor):
    """For ``--distributed-executor-backend``."""

    def _init_executor(self) -> None:
        cores = OMPProcessManager(self.vllm_config).cpu_lists
        if cores:  # none where the user wants no binding
            os.sched_setaffinity(0, cores[0])  # of this thread, and so of OpenMP's, which it will start
            torch.set_num_threads(len(cores[0]))
        super()._init_executor()
