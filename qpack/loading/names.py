"""What a checkpoint and the model loaded from it call the same module, by transformers' own table of conversions.

Most families agree. Mixtral's ``block_sparse_moe`` is ``mlp`` in transformers 5, for one.
"""

from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key


class Names:
    """Translates the names of modules and tensors of one model, both ways."""

    def __init__(self, model: Any) -> None:
        """Take the renamings of ``model``, a transformers model."""
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        self._forth: list[Any] = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._back = [renaming.reverse_transform() for renaming in reversed(self._forth)]

    def in_model(self, name: str) -> str:
        """Translate a name of the checkpoint."""
        return rename_source_key(name, self._forth, [])[0]

    def in_checkpoint(self, name: str) -> str:
        """Translate a name of the model."""
        return rename_source_key(name, self._back, [])[0]
