"""How much of what packing loses ``--init-from-error`` gives back before the first step.

    python -m benches.from_error [--model DIR] [--tokens 2048]

The model, texts and measures of `quality.py`. The base is packed as `qpack convert` does by default; LoRA on all linear
layers begins from its error at several ranks.

- KL, ppl: as in `quality.py`, over all texts; ``packed`` is the base alone.
- error: how far the weights are from the original ones, of their norm.
- s: seconds of processor time that the beginning takes.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qpack
from benches.quality import compare, log_probabilities, read_texts
from qpack.checkpoint import Checkpoint
from qpack.demo.model import write_model
from qpack.loading.weights import Original, read_packed
from qpack.training.compute import Compute
from qpack.training.from_error import begin_from_error
from qpack.training.model import add_lora, load_base

RANKS = (8, 16, 64)


def left(model: Any, base: Checkpoint, original: Original) -> float:
    """The Frobenius norm of the error of all packed weights after the correction, over that of the weights."""
    error = norm = 0.0
    for name in base.packed:
        weight = original.read(name)
        layer = model.get_base_model().get_submodule(name.removesuffix(".weight"))
        corrected = read_packed(base, name) + layer.get_delta_weight("default").detach()
        error += float((weight - corrected).norm() ** 2)
        norm += float(weight.norm() ** 2)
    return math.sqrt(error / norm)


def main() -> None:
    """Print a table, a line for each rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, help="a 16-bit model [default: SmolLM2-135M-Instruct]")
    parser.add_argument("--tokens", type=int, default=2048)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source, packed = arguments.model or Path(scratch) / "model", Path(scratch) / "packed"
        if arguments.model is None:
            write_model(source, None)
        tokenizer = AutoTokenizer.from_pretrained(source)
        texts = [torch.tensor(tokenizer(text)["input_ids"][: arguments.tokens]) for text in read_texts().values()]
        plain: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        references = [log_probabilities(plain, tokens) for tokens in texts]
        del plain

        def row(name: str, model: Any, error: float, seconds: float) -> None:
            pairs = zip(texts, references, strict=True)
            found = [compare(log_probabilities(model, tokens), reference, tokens) for tokens, reference in pairs]
            kl, ppl = fmean(one.kl for one in found), math.exp(fmean(one.nll for one in found))
            print(f"| {name} | {kl:.4f} | {ppl:.3f} | {100 * error:.2f} | {seconds:.1f} |", flush=True)

        report = qpack.convert(source, packed)
        base, compute = Checkpoint.open(packed), Compute("cpu", torch.float32)
        original = Original.open(source, base)
        print(f"{source.name}: {sum(map(len, texts))} tokens, {len(base.packed)} weights\n")
        print("| | KL | ppl | error % | s |\n|---|---|---|---|---|")
        row("packed", load_base(packed, compute), report.result.error or 0.0, 0.0)
        for rank in RANKS:
            model = add_lora(load_base(packed, compute), qpack.TrainSettings(r=rank)).eval()
            start = time.process_time()
            begin_from_error(model, packed, source, "cpu")
            seconds = time.process_time() - start
            row(f"r = {rank}", model, left(model, base, original), seconds)


if __name__ == "__main__":
    main()
