"""A base of 65B's shape, packed from the start, trains a step under 48 GB; on a CPU a small one goes the same way."""

import subprocess
import sys
from pathlib import Path

import pytest

import qpack
from benches.train_65b import write_base

ROOT = Path(__file__).parents[2]


def bench(name: str, *arguments: object) -> str:
    """What a benchmark prints; the exit status says whether its goals were met."""
    command = [sys.executable, str(ROOT / "benches" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_base_is_made_packed_and_trained(tmp_path: Path) -> None:
    write_base(tmp_path, layers=2, width=256)
    assert qpack.verify(tmp_path).ok
    assert qpack.inspect(tmp_path).packed_bits == pytest.approx(4.127, rel=0.03)  # and tables, beside small weights
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    last = tmp_path / "model-00002.safetensors"
    content = last.read_bytes()
    last.unlink()
    assert "tokens/s in step 2" in bench("train_65b.py", tmp_path, "--layers", 2, "--width", 256, "--length", 64)
    assert last.read_bytes() == content
    assert all(path.stat().st_mtime_ns == time for path, time in made.items() if path != last)


@pytest.mark.gpu
@pytest.mark.timeout(7200)
def test_65b_trains_a_step_under_48_gb(tmp_path: Path) -> None:
    print(bench("train_65b.py", tmp_path / "base"))


@pytest.mark.gpu
@pytest.mark.timeout(1800)
def test_no_slower_and_no_larger_than_trl_on_a_gpu() -> None:
    print(bench("train_vs_trl.py", "--rounds", 1))
