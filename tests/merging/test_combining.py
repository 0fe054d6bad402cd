"""Several adapters as one, by qpack and by stock PEFT's `add_weighted_adapter`: the same bits, merged or not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora import draw_adapter, rounded, tensors
from peft import PeftModel
from safetensors.torch import load_file
from test_cli import contents, run
from tiny import write_llama
from transformers import AutoModelForCausalLM

import qpack
from qpack.adapters.record import RECORD_NAME, Record
from qpack.errors import AdapterError, OutputExistsError
from serve import ServeConfig

WEIGHTS = {"one": 0.75, "two": -2.0}
# What both adapters have comes in one order by name and in the model, which the draws of DARE depend on.
LAYERS: dict[str, Any] = {"target_modules": ["gate_proj"]}
OTHERS: dict[str, Any] = {"target_modules": ["gate_proj", "up_proj"], "lora_alpha": 3}

COMBINATIONS = {
    "cat": (qpack.Combination(), {}),
    "linear": (qpack.Combination("linear"), {}),
    "ties": (qpack.Combination("ties", 0.3), {"density": 0.3}),
    "ties of all": (qpack.Combination("ties", 1.0), {"density": 1.0}),
    "dare_linear": (qpack.Combination("dare_linear", 0.7, 5), {"density": 0.7}),
    "dare_ties": (qpack.Combination("dare_ties", 0.7, 5), {"density": 0.7}),
    "magnitude_prune": (qpack.Combination("magnitude_prune", 0.3), {"density": 0.3}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain Llama with an output embedding of its own. Read only."""
    return write_llama(tmp_path_factory.mktemp("bases") / "untied", tied=False)


@pytest.fixture(scope="module")
def pair(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, float]]:
    """Two adapters with weights; the second one changes more. Read only."""
    folder = tmp_path_factory.mktemp("pair")
    one, two = draw_adapter(folder / "one", base, **LAYERS), draw_adapter(folder / "two", base, **OTHERS, seed=2)
    return list(zip((one, two), WEIGHTS.values(), strict=True))


def by_peft(base: Path, adapters: list[tuple[Path, float]], kind: str, seed: int, **settings: Any) -> Any:
    """The model with the combination as its active adapter, in f32."""
    (first, _), *_ = adapters
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft: Any = PeftModel.from_pretrained(model, str(first), first.name)
    for path, _ in adapters[1:]:
        peft.load_adapter(str(path), path.name)
    inject = peft.base_model.inject_adapter

    def injected(*arguments: Any) -> None:
        inject(*arguments)
        torch.manual_seed(seed)  # the new adapter's own initial values are drawn first

    peft.base_model.inject_adapter = injected
    names, weights = [path.name for path, _ in adapters], [weight for _, weight in adapters]
    peft.add_weighted_adapter(names, weights, "all", combination_type=kind, **settings)
    peft.set_adapter("all")
    return peft


@pytest.mark.filterwarnings("ignore:The density 1.0 is greater than or equal to 1:UserWarning")
@pytest.mark.parametrize(("combination", "settings"), COMBINATIONS.values(), ids=COMBINATIONS)
def test_every_combination_is_peft_s_to_the_bit(
    combination: qpack.Combination,
    settings: dict[str, Any],
    base: Path,
    pair: list[tuple[Path, float]],
    tmp_path: Path,
) -> None:
    peft = by_peft(base, pair, combination.kind, combination.seed or 0, **settings)
    peft.save_pretrained(str(tmp_path), selected_adapters=["all"])
    expected = load_file(tmp_path / "all" / "adapter_model.safetensors")

    report = qpack.combine(base, pair, tmp_path / "combined", combination)
    factors = load_file(tmp_path / "combined" / "adapter_model.safetensors")
    assert (report.r, report.weights) == ((8 if combination.kind == "cat" else 4), 4)
    assert factors.keys() == expected.keys()
    for name, factor in factors.items():
        assert factor.dtype == torch.float32
        assert torch.equal(factor, expected[name]), name

    # Merged at once, and by way of the adapter. Cat at once has no f32 between: a sum of products, rounded once.
    qpack.merge(base, tmp_path / "combined", tmp_path / "merged")
    merged = peft.double().merge_and_unload().state_dict()
    for name, weight in tensors(tmp_path / "merged").items():
        assert torch.equal(weight, rounded(merged[name])), name
    if combination.kind != "cat":
        qpack.merge(base, pair, tmp_path / "at once", combination=combination)
        for file in (tmp_path / "merged").glob("*.safetensors"):
            assert file.read_bytes() == (tmp_path / "at once" / file.name).read_bytes()


def test_the_combined_adapter_is_one_like_any_other(
    llama: Path, packed: Path, pair: list[tuple[Path, float]], tmp_path: Path
) -> None:
    (one, _), (two, _) = pair
    done = run("merge", packed, f"{one}:0.75", f"{two}:-2", tmp_path / "all", "--to", "adapter")
    assert done.stdout.startswith(f"{tmp_path / 'all'}: rank 8, 4 weights, ")
    assert ServeConfig(packed, {"all": tmp_path / "all"}).max_lora_rank == 16  # the least that is set aside

    record = Record.find(tmp_path / "all")
    assert record is not None
    assert record.base.fingerprint == qpack.inspect(packed).manifest.fingerprint  # type: ignore[union-attr]
    assert record.settings["combine"]["kind"] == "cat"
    assert [(name, weight) for name, _, weight in record.settings["adapters"]] == [("one", 0.75), ("two", -2.0)]

    # Stock PEFT loads it, and computes what the two do together.
    ids = torch.arange(48)[None]
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.no_grad():
        alone = model(ids).logits
        found = PeftModel.from_pretrained(model, str(tmp_path / "all"))(ids).logits
        expected = by_peft(llama, pair, "cat", 0)(ids).logits
    assert torch.equal(found, expected)
    assert (found - alone).abs().max() > 0.1

    with pytest.raises(OutputExistsError, match=r"already exists \(--force replaces it\)"):
        qpack.combine(packed, pair, tmp_path / "all")
    before = contents(tmp_path / "all")
    qpack.combine(packed, pair, tmp_path / "all", force=True)
    assert contents(tmp_path / "all") == before


def test_what_comes_along_is_that_of_the_first(packed: Path, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "order a", "completion": "item 0"}\n')
    settings = qpack.TrainSettings(r=2, max_steps=1)
    trained = qpack.train(packed, tmp_path / "data.jsonl", tmp_path / "trained", settings).output
    other = draw_adapter(tmp_path / "other", llama, target_modules="all-linear", r=2)
    qpack.combine(packed, [(trained, 1.0), (other, 0.5)], tmp_path / "all", qpack.Combination("linear"))
    names = {path.name for path in (tmp_path / "all").iterdir()}
    ours = {"adapter_config.json", "adapter_model.safetensors", RECORD_NAME}
    assert names - ours == {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    for name in names - ours:
        assert (tmp_path / "all" / name).read_bytes() == (trained / name).read_bytes()
    one, both = Record.find(trained), Record.find(tmp_path / "all")
    assert one is not None
    assert both is not None
    assert (both.base, both.template) == (one.base, one.template)
    assert json.loads((tmp_path / "all" / "adapter_config.json").read_text())["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_embeddings_ranks_by_pattern_and_rslora(base: Path, tmp_path: Path) -> None:
    """Where PEFT's own result cannot be loaded, or is scaled once more, against the changes of its two adapters."""
    patterns: dict[str, Any] = {"target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {"q_proj": 2}}
    one = draw_adapter(tmp_path / "one", base, **patterns, use_rslora=True)
    two = draw_adapter(tmp_path / "two", base, **patterns, layers_to_transform=[1], layers_pattern="layers", seed=2)
    pair = [(one, 0.5), (two, 2.0)]
    qpack.combine(base, pair, tmp_path / "all")
    qpack.merge(base, tmp_path / "all", tmp_path / "merged", dtype="float32")
    qpack.merge(base, pair, tmp_path / "expected", dtype="float32")
    expected = tensors(tmp_path / "expected")
    for name, weight in tensors(tmp_path / "merged").items():
        # The weight times the scale, and that times a value, are rounded to f32 in the adapter.
        assert torch.allclose(weight, expected[name], rtol=1e-6, atol=1e-7), name
    config = json.loads((tmp_path / "all" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["rank_pattern"]) == (8, 8, False, {})
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "all"))
    assert sum("lora_A" in name for name, _ in loaded.named_parameters()) == 2


def test_dare_draws_by_its_seed(base: Path, pair: list[tuple[Path, float]], tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    files = []
    for name, seed in (("a", None), ("b", 0), ("c", 1)):
        qpack.combine(base, pair, tmp_path / name, qpack.Combination("dare_linear", 0.5, seed))
        files.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]
    assert torch.equal(state, torch.random.get_rng_state())  # the caller's draws go on as if nothing had been


def test_a_merge_under_another_combination_begins_anew(
    base: Path, pair: list[tuple[Path, float]], tmp_path: Path
) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    small: dict[str, Any] = {"max_shard_size": "500kB", "threads": 1}
    ties, denser = qpack.Combination("ties", 0.3), qpack.Combination("ties", 0.4)
    with pytest.raises(KeyboardInterrupt):
        qpack.merge(base, pair, tmp_path / "merged", combination=ties, on_progress=interrupt, **small)
    plan = qpack.plan_merge(base, pair, tmp_path / "merged", combination=denser)
    assert plan.merged == 4
    report = qpack.merge(base, pair, tmp_path / "merged", combination=denser, **small)
    assert report.resumed_bytes == 0
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "- adapters combined as PEFT's ties, density 0.4\n" in card


# ---- what is refused -----------------------------------------------------------------------------------------------

NOT_FACTORS: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora is True, which is not plain LoRA"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
    "biases": ({"bias": "all"}, "bias is 'all', expected 'none'"),
    "tokens": ({"trainable_token_indices": [1]}, r"trainable_token_indices is \[1\]"),
}


@pytest.mark.parametrize(("settings", "message"), NOT_FACTORS.values(), ids=NOT_FACTORS)
def test_what_is_more_than_factors_is_refused(
    settings: dict[str, Any], message: str, base: Path, pair: list[tuple[Path, float]], tmp_path: Path
) -> None:
    other = draw_adapter(tmp_path / "other", base, **LAYERS, **settings)
    both = [pair[0], (other, 1.0)]
    with pytest.raises(AdapterError, match=rf"other: {message}"):
        qpack.combine(base, both, tmp_path / "all")
    with pytest.raises(AdapterError, match=rf"other: {message}"):
        qpack.merge(base, both, tmp_path / "all", combination=qpack.Combination("linear"))
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 2}, r"other: has rank 2, .*one has 4; linear takes equal ones, cat any"),
        (
            {"rank_pattern": {"gate_proj": 2}},
            r"gate_proj has rank 4 in .*one, 2 in .*other; linear takes equal ones",
        ),
        ({"ensure_weight_tying": True}, r"other: ensure_weight_tying is True, in .*one it is False"),
    ],
)
def test_what_does_not_go_together_is_refused(
    settings: dict[str, Any], message: str, base: Path, pair: list[tuple[Path, float]], tmp_path: Path
) -> None:
    tying = settings.keys() == {"ensure_weight_tying"}  # PEFT warns of it where nothing is tied
    other = draw_adapter(tmp_path / "other", base, **LAYERS | ({} if tying else settings))
    if tying:
        path = other / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    for to in (qpack.combine, qpack.merge):
        with pytest.raises(AdapterError, match=message):
            to(base, [pair[0], (other, 1.0)], tmp_path / "all", combination=qpack.Combination("linear"))
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_weight_is_of_a_sum(base: Path, tmp_path: Path) -> None:
    adapter = draw_adapter(tmp_path / "adapter", base, **LAYERS, modules_to_save=["lm_head"])
    with pytest.raises(AdapterError, match=r"its weight is 0\.5, but what it does to lm_head\.weight is no sum"):
        qpack.merge(base, [(adapter, 0.5)], tmp_path / "merged")
    with pytest.raises(ValueError, match="its weight is nan, expected a finite number"):
        qpack.merge(base, [(adapter, float("nan"))], tmp_path / "merged")
    with pytest.raises(ValueError, match="combine linear: one adapter is given, expected several"):
        qpack.combine(base, adapter, tmp_path / "all", qpack.Combination("linear"))
    with pytest.raises(OutputExistsError, match="is or holds the input"):
        qpack.combine(base, draw_adapter(tmp_path / "plain", base, **LAYERS), tmp_path / "plain", force=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("svd",), "combine is 'svd', expected one of cat, linear, ties, "),
        (("ties",), "combine ties: density is None, it goes with ties, "),
        (("cat", 0.5), "combine cat: density is 0.5, it goes with ties, "),
        (("ties", 0.0), "density is 0.0, expected over 0 and at most 1"),
        (("ties", 0.5, 1), "combine ties: seed is 1, it goes with dare_linear, dare_ties"),
    ],
)
def test_illegal_combinations(settings: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qpack.Combination(*settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--combine", "linear"), "--combine linear is of several adapters"),
        (("another", "--combine", "ties"), "combine ties: density is None"),
        (("another:nan",), "'nan' is no weight"),
        (("--to", "adapter", "--dtype", "float32"), "--dtype is not for --to adapter"),
        (("--to", "adapter", "--json"), "--json is not for --to adapter"),
    ],
)
def test_options_that_do_not_go_together(arguments: tuple[str, ...], message: str) -> None:
    assert message in run("merge", "base", "adapter", *arguments, "dst", status=2).stderr
