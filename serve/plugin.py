"""The entry point ``vllm.general_plugins``: what vLLM must be told in every process that it starts.

vLLM logs and skips a plugin that it cannot import, so this module imports nothing that could fail; an error raised by
`register` itself stops the process.
"""


def register() -> None:
    """Correct vLLM where a client would get a wrong answer. Safe to call more than once."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from serve import lora_cpu

        lora_cpu.install()
