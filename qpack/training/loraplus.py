"""LoRA+: the B matrices learn faster than the A matrices.

With one rate for both, A moves the features of a wide model as it should and B hardly at all; B's rate is therefore a
multiple of A's. Hayou et al., arXiv 2402.12354. What is neither (DoRA's magnitudes, whole modules) keeps A's rate.
"""

import torch
from torch import nn


def raise_rate_of_b(optimizer: torch.optim.Optimizer, model: nn.Module, ratio: float) -> None:
    """Put the B matrices of ``optimizer`` into groups of their own, whose rate is ``ratio`` times that of the others.

    A schedule multiplies the rate of each group, so the ratio holds for the whole run.
    """
    chosen = {id(parameter) for name, parameter in model.named_parameters() if ".lora_B." in name}
    for group in list(optimizer.param_groups):
        of_b = [parameter for parameter in group["params"] if id(parameter) in chosen]
        if of_b:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
            optimizer.add_param_group({**group, "params": of_b, "lr": ratio * group["lr"]})
