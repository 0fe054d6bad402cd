"""QLoRA steps on a base of Llama-65B's shape, which the paper trains under 48 GB (arXiv 2305.14314).

    python benches/train_65b.py DIR [--layers 80] [--width 8192] [--length 512] [--steps 2]

Makes the base in DIR, packed from the start: random codes and scales in a file for each layer, as `qpack convert` lays
them out. In 16 bits there are never more than the embeddings, which are kept so. It takes 34.6 GB of disk; what is
there already is not made again, so an interrupted call goes on, and another one only trains.

Then `qpack.train` as a user calls it, with the paper's settings: LoRA of rank 64 on all linear layers, dropout 0.05,
paged AdamW in 32 bits, one sequence of LENGTH tokens. Prints the estimate and what was taken: on a GPU by torch's
allocator, so without the 6.4 GB of paged state, which the driver moves to the host when the GPU is full; on a CPU by
the process. Exit status 1 if a GPU had to give 48 GB or more.

A smaller base is made by fewer layers and by a width below 8192, to which all other sizes are in proportion.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from bitsandbytes.functional import QuantState
from safetensors.torch import save_file
from transformers import LlamaConfig

import qpack
from qpack import _core
from qpack.sizes import format_size
from qpack.training import Event, StepLog, TrainSettings

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from tiny import write_tokenizer

WIDTH, INNER, HEAD = 8192, 22016, 128
LIMIT = 48 * 10**9
SCALE, SPREAD = 0.036, 0.01
"""Of a block: so that weights are about as large as a model's, 0.02."""


def write_base(directory: Path, layers: int, width: int) -> None:
    """Make a packed Llama with random weights, or the files of it that are not there."""
    directory.mkdir(parents=True, exist_ok=True)
    inner = INNER * width // WIDTH
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD,
        max_position_embeddings=2048,
        bos_token_id=256,
        eos_token_id=257,
    )
    placed: dict[str, str] = {}
    size = 0
    for number in range(-1, layers):
        path = directory / f"model-{number + 1:05}.safetensors"
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            save_file(_ends(config) if number < 0 else _layer(config, number), unfinished, metadata={"format": "pt"})
            os.replace(unfinished, path)
        tensors = _core.read_header(path)
        placed |= {info.name: path.name for info in tensors}
        size += sum(info.bytes for info in tensors)
    index = {"metadata": {"total_size": size}, "weight_map": placed}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    quantization = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head"],
    }
    declared = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(config.to_dict() | declared, indent=1))
    write_tokenizer(directory)


def _ends(config: LlamaConfig) -> dict[str, torch.Tensor]:
    """What is in no layer."""
    generator = torch.Generator().manual_seed(0)
    size = config.vocab_size, config.hidden_size
    ends = {name: torch.empty(size, dtype=torch.bfloat16) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    for weight in ends.values():
        weight.normal_(std=0.02, generator=generator)
    return ends | {"model.norm.weight": torch.ones(config.hidden_size, dtype=torch.bfloat16)}


def _layer(config: LlamaConfig, number: int) -> dict[str, torch.Tensor]:
    """The tensors of a layer."""
    draw = np.random.default_rng(number)
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = dict.fromkeys((f"self_attn.{name}_proj" for name in "qkvo"), (hidden, hidden))
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    tensors = {
        f"model.layers.{number}.{name}.weight": torch.ones(hidden, dtype=torch.bfloat16)
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    for name, shape in shapes.items():
        weight = f"model.layers.{number}.{name}.weight"
        tensors |= {weight + suffix: tensor for suffix, tensor in _packed(draw, shape).items()}
    return tensors


def _packed(draw: np.random.Generator, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """A packed weight of random codes, by what is added to its name."""
    blocks = shape[0] * shape[1] // 64

    def drawn(*size: int) -> torch.Tensor:
        return torch.from_numpy(draw.integers(256, size=size, dtype=np.uint8))

    scales = QuantState(
        absmax=torch.full((-(-blocks // 256),), SPREAD),
        code=torch.frombuffer(bytearray(_core.nested_quant_map()), dtype=torch.float32),
        blocksize=256,
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=drawn(blocks),
        shape=torch.Size(shape),
        code=torch.tensor(_core.LEVELS),
        blocksize=64,
        quant_type="nf4",
        dtype=torch.bfloat16,
        offset=torch.tensor(SCALE),
        state2=scales,
    )
    beside = {f".{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    return {"": drawn(shape[0] * shape[1] // 2, 1)} | beside


def train(base: Path, length: int, steps: int) -> int:
    """Train, tell of it, and return the exit status."""
    last: list[StepLog] = []

    def listen(event: Event) -> None:
        if isinstance(event, StepLog):
            last[:] = [event]

    settings = TrainSettings(
        r=64,
        lora_alpha=16,
        lora_dropout=0.05,
        optim="paged_adamw_32bit",
        batch_size=1,
        max_length=length,
        max_steps=steps,
        samples=0,
    )
    with tempfile.TemporaryDirectory() as work:
        data = Path(work, "data.jsonl")
        characters = steps * (length - 1)  # a token each, and one at the end: windows that overlap by one
        text = "".join(random.Random(0).choices("abcdefgh ", k=characters))
        data.write_text(json.dumps({"text": text}) + "\n")
        report = qpack.train(base, data, Path(work, "adapter"), settings, on_event=listen)
    print(f"{settings.optim} as {report.optimizer}, {report.compute_dtype}, loss {report.first_loss:.2f}")
    print(f"estimated   {report.estimated_memory}")
    taken = report.peak_memory
    if torch.cuda.is_available():
        taken = torch.cuda.max_memory_reserved()
        print(f"allocated   {format_size(torch.cuda.max_memory_allocated())} at most")
    print(f"taken       {format_size(taken)}")
    print(f"speed       {last[0].tokens_per_second:.0f} tokens/s in step {last[0].step}, {last[0].seconds:.1f} s")
    return int(torch.cuda.is_available() and taken >= LIMIT)


def main() -> int:
    """Read the command line, make the base, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, metavar="DIR")
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--width", type=int, default=WIDTH, help="a multiple of 128, which is the size of a head")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2, help="the first is slower")
    arguments = parser.parse_args()
    write_base(arguments.base, arguments.layers, arguments.width)
    return train(arguments.base, arguments.length, arguments.steps)


if __name__ == "__main__":
    sys.exit(main())
