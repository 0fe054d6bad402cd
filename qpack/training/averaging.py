"""Gradients averaged over processes: DistributedDataParallel around the adapter alone.

The base is left out. It has no gradients, every process has read the same, and with FSDP2 part of it is elsewhere;
accelerate would send a whole one through the network and refuses a split one. So that all processes begin with the same
adapter, that of rank 0 is sent to them.

An expert to which none of a process's tokens went has no gradient there. DDP waits for it for ever unless it is told
to look, which costs a walk over the graph in each pass.
"""

from peft import PeftModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from qpack.loading.experts import has_experts


def average_gradients(model: PeftModel) -> nn.Module:
    """Wrap ``model`` so that its backward pass averages the adapter's gradients over all processes."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    buffers = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*frozen, *buffers])
    return DistributedDataParallel(model, find_unused_parameters=has_experts(model))
