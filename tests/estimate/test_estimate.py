"""Sizing: against sums written out, published figures, the bytes of the real objects, and what runs measure."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from bitsandbytes.optim.adamw import AdamW8bit, AdamW32bit
from click.testing import CliRunner
from tiny import write_llama
from torch.autograd.profiler import profile

import qpack
from qpack.checkpoint import Checkpoint
from qpack.cli import cli
from qpack.errors import CheckpointError
from qpack.estimate import CARDS, Device, Model, Need, fit, serving, training
from qpack.training import TrainSettings
from qpack.training.compute import Compute
from qpack.training.model import add_lora, load_base


def llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int = 32000) -> Model:
    """A Llama with untied embeddings in 16 bits, packed with blocks of 64 and double quantization."""
    width = hidden // heads * kv_heads
    shapes = {"q": (hidden, hidden), "k": (width, hidden), "v": (width, hidden), "o": (hidden, hidden)}
    shapes |= {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    packed = {f"model.layers.{i}.{name}_proj.weight": shape for i in range(layers) for name, shape in shapes.items()}
    weights = sum(rows * columns for rows, columns in packed.values())
    config = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
    }
    kept = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (vocab, hidden))
    return Model.of(config, packed, int(weights * (4 + 8 / 64 + 32 / (64 * 256)) / 8), kept)


LLAMA_7B = llama(4096, 11008, 32, 32, 32)
LLAMA_33B = llama(6656, 17920, 60, 52, 52)
LLAMA_65B = llama(8192, 22016, 80, 64, 64)


def test_the_papers_models() -> None:
    """QLoRA: 7B has a base of about 5 GB, 33B trains near 24 GB and 65B under 48 GB, one sequence of 512 at a time."""
    assert 3.5e9 < LLAMA_7B.bytes() < 5e9
    assert training(LLAMA_33B).smallest() == 24
    need = training(LLAMA_65B)
    assert need.smallest() == 48
    assert 36e9 < need.bytes < 46e9
    papers = TrainSettings(r=64, optim="paged_adamw_32bit", batch_size=1, max_length=512)
    assert training(LLAMA_65B, papers).fits(48)
    assert not training(LLAMA_65B, TrainSettings(max_length=4096, batch_size=4)).fits(48)


def test_the_kv_cache_of_llama_2_7b_is_half_a_megabyte_a_token() -> None:
    need = serving(LLAMA_7B, length=4096)
    assert need.parts["KV cache"] == 2 * 32 * 128 * 32 * 2 * 4096 == 2**31
    assert serving(LLAMA_7B, length=4096, batch=4).parts["KV cache"] == 4 * 2**31
    assert serving(LLAMA_7B).parts == need.parts  # its longest
    assert need.smallest() == 12
    assert need.share == 0.92
    grouped = llama(4096, 14336, 32, 32, 8, vocab=128256)
    assert serving(grouped, length=4096).parts["KV cache"] == 2**29


def test_slots_of_adapters_hold_both_factors_of_every_linear_weight() -> None:
    in_a_layer = 4 * (4096 + 4096) + 3 * (4096 + 11008)
    slots = serving(LLAMA_7B, slots=4, rank=16).parts["adapter slots"]
    assert slots == 2 * 4 * 16 * (32 * in_a_layer + 4096 + 32000)
    assert "adapter slots" not in serving(LLAMA_7B).parts


def test_the_parts_of_training_written_out() -> None:
    """Two layers: attention of two heads of 16, and a gated feed-forward part of 96."""
    attention = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}
    shapes = {f"self_attn.{name}": shape for name, shape in attention.items()}
    shapes |= {"mlp.gate_proj": (96, 32), "mlp.up_proj": (96, 32), "mlp.down_proj": (32, 96)}
    packed = {f"model.layers.{index}.{name}.weight": shape for index in (0, 1) for name, shape in shapes.items()}
    kept: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (1000, 32), "model.norm.weight": (32,)}
    kept |= {f"model.layers.{i}.{name}.weight": (32,) for i in (0, 1) for name in ("input_layernorm", "post_layernorm")}
    model = Model(packed, 10**6, kept, 32, layers=2, heads=2, head_dim=16, cached=32, vocab_size=1000, max_length=64)
    sides = 2 * (64 + 48 + 48 + 64 + 128 + 128 + 128)  # two layers, in and out of seven matrices
    settings = TrainSettings(batch_size=2, max_length=8, r=16, lora_dropout=0.0, optim="adamw_torch")
    layer = (
        4 * 2 * 32  # the inputs of two norms
        + 4 * 4 * 32 + 4 * 2 + 4 * 8  # query, key, value and output, two normalizers, the mask
        + 4 * (96 + 96 + 96)  # gate, up and the activated gate
        + 4 * (32 + 32 + 96)  # what goes into the A of query, key and value, of gate and up, and of down
        + 7 * 4 * 16  # and comes out
    )  # fmt: skip
    at_loss = 8 + 4 * 32 + 3 * 4 * 32 + 4 * 32  # mask; input and output of the last norm, states, derivatives, input
    here = Device("here", "cpu", 10**9, value_bytes=4)
    assert training(model, settings, here).parts == {
        "weights": 10**6 + 4 * (1000 * 32 + 5 * 32),
        "adapters": 4 * 16 * sides,
        "gradients": 0,
        "optimizer": 8 * 16 * sides,
        "activations": 16 * (2 * layer + at_loss),
        "logits": 16 * 8 * 1000,
        "workspace": 4 * 96 * 32 + here.allowance,
        "holes": 200 * 10**6 + 16 * (2 * layer + at_loss) // 4,
    }
    # In a second pass the gradients of the first are there; of several processes DDP holds them twice.
    assert training(model, replace(settings, grad_accum=2), here).parts["gradients"] == 4 * 16 * sides
    assert training(model, replace(settings, grad_accum=2), here, processes=2).parts["gradients"] == 8 * 16 * sides
    # Of 10**6 packed bytes, these are codes, and the rest scales.
    codes, others = 2 * (3 * 32 * 32 + 3 * 96 * 32) // 2, 4 * (1000 * 32 + 5 * 32)
    shared = training(model, replace(settings, fsdp=True), here, processes=2).parts["weights"]
    assert shared == (codes + others) // 2 + 10**6 - codes + others + codes  # two layers of codes: all that there are


@pytest.mark.parametrize(
    ("changes", "adapted"),
    [
        ({"target_modules": "q_proj,down_proj"}, 32 * (16 * 2 * 4096 + 16 * (4096 + 11008))),
        ({"target_modules": r".*\.layers\.(0|31)\.(gate|up|down)_proj"}, 2 * 3 * 16 * (4096 + 11008)),
        ({"target_modules": "k_proj", "rank_pattern": {"3.*k_proj": 8}}, (29 * 16 + 3 * 8) * 2 * 4096),
        ({"target_modules": "q_proj", "modules_to_save": "lm_head"}, 32 * 16 * 2 * 4096 + 32000 * 4096),
        ({"target_modules": "v_proj", "use_dora": True}, 32 * (16 * 2 * 4096 + 4096)),
    ],
    ids=str,
)
def test_adapters_are_those_asked_for(changes: dict[str, Any], adapted: int) -> None:
    settings = replace(TrainSettings(), **changes)
    assert training(LLAMA_7B, settings).parts["adapters"] == 4 * adapted


def test_what_a_run_saves_itself() -> None:
    """Checkpointing, short sequences, few targets and one process's share each take less."""
    settings = TrainSettings(gradient_checkpointing=False, max_length=2048)
    whole = training(LLAMA_7B, settings)
    for changes in (
        {"gradient_checkpointing": True},
        {"max_length": 1024},
        {"target_modules": "q_proj,v_proj"},
        {"target_modules": r".*\.layers\.31\..*"},  # nothing is kept of those below
        {"lora_dropout": 0.0},
    ):
        assert training(LLAMA_7B, replace(settings, **changes)).parts["activations"] < whole.parts["activations"]
    pairs = training(LLAMA_7B, replace(settings, method="dpo", batch_size=4))
    assert pairs.parts == whole.parts
    # Alone in its batch a sequence has no padding, and so no mask; packed it has one.
    one = training(LLAMA_7B, replace(settings, batch_size=1)).parts["activations"]
    assert training(LLAMA_7B, replace(settings, batch_size=1, packing=True)).parts["activations"] > one


@pytest.mark.parametrize(("optimizer", "bits"), [(AdamW8bit, 8), (AdamW32bit, 32)])
def test_optimizer_state_is_what_bitsandbytes_allocates(optimizer: Any, bits: int) -> None:
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in ((16, 200), (16, 5000))]
    stepped = optimizer(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    stepped.step()
    kept = 0
    for state in stepped.state.values():
        kept += sum(state[name].nbytes for name in ("state1", "state2", "absmax1", "absmax2") if name in state)
    shapes = {"model.layers.0.w.weight": (200, 5000)}
    model = Model(shapes, 0, {}, 1, layers=1, heads=1, head_dim=1, cached=1, vocab_size=1, max_length=1)
    name = {8: "adamw_8bit", 32: "paged_adamw_32bit"}[bits]
    assert training(model, TrainSettings(optim=name)).parts["optimizer"] == kept


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed, with activations that outweigh its parameters. Read only."""
    directory = tmp_path_factory.mktemp("base")
    source = write_llama(directory / "source", hidden_size=256, intermediate_size=704, layers=6)
    qpack.convert(source, directory / "packed")
    return directory / "packed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_and_adapters_are_those_loaded(base: Path, dtype: torch.dtype) -> None:
    model: Any = add_lora(load_base(base, Compute("cpu", dtype)), TrainSettings(r=16))
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    for layer in [layer for layer in model.modules() if isinstance(layer, Linear4bit)]:
        state: Any = layer.weight.quant_state  # type: ignore[attr-defined]
        held |= {part.data_ptr(): part.nbytes for part in (state.absmax, state.state2.absmax, state.offset)}
    parts = training(Model.open(Checkpoint.open(base)), TrainSettings(), Device("", "cpu", 0, dtype.itemsize)).parts
    # A quant state's own bytes are its JSON text and two tables, which are counted by the file's size.
    assert sum(held.values()) == pytest.approx(parts["weights"] + parts["adapters"], rel=0.02)


@pytest.mark.skipif(torch.cuda.is_available(), reason="measured by the allocator of the CPU")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch_size": 2, "max_length": 384, "optim": "adamw_torch"},
        {"batch_size": 1, "grad_accum": 2, "max_length": 448},
        {"lora_dropout": 0.0, "r": 64},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "r": 128, "max_length": 64},  # more gradients than activations
        {"packing": True, "batch_size": 2},
        {"method": "dpo", "batch_size": 2},
        {"packing": True, "gradient_checkpointing": True, "batch_size": 1},
        {"target_modules": "q_proj,v_proj", "rank_pattern": {"v_proj": 64}},
        {"target_modules": "down_proj"},
        {"use_dora": True, "gradient_checkpointing": True},
        {"modules_to_save": "embed_tokens,norm", "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_a_run_measures_what_was_estimated(base: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Within a tenth of the most that torch's allocator gave out from the first step on; weights are tested above."""
    settings = replace(TrainSettings(r=16, batch_size=4, max_length=256, max_steps=4, samples=0), **changes)
    answers = [(settings.max_length + longer) * "a" for longer in 4 * (40, -60)]  # some cut and some padded
    rows = [{"prompt": "?", "completion": answer} for answer in answers]
    if settings.method == "dpo":
        rows = [{"prompt": "?", "chosen": answer, "rejected": "b" + answer[1:]} for answer in answers]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Allocations() as allocations:
        qpack.train(base, tmp_path / "data.jsonl", tmp_path / "adapter", settings, on_progress=allocations.begin)
    device = Device.here()
    need = training(Model.open(Checkpoint.open(base)), settings, device)
    others = need.parts["weights"] + need.parts["adapters"] + need.parts["holes"] + device.allowance
    assert need.bytes - others == pytest.approx(allocations.peak, rel=0.1)


RUN = """
import sys
from pathlib import Path
import qpack
base, data, output = map(Path, sys.argv[1:])
settings = qpack.TrainSettings(r=16, batch_size=8, max_length=256, max_steps=2, samples=0)
report = qpack.train(base, data, output, settings)
print(report.estimated_memory.bytes, report.peak_memory)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="measured of a process that trains on a CPU")
def test_a_process_takes_what_was_estimated(tmp_path: Path) -> None:
    """Within a tenth of the most that a process of its own had resident, libraries and all that malloc keeps included:
    of 2 GB the libraries are less than half."""
    source = write_llama(tmp_path / "source", hidden_size=512, intermediate_size=1408, layers=8)
    qpack.convert(source, tmp_path / "base")
    rows = [{"prompt": "?", "completion": 300 * "a"}, {"prompt": "?", "completion": 100 * "b"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in 8 * rows))
    command = [sys.executable, "-c", RUN, *map(str, (tmp_path / "base", tmp_path / "data.jsonl", tmp_path / "adapter"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    estimated, taken = map(int, done.stdout.split())
    assert taken > 1.8 * 10**9
    assert estimated == pytest.approx(taken, rel=0.1)


class Allocations:
    """Counts what torch's CPU allocator gives out and takes back, by its own profiler."""

    def __enter__(self) -> "Allocations":
        self._profile = profile(profile_memory=True)
        self._begun = False
        return self

    def begin(self, done: int, total: int) -> None:
        if not self._begun:
            self._begun = True
            self._profile.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        results: Any = self._profile.kineto_results
        events = [event for event in results.events() if event.name() == "[memory]"]
        sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        self.peak = max(accumulate(sizes))


def test_a_checkpoint_is_sized_by_its_headers(packed: Path) -> None:
    model = Model.open(Checkpoint.open(packed))
    assert (model.cached, model.layers, model.heads, model.max_length) == (2 * 2 * 64, 2, 4, 512)
    assert model.bytes() == Checkpoint.open(packed).tensor_bytes
    assert (model.normalized, model.inner) == (2 * 256, (2 * 512, 512))


def test_what_fits_and_what_is_nearest() -> None:
    settings = TrainSettings(batch_size=8, grad_accum=2, max_length=2048)
    roomy = fit(LLAMA_7B, settings, Device.gpu(24 * 10**9))
    assert roomy.fits
    assert roomy.nearest == {}
    tight = fit(LLAMA_7B, settings, Device.gpu(12 * 10**9))
    assert not tight.fits
    assert tight.nearest is not None
    assert tight.nearest["batch_size"] * tight.nearest["grad_accum"] == 16
    assert fit(LLAMA_7B, replace(settings, **tight.nearest), Device.gpu(12 * 10**9)).fits
    more: dict[str, Any] = {"batch_size": tight.nearest["batch_size"] * 2, "grad_accum": 1}
    assert not fit(LLAMA_7B, replace(settings, **more), Device.gpu(12 * 10**9)).fits

    # The longest and the largest are just that.
    assert roomy.longest is not None
    assert roomy.largest is not None
    for within, beyond in (
        ({"max_length": roomy.longest}, {"max_length": roomy.longest + 64}),
        ({"batch_size": roomy.largest}, {"batch_size": roomy.largest + 1}),
    ):
        changed: list[dict[str, Any]] = [within, beyond]
        found = [fit(LLAMA_7B, replace(settings, **changes), Device.gpu(24 * 10**9)).fits for changes in changed]
        assert found == [True, False]

    short = fit(LLAMA_7B, replace(settings, batch_size=1), Device.gpu(6 * 10**9)).nearest
    assert short is not None
    assert short.keys() == {"max_length"}
    assert fit(LLAMA_7B, settings, Device.gpu(4 * 10**9)).nearest is None


def test_the_command(packed: Path) -> None:
    command = ["estimate", str(packed), "--batch-size", "64", "--gpu"]
    small = CliRunner().invoke(cli, [*command, "1.1GB"])
    assert small.exit_code == 0, small.output
    assert f"{packed}: train r=16 on 64 x 1024 tokens" in small.output
    assert "fits         NO: 1.1 GB, a GPU of that size" in small.output
    assert re.search(r"nearest      --batch-size \d+ --grad-accum \d+\n", small.output)
    less = CliRunner().invoke(
        cli,
        [*command, "80GB", "--json", "--target-modules", "q_proj", "--rank-pattern", "q_proj=4", "--method", "dpo"],
    )
    assert json.loads(less.output)["need"]["parts"]["adapters"] == 2 * 4 * 4 * (256 + 256)
    shared = CliRunner().invoke(cli, [*command, "80GB", "--json", "--fsdp", "--processes", "4"])
    alone = CliRunner().invoke(cli, [*command, "80GB", "--json"])
    weights = [json.loads(done.output)["need"]["parts"]["weights"] for done in (shared, alone)]
    assert weights[0] < weights[1] + json.loads(alone.output)["need"]["parts"]["workspace"]
    found = json.loads(CliRunner().invoke(cli, [*command, "80GB", "--json"]).output)
    assert found["fits"]
    assert found["bytes"] == sum(found["need"]["parts"].values())


def test_a_token_goes_through_some_experts_and_a_latent_cache() -> None:
    config: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "vocab_size": 100,
        "max_position_embeddings": 128,
        "num_experts_per_tok": 2,
    }
    packed = {f"model.layers.0.mlp.experts.{i}.up_proj.weight": (128, 64) for i in range(8)}
    model = Model.of({"text_config": config}, packed, 1000, {})
    assert model.cached == 48
    assert model.in_layer(lambda rows, columns: rows + columns) == 2 * (128 + 64)
    assert training(model).parts["adapters"] == 8 * 4 * 16 * (128 + 64)
    del config["num_experts_per_tok"]
    with pytest.raises(CheckpointError, match=r"config\.json: has no num_experts_per_tok, which the sizing needs"):
        Model.of(config, packed, 1000, {})


def test_a_line_says_it_all() -> None:
    need = Need("train 1 x 9 tokens", {"weights": 30 * 10**9, "optimizer": 3 * 10**9}, pageable=2 * 10**9)
    assert [card for card in CARDS if need.fits(card)] == [32, 48, 80, 96, 141]
    assert str(need) == (
        "train 1 x 9 tokens: 33 GB (weights 30 GB, optimizer 3 GB); fits a GPU of 32 GB with its optimizer paged"
    )
    assert str(Need("serve 1 x 9 tokens", {"weights": 10**12})).endswith("; fits no GPU of up to 141 GB")
    assert str(serving(LLAMA_7B, length=4096)).startswith("serve 1 x 4096 tokens: 7.")
