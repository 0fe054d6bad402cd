"""The endpoint: one packed base and its LoRA adapters behind vLLM's own OpenAI server.

Nothing here is a fork of vLLM. It is configured through its argument parser, corrected through its plugin entry point
(`serve.plugin`) and fenced in by a middleware (`serve.routes`). Importing `serve` imports neither vLLM nor torch, so
every mistake in the options is reported at once and not after the minute that loading an engine takes.
"""

from serve.config import ServeConfig, collect_adapters
from serve.launch import serve

__all__ = ["ServeConfig", "collect_adapters", "serve"]
