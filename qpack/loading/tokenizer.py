"""Loading the tokenizer of a base directory. Importing this module loads neither torch nor transformers."""

from pathlib import Path
from typing import TYPE_CHECKING

from qpack.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(base: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a base directory.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{base}: no tokenizer that can be loaded: {' '.join(str(error).split())}") from error
    return tokenizer
