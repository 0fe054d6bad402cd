"""Keep bitsandbytes from repacking 4-bit weights on a CPU.

On a CPU with AVX512-BF16 one forward pass outside training makes bitsandbytes repack every weight in place for an
inference kernel that has no gradient, in a layout that no other code reads. Training then goes wrong without an error:
on the tests' model, in float32 and bfloat16 alike, the loss is as before (6.38) and the gradient norm 0.92, not 4.54.
:func:`keep_weights_in_place` turns the repacking off, which gives bit for bit the gradients of a run without that pass.
"""

import bitsandbytes
import torch
from bitsandbytes.nn.modules import Linear4bit

from qpack.errors import TrainingError


def keep_weights_in_place(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking the 4-bit weights in a forward pass outside training.

    Raises:
        TrainingError: this bitsandbytes has no such switch, so that nothing is known about its repacking.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            if not hasattr(layer, "support_avx512bf16_for_cpu"):
                raise TrainingError(
                    f"{name}: bitsandbytes {bitsandbytes.__version__} has no support_avx512bf16_for_cpu to turn off; "
                    "its CPU weight repacking may break training"
                )
            layer.support_avx512bf16_for_cpu = False
