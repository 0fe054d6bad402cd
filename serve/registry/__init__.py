"""Adapters on disk: versions that never change, the names that point at them, and the checks that come before both.

Importing it loads neither torch nor vLLM. `Registry` is the way in, `Limits` what an adapter may take.
"""

from serve.registry.errors import RegistryError
from serve.registry.limits import Limits
from serve.registry.registry import Registry
from serve.registry.version import Alias, Version

__all__ = ["Alias", "Limits", "Registry", "RegistryError", "Version"]
