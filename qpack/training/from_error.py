"""LoRA that begins as the best correction of rank r of what packing has lost, on a base that stays as it is.

::

    E = W - Q                          what the base was packed from, less the packed weight
    s B A = E_r = U_r S_r V_r^T        B = U_r sqrt(S_r / s), A = sqrt(S_r / s) V_r^T, with the scale s of the layer

It is the first step of LoftQ (Li et al., arXiv 2310.08659). LoftQ and PiSSA change the base too, which then serves
this adapter alone; here the base is shared, and the adapter is plain LoRA for whoever loads it. One weight at a time is
in memory. A layer whose weight is not packed, or lost nothing, begins as LoRA does.
"""

import logging
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from qpack.checkpoint import Checkpoint
from qpack.loading.names import Names
from qpack.loading.weights import Original, read_packed
from qpack.training.low_rank import largest_singular

logger = logging.getLogger(__name__)


@torch.no_grad()
def begin_from_error(model: PeftModel, base: Path, source: Path, device: str) -> int:
    """Set the factors of every LoRA layer on a weight that ``base`` has packed from ``source``, and return how many.

    The decompositions are made on ``device``. No random number is drawn.

    Raises:
        CheckpointError: ``source`` is not what the base was packed from.
    """
    packed = Checkpoint.open(base)
    original = Original.open(source, packed)
    whole = model.get_base_model()
    names = Names(whole)
    targets = {
        name: module
        for path, module in whole.named_modules()
        if isinstance(module, LoraLayer) and (name := f"{names.in_checkpoint(path)}.weight") in packed.packed
    }
    logger.info("beginning from the quantization error of %d weights of %s", len(targets), source)
    for name, layer in targets.items():
        error = original.read(name).to(device) - read_packed(packed, name).to(device)
        a, b = (getattr(layer, factor)["default"].weight for factor in ("lora_A", "lora_B"))
        u, s, vt = largest_singular(error, len(a))
        u, s, vt = u[:, s > 0], s[s > 0], vt[s > 0]
        scale = layer.scaling["default"]
        logger.debug("%s: of its error %.4g in rank %d", name, (s.norm() / error.norm()).item(), len(a))
        root = (s / scale).sqrt()
        b[:, : len(s)] = u * root
        a[: len(s)] = root[:, None] * vt
    return len(targets)
