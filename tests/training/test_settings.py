"""Settings: every refusal names its field, the file's refusals its file."""

from pathlib import Path
from typing import Any

import pytest

from qpack.errors import DataError
from qpack.training import TrainSettings, load_settings


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("r", 0, "r: expected at least 1, found 0"),
        ("r", 8.0, "r: expected an integer, found 8.0"),
        ("r", True, "r: expected an integer, found True"),
        ("lora_alpha", 0, "lora_alpha: expected at least 1, found 0"),
        ("lora_dropout", 1.0, "lora_dropout: expected at least 0 and less than 1, found 1.0"),
        ("lora_dropout", -0.1, "lora_dropout: expected at least 0 and less than 1, found -0.1"),
        ("lr", 0, "lr: expected more than 0, found 0"),
        ("lr", "fast", "lr: expected a finite number, found 'fast'"),
        ("lr", float("nan"), "lr: expected a finite number, found nan"),
        ("lr_scheduler", "constant", "lr_scheduler: expected one of constant_with_warmup, linear, cosine, found"),
        ("warmup_steps", -1, "warmup_steps: expected at least 0, found -1"),
        ("epochs", 0.0, "epochs: expected more than 0, found 0.0"),
        ("max_steps", 0, "max_steps: expected at least 1, found 0"),
        ("batch_size", 0, "batch_size: expected at least 1, found 0"),
        ("grad_accum", 0, "grad_accum: expected at least 1, found 0"),
        ("max_length", 1, "max_length: expected at least 2, found 1"),
        ("max_grad_norm", float("inf"), "max_grad_norm: expected a finite number, found inf"),
        ("optim", "sgd", "optim: expected one of paged_adamw_8bit, paged_adamw_32bit, adamw_8bit, adamw_torch, found"),
        ("fsdp", "yes", "fsdp: expected true or false, found 'yes'"),
        ("use_dora", 1, "use_dora: expected true or false, found 1"),
        ("gradient_checkpointing", "on", "gradient_checkpointing: expected true or false, found 'on'"),
        ("target_modules", [3], "target_modules: expected all-linear, names or a regular expression, found [3]"),
        ("target_modules", [], "target_modules: expected all-linear, names or a regular expression, found ''"),
        ("loraplus_lr_ratio", 0.5, "loraplus_lr_ratio: expected at least 1, found 0.5"),
        ("rank_pattern", {"q_proj": 0}, "rank_pattern['q_proj']: expected at least 1, found 0"),
        ("target_modules", "(", "target_modules: '(' is not a regular expression: "),
        ("alpha_pattern", {"(": 1}, "alpha_pattern: '(' is not a regular expression: "),
        ("alpha_pattern", 8, "alpha_pattern: expected regular expressions with a number each, found 8"),
        ("packing", 1, "packing: expected true or false, found 1"),
        ("weight_decay", -0.1, "weight_decay: expected at least 0, found -0.1"),
        ("eval_split", 1.0, "eval_split: expected more than 0 and less than 1, found 1.0"),
        ("early_stopping", 0, "early_stopping: expected at least 1, found 0"),
        ("keep", 0, "keep: expected at least 1, found 0"),
        ("chat_template", 3, "chat_template: expected the path of a file, found 3"),
        ("report_to", "wandb", "report_to: expected a list of tensorboard, wandb, mlflow, found 'wandb'"),
        ("report_to", ["comet"], "report_to: expected one of tensorboard, wandb, mlflow, found 'comet'"),
        ("seed", -1, "seed: expected at least 0, found -1"),
    ],
)
def test_impossible_value_is_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(DataError) as error:
        TrainSettings(**{field: value})
    assert str(error.value).startswith(message)


def test_names_are_a_list_or_stand_between_commas(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    for text in ("q_proj,v_proj", '" q_proj ,  v_proj"', "[q_proj, v_proj]", "\n- q_proj\n- v_proj"):
        path.write_text(f"target_modules: {text}\n")
        assert load_settings(path) == TrainSettings(target_modules="q_proj,v_proj"), text
    assert TrainSettings(target_modules=r".*\.(up|down)_proj").target_modules == r".*\.(up|down)_proj"


def test_file_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("r: 8\nlr: 2e-5\nepochs: 2\nmax_steps: null\noptim: adamw_torch\n")
    settings = load_settings(path, r=4, seed=7)
    assert settings == TrainSettings(r=4, lr=2e-5, epochs=2, optim="adamw_torch", seed=7)


def test_empty_file_means_defaults(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("# nothing yet\n")
    assert load_settings(path) == TrainSettings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank: 8\n", "unknown setting 'rank', expected one of base, r, lora_alpha, "),
        ("r: eight\n", "r: expected an integer, found 'eight'"),
        ("- r\n", "expected 'field: value' lines, found a list"),
        ("r: [1\n", "not a YAML file: "),
        ("r: !!python/object/apply:os.getpid []\n", "not a YAML file: "),
    ],
)
def test_bad_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        load_settings(path, r=4)  # an override hides nothing
    assert str(error.value).startswith(f"{path}: {message}")
    assert "\n" not in str(error.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.yaml: No such file or directory"):
        load_settings(tmp_path / "nowhere.yaml")


def test_bad_override_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("r: 8\n")
    with pytest.raises(DataError, match=r"^r: expected at least 1, found 0"):
        load_settings(path, r=0)
