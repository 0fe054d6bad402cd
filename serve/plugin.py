"""The entry point ``vllm.general_plugins``: what vLLM must be told in every process that it starts.

vLLM logs and skips a plugin that it cannot import, so this module imports nothing that could fail; an error raised by
`register` itself stops the process.
"""

from typing import Any


def register() -> None:
    """Correct vLLM where a client would get a wrong answer, and take the slow out of its CPU path.

    Safe to call more than once.

    Raises:
        RuntimeError: if this vLLM has no place for what is put there. Better no server than wrong answers.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _multiply_adapters(type(current_platform))
        from serve import linear_cpu

        linear_cpu.install()


def _multiply_adapters(platform: Any) -> None:
    """Let vLLM make `serve.punica.Products` where it asks its platform for a class by name.

    By name: importing it here would cost the processes that never make one some seconds.
    """
    theirs, ours = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU", "serve.punica.Products"
    if platform.get_punica_wrapper() not in (theirs, ours):
        raise RuntimeError(f"{platform.__name__}.get_punica_wrapper is not vLLM 0.32's: the LoRA fix does not apply")
    platform.get_punica_wrapper = classmethod(lambda cls: ours)
