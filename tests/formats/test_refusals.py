"""Files that cannot be used, in words and before a weight is read: quantisation, mixed layouts, incomplete folders."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sparse import lay_out, manifest, write
from torch import Tensor
from writers import (
    block_split,
    block_split_without_index,
    diffusers,
    lightx2v_fp8,
    lightx2v_fp8_scales_in_another_shard,
)

from lightx2v.checkpoint import CheckpointError, read_tensors
from lightx2v.config import Engine
from lightx2v.identify import identify, recognise
from lightx2v.loading import load_transformer
from lightx2v.models.wan.config import WanConfig
from lightx2v.models.wan.transformer import WanTransformer
from lightx2v.quant import find_packed
from lightx2v_kernels import select

CPU = torch.device("cpu")
KERNELS = select(device=CPU, dtype=torch.float32, head_dim=128)
LAYER = "blocks.0.self_attn.q"
FP8 = torch.float8_e4m3fn
State = dict[str, Tensor]


@pytest.fixture
def state() -> State:
    config = WanConfig(128, 64, 2, 16, 16, text_dim=32, freq_dim=32, patch_size=(1, 2, 2))
    return WanTransformer(config, KERNELS).state_dict()


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightx2v.checkpoint.weights.read_tensors", lambda *a, **k: pytest.fail("read weights"))


def said(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def fp8(state: State) -> State:
    return {f"{LAYER}.weight": state[f"{LAYER}.weight"].to(FP8)}


ONE = torch.tensor(1.0)
SCALED = {f"{LAYER}.weight_scale": ONE}
# What is added to a plain state dict, and what is said.
QUANTISED: dict[str, tuple[Callable[[State], State], str]] = {
    "nvfp4 of others": (lambda s: {f"{LAYER}.weight_scale_2": ONE}, f"'{LAYER}.weight' has a weight_scale_2, but no"),
    "lightx2v nvfp4": (lambda s: {f"{LAYER}.weight_global_scale": ONE}, r"is \[128, 128\] float32, nvfp4 weights are"),
    "compressed-tensors": (lambda s: {f"{LAYER}.weight_packed": ONE}, "quantised as compressed-tensors' 4 bits"),
    "nvfp4 with channels": (lambda s: {f"{LAYER}.pre_quant_scale": ONE}, "a scale for each channel of the tokens"),
    "mxfp4": (
        lambda s: {
            f"{LAYER}.weight": torch.zeros(128, 64, dtype=torch.uint8),
            f"{LAYER}.weight_scale": torch.zeros(128, 8, dtype=torch.uint8),
        },
        r"are \[128, 4\].*no mxfp4, no mxfp6",
    ),
    "bitsandbytes": (lambda s: {f"{LAYER}.weight.absmax": ONE}, "bitsandbytes"),
    "svdquant": (lambda s: {f"{LAYER}.wscales": ONE}, "SVDQuant"),
    "gptq": (lambda s: {f"{LAYER}.qzeros": ONE}, "GPTQ"),
    "blocks of 128": (lambda s: {f"{LAYER}.weight_scale_inv": ONE}, "128 x 128"),
    "packed bytes": (
        lambda s: {f"{LAYER}.weight": torch.zeros(128, 64, dtype=torch.uint8), **SCALED},
        f"'{LAYER}.weight' holds weights packed into uint8",
    ),
    "int8 without scale": (
        lambda s: {f"{LAYER}.weight": torch.zeros(128, 128, dtype=torch.int8)},
        rf"'{LAYER}.weight' \(int8\) has lost its scale",
    ),
    "lost scale": (
        lambda s: {**fp8(s), "blocks.1.ffn.0.weight": s["blocks.1.ffn.0.weight"].to(FP8), **SCALED},
        r"'blocks.1.ffn.0.weight' \(float8_e4m3fn\) has lost its scale",
    ),
    "lost all scales": (
        lambda s: {**fp8(s), "scaled_fp8": torch.zeros(2).to(FP8)},
        rf"'{LAYER}.weight' \(float8_e4m3fn\) has lost its scale",
    ),
    "lost weight": (lambda s: {"blocks.7.ffn.0.scale_weight": ONE}, "scales a weight that the file lacks"),
    "two scales": (
        lambda s: {**fp8(s), **SCALED, f"{LAYER}.scale_weight": torch.tensor(2.0)},
        f"mixes two layouts: '{LAYER}.weight' has two scales",
    ),
    "a scale a column": (
        lambda s: {**fp8(s), f"{LAYER}.weight_scale": torch.ones(1, 128)},
        r"has a scale \[1, 128\] float32 that does not belong to \[128, 128\] float8_e4m3fn",
    ),
    "a scale of bytes": (
        lambda s: {**fp8(s), f"{LAYER}.weight_scale": torch.ones(128, 1).to(FP8)},
        "that does not belong to",
    ),
    "a scale for a plain weight": (lambda s: dict(SCALED), r"float32 that does not belong to \[128, 128\] float32"),
    "unknown comfy_quant": (
        lambda s: {**fp8(s), **SCALED, f"{LAYER}.comfy_quant": said(b'{"format": "int3"}')},
        f"'{LAYER}.comfy_quant' states the format 'int3', known are float8_e4m3fn, float8_e5m2",
    ),
    "damaged comfy_quant": (
        lambda s: {**fp8(s), **SCALED, f"{LAYER}.comfy_quant": said(b"\xff\x00{")},
        f"'{LAYER}.comfy_quant' is not JSON",
    ),
    "comfy_quant of a megabyte": (
        lambda s: {**fp8(s), **SCALED, f"{LAYER}.comfy_quant": said(b" " * 2**20)},
        f"'{LAYER}.comfy_quant' has 1048576 bytes, a mark has some 30 and at most 4096",
    ),
    "comfy_quant that is a list": (
        lambda s: {**fp8(s), **SCALED, f"{LAYER}.comfy_quant": said(b"[1]")},
        "is no JSON object",
    ),
}


@pytest.mark.usefixtures("no_reading")
@pytest.mark.parametrize("case", QUANTISED)
def test_quantisation_that_is_not_known(case: str, state: State, tmp_path: Path) -> None:
    added, words = QUANTISED[case]
    save_file({**state, **added(state)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=words) as caught:
        recognise(tmp_path / "m.safetensors")
    assert str(tmp_path / "m.safetensors") in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ("{", "'_quantization_metadata' is not JSON"),
        ("{}", "_quantization_metadata lists no layers"),
        ('{"layers": {"a": {"format": "nvfp3"}}}', "'_quantization_metadata, a' states the format 'nvfp3'"),
        ('{"layers": {"a": 3}}', "states the format None"),
    ],
)
def test_quantisation_metadata_that_is_not_known(metadata: str, words: str, state: State, tmp_path: Path) -> None:
    save_file({**state, **fp8(state), **SCALED}, tmp_path / "m.safetensors", {"_quantization_metadata": metadata})
    with pytest.raises(CheckpointError, match=words):
        identify(tmp_path / "m.safetensors")


@pytest.mark.usefixtures("no_reading")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("blocks.1.norm3.bias"), "1 of 69 tensors are missing, first 'blocks.1.norm3.bias'"),
        (lambda s: s.update(extra=ONE), "1 tensors have no place in the model, first 'extra'"),
        (
            lambda s: s.update({"blocks.1.ffn.2.bias": torch.zeros(3)}),
            r"'blocks.1.ffn.2.bias' is \[3\], the model expects",
        ),
        (
            lambda s: s.update({k: v.to(torch.int8) for k, v in s.items() if k.endswith("ffn.0.bias")}),
            "is int8, the model expects fractions",
        ),
    ],
)
def test_missing_and_extra_tensors(change: Callable[[State], object], words: str, state: State, tmp_path: Path) -> None:
    assert len(state) == 69
    change(state)
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=words):
        load_transformer(identify(tmp_path / "m.safetensors"), Engine(dtype="fp32"), CPU)


def test_names_of_two_layouts_in_one_file(state: State, tmp_path: Path) -> None:
    diffusers(state, tmp_path / "d")
    path = tmp_path / "d" / "transformer" / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file

    save_file({**load_file(path), "blocks.0.norm3.bias": ONE}, path)
    with pytest.raises(
        CheckpointError, match=r"mixes two layouts: 'blocks\.0\.norm\d\.bias' and 'blocks\.0\.norm\d\.bias'"
    ):
        identify(path)


def test_two_layouts_in_one_folder(state: State, tmp_path: Path) -> None:
    block_split_without_index(state, tmp_path / "b")
    save_file(state, tmp_path / "b" / "whole.safetensors")
    with pytest.raises(CheckpointError, match=r"mixes two layouts: one file a block .* and whole.safetensors"):
        identify(tmp_path / "b")


@pytest.mark.parametrize("writer", [block_split, block_split_without_index])
@pytest.mark.parametrize("gone", ["block_0.safetensors", "non_block.safetensors", "block_1.safetensors"])
def test_a_missing_block(writer: Callable, gone: str, state: State, tmp_path: Path) -> None:
    writer(state, tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text(json.dumps({"num_layers": 2}))
    (tmp_path / "b" / gone).unlink()
    with pytest.raises(CheckpointError, match=f"1 of 3 shards are missing .*{gone}"):
        identify(tmp_path / "b")


def test_a_part_alone_is_its_whole_set(state: State, tmp_path: Path) -> None:
    """Without its scales in the other part, the fp8 part would pass for a file that never had any."""
    lightx2v_fp8_scales_in_another_shard(state, tmp_path / "p")
    found = identify(tmp_path / "p" / "part0.safetensors")
    assert found.detail == "e4m3, a scale a row"
    (tmp_path / "p" / "part1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 shards are missing .*part1.safetensors"):
        identify(tmp_path / "p" / "part0.safetensors")


def test_a_damaged_index_of_something_else_is_no_matter(state: State, tmp_path: Path) -> None:
    (tmp_path / "other.safetensors.index.json").write_text("{")
    save_file(state, tmp_path / "m.safetensors")
    assert identify(tmp_path / "m.safetensors").spec.name == "wan2.1_t2v"


def test_the_published_name_among_others(state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    save_file({"a": ONE}, tmp_path / "other.safetensors")
    assert identify(tmp_path).spec.name == "wan2.1_t2v"


def test_half_a_model(tmp_path: Path) -> None:
    tensors = manifest("wan2.1_t2v_1.3B")["tensors"]
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith("blocks.0.")}
    with pytest.raises(CheckpointError, match="a diffusion transformer that is incomplete or of another model"):
        identify(write(kept, tmp_path / "m.safetensors"))


def test_nothing_known(tmp_path: Path) -> None:
    path = write({"a": {"dtype": "F32", "shape": [2]}}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"not known \(1 tensors\). Supported here: HunyuanVideo-1.5"):
        identify(path)


def test_a_cut_gguf_model(tmp_path: Path) -> None:
    path = lay_out("gguf_wan2.2_i2v_A14B_Q8_0", tmp_path / "models")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 32)
    with pytest.raises(CheckpointError, match=r"truncated: tensor '\S+' ends at byte 15\d+"):
        identify(path)


def test_one_weight_at_a_time_is_in_memory(state: State, tmp_path: Path) -> None:
    path, expected = lightx2v_fp8(state, tmp_path / "m")
    header = identify(path).header
    packed = [name for name, info in header.tensors.items() if info.packed]
    parts: list[str] = []
    for index, (name, tensor) in enumerate(read_tensors(_watched(header, parts), packed), start=1):
        assert len(parts) == index, "unpacked before it was asked for"
        assert torch.equal(tensor, expected[name])


def _watched(header, seen: list[str]):
    """The header, noting each call of an unpacking."""
    from dataclasses import replace

    def noting(name, unpack):
        def noted(parts):
            seen.append(name)
            return unpack(parts)

        return noted

    tensors = {
        name: replace(info, packed=replace(info.packed, unpack=noting(name, info.packed.unpack)))
        if info.packed
        else info
        for name, info in header.tensors.items()
    }
    return replace(header, tensors=tensors)


def test_what_is_found_twice_stays_the_same(state: State, tmp_path: Path) -> None:
    """A header whose weights are found already has nothing more to find."""
    path, _ = lightx2v_fp8(state, tmp_path / "m")
    header = identify(path).header
    assert any(info.packed for info in header.tensors.values())
    again = find_packed(header).header.tensors
    assert {name: info.packed for name, info in again.items()} == {n: i.packed for n, i in header.tensors.items()}
