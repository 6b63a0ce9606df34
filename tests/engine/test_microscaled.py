"""NVFP4 and MXFP8 as people meet them: both layouts of a file, quantised at load, written, refused, offloaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from closeness import relative_error
from demo.shipped import HIGH_NOISE, NIGHT, T2V
from engine.test_packed_linear import streamed_velocity, velocity
from lightx2v.checkpoint import CheckpointError, read_header, read_tensors
from lightx2v.checkpoint.pieces import split
from lightx2v.config import Engine
from lightx2v.identify import identify
from lightx2v.loading import load_transformer, with_attention
from lightx2v.lora import Lora, apply_loras, remove_loras
from lightx2v.quant import METADATA_MARK, find_packed, microscaled
from lightx2v.quant.linear import MicroscaledLinear, kind_of
from lightx2v.quant.writing import write_quantised
from lightx2v_kernels.microscaled import tiled

CPU = torch.device("cpu")
SCHEMES = ("nvfp4", "mxfp8")
KEPT = Engine(linear="reference")
LAYER = "blocks.0.self_attn.q"
E8M0 = pytest.importorskip("torch", minversion="2.7").float8_e8m0fnu


def packed(network: torch.nn.Module) -> dict[str, MicroscaledLinear]:
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, MicroscaledLinear)}


def by_hand(scheme: str, layout: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of one layer as another program writes them, and the values that they stand for, one by one.

    Codes and scales are arbitrary: nothing here shares a line with what reads them but the tiles, which have a test.
    """
    rows, size = weight.shape
    generator = torch.Generator().manual_seed(3)
    if scheme == "mxfp8":
        values = torch.randint(0, 127, (rows, size), generator=generator, dtype=torch.uint8)
        exponents = torch.randint(110, 130, (rows, size // 32), generator=generator, dtype=torch.uint8)
        stood = values.view(torch.float8_e4m3fn).double() * (2.0 ** (exponents.double() - 127)).repeat_interleave(32, 1)
        stored = values.view(torch.float8_e4m3fn) if layout == "comfy" else values
        return {"weight": stored, "weight_scale": tiled(exponents).view(E8M0)}, stood
    codes = torch.randint(0, 16, (rows, size), generator=generator, dtype=torch.uint8)
    scales = torch.randint(1, 127, (rows, size // 16), generator=generator, dtype=torch.uint8)
    sizes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    signed = torch.where(codes > 7, -sizes[(codes & 7).int()], sizes[codes.int() & 7])
    stood = signed * scales.view(torch.float8_e4m3fn).double().repeat_interleave(16, 1)
    even, odd = codes[:, 0::2], codes[:, 1::2]
    tensors = {"weight_scale": tiled(scales).view(torch.float8_e4m3fn)}
    if layout == "comfy":
        tensors |= {"weight": even * 16 + odd, "weight_scale_2": torch.tensor(0.25)}
        return tensors, stood * 0.25
    tensors["weight"] = odd * 16 + even
    if layout == "lightx2v":
        return tensors | {"weight_global_scale": torch.tensor(8.0), "input_absmax": torch.tensor(3.0)}, stood / 8
    folded = {"input_global_scale": torch.tensor(4.0), "alpha": torch.tensor(0.125)}  # calibration folded in
    return tensors | folded, stood * 0.5


def write(path: Path, tensors: Mapping[str, Tensor], layout: str, scheme: str, prefix: str = "") -> Path:
    """The small model with one layer replaced. layout "marks" has a comfy_quant tensor, "comfy" the metadata."""
    state = {f"{prefix}{name}": tensor for name, tensor in load_file(T2V).items()}
    state |= {f"{prefix}{LAYER}.{leaf}": tensor for leaf, tensor in tensors.items()}
    metadata = None
    if layout == "marks":
        said = json.dumps({"format": scheme}).encode()
        state[f"{prefix}{LAYER}.comfy_quant"] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
    elif layout == "comfy":
        metadata = {METADATA_MARK: json.dumps({"layers": {f"{prefix}{LAYER}": {"format": scheme}}})}
    save_file(state, path, metadata)
    return path


@pytest.mark.parametrize(
    ("scheme", "layout", "prefix"),
    [
        ("nvfp4", "comfy", ""),
        ("nvfp4", "marks", "model.diffusion_model."),
        ("nvfp4", "lightx2v", ""),
        ("nvfp4", "folded", ""),
        ("mxfp8", "comfy", "model.diffusion_model."),
        ("mxfp8", "lightx2v", ""),
    ],
)
def test_both_layouts_are_read_to_the_bit(scheme: str, layout: str, prefix: str, tmp_path: Path) -> None:
    """256 rows of 16 and 8 blocks; the layers that are plain stay plain. Kept and restored are the same values."""
    plain = load_file(T2V)[f"{LAYER}.weight"]
    tensors, stood = by_hand(scheme, "comfy" if layout == "marks" else layout, plain)
    info = identify(write(tmp_path / "m.safetensors", tensors, layout, scheme, prefix))
    assert info.scheme == scheme and info.quantised
    assert info.format == ("comfyui" if layout in ("comfy", "marks") else "lightx2v")
    assert info.header.tensors[f"{LAYER}.weight"].shape == tuple(plain.shape)
    restored = load_transformer(info, Engine(), CPU)
    assert torch.equal(restored.get_submodule(LAYER).weight, stood.float())
    network = load_transformer(info, KEPT, CPU)
    assert list(packed(network)) == [LAYER]
    layer = network.get_submodule(LAYER)
    assert torch.equal(layer.weight, tensors["weight"].view(torch.uint8)), "as it lies in the file"
    assert torch.equal(velocity(network, info), velocity(restored, info))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_plain_file_is_quantised_as_it_is_read(scheme: str) -> None:
    info, stored = identify(T2V), load_file(T2V)
    network, plain = load_transformer(info, Engine(quant=scheme), CPU), load_transformer(info, Engine(), CPU)
    layers = packed(network)
    assert set(layers) == {name for name, layer in plain.named_modules() if info.spec.quantises(name)}
    most = {"nvfp4": 0.11, "mxfp8": 0.03}[scheme]
    tokens = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1))
    for name, layer in layers.items():
        made = microscaled.quantise(stored[f"{name}.weight"], scheme, name)
        kept = (layer.weight, layer.weight_scale, *((layer.unit,) if scheme == "nvfp4" else ()))
        assert all(torch.equal(*pair) for pair in zip(kept, made, strict=True))
        x = tokens[:, : layer.in_features]
        assert relative_error(layer(x) - layer.bias, x @ plain.get_submodule(name).weight.T) < most
        assert kind_of(layer) == scheme
        weights = sum(tensor.nbytes for tensor in kept)
        share = weights / plain.get_submodule(name).weight.numel()
        assert share < {"nvfp4": 0.57, "mxfp8": 1.04}[scheme], "4.5 and 8.25 bits a value, and tiles that are filled up"
    assert 0 < relative_error(velocity(network, info), velocity(plain, info)) < 2 * most


def test_what_is_wanted_decides_not_what_is_stored(tmp_path: Path) -> None:
    """From every scheme to every other one; the file's own bytes stay where they are of the one that is wanted."""
    write_quantised(T2V, tmp_path / "m.safetensors", "nvfp4", "comfy")
    info = identify(tmp_path / "m.safetensors")
    assert not packed(load_transformer(info, Engine(quant="none", linear="reference"), CPU))
    assert not packed(load_transformer(info, Engine(), CPU)), "on a CPU restored once"
    same = packed(load_transformer(info, Engine(quant="nvfp4"), CPU))
    assert all(layer.high_first for layer in same.values()) and len(same) == 60
    eight = packed(load_transformer(info, Engine(quant="mxfp8"), CPU))
    assert {layer.scheme for layer in eight.values()} == {"mxfp8"} and len(eight) == 60
    fp8 = load_transformer(info, Engine(quant="fp8"), CPU).get_submodule(LAYER)
    assert kind_of(fp8) == "float8_e4m3fn"
    four = packed(load_transformer(identify(HIGH_NOISE), Engine(quant="nvfp4"), CPU))
    assert len(four) == 40 and not any(layer.high_first for layer in four.values())


@pytest.mark.parametrize("layout", ["comfy", "lightx2v"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_written_file_computes_what_quantising_at_load_does(scheme: str, layout: str, tmp_path: Path) -> None:
    target = tmp_path / "m.safetensors"
    made = write_quantised(T2V, target, scheme, layout)
    assert made.layers == 60 and list(tmp_path.iterdir()) == [target]
    info, plain = identify(target), identify(T2V)
    assert (info.scheme, info.spec, info.config) == (scheme, plain.spec, plain.config)
    assert info.format == {"comfy": "comfyui"}.get(layout, layout)
    at_load = load_transformer(plain, Engine(quant=scheme), CPU)
    close = relative_error(velocity(load_transformer(info, KEPT, CPU), info), velocity(at_load, plain))
    assert close < 1e-6, "the reciprocal of the unit is rounded in LightX2V's layout"
    stored = load_file(target)
    kinds = microscaled.stored_as(scheme, layout, 256, 256)
    for leaf, (shape, dtype) in kinds.items():
        assert stored[f"{LAYER}.{leaf}"].dtype == dtype and tuple(stored[f"{LAYER}.{leaf}"].shape) == shape
    with safe_open(target, "pt") as file:
        metadata = file.metadata() or {}
    assert (METADATA_MARK in metadata) == (layout == "comfy")
    if layout == "comfy":
        layers = json.loads(metadata[METADATA_MARK])["layers"]
        assert len(layers) == 60 and layers[LAYER] == {"format": scheme}


def test_a_pickled_file_is_read_too(tmp_path: Path) -> None:
    """LightX2V's tools write .pth where they are asked to."""
    tensors, stood = by_hand("nvfp4", "lightx2v", load_file(T2V)[f"{LAYER}.weight"])
    state = load_file(T2V) | {f"{LAYER}.{leaf}": tensor for leaf, tensor in tensors.items()}
    torch.save(state, tmp_path / "m.pth")
    network = load_transformer(identify(tmp_path / "m.pth"), KEPT, CPU)
    assert torch.equal(network.get_submodule(LAYER).weight, tensors["weight"])
    x = torch.randn(3, stood.shape[1])
    wanted = x @ stood.float().T + network.get_submodule(LAYER).bias
    assert relative_error(network.get_submodule(LAYER)(x), wanted) < 1e-5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_loras_come_and_go_beside_packed_weights(scheme: str) -> None:
    info = identify(T2V)
    network = load_transformer(info, Engine(quant=scheme), CPU)
    before = velocity(network, info)
    applied = apply_loras(network, info, (Lora(NIGHT, 1.0),))
    assert applied.how == "branch"
    changed = velocity(network, info)
    assert relative_error(changed, before) > 0.01
    other = with_attention(network, info, Engine(quant=scheme, attention="torch_sdpa"), CPU)
    assert relative_error(velocity(other, info), changed) < 1e-5, "shares weights and branches"
    remove_loras(network, applied)
    assert torch.equal(velocity(network, info), before)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_fused_layer_is_cut_with_its_tiles(scheme: str, tmp_path: Path) -> None:
    """As ComfyUI fuses HunyuanVideo-1.5's q, k and v; where a part has no whole tiles, it is refused."""
    for rows in (384, 96):
        tensors, stood = by_hand(scheme, "comfy", torch.empty(rows, 160))
        metadata = {METADATA_MARK: json.dumps({"layers": {"qkv": {"format": scheme}}})}
        path = tmp_path / f"{rows}.safetensors"
        save_file({f"qkv.{leaf}": tensor for leaf, tensor in tensors.items()}, path, metadata)
        header = split(read_header(path), "qkv", ["q", "k", "v"])
        if rows == 96:
            with pytest.raises(CheckpointError, match="has no whole tiles for each part"):
                find_packed(header)
            return
        found = dict(read_tensors(find_packed(header).header))
        assert torch.equal(torch.cat([found[f"{part}.weight"] for part in "qkv"]), stood.float())


Change = Any
WRONG: dict[str, tuple[str, Change, str]] = {
    "no scale": ("nvfp4", {"weight_scale": None}, r"\(nvfp4\) has lost its scale"),
    "no unit": ("nvfp4", {"weight_scale_2": None}, r"has lost its weight_scale_2 or weight_global_scale"),
    "a scale a row": (
        "nvfp4",
        {"weight_scale": torch.ones(256, 1)},
        r"is \[256, 128\] uint8 and its weight_scale \[256, 1\] float32; the tiles of its scales are \[256, 16\]",
    ),
    "scales not filled up": (
        "nvfp4",
        {"weight": torch.zeros(96, 24, dtype=torch.uint8), "weight_scale": torch.zeros(96, 3).to(torch.float8_e4m3fn)},
        r"is \[96, 24\] uint8 and its weight_scale \[96, 3\] float8_e4m3fn; .* are \[128, 4\]",
    ),
    "half a block": (
        "nvfp4",
        {"weight": torch.zeros(256, 4, dtype=torch.uint8)},
        "has 8 values a row, nvfp4 has whole",
    ),
    "plain weights": ("nvfp4", {"weight": torch.zeros(256, 256)}, "float32, nvfp4 weights are uint8 of two axes"),
    "many units": (
        "nvfp4",
        {"weight_scale_2": torch.ones(3)},
        r"its weight_scale_2 is \[3\] float32, it is one float32",
    ),
    "mxfp8 in bf16": ("mxfp8", {"weight": torch.zeros(256, 256)}, "mxfp8 weights are float8_e4m3fn or uint8"),
    "mxfp8 without scale": ("mxfp8", {"weight_scale": None}, r"\(mxfp8\) has lost its scale"),
    "fp8's scale": ("mxfp8", {"weight_scale": torch.tensor(1.0)}, r"its weight_scale \[\] float32; .*\[256, 8\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_in_words(case: str, tmp_path: Path) -> None:
    scheme, changes, words = WRONG[case]
    tensors, _ = by_hand(scheme, "comfy", load_file(T2V)[f"{LAYER}.weight"])
    tensors = {leaf: tensor for leaf, tensor in {**tensors, **changes}.items() if tensor is not None}
    path = write(tmp_path / "m.safetensors", tensors, "comfy", scheme)
    with pytest.raises(CheckpointError, match=words) as caught:
        identify(path)
    assert f"{path}: '{LAYER}.weight'" in str(caught.value)


def test_files_of_other_writers_are_refused(tmp_path: Path) -> None:
    """The same names without ComfyUI's mark: their scales lie in rows."""
    tensors, _ = by_hand("nvfp4", "comfy", load_file(T2V)[f"{LAYER}.weight"])
    path = write(tmp_path / "m.safetensors", tensors, "no mark", "nvfp4")
    with pytest.raises(CheckpointError, match="no comfy_quant mark says that it is ComfyUI's nvfp4"):
        identify(path)
    path = write(tmp_path / "n.safetensors", {"weight_global_scale": torch.tensor(1.0)}, "no mark", "")
    with pytest.raises(CheckpointError, match=r"is \[256, 256\] float16, nvfp4 weights are uint8"):
        identify(path)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scale_that_is_no_number_is_refused_as_it_is_read(scheme: str, tmp_path: Path) -> None:
    tensors, _ = by_hand(scheme, "comfy", load_file(T2V)[f"{LAYER}.weight"])
    tensors["weight_scale"].view(torch.uint8)[7, 3] = 0xFF
    info = identify(write(tmp_path / "m.safetensors", tensors, "comfy", scheme))
    for engine in (KEPT, Engine()):
        with pytest.raises(CheckpointError, match=f"'{LAYER}.weight': a scale in its weight_scale is NaN"):
            load_transformer(info, engine, CPU)
    if scheme == "nvfp4":
        tensors, _ = by_hand(scheme, "comfy", load_file(T2V)[f"{LAYER}.weight"])
        tensors["weight_scale_2"] = torch.tensor(float("inf"))
        info = identify(write(tmp_path / "n.safetensors", tensors, "comfy", scheme))
        with pytest.raises(CheckpointError, match="its scale for the whole tensor is inf"):
            load_transformer(info, KEPT, CPU)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_that_are_not_finite_are_refused(scheme: str, tmp_path: Path) -> None:
    tensors = load_file(T2V)
    tensors["blocks.0.ffn.0.weight"][3, 5] = float("nan")
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"m.safetensors: 'blocks.0.ffn.0.weight' holds values that are not"):
        load_transformer(identify(tmp_path / "m.safetensors"), Engine(quant=scheme), CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_gpu_keeps_what_the_file_packs(scheme: str, tmp_path: Path) -> None:
    """With "auto", as near to restored weights as another order of sums; streamed, to the bit."""
    gpu, target = torch.device("cuda"), tmp_path / "m.safetensors"
    write_quantised(T2V, target, scheme, "comfy")
    info, engine = identify(target), Engine(dtype="bf16")
    network = load_transformer(info, engine, gpu)
    assert len(packed(network)) == 60
    restored = load_transformer(info, Engine(dtype="bf16", quant="none"), gpu)
    found = velocity(network, info, gpu)
    assert relative_error(found, velocity(restored, info, gpu)) < 0.01
    assert torch.equal(streamed_velocity(info, engine, gpu), found)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (10, 0), reason="needs a Blackwell GPU"
)
@pytest.mark.parametrize(("scheme", "most"), [("nvfp4", 0.3), ("mxfp8", 0.1)])
def test_blackwell_multiplies_in_the_format(scheme: str, most: float) -> None:
    gpu, info = torch.device("cuda"), identify(T2V)
    network = load_transformer(info, Engine(dtype="bf16", quant=scheme, linear="torch_scaled_mm"), gpu)
    restored = load_transformer(info, Engine(dtype="bf16", quant=scheme, linear="triton"), gpu)
    assert 0 < relative_error(velocity(network, info, gpu), velocity(restored, info, gpu)) < most
