"""Whether sequences in one row of a batch see each other: tried on the model, not told from its name.

Transformers separates them by position ids that begin anew, in the masks of its attention. What has no such mask mixes
them without a word: a convolution, a recurrent state, attention that takes no position ids, or any while the model
keeps a cache. So two sequences are run in one row, then another and the second of them, and what the model makes of the
second is compared::

    leak = |second after first - second after other| / |the same where no border is told|

The shapes are the same each time, and so is the rounding: of Llama, Mistral, Gemma 3, Qwen 3, GPT-2 and Mixtral the
leak is 0, of Mamba, Bloom and OPT 1, of Falcon H1, which has attention and a state, 0.07.
"""

import inspect
from typing import Any

import torch
from peft import PeftModel

from qpack.errors import TrainingError

LENGTHS = (40, 24)
TOLERANCE = 0.01
"""For experts: how many tokens one gets together can change the order of its sums."""


def require_isolation(model: PeftModel) -> None:
    """Refuse a model that cannot tell sequences in one row apart. It is left as it was, and so are random numbers.

    Raises:
        TrainingError: naming its class.
    """
    base = model.get_base_model()
    takes_positions = "position_ids" in inspect.signature(base.forward).parameters
    if not takes_positions or not _leak(model) <= TOLERANCE:
        kind = type(base).__name__
        raise TrainingError(f"packing: {kind} lets sequences that share a row see each other; train without packing")


@torch.no_grad()
def _leak(model: Any) -> float:
    first, second = LENGTHS
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (2, first + second), generator=torch.Generator().manual_seed(0))
    ids[1, first:] = ids[0, first:]

    def difference(positions: torch.Tensor) -> float:
        rows = [model(input_ids=row[None].to(model.device), position_ids=positions.to(model.device)) for row in ids]
        one, other = (row.logits[0, first:].float() for row in rows)  # (second, vocabulary)
        return float((one - other).norm())

    training = model.training
    model.eval()
    told = difference(torch.cat((torch.arange(first), torch.arange(second)))[None])
    untold = difference(torch.arange(first + second)[None])
    model.train(training)
    return told / untold
