"""`qpack.merge(..., check=TEXT)`: the merged model says what the base says with its adapters, or is not kept."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from lora import draw_adapter, write_adapter
from peft import PeftModel
from tiny import write_llama, write_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

import qpack
from qpack.cli import cli
from qpack.errors import DataError, MergeError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "sample.txt"
    path.write_text("What was trained is what you get. " * 4)
    return path


def test_the_divergence_is_that_of_the_stored_weights_in_f32(
    llama: Path, packed: Path, text: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", llama)
    arguments = ["merge", "-q", str(packed), str(adapter), str(tmp_path / "merged"), "--dtype", "float16"]
    shown = CliRunner().invoke(cli, [*arguments, "--check", str(text), "--json"])
    assert shown.exit_code == 0, shown.stderr
    check = json.loads(shown.stdout)["check"]
    assert 0 < check["kl"] < 1e-4
    assert check["tokens"] == len(text.read_text())  # the tokenizer is of bytes
    tokenizer: Any = AutoTokenizer.from_pretrained(packed)
    ids = tokenizer(text.read_text(), return_tensors="pt")["input_ids"]
    peft = PeftModel.from_pretrained(qpack.load(packed, dtype=torch.float32), str(adapter))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        p, q = (model(ids).logits[0].double().log_softmax(-1) for model in (peft, merged))
    divergence = (p.exp() * (p - q)).sum(-1)
    assert check["kl"] == pytest.approx(divergence.mean().item(), rel=0.05)  # of logits in f32
    assert check["worst"] == pytest.approx(divergence.max().item(), rel=0.05)


KINDS: dict[str, dict[str, Any]] = {
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "tied head": {"target_modules": ["lm_head", "v_proj"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
}


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_every_kind_of_adapter_is_compared(
    settings: dict[str, Any], llama: Path, packed: Path, text: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", llama, **settings)
    check = qpack.merge(packed, adapter, tmp_path / "merged", dtype="float32", check=text).check
    assert check is not None
    assert check.kl < 1e-6


def test_several_adapters_are_compared_with_their_weights(
    llama: Path, packed: Path, text: Path, tmp_path: Path
) -> None:
    one = write_adapter(tmp_path / "one", llama, target_modules=["q_proj"])
    two = write_adapter(tmp_path / "two", llama, target_modules=["q_proj", "up_proj"], r=2)
    check = qpack.merge(packed, [(one, 0.5), (two, -1.0)], tmp_path / "sum", dtype="float32", check=text).check
    assert check is not None
    assert check.kl < 1e-6
    ties = qpack.Combination("ties", density=0.5)
    two = write_adapter(tmp_path / "three", llama, target_modules=["q_proj"], lora_alpha=4)
    check = qpack.merge(
        packed, [(one, 0.5), (two, 1.0)], tmp_path / "ties", combination=ties, dtype="float32", check=text
    ).check
    assert check is not None
    assert check.kl < 1e-6


def test_a_model_that_diverges_is_not_kept(llama: Path, packed: Path, text: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", llama, target_modules=["q_proj"])
    # The original is another model by the error of quantization: that is told, and refused where less is asked for.
    told = qpack.merge(packed, adapter, tmp_path / "original", original=llama, check=text).check
    assert told is not None
    assert told.kl > 1e-3
    options = ["--onto", "original", "--source", str(llama), "--check", str(text), "--max-kl", "1e-3"]
    done = CliRunner().invoke(cli, ["merge", "-q", str(packed), str(adapter), str(tmp_path / "no"), *options])
    assert isinstance(done.exception, MergeError)
    assert str(done.exception).endswith(f"KL {told.kl:.2g} a token, expected at most 0.001")
    nf4 = qpack.merge(llama, adapter, tmp_path / "nf4", to="nf4", check=text).check
    assert nf4 is not None
    assert nf4.kl > 1e-3
    with pytest.raises(MergeError, match=r"expected at most 1e-06; rounding alone makes .* float16"):
        qpack.merge(packed, adapter, tmp_path / "no", check=text, max_kl=1e-6)
    assert not list(tmp_path.glob("*no*"))


def test_bfloat16_may_diverge_by_twice_what_rounding_alone_does(
    llama: Path, packed: Path, text: Path, tmp_path: Path
) -> None:
    """Packed or of bfloat16 already, the base's weights are put as far off as the merged ones are."""
    adapter = write_adapter(tmp_path / "adapter", llama)
    for base in (packed, llama):
        check = qpack.merge(base, adapter, tmp_path / f"merged-{base.name}", check=text).check
        assert check is not None
        assert check.rounding is not None
        assert 0.7 * check.rounding < check.kl < 1.4 * check.rounding
        assert check.limit == max(1e-4, 2 * check.rounding)
        assert replace(check, rounding=1.5e-4).limit == 3e-4
    arguments = ["merge", "-q", str(packed), str(adapter), str(tmp_path / "f32"), "--dtype", "float32"]
    shown = CliRunner().invoke(cli, [*arguments, "--check", str(text)])
    assert re.search(r"rounding  KL [\d.]+e-\d\d a token", shown.stdout)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_rows_that_are_no_whole_blocks_are_decoded_right(settings: dict[str, Any], text: Path, tmp_path: Path) -> None:
    """bitsandbytes' decoder errs on a CPU where rows are not: the base would be another than what is merged onto."""
    source = write_llama(tmp_path / "source", intermediate_size=528)
    qpack.convert(source, tmp_path / "packed")
    adapter = write_adapter(tmp_path / "adapter", source, target_modules=["down_proj"], **settings)
    check = qpack.merge(tmp_path / "packed", adapter, tmp_path / "merged", dtype="float32", check=text).check
    assert check is not None
    assert check.kl < 1e-6


def test_layers_that_lie_the_other_way_are_compared_quietly(text: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=320, bos_token_id=256, eos_token_id=257, n_layer=1, n_embd=64, n_head=2)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "gpt2")
    write_tokenizer(tmp_path / "gpt2")
    qpack.convert(tmp_path / "gpt2", tmp_path / "packed")
    adapter = draw_adapter(tmp_path / "adapter", tmp_path / "gpt2", target_modules=["c_attn"], fan_in_fan_out=True)
    check = qpack.merge(tmp_path / "packed", adapter, tmp_path / "merged", dtype="float32", check=text).check
    assert check is not None
    assert check.kl < 1e-6


def test_what_is_no_text_is_refused_before_anything_is_written(
    llama: Path, packed: Path, text: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", llama, target_modules=["q_proj"])
    short, binary = tmp_path / "short.txt", tmp_path / "binary"
    short.write_text("a")
    binary.write_bytes(b"ab\xff")
    with pytest.raises(DataError, match=r"short\.txt: is 1 tokens, expected at least 2"):
        qpack.merge(packed, adapter, tmp_path / "no", check=short)
    with pytest.raises(DataError, match="binary: not UTF-8 text, at byte 2"):
        qpack.merge(packed, adapter, tmp_path / "no", check=binary)
    with pytest.raises(FileNotFoundError):
        qpack.merge(packed, adapter, tmp_path / "no", check=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="max_kl is of a check"):
        qpack.merge(packed, adapter, tmp_path / "no", max_kl=1.0)
    for options in (["--max-kl", "1"], ["--dry-run", "--check", str(text)]):
        done = CliRunner().invoke(cli, ["merge", str(packed), str(adapter), str(tmp_path / "no"), *options])
        assert done.exit_code == 2
    assert not list(tmp_path.glob("*no*"))
