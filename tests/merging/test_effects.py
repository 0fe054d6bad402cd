"""The report of a merge: how much each weight was changed, beside the error of quantization."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from lora import tensors, unpacked, write_adapter

import qpack
from qpack.cli import cli
from qpack.merging.effects import Effect


def test_changes_stand_beside_the_errors_of_the_packed_base(llama: Path, packed: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", llama, target_modules=["q_proj", "up_proj"])
    report = qpack.merge(packed, adapter, tmp_path / "merged", dtype="float32")
    merged, base, source = tensors(tmp_path / "merged"), unpacked(packed), tensors(llama)
    assert report.errors_of == "base"
    assert len(report.effects) == 4
    for name, effect in report.effects.items():
        before = base[name].double()
        assert effect.change == pytest.approx((merged[name] - before).norm().item(), rel=1e-5)
        assert effect.weight == pytest.approx(before.norm().item(), rel=1e-6)
        assert effect.error == pytest.approx((before - source[name]).norm().item(), rel=1e-4)
    onto = qpack.merge(packed, adapter, tmp_path / "onto-original", original=llama).effects
    assert {name: effect.error for name, effect in onto.items()} == {
        name: effect.error for name, effect in report.effects.items()
    }


def test_the_report_is_a_table_by_kind_and_json_by_weight(llama: Path, packed: Path, tmp_path: Path) -> None:
    small = write_adapter(tmp_path / "small", llama, target_modules=["q_proj", "up_proj"], lora_alpha=1)
    large = write_adapter(tmp_path / "large", llama, target_modules=["q_proj", "up_proj"], lora_alpha=64)
    shown = CliRunner().invoke(cli, ["merge", "-q", str(packed), str(small), str(tmp_path / "merged")])
    lines = shown.stdout.splitlines()
    warning = "in 4 of 4 weights the packed base and its original differ by more than the adapters change"
    assert f"warning  {warning}" in lines
    kinds = {line.split()[0]: line.split() for line in lines if line.startswith(("q_proj", "up_proj", "in all"))}
    arguments = ["merge", "-q", "--json", str(packed), str(large), str(tmp_path / "strong")]
    report = json.loads(CliRunner().invoke(cli, arguments).stdout)
    assert [kind["name"] for kind in report["kinds"]] == ["q_proj", "up_proj"]
    for kind in report["kinds"]:
        weights = [weight for weight in report["weights"] if weight["kind"] == kind["name"]]
        assert [weight["layer"] for weight in weights] == [0, 1]
        assert kind["change"] ** 2 == pytest.approx(sum(weight["change"] ** 2 for weight in weights))
        assert kind["ratio"] == pytest.approx(kind["change"] / kind["error"])
        # The same factors times 64: the table of the small one says a 64th.
        assert float(kinds[kind["name"]][2]) == pytest.approx(kind["change"] / 64, rel=1e-3)
    assert "warning" not in qpack_merge(packed, large, tmp_path / "again")


def test_an_error_that_nobody_recorded_is_not_known(llama: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", llama, target_modules=["q_proj"])
    shown = qpack_merge(llama, adapter, tmp_path / "merged")
    assert "error   not recorded: the base was not packed by qpack" in shown.splitlines()
    assert qpack.merge(llama, adapter, tmp_path / "merged", force=True).errors_of is None


def test_norms_add_up_as_if_weights_were_one() -> None:
    both = Effect.of_all([Effect(3.0, 6.0, 1.0), Effect(4.0, 8.0, 0.0)])
    assert (both.change, both.weight, both.error, both.ratio) == (5.0, 10.0, 1.0, 5.0)
    assert Effect.of_all([both, Effect(1.0, 1.0, None)]).ratio is None
    assert Effect(1.0, 1.0, 0.0).as_json()["ratio"] is None
    assert Effect(1.0, 1.0, 2.0).is_small
    assert not both.is_small


def qpack_merge(base: Path, adapter: Path, merged: Path) -> str:
    done = CliRunner().invoke(cli, ["merge", "-q", str(base), str(adapter), str(merged)])
    assert done.exit_code == 0, done.stderr
    return done.stdout
