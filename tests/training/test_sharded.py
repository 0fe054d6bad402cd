"""A base spread over two processes: half of it in each, read by each alone, and it computes what it computes whole."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from moe import write_source
from processes import run_together
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import core_model_loading
from transformers.distributed.sharding_utils import DtensorShardOperation

import qpack
from qpack.loading.model import load
from qpack.training.distributed import Processes

IDS = [[5, 6, 7, 8], [9, 10, 11, 12]]


def sharded(base: Path) -> dict[str, Any]:
    """Load a half, and return how many elements it reads, how many bytes it holds, and what it computes."""
    read: Counter[str] = Counter()

    def counted(kind: str, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = function(*args, **kwargs)
            read[kind] += tensor.numel()
            return tensor

        return call

    # These two are where transformers' loader takes bytes out of the mapped file.
    places: Any = DtensorShardOperation, core_model_loading
    places[0].shard_tensor = counted("parts", places[0].shard_tensor)
    places[1]._materialize_copy = counted("whole", places[1]._materialize_copy)
    with Processes.launched().joined():
        model = load(base, dtype=torch.float32, device_map={"": "cpu"}, sharded=True)
        held = sum(parameter.to_local().nbytes for parameter in model.parameters() if isinstance(parameter, DTensor))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(IDS)).logits.tolist()
        after = sum(parameter.to_local().nbytes for parameter in model.parameters() if isinstance(parameter, DTensor))
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        whole_ones = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    return {"read": read, "held": held, "after": after, "logits": logits, "shapes": shapes, "whole": whole_ones}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixtral")
    qpack.convert(write_source("mixtral", directory / "source"), directory / "packed")
    return directory / "packed"


@pytest.fixture(scope="module")
def floats(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codes in bfloat16, and scales that are not quantized themselves."""
    directory = tmp_path_factory.mktemp("floats") / "packed"
    qpack.convert(llama, directory, quant_storage="bfloat16", double_quant=False)
    return directory


@pytest.mark.parametrize("name", ["base", "floats", "mixtral"])
def test_each_process_reads_and_holds_its_half(name: str, request: pytest.FixtureRequest) -> None:
    base: Path = request.getfixturevalue(name)
    model = load(base, dtype=torch.float32, device_map={"": "cpu"})
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(IDS)).logits
    weights = sum(parameter.nbytes for parameter in model.parameters())
    halves = run_together(sharded, base)
    assert sum(half["held"] for half in halves) == weights
    for half in halves:
        assert half["whole"] == []
        assert half["held"] == half["after"] == pytest.approx(weights / 2, rel=0.01)
        assert half["shapes"] == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        # Float32; with another number of threads a product sums in another order.
        torch.testing.assert_close(torch.tensor(half["logits"]), logits, rtol=1e-4, atol=1e-4)
    # Every element of the weights is read by one of the two, and by no more; the scales by both.
    assert sum(half["read"]["parts"] for half in halves) == sum(parameter.numel() for parameter in model.parameters())
    scales = sum(tensor.numel() for name, tensor in tensors(base).items() if ".weight." in name)
    assert [half["read"]["whole"] for half in halves] == [scales, scales]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in checkpoint.glob("*.safetensors") for name, tensor in load_file(path).items()}
