"""`make wheel`: what a user installs, in a clean environment without torch."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def test_the_wheel_packs_a_model_in_a_clean_environment(llama: Path, packed: Path, tmp_path: Path) -> None:
    build: list[str | Path] = [BIN / "maturin", "build", "--release", "--quiet", "--out", tmp_path]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp311-abi3-" in wheel.name
    files = {str(file.relative_to(ROOT)) for file in (ROOT / "serve/page").glob("*.[!p]*") if file.is_file()}
    assert files <= set(zipfile.ZipFile(wheel).namelist()), "the page's"

    clean = tmp_path / "clean"
    subprocess.run([BIN / "uv", "venv", "--quiet", "--python", sys.executable, clean], check=True)
    python = clean / "bin" / "python"
    subprocess.run([BIN / "uv", "pip", "install", "--quiet", "--python", python, wheel], check=True)
    assert subprocess.run([python, "-c", "import torch"], capture_output=True, check=False).returncode == 1

    output = tmp_path / "packed"
    subprocess.run([clean / "bin" / "qpack", "convert", llama, output], cwd=tmp_path, check=True, capture_output=True)
    assert (output / "model.safetensors").read_bytes() == (packed / "model.safetensors").read_bytes()

    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    train: list[str | Path] = [clean / "bin" / "qpack", "train", output, tmp_path / "data.jsonl"]
    train += ["-o", tmp_path / "adapter"]
    done = subprocess.run(train, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        1,
        "error: transformers is not installed: this command needs qpack with the extra cpu or cuda (demo: and demo)\n",
    )
