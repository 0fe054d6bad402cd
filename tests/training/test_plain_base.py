"""``--base 16bit``: the same command on a checkpoint that is not packed, and what each kind of base is refused by."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from moe import write_source
from peft import PeftModel
from runs import contents, finish, kill
from transformers import AutoModelForCausalLM

import qpack
from qpack.adapters.record import Base
from qpack.checkpoint import Checkpoint
from qpack.cli.train import train as command
from qpack.errors import CheckpointError, DataError, TrainingError
from qpack.training import TrainSettings, train
from qpack.training.compute import Compute
from qpack.training.model import add_lora, load_base

SETTINGS = TrainSettings(
    base="16bit", r=4, lora_dropout=0.1, lr=1e-2, max_steps=4, batch_size=4, save_steps=2, samples=0
)


@pytest.fixture(scope="module")
def plain(base: Path) -> Path:
    """What ``base`` was packed from."""
    return base.parent / "source"


def test_it_trains_resumes_and_merges(plain: Path, data: Path, tmp_path: Path) -> None:
    finish(plain, data, tmp_path / "whole", SETTINGS)
    kill(plain, data, tmp_path / "resumed", SETTINGS, 3, delay=0)
    assert finish(plain, data, tmp_path / "resumed", SETTINGS) == 2
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")

    record = json.loads((tmp_path / "whole" / "qpack_adapter.json").read_text())
    assert record["base"]["fingerprint"] == Base.of(Checkpoint.open(plain)).fingerprint
    qpack.merge(plain, tmp_path / "whole", tmp_path / "merged", dtype="float32")
    ids = torch.arange(64)[None]
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
        before = stock(ids).logits
        expected = PeftModel.from_pretrained(stock, tmp_path / "whole")(ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (before - expected).abs().max() > 0.1


def test_the_same_command_trains_both_kinds_of_base(base: Path, plain: Path, data: Path, tmp_path: Path) -> None:
    few = ["--max-steps", "1", "--samples", "1", "--modules-to-save", "norm", "-q", "--loraplus-lr-ratio", "2"]
    for directory, kind in ((base, "4bit"), (plain, "16bit")):
        arguments = [str(directory), str(data), "-o", str(tmp_path / kind), "--base", kind, *few]
        assert CliRunner().invoke(command, arguments, catch_exceptions=False).exit_code == 0
        assert json.loads((tmp_path / kind / "qpack_adapter.json").read_text())["settings"]["base"] == kind


def test_each_kind_of_base_names_the_way_for_the_other(base: Path, plain: Path, data: Path, tmp_path: Path) -> None:
    encoded = write_source("gpt_oss", tmp_path / "encoded", "mxfp4")
    for directory, kind, message in (
        (plain, "4bit", "; run `qpack convert` on it, or train it unpacked with --base 16bit"),
        (base, "16bit", "16 or 32 bits, found bitsandbytes; a packed base is trained without --base 16bit"),
        (encoded, "16bit", "encoded: expected weights of 16 or 32 bits, found mxfp4; "),
    ):
        with pytest.raises(CheckpointError, match=message):
            train(directory, data, tmp_path / "adapter", replace(SETTINGS, base=kind))
    assert list(tmp_path.iterdir()) == [encoded]


def test_experts_in_one_tensor_are_not_passed_over(tmp_path: Path) -> None:
    source = write_source("mixtral", tmp_path / "source")
    base = load_base(source, Compute("cpu", torch.float32), plain=True)
    with pytest.raises(TrainingError, match=r"^target_modules: all-linear does not reach experts .*, or pack the base"):
        add_lora(base, SETTINGS)
    model = add_lora(base, replace(SETTINGS, target_modules="q_proj,v_proj"))
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert adapted == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "8bit"}, "base: expected one of 4bit, 16bit, found '8bit'"),
        ({"fsdp": True}, "fsdp: shards packed bases, not base '16bit'"),
        ({"init_from_error": "source"}, "init_from_error: not for base '16bit', which has lost nothing"),
    ],
)
def test_what_a_plain_base_does_not_go_with(change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=f"^{message}$"):
        replace(SETTINGS, **change)  # type: ignore[arg-type]
