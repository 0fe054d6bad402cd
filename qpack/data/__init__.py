"""Training data: from files of any common kind to tokens and labels.

One way through it, each step a module::

    sources    what a DATA argument names: a file, a directory, a data set of the hub; its weight
    files      JSONL, JSON, CSV, Parquet, text            -> records, each with its FILE:LINE
    formats    messages, alpaca, chosen/rejected, ...     -> rows: Conversation, Document, Comparison
    reading    all of it, checked                         -> Rows
    encoding   chat template, tokens, labels              -> Dataset of Examples or Preferences
    packing    lengths                                    -> sequences that share one forward pass

Importing this package loads neither torch nor transformers; :func:`encode` works with the tokenizer it is given.
"""

from qpack.data.encoding import Dataset, encode, encode_preferences
from qpack.data.examples import IGNORED, Example, Examples, Preference
from qpack.data.options import FORMATS, LOSSES, ON_BAD_ROW, DataOptions
from qpack.data.packing import pack
from qpack.data.reading import read, read_preferences
from qpack.data.rows import BadRow, Comparison, Conversation, Document, Rows

__all__ = [
    "FORMATS",
    "IGNORED",
    "LOSSES",
    "ON_BAD_ROW",
    "BadRow",
    "Comparison",
    "Conversation",
    "DataOptions",
    "Dataset",
    "Document",
    "Example",
    "Examples",
    "Preference",
    "Rows",
    "encode",
    "encode_preferences",
    "pack",
    "read",
    "read_preferences",
]
