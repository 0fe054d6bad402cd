"""Adapters that must be refused: every kind, how one is made of a good one, and with which status and reason.

The good one has rank 4 and changes q_proj, as `factors.draw` makes it; limits are a registry's.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qpack.adapters.record import Base, Record
from serve.registry.limits import CONFIG_BYTES, HEADER_BYTES

Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B = Q_A.replace("lora_A", "lora_B")
MERGE = "; merge the adapter into its base (`qpack merge`), pack the result, and serve that"


def settings(**changes: Any) -> Callable[[Path], None]:
    """Change adapter_config.json; None takes a setting out."""

    def change(adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))

    return change


def config_text(text: str | bytes) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        (adapter / "adapter_config.json").write_bytes(text.encode() if isinstance(text, str) else text)

    return change


def weights(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Change the tensors."""

    def change(adapter: Path) -> None:
        path = adapter / "adapter_model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)

    return change


def put(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return weights(lambda tensors: tensors.update({name: tensor}))


def each(edit: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return weights(lambda tensors: tensors.update({name: edit(tensor) for name, tensor in tensors.items()}))


def element(name: str, value: float) -> Callable[[Path], None]:
    return weights(lambda tensors: tensors[name].view(-1).__setitem__(5, value))


def file_bytes(edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        path = adapter / "adapter_model.safetensors"
        path.write_bytes(edit(path.read_bytes()))

    return change


def header(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


def sparse(adapter: Path) -> None:
    with (adapter / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(20 << 30)


def long_header(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    with path.open("r+b") as file:
        file.write((HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(HEADER_BYTES + 100)


def linked_outside(name: str) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        outside = adapter.parent / name
        (adapter / name).rename(outside)
        (adapter / name).symlink_to(outside)

    return change


def pipe(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.unlink()
    os.mkfifo(path)


def pickle_only(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


def renamed(old: str, new: str) -> Callable[[Path], None]:
    return weights(lambda tensors: tensors.update({name.replace(old, new): tensors.pop(name) for name in [*tensors]}))


def record_of_another_base(adapter: Path) -> None:
    Record({}, Base("elsewhere", "0" * 64, None), {}, {}, None, {}).write(adapter)


def nothing(adapter: Path) -> None:
    shutil.rmtree(adapter)


BAD: dict[str, tuple[Callable[[Path], None], int, str]] = {
    # the directory and its files
    "no directory": (nothing, 422, "adapter: not a directory"),
    "no settings": (lambda a: (a / "adapter_config.json").unlink(), 422, "adapter_config.json: no such file"),
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), 422, "safetensors: no such file"),
    "pickled weights": (pickle_only, 422, "adapter_model.bin: pickled weights can run code when loaded"),
    "weights linked from outside": (
        linked_outside("adapter_model.safetensors"),
        422,
        "adapter_model.safetensors: is a symbolic link to ",
    ),
    "settings linked from outside": (linked_outside("adapter_config.json"), 422, "is a symbolic link to "),
    "a pipe for weights": (pipe, 422, "adapter_model.safetensors: not a file"),
    "20 GB of nothing": (sparse, 413, "adapter_model.safetensors: 21.5 GB, expected at most 8 MB"),
    "large settings": (config_text(" " * (CONFIG_BYTES + 1)), 413, "adapter_config.json: 1.05 MB, expected at most"),
    # settings
    "settings that are no JSON": (config_text("r: 4"), 422, "adapter_config.json: not valid JSON"),
    "settings that are binary": (config_text(b"\xff\xfe\x80"), 422, "adapter_config.json: not valid JSON"),
    "settings that are a list": (config_text("[]"), 422, "expected a JSON object, found list"),
    "settings that are nested": (config_text("[" * 100_000), 422, "adapter_config.json: not valid JSON"),
    "another method": (settings(peft_type="LOHA"), 422, "peft_type is 'LOHA', expected 'LORA'"),
    "prompt tuning": (settings(peft_type="PROMPT_TUNING"), 422, "peft_type is 'PROMPT_TUNING'"),
    "no rank": (settings(r=None), 422, "r is None, expected a whole number over 0"),
    "rank zero": (settings(r=0), 422, "r is 0, expected a whole number over 0"),
    "a rank that is text": (settings(r="4"), 422, "r is '4', expected a whole number over 0"),
    "half a rank": (settings(r=4.5), 422, "r is 4.5, expected a whole number over 0"),
    "another rank than the factors'": (settings(r=8), 422, "have ranks 4 and 4, expected 8"),
    "infinite alpha": (settings(lora_alpha=float("inf")), 422, "lora_alpha is inf, expected a number over 0"),
    "alpha that is not a number": (settings(lora_alpha=float("nan")), 422, "lora_alpha is nan, expected a number"),
    "patterns in a list": (settings(rank_pattern=["q_proj"]), 422, "rank_pattern is ['q_proj'], expected numbers"),
    "a pattern that is none": (settings(rank_pattern={"(": 4}), 422, "rank_pattern: '(' is no regular expression"),
    "a pattern's value that is none": (settings(alpha_pattern={"q": "x"}), 422, "alpha_pattern of 'q' is 'x'"),
    "DoRA": (settings(use_dora=True), 422, f"use_dora is True, which is not plain LoRA{MERGE}"),
    "saved modules": (settings(modules_to_save=["lm_head"]), 422, "modules_to_save is ['lm_head'], which is not plain"),
    "trained tokens": (settings(trainable_token_indices=[1, 2]), 422, "trainable_token_indices is [1, 2], which is"),
    "fused parameters": (settings(target_parameters=["experts.down_proj"]), 422, "target_parameters is"),
    "transposed weights": (
        settings(fan_in_fan_out=True),
        422,
        f"fan_in_fan_out is True, which is not plain LoRA{MERGE}",
    ),
    "biases": (settings(bias="all"), 422, f"bias is 'all', expected 'none'{MERGE}"),
    "bias of the factors": (settings(lora_bias=True), 422, "lora_bias is True, which is no change of the base's"),
    "activated LoRA": (settings(alora_invocation_tokens=[1]), 422, "alora_invocation_tokens is [1]"),
    "replicated layers": (settings(layer_replication=[[0, 2]]), 422, "layer_replication is [[0, 2]]"),
    "QALoRA": (settings(use_qalora=True), 422, "use_qalora is True"),
    "PiSSA": (settings(init_lora_weights="pissa"), 422, "init_lora_weights is 'pissa', which changes the base too"),
    # the file of tensors
    "an empty file": (file_bytes(lambda _: b""), 422, "0 bytes are too few for a safetensors file"),
    "a truncated header": (file_bytes(lambda data: data[:100]), 422, "truncated?"),
    "truncated data": (file_bytes(lambda data: data[:-4]), 422, "truncated?"),
    "bytes too many": (file_bytes(lambda data: data + b"0000"), 422, "4 bytes after the last tensor belong to none"),
    "a pickle by another name": (file_bytes(lambda _: b"\x80\x04\x95" + bytes(1000)), 422, "header"),
    "a header that is no JSON": (file_bytes(lambda _: header("not json")), 422, "header is not valid"),
    "no tensors": (file_bytes(lambda _: header("{}")), 422, "adapter: holds no tensors"),
    "a tensor given twice": (
        file_bytes(lambda _: header('{"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"x":{}}')),
        422,
        "header is not valid",
    ),
    "offsets out of the file": (
        file_bytes(lambda _: header('{"x":{"dtype":"F32","shape":[1000],"data_offsets":[0,4000]}}')),
        422,
        "tensor x ends at byte 4000",
    ),
    "sizes that overflow": (
        file_bytes(lambda _: header('{"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}')),
        422,
        "has too many bytes to count",
    ),
    # tensors
    "NaN": (element(Q_A, float("nan")), 422, f"tensor {Q_A} is not finite at flat index 5"),
    "infinity": (element(Q_B, float("inf")), 422, f"tensor {Q_B} is not finite at flat index 5"),
    "more than 16 bits hold": (element(Q_A, 1e30), 422, "expected at most 65504, what 16 bits hold"),
    "a scale beyond 16 bits": (settings(lora_alpha=1e9), 422, "with its scale, expected at most 65504"),
    "f64": (each(lambda tensor: tensor.double()), 422, "is F64, expected one of BF16, F16, F32"),
    "integers": (each(lambda tensor: tensor.to(torch.int8)), 422, "is I8, expected one of BF16, F16, F32"),
    "no lora_B": (weights(lambda tensors: tensors.pop(Q_B)), 422, f"{Q_A} has no partner"),
    "no lora_A": (weights(lambda tensors: tensors.pop(Q_A)), 422, f"{Q_B} has no partner"),
    "another hidden size": (put(Q_A, torch.zeros(4, 128)), 422, f"{Q_A} changes model.layers.0"),
    "another output size": (put(Q_B, torch.zeros(512, 4)), 422, f"{Q_A} changes model.layers.0"),
    "factors of two ranks": (put(Q_A, torch.zeros(2, 256)), 422, "have ranks 2 and 4, expected 4"),
    "a factor of one dimension": (put(Q_A, torch.zeros(256)), 422, "expected two dimensions"),
    "a layer that the base lacks": (renamed("layers.1", "layers.7"), 422, "what the base"),
    "a module that the base lacks": (renamed("q_proj", "qkv"), 422, "what the base"),
    "names without PEFT's prefix": (renamed("base_model.model.", ""), 422, "is not a factor of a Linear weight"),
    "names of one tower more": (renamed("base_model.model.model", "base_model.model.model.text"), 422, "what the base"),
    "DoRA that the settings hide": (
        put(Q_A.replace("lora_A.weight", "lora_magnitude_vector"), torch.ones(256)),
        422,
        "lora_magnitude_vector of shape (256,) is not a factor",
    ),
    "a tensor of the base": (
        put("base_model.model.model.norm.weight", torch.ones(256)),
        422,
        "norm.weight of shape (256,) is not a factor of a Linear weight",
    ),
    "an adapted embedding": (
        put("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(4, 320)),
        422,
        "is not a factor of a Linear weight",
    ),
    "an embedding taken for a Linear": (
        weights(
            lambda tensors: tensors.update(
                {
                    "base_model.model.model.embed_tokens.lora_A.weight": torch.ones(4, 256),
                    "base_model.model.model.embed_tokens.lora_B.weight": torch.ones(320, 4),
                }
            )
        ),
        422,
        f"changes model.embed_tokens.weight, which is not a Linear weight{MERGE}",
    ),
    "another base": (record_of_another_base, 422, "was trained on the base elsewhere (fingerprint 000000000000)"),
    "a record that is none": (lambda a: (a / "qpack_adapter.json").write_text("{}"), 422, "format is None, expected 1"),  # type: ignore[dict-item]  # the length is not used
    # what is large, or slow
    "a header of 32 MiB": (long_header, 413, "expected at most"),
}
