"""`qpack.verify`: a clean checkpoint passes, and every kind of damage is found and named."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import definitions
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import run
from tiny import write_llama

import qpack
from qpack import _core
from qpack.errors import CheckpointError
from qpack.manifest import Manifest

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"
STATE = f"{UP}.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def recorded(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama packed into several files, with its ``qpack.json``. Read only."""
    directory = tmp_path_factory.mktemp("models") / "recorded"
    qpack.convert(llama, directory, max_shard_size="200KB")
    return directory


@pytest.fixture
def copy(recorded: Path, tmp_path: Path) -> Path:
    shutil.copytree(recorded, tmp_path / "copy")
    return tmp_path / "copy"


def file_of(directory: Path, tensor: str) -> Path:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return directory / str(index["weight_map"][tensor])


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def rerecord(directory: Path) -> None:
    """Make ``qpack.json`` say of the tensors what they are now."""
    digests, fingerprint = definitions.lines(directory), definitions.fingerprint(directory)
    replace(Manifest.read(directory), tensors=digests, fingerprint=fingerprint).write(directory)


def lines(directory: Path, against: Path | None = None) -> list[str]:
    return [str(problem) for problem in qpack.verify(directory, against=against).problems]


def test_digests_and_fingerprint_are_those_of_blake3_itself(recorded: Path) -> None:
    expected = definitions.lines(recorded)
    paths = sorted(recorded.glob("*.safetensors"))
    for threads in (1, 3):
        found = _core.digest_tensors(paths, threads=threads)
        assert {name: digest for _, name, digest in found} == {
            name: line.rsplit(" ", 1)[1] for name, line in expected.items()
        }
    assert qpack.verify(recorded).fingerprint == definitions.fingerprint(recorded)
    with pytest.raises(ValueError, match="tensor a has unknown dtype 'U7'"):
        _core.fingerprint([("a", "U7", (1,), "")])


def test_a_clean_checkpoint_passes(recorded: Path, llama: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = qpack.verify(recorded, against=llama, on_progress=lambda *counts: seen.append(counts))
    assert found.ok, found.problems
    assert seen[-1] == (found.bytes + tensor_bytes(llama),) * 2
    assert found.tensors == len(definitions.lines(recorded))
    assert found.errors.keys() == {weight.name for weight in qpack.inspect(recorded).packed}


def tensor_bytes(directory: Path) -> int:
    return sum(tensor.nbytes for tensor in definitions.tensors(directory).values())


@pytest.mark.parametrize("tensor", [UP, f"{UP}.absmax", f"{UP}.nested_absmax", NORM, "model.embed_tokens.weight"])
def test_a_flipped_bit_is_found_and_named(copy: Path, llama: Path, tensor: str) -> None:
    path = file_of(copy, tensor)
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    end = json.loads(content[8:start])[tensor]["data_offsets"][1]
    content[start + end - 1] ^= 0x10
    path.write_bytes(content)
    weight = tensor.split(".weight")[0] + ".weight"
    (problem,) = qpack.verify(copy).problems
    assert (problem.file, problem.tensor, problem.weight) == (path.name, tensor, weight)
    of = "" if weight == tensor else f" (of {weight})"
    assert str(problem).startswith(f"{path.name}: tensor {tensor}{of}: bytes have digest ")
    against = lines(copy, against=llama)
    assert len(against) >= 1
    if tensor in (NORM, "model.embed_tokens.weight"):
        last = definitions.tensors(llama)[tensor].numel() - 1
        assert against[1:] == [f"{path.name}: tensor {tensor}: is not what {llama} has, from flat index {last} on"]


def test_changed_headers_are_found(copy: Path) -> None:
    path = file_of(copy, NORM)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NORM] = tensors[NORM].view(torch.float16)[None]

    rewrite(path, change)
    assert lines(copy) == [f"{path.name}: tensor {NORM}: is F16 [1, 256], recorded BF16 [256]"]

    manifest = Manifest.read(copy)
    replace(manifest, tensors=definitions.lines(copy)).write(copy)
    (line,) = lines(copy)
    assert line.startswith(f"qpack.json: fingerprint is {manifest.fingerprint}, that of the tensors is ")


def test_missing_and_extra_tensors(copy: Path) -> None:
    path = file_of(copy, f"{UP}.absmax")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["stray"] = tensors.pop(f"{UP}.absmax")

    rewrite(path, change)
    index = "model.safetensors.index.json"
    assert sorted(lines(copy)) == [
        f"{path.name}: tensor stray: is not recorded in qpack.json",
        f"{index}: tensor {UP}.absmax (of {UP}): places it in {path.name}, but no file holds it",
        f"{index}: tensor stray: does not place it, but {path.name} holds it",
    ]
    (copy / index).write_text(
        (copy / index).read_text().replace(f'"{UP}.absmax"', '"stray"')  # now only qpack.json knows
    )
    assert sorted(lines(copy)) == [
        f"{path.name}: tensor stray: is not recorded in qpack.json",
        f"{index}: tensor {UP}.absmax (of {UP}): no file holds it, but qpack.json records it",
    ]


def test_missing_extra_and_truncated_files(copy: Path) -> None:
    first, second, third, *_ = sorted(copy.glob("*.safetensors"))
    count = len(load_file(first))
    first.unlink()
    shutil.copy(third, copy / "other.safetensors")
    second.write_bytes(second.read_bytes()[:-1])
    found = qpack.verify(copy)
    assert found.fingerprint is None
    assert str(found.problems[0]) == (
        f"{first.name}: no such file, but model.safetensors.index.json places {count} tensors in it"
    )
    assert [problem.file for problem in found.problems] == [first.name, second.name, "other.safetensors"]
    assert "truncated?" in found.problems[1].reason


def test_a_name_in_two_files_and_an_index_that_disagrees(copy: Path) -> None:
    path, *_ = (path for path in sorted(copy.glob("*.safetensors")) if path != file_of(copy, NORM))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NORM] = torch.zeros(256, dtype=torch.bfloat16)

    rewrite(path, change)
    first, second = sorted([path.name, file_of(copy, NORM).name])
    assert f"{second}: tensor {NORM}: is in {first} too" in lines(copy)
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')
    expected = 'places tensor a in "../model.safetensors", which is not a file of this directory'
    assert lines(copy)[0] == f"model.safetensors.index.json: {expected}"
    (copy / "model.safetensors.index.json").write_text("{")
    assert lines(copy)[0].startswith("model.safetensors.index.json: not a valid index: EOF while parsing")


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        (b'"blocksize":64', b'"blocksize":63', "blocksize is 63, expected one of "),
        (b'"blocksize":64', b'"blocksize":32', "expected U8 [4096]"),
        (b'"shape":[512,256]', b'"shape":[256,256]', "expected U8 [32768, 1]"),
        (b'"bfloat16"', b'"bfloat17"', 'dtype is "bfloat17", expected bfloat16, float16 or float32'),
        (b'{"', b'["', "quant state: "),
    ],
)
def test_a_wrong_quant_state_is_found(copy: Path, before: bytes, after: bytes, reason: str) -> None:
    path = file_of(copy, STATE)
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    at = start + json.loads(content[8:start])[STATE]["data_offsets"][0]
    path.write_bytes(content[:at] + content[at:].replace(before, after, 1))
    digest, state = qpack.verify(copy).problems
    assert (digest.tensor, digest.weight) == (STATE, UP)
    assert state.weight == UP
    assert reason in state.reason
    (copy / "qpack.json").unlink()
    assert [problem.reason for problem in qpack.verify(copy).problems] == [state.reason]


def test_structure_without_qpack_json(copy: Path) -> None:
    (copy / "qpack.json").unlink()
    found = qpack.verify(copy)
    assert found.ok
    assert "well formed (no qpack.json, so only the structure was checked)" in found.summary()

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP}.nested_absmax"][0] = torch.nan

    rewrite(file_of(copy, UP), change)
    (problem,) = qpack.verify(copy).problems
    assert problem.weight == UP
    assert "the scale of block 0 is not finite" in problem.reason

    rewrite(file_of(copy, UP), lambda tensors: tensors[f"{UP}.quant_map"].neg_())
    (problem,) = qpack.verify(copy).problems
    assert "holds other levels than those of NF4" in problem.reason
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["load_in_4bit"] = False
    (copy / "config.json").write_text(json.dumps(config))
    assert lines(copy)[-1] == "config.json: quantization_config has load_in_4bit False, expected True"


def test_a_manifest_that_disagrees_with_itself(copy: Path) -> None:
    manifest = Manifest.read(copy)
    errors = dict(manifest.errors)
    error = errors.pop(UP)
    replace(manifest, errors=errors | {NORM: error}, kept=dict(manifest.kept) | {UP: "why"}).write(copy)
    assert lines(copy) == [
        f"qpack.json: tensor {UP}: is packed, but no error is recorded for it",
        f"qpack.json: tensor {NORM}: is recorded with an error, but it is not packed",
        f"qpack.json: tensor {UP}: is recorded as kept, but it is packed",
    ]
    (copy / "qpack.json").write_text("{}")
    assert lines(copy) == ["qpack.json: format is None, expected 1"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_errors_against_the_source(tmp_path: Path, dtype: str, double_quant: bool) -> None:
    # in_features of 72: blocks straddle rows, and the last block of the narrow weights is short.
    source = write_llama(tmp_path / "source", hidden_size=256, intermediate_size=72, dtype=dtype)
    qpack.convert(source, tmp_path / "packed", double_quant=double_quant, blocksize=128)
    manifest = Manifest.read(tmp_path / "packed")
    one = qpack.verify(tmp_path / "packed", against=source, threads=1)
    assert one.ok, one.problems
    assert one.errors == qpack.verify(tmp_path / "packed", against=source, threads=3).errors
    for name, found in one.errors.items():
        assert found.relative == pytest.approx(manifest.errors[name].relative, rel=1e-4)
        assert found.worst_block == manifest.errors[name].worst_block
        assert 0.08 < found.relative < found.worst < 0.2
    name, found = next(iter(one.errors.items()))
    changed = {name: replace(found, relative=found.relative * 1.01, worst=found.worst * 0.99)}
    replace(manifest, errors=dict(one.errors) | changed).write(tmp_path / "packed")
    relative, worst = lines(tmp_path / "packed", against=source)
    assert f"tensor {name}: relative error against the source is {found.relative:.6f}, recorded " in relative
    assert f"tensor {name}: worst error against the source is {found.worst:.6f}, recorded " in worst


def test_weights_of_several_chunks_with_an_odd_tail(tmp_path: Path) -> None:
    """A million and some elements: more than a thread takes at a time, and no whole number of blocks or bytes."""
    torch.manual_seed(0)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    weight, embedding = torch.randn(1025, 1025), torch.randn(1025, 1025)
    weight.view(-1)[800_000:800_064] = torch.linspace(0.035, 0.045, 64)  # between two levels
    weight.view(-1)[800_000] = 1.0
    save_file({UP: weight, "model.embed_tokens.weight": embedding}, source / "model.safetensors")
    qpack.convert(source, tmp_path / "packed")
    manifest = Manifest.read(tmp_path / "packed")
    one = qpack.verify(tmp_path / "packed", against=source, threads=1)
    assert one.ok, one.problems
    assert one.errors == qpack.verify(tmp_path / "packed", against=source, threads=3).errors
    assert one.errors[UP].worst_block == manifest.errors[UP].worst_block == 800_000 // 64
    assert one.errors[UP].relative == pytest.approx(manifest.errors[UP].relative, rel=1e-6)

    name = "model.embed_tokens.weight"
    rewrite(tmp_path / "packed" / "model.safetensors", lambda tensors: tensors[name][-1, -2:].add_(1))
    rerecord(tmp_path / "packed")
    (line,) = lines(tmp_path / "packed", against=source)
    assert line.endswith(f"tensor {name}: is not what {source} has, from flat index {1025 * 1025 - 2} on")


def test_another_source_is_found(copy: Path, tmp_path: Path) -> None:
    other = write_llama(tmp_path / "other", seed=1)
    found = qpack.verify(copy, against=other)
    assert found.problems[0].file == "qpack.json"
    assert found.problems[0].reason.startswith("was packed from tensors with digest ")
    assert {problem.weight for problem in found.problems[1:]} >= found.errors.keys() | {"model.embed_tokens.weight"}

    wider = write_llama(tmp_path / "wider", intermediate_size=256, layers=3)
    reasons = [str(problem) for problem in qpack.verify(copy, against=wider).problems]
    assert any(f"tensor {UP}: has shape [512, 256], its source [256, 256]" in reason for reason in reasons)
    extra = "model.layers.2.mlp.up_proj.weight"
    assert f"model.safetensors.index.json: tensor {extra}: no file holds it, but {wider} does" in reasons
    fewer = write_llama(tmp_path / "fewer", layers=1)
    assert f"{file_of(copy, UP).name}: tensor {UP}: {fewer} has nothing that it was made from" in lines(
        copy, against=fewer
    )


def test_what_cannot_be_compared_is_a_problem(recorded: Path, packed: Path, llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(llama, source)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP][0, 0] = torch.inf

    rewrite(file_of(source, UP), change)
    rewrite(file_of(source, NORM), lambda tensors: tensors.update({NORM: tensors[NORM].long()}))
    _, *problems = lines(recorded, against=source)
    assert sorted(problems) == [
        f"{file_of(recorded, NORM).name}: tensor {NORM}: is BF16, which is no rounding of I64",
        f"{file_of(recorded, UP).name}: {file_of(source, UP)}: tensor {UP}: holds values that are not finite",
    ]
    with pytest.raises(CheckpointError, match=r"quantized already \(bitsandbytes\)"):
        qpack.verify(recorded, against=packed)


def test_a_kept_tensor_is_its_source_rounded_once(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source", dtype="float32")
    qpack.convert(source, tmp_path / "packed")
    path = tmp_path / "packed" / "model.safetensors"

    def cast(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16()

    rewrite(path, cast)
    rerecord(tmp_path / "packed")
    assert lines(tmp_path / "packed", against=source) == []
    rewrite(path, lambda tensors: tensors["model.embed_tokens.weight"][3, 7].mul_(1.01))
    rerecord(tmp_path / "packed")
    name = "model.embed_tokens.weight"
    expected = f"model.safetensors: tensor {name}: is not what {source} has rounded to BF16, from flat index 775 on"
    assert lines(tmp_path / "packed", against=source) == [expected]


def test_the_command(copy: Path, llama: Path, tmp_path: Path) -> None:
    done = run("verify", copy, "--against", llama, "--threads", 2)
    assert done.stdout.startswith(f"{copy}: 90 tensors, ")
    assert done.stdout.count("\n") == 1
    assert f"fingerprint {definitions.fingerprint(copy)}, and as packed from {llama}, in " in done.stdout
    assert "verify: " in done.stderr
    report = json.loads(run("verify", copy, "--json", "-q").stdout)
    assert (report["ok"], report["problems"], report["fingerprint"]) == (True, [], definitions.fingerprint(copy))
    rewrite(file_of(copy, NORM), lambda tensors: tensors[NORM].add_(1))
    done = run("verify", copy, "-q", status=1)
    assert done.stdout.splitlines()[0].startswith(f"{copy}/{file_of(copy, NORM).name}: tensor {NORM}: bytes have ")
    assert done.stdout.splitlines()[1].startswith(f"{copy}: 1 problem in 90 tensors, ")
    (problem,) = json.loads(run("verify", copy, "-q", "--json", status=1).stdout)["problems"]
    assert (problem["tensor"], problem["weight"]) == (NORM, NORM)
    assert run("verify", tmp_path / "nowhere", status=1).stderr == f"error: {tmp_path / 'nowhere'}: not a directory\n"
    with pytest.raises(CheckpointError, match="nowhere: not a directory"):
        qpack.verify(copy, against=tmp_path / "nowhere")
