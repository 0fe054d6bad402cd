"""What packing does to a model: perplexity, and KL divergence from the 16-bit model, in each mode.

    python benches/quality.py [--model DIR] [--tokens 2048]

Packs SmolLM2-135M-Instruct, the demo's model, exact and best, each with and without double quantization, and reads
texts of three kinds with all of them: a licence (the project's own), a program (transformers' Llama), and the
docstrings of one module of numpy. The latter two are of pinned versions, so the texts are the same on every machine.
Each text is one window of ``--tokens`` tokens, computed in f32 on the CPU; packed models are decoded by bitsandbytes,
through `qpack.load`.

- ppl: exp of the mean negative log-likelihood of the next token.
- KL: the mean over all positions of KL(16-bit || packed) of the next token's distribution, in nats.
- top-1: at how many positions the two find the same token the likeliest.

Over all texts ppl is the geometric mean, the others the mean. Exit status 1 if best is worse than exact in ppl or KL
over all texts.
"""

import argparse
import ast
import math
import platform
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qpack
from qpack.demo.model import write_model

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Quality:
    """How one model reads one text."""

    nll: float
    """Mean negative log-likelihood of a token, in nats."""
    kl: float
    top1: float


def read_texts() -> dict[str, str]:
    """The texts by kind."""
    program = _source("transformers.models.llama.modeling_llama")
    numpy = ast.parse(_source("numpy.lib._function_base_impl"))
    documented = (node for node in numpy.body if isinstance(node, ast.FunctionDef))
    return {
        "licence": (ROOT / "LICENSE").read_text(encoding="utf-8"),
        "program": program[program.index("\nclass ") :],
        "docstrings": "\n\n".join(filter(None, map(ast.get_docstring, documented))),
    }


def _source(module: str) -> str:
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


@torch.inference_mode()
def log_probabilities(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Of the token behind each position: (tokens - 1, vocab_size)."""
    logits: torch.Tensor = model(tokens[None]).logits[0, :-1]
    return logits.float().log_softmax(-1)


def compare(found: torch.Tensor, reference: torch.Tensor, tokens: torch.Tensor) -> Quality:
    """Compare log-probabilities with those of the 16-bit model."""
    kl = torch.nn.functional.kl_div(found, reference, log_target=True, reduction="none").sum(-1)
    return Quality(
        nll=-found.gather(1, tokens[1:, None]).double().mean().item(),
        kl=kl.double().mean().item(),
        top1=(found.argmax(-1) == reference.argmax(-1)).double().mean().item(),
    )


def main() -> int:
    """Print a table, a line for each way to pack."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, help="a 16-bit model [default: SmolLM2-135M-Instruct]")
    parser.add_argument("--tokens", type=int, default=2048)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = arguments.model or Path(scratch) / "model"
        if arguments.model is None:
            write_model(source, None)
        tokenizer = AutoTokenizer.from_pretrained(source)
        texts: dict[str, torch.Tensor] = {}
        for kind, text in read_texts().items():
            texts[kind] = torch.tensor(tokenizer(text)["input_ids"][: arguments.tokens])
        plain: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        references = {kind: log_probabilities(plain, tokens) for kind, tokens in texts.items()}
        del plain

        rows = {"16 bits": [compare(reference, reference, texts[kind]) for kind, reference in references.items()]}
        errors = {"16 bits": 0.0}
        for mode, double_quant in product(("exact", "best"), (True, False)):
            name = f"{mode}, {'double quantization' if double_quant else 'f32 scales'}"
            packed = Path(scratch) / "packed"
            result = qpack.convert(source, packed, mode=mode, double_quant=double_quant, force=True).result
            model = qpack.load(packed, dtype=torch.float32)
            rows[name] = [
                compare(log_probabilities(model, tokens), references[kind], tokens) for kind, tokens in texts.items()
            ]
            errors[name] = result.error or 0.0
            del model

    counts = ", ".join(f"{kind} {len(tokens)}" for kind, tokens in texts.items())
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "bitsandbytes", "transformers", "numpy"))
    print(f"{source.name}: tokens of {counts}; {packages}, Python {platform.python_version()}\n")
    by_kind = [f"{what} {kind}" for what in ("ppl", "KL") for kind in texts]
    headings = ["ppl", *by_kind[: len(texts)], "KL", *by_kind[len(texts) :], "top-1 %", "error %"]
    print(f"| | {' | '.join(headings)} |")
    print(f"|---|{'---|' * len(headings)}")
    for name, qualities in rows.items():
        cells = [f"{_perplexity(qualities):.3f}", *(f"{math.exp(quality.nll):.3f}" for quality in qualities)]
        cells += [f"{_divergence(qualities):.4f}", *(f"{quality.kl:.4f}" for quality in qualities)]
        cells += [f"{100 * fmean(quality.top1 for quality in qualities):.1f}", f"{100 * errors[name]:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |")
    worse = [
        f"best is worse than exact with {scales} in {what}"
        for scales in ("double quantization", "f32 scales")
        for what, of in (("ppl", _perplexity), ("KL", _divergence))
        if of(rows[f"best, {scales}"]) > of(rows[f"exact, {scales}"])
    ]
    print("\n" + ("; ".join(worse) or "over all texts best is no worse than exact in ppl and KL"))
    return 1 if worse else 0


def _perplexity(qualities: list[Quality]) -> float:
    return math.exp(fmean(quality.nll for quality in qualities))


def _divergence(qualities: list[Quality]) -> float:
    return fmean(quality.kl for quality in qualities)


if __name__ == "__main__":
    sys.exit(main())
