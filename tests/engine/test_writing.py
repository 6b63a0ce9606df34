"""`lightx2v quantize`: files that are recognised, equal what is quantised at load, and are whole or not there."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from closeness import relative_error
from demo.shipped import HIGH_NOISE, T2V
from lightx2v.__main__ import main
from lightx2v.checkpoint import CheckpointError
from lightx2v.checkpoint.writing import Entry, write_safetensors
from lightx2v.config import Engine
from lightx2v.identify import identify
from lightx2v.loading import load_transformer
from lightx2v.quant import METADATA_MARK
from lightx2v.quant import writing as quant_writing
from lightx2v.quant.writing import write_quantised

CPU = torch.device("cpu")


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_a_file_equals_what_is_quantised_at_load(scheme: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    target = tmp_path / "m.safetensors"
    assert main(["quantize", str(T2V), str(target), "--scheme", scheme, "--quiet"]) == 0
    assert f"m.safetensors: 60 layers in {scheme}, 0.02 GB became 0.01" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [target]
    info, plain = identify(target), identify(T2V)
    assert (info.format, info.scheme, info.spec) == ("lightx2v", scheme, plain.spec)
    assert info.detail.endswith("a scale a row") and info.config == plain.config
    kept = load_transformer(info, Engine(linear="reference"), CPU).state_dict()
    at_load = load_transformer(plain, Engine(quant=scheme), CPU).state_dict()
    assert list(kept) == list(at_load)
    for name, tensor in kept.items():
        assert torch.equal(tensor.view(torch.uint8), at_load[name].view(torch.uint8)), name
    stored, before = load_file(target), load_file(T2V)
    for name, tensor in before.items():
        assert f"{name}_scale" in stored or torch.equal(stored[name], tensor), name
    with safe_open(target, "pt") as new, safe_open(T2V, "pt") as old:
        assert new.metadata() == old.metadata()


def test_a_file_for_comfyui_has_a_scale_a_tensor_and_says_so(tmp_path: Path) -> None:
    target = tmp_path / "m.safetensors"
    made = write_quantised(T2V, target, "fp8", "comfy")
    assert made.layers == 60 and made.before == identify(T2V).header.nbytes and made.after < 0.65 * made.before
    info = identify(target)
    assert (info.format, info.scheme, info.detail) == ("comfyui", "fp8", "e4m3, a scale a tensor")
    with safe_open(target, "pt") as file:
        layers = json.loads(file.metadata()[METADATA_MARK])["layers"]
    stored, before = load_file(target), load_file(T2V)
    assert set(layers) == {name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")}
    for layer in layers:
        assert stored[f"{layer}.weight_scale"] == before[f"{layer}.weight"].abs().max().float() / 448
    restored = load_transformer(info, Engine(), CPU).state_dict()
    name = "blocks.3.ffn.0.weight"
    assert relative_error(restored[name], before[name].float()) < 0.03


def test_shards_and_other_names_become_one_file(tmp_path: Path) -> None:
    tensors, folder = load_file(T2V), tmp_path / "shards"
    folder.mkdir()
    names = sorted(tensors)
    files = {f"m-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, members in files.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    index = {"weight_map": {name: file for file, members in files.items() for name in members}}
    (folder / "m.safetensors.index.json").write_text(json.dumps(index))
    write_quantised(folder, tmp_path / "a.safetensors", "int8")
    write_quantised(T2V, tmp_path / "b.safetensors", "int8")
    first, second = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in second) and set(first) == set(second)


def test_what_cannot_be_written_is_refused_in_words(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    target = tmp_path / "m.safetensors"
    for arguments, words in (
        ((HIGH_NOISE, target, "fp8"), r"is quantised already, fp8 \(e4m3, a scale a row\): give the bf16"),
        ((T2V, target, "int8", "comfy"), "ComfyUI reads no int8 files; use scheme='fp8', or layout='lightx2v'"),
        ((T2V, target, "fp4"), "scheme='fp4' is not one of fp8, int8"),
        ((T2V, tmp_path / "m.gguf", "fp8"), "give a name that ends so"),
        ((T2V.parent / "Wan2.1_VAE.safetensors", target, "fp8"), "this file is .*VAE"),
        ((tmp_path / "gone.safetensors", target, "fp8"), "no such file"),
    ):
        with pytest.raises(ValueError, match=words):
            write_quantised(*arguments)
    assert not list(tmp_path.iterdir())
    target.write_text("mine")
    assert main(["quantize", str(T2V), str(target), "--quiet"]) == 1
    assert "m.safetensors: is there already; give another name, or force" in capsys.readouterr().err
    assert target.read_text() == "mine"
    assert main(["quantize", str(T2V), str(target), "--quiet", "--force"]) == 0
    assert identify(target).scheme == "fp8"
    own = tmp_path / "own.safetensors"
    own.write_bytes(T2V.read_bytes())
    with pytest.raises(ValueError, match=r"is there already; give another name$"):
        write_quantised(own, own, "fp8", force=True)


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=repr)
def test_nothing_half_written_is_left(failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))
    working = quant_writing.quantise_weight

    def fails_at_the_fifth(*args: object) -> object:
        if next(calls) == 5:
            (partial,) = tmp_path.iterdir()
            assert partial.name.startswith(".m.safetensors.") and partial.suffix == ".part"
            raise failure
        return working(*args)

    monkeypatch.setattr(quant_writing, "quantise_weight", fails_at_the_fifth)
    with pytest.raises(type(failure)):
        write_quantised(T2V, tmp_path / "m.safetensors", "fp8")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_shows_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    monkeypatch.setattr(quant_writing, "quantise_weight", lambda *_: pytest.fail("computed for a disk that is full"))
    with pytest.raises(OSError, match=r"the disk is full.*make room.*m\.safetensors"):
        write_quantised(T2V, tmp_path / "m.safetensors", "fp8")
    assert not list(tmp_path.iterdir())


def test_tensors_come_one_at_a_time_in_any_order(tmp_path: Path) -> None:
    """Of any types and odd sizes, as safetensors itself reads them; a tensor that was not announced is an error."""
    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        "b": torch.randint(-9, 9, (7,), dtype=torch.int8),
        "c": torch.tensor(2.5),
        "d": torch.randn(5).to(torch.float8_e4m3fn),
        "e": torch.empty(0, 3),
        "f": torch.randn(4, 6).T,
    }
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    path = tmp_path / "m.safetensors"
    write_safetensors(path, entries, reversed(tensors.items()), {"x": "y"})
    found = load_file(path)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name].float(), tensor.float())
    for given, words in (
        ({"a": tensors["a"].float()}, "was announced"),
        ({"a": tensors["a"]}, "5 tensors were announced"),
    ):
        with pytest.raises(ValueError, match=words):
            write_safetensors(tmp_path / "n.safetensors", entries, given.items(), {})
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    tensors = load_file(T2V)
    tensors["blocks.1.ffn.2.weight"][0, 0] = float("inf")
    save_file(tensors, tmp_path / "in.safetensors")
    with pytest.raises(CheckpointError, match=r"'blocks\.1\.ffn\.2\.weight' holds values that are not finite"):
        write_quantised(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "int8")
