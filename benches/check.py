"""How far a merged model is from its base and adapter beside it: `qpack merge --check` on SmolLM2-135M, by dtype.

    python -m benches.check [--model DIR]

Packs the demo's model, and merges adapters of rank 16 with random factors, which change weights by 0.3 and by 5 % of
their norm, onto the packed base and onto the original, and to NF4. Beside the mean is what rounding alone
does. The texts are those of benches/quality.py. Exit status 1 if what is merged onto the packed base in float16 or
float32 diverges by more than 1e-4.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import qpack
from benches.quality import read_texts
from qpack.demo.model import write_model
from qpack.merging.check import LIMIT

R, SIZE = 16, 0.05

WAYS: dict[str, dict[str, Any]] = {
    "packed, bfloat16": {},
    "packed, float16": {"dtype": "float16"},
    "packed, float32": {"dtype": "float32"},
    "original, bfloat16": {"original": True},
    "original, nf4": {"original": True, "to": "nf4"},
}


def write_adapter(directory: Path, base: Path, alpha: int) -> Path:
    """Random factors for every linear layer but the output embedding."""
    config = LoraConfig(r=R, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * SIZE
    model.save_pretrained(str(directory))
    return directory


def main() -> int:
    """Print a table, a line for each way to merge."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, help="a 16-bit model [default: SmolLM2-135M-Instruct]")
    arguments = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch)
        source = arguments.model or here / "model"
        if arguments.model is None:
            write_model(source, None)
        qpack.convert(source, here / "base")
        texts = {}
        for kind, content in read_texts().items():
            texts[kind] = here / f"{kind}.txt"
            texts[kind].write_text(content, encoding="utf-8")
        print(f"| onto, as | change | KL | rounding | {' | '.join(f'KL {kind}' for kind in texts)} |")
        print("|---|---|---|---|" + "---|" * len(texts))
        for alpha in (1, 16):
            adapter = write_adapter(here / f"adapter-{alpha}", source, alpha)
            for way, options in WAYS.items():
                given = options | {"original": source if "original" in options else None, "max_kl": float("inf")}
                found, rounding = [], []
                for text in texts.values():
                    report = qpack.merge(here / "base", adapter, here / "merged", check=text, force=True, **given)
                    assert report.check is not None
                    found.append(report.check.kl)
                    rounding.append(report.check.rounding or 0.0)
                change = fmean(effect.change / effect.weight for effect in report.effects.values())
                cells = [f"{kl:.2g}" for kl in (fmean(found), fmean(rounding), *found)]
                print(f"| {way} | {100 * change:.1f} % | {' | '.join(cells)} |", flush=True)
                failed |= way in ("packed, float16", "packed, float32") and max(found) > LIMIT
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
