"""Weights that stay packed while a transformer runs: what stays, how wrong it is, and that all else still works."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize as to_blocks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tiny_hunyuan
from closeness import assert_exact_enough, relative_error
from demo.shipped import HIGH_NOISE, I2V, NIGHT, T2V
from lightx2v.blocks import run_blocks
from lightx2v.checkpoint import CheckpointError
from lightx2v.config import Engine
from lightx2v.identify import CheckpointInfo, identify
from lightx2v.loading import load_transformer, with_attention
from lightx2v.lora import Lora, apply_loras, remove_loras
from lightx2v.models.hunyuan_video_15.transformer import Conditioning
from lightx2v.offload.disk import left_in_file
from lightx2v.offload.plan import measure
from lightx2v.offload.stream import BlockStream
from lightx2v.quant.feeding import agreed
from lightx2v.quant.linear import GgufLinear, ScaledLinear
from lightx2v.quant.packing import filling, quantise_weight
from lightx2v_kernels import UnsupportedBackendError
from lightx2v_kernels.quantize.reference import quantize

CPU = torch.device("cpu")
DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
KEPT = Engine(linear="reference")


def tensors_of(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


def nbytes(network: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(network))


def packed(network: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, ScaledLinear | GgufLinear)}


@torch.inference_mode()
def velocity(network: nn.Module, info: CheckpointInfo, device: torch.device = CPU, **options: object) -> Tensor:
    """Of one step in the middle."""
    generator, config = torch.Generator().manual_seed(0), info.config
    latents = torch.randn(1, config.in_channels, 2, 8, 8, generator=generator)
    context = torch.randn(1, 24, config.text_dim, generator=generator)
    if config.image_dim:
        options["clip"] = torch.randn(1, 4, config.image_dim, generator=generator)
    options = {name: each.to(device) if isinstance(each, Tensor) else each for name, each in options.items()}
    return network(latents.to(device), torch.tensor([500.0], device=device), context.to(device), **options)


@pytest.mark.parametrize("path", [HIGH_NOISE, I2V], ids=["a scale a row", "a scale a tensor"])
def test_8_bit_files_stay_as_they_are_stored(path: Path) -> None:
    info, stored = identify(path), load_file(path)
    network, restored = load_transformer(info, KEPT, CPU), load_transformer(info, Engine(), CPU)
    layers = packed(network)
    assert len(layers) == 10 * info.config.num_layers and not packed(restored)
    assert all(info.spec.quantises(name) for name in layers)
    for name, layer in layers.items():
        source = next(key for key in stored if key.endswith(f"{name}.weight"))
        assert torch.equal(layer.weight.view(torch.int8), stored[source].view(torch.int8))
        wanted = layer.weight.float() * layer.weight_scale[:, None]
        assert torch.equal(wanted, restored.get_submodule(name).weight)
    assert 0 < relative_error(velocity(network, info), velocity(restored, info)) < 0.05


@pytest.mark.parametrize(("scheme", "most"), [("fp8", 0.08), ("int8", 0.03)])
def test_a_plain_file_is_quantised_as_it_is_read(scheme: str, most: float) -> None:
    """Every layer is as wrong as rounding its tokens and its weight explains, and no more; what the network adds up to
    is 3.0 % and 1.1 % on this model's random input."""
    info, stored, dtype = identify(T2V), load_file(T2V), DTYPES[scheme]
    network, plain = load_transformer(info, Engine(quant=scheme), CPU), load_transformer(info, Engine(), CPU)
    layers = packed(network)
    assert set(layers) == {name for name, layer in plain.named_modules() if info.spec.quantises(name)}
    tokens = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1))
    for name, layer in layers.items():
        values, scale = quantise_weight(stored[f"{name}.weight"], dtype, name)
        assert torch.equal(layer.weight.view(torch.int8), values.view(torch.int8))
        assert torch.equal(layer.weight_scale, scale)
        weight, x = plain.get_submodule(name).weight, tokens[:, : layer.in_features]
        of_weight = relative_error(values.float() * scale[:, None], weight)
        of_tokens = relative_error(quantize(x, dtype).dense(torch.float32), x)
        found = relative_error(layer(x) - layer.bias, x @ weight.T)
        assert found < 1.1 * (of_weight**2 + of_tokens**2) ** 0.5, name
    assert 0 < relative_error(velocity(network, info), velocity(plain, info)) < most


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_memory_is_a_quarter_of_fp32_and_half_of_bf16(scheme: str) -> None:
    info = identify(T2V)
    for dtype, share in (("fp32", 4), ("bf16", 2)):
        plain = load_transformer(info, Engine(dtype=dtype), CPU)
        network = load_transformer(info, Engine(dtype=dtype, quant=scheme), CPU)
        layers = packed(network)
        weights = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers.values())
        assert weights * share == sum(plain.get_submodule(name).weight.nbytes for name in layers)
        scales = sum(layer.weight_scale.nbytes for layer in layers.values())
        assert nbytes(plain) - nbytes(network) == (share - 1) * weights - scales
        assert sum(measure(network).blocks) < sum(measure(plain).blocks) / share * 1.05


def test_what_is_wanted_decides_not_what_is_stored() -> None:
    info = identify(HIGH_NOISE)
    assert not packed(load_transformer(info, Engine(quant="none", linear="reference"), CPU))
    other = load_transformer(info, Engine(quant="int8"), CPU)
    assert {layer.reads for layer in packed(other).values()} == {torch.int8}
    name, layer = next(iter(packed(other).items()))
    values, scale = quantise_weight(load_transformer(info, Engine(), CPU).get_submodule(name).weight, torch.int8, name)
    assert torch.equal(layer.weight, values) and torch.equal(layer.weight_scale, scale)


def test_a_kernel_that_cannot_run_is_refused_with_every_reason() -> None:
    with pytest.raises(
        UnsupportedBackendError, match=r"fp8_linear backend 'sgl' cannot run on cpu.*'sgl_kernel'.*CPU|cpu"
    ):
        load_transformer(identify(T2V), Engine(quant="fp8", linear="sgl"), CPU)
    with pytest.raises(UnsupportedBackendError, match="unknown int8_linear backend 'cutlass'; known: auto, exact, sgl"):
        load_transformer(identify(T2V), Engine(quant="int8", linear="cutlass"), CPU)
    with pytest.raises(ValueError, match="quant='fp4' is not one of auto, none, fp8, int8"):
        Engine(quant="fp4")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    tensors = load_file(T2V)
    tensors["blocks.0.ffn.0.weight"][3, 5] = float("nan")
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"m\.safetensors: 'blocks\.0\.ffn\.0\.weight' holds values that are not"):
        load_transformer(identify(tmp_path / "m.safetensors"), Engine(quant="fp8"), CPU)


def test_tokens_are_quantised_once_for_the_layers_that_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten layers of a Wan block: three share modulated tokens, two read text, and one what attention gave."""
    info = identify(T2V)
    network = load_transformer(info, Engine(quant="int8"), CPU)
    seen: list[str] = []
    for name, layer in packed(network).items():
        inner = layer._quantize
        monkeypatch.setattr(
            layer, "_quantize", lambda x, dtype, name=name, inner=inner: seen.append(name) or inner(x, dtype)
        )
    velocity(network, info)
    alone = ("self_attn.o", "cross_attn.k", "cross_attn.v", "cross_attn.o")
    assert seen == [f"blocks.{i}.{name}" for i in range(info.config.num_layers) for name in alone]


def test_layers_agree_only_where_all_read_the_same() -> None:
    info = identify(T2V)
    fp8, int8 = (load_transformer(info, Engine(quant=scheme), CPU).blocks[0].self_attn for scheme in DTYPES)
    plain = nn.Linear(4, 4)
    assert agreed(fp8.q, fp8.k, fp8.v) == torch.float8_e4m3fn and agreed(int8.q) == torch.int8
    assert agreed(fp8.q, int8.k) is None and agreed(fp8.q, plain) is None and agreed(plain, plain) is None


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_loras_are_branches_beside_8_bits(scheme: str) -> None:
    info = identify(T2V)
    network, plain = load_transformer(info, Engine(quant=scheme), CPU), load_transformer(info, Engine(), CPU)
    before, states = velocity(network, info), {name: tensor.clone() for name, tensor in network.state_dict().items()}
    applied = apply_loras(network, info, (Lora(NIGHT, 1.0),))
    assert applied.how == "branch"
    assert agreed(network.blocks[0].self_attn.q) is None
    changed = velocity(network, info)
    unquantised = velocity(plain, info)
    apply_loras(plain, info, (Lora(NIGHT, 1.0),))
    wanted = velocity(plain, info)
    assert relative_error(changed - before, wanted - unquantised) < 0.5, "the change is the LoRA's"
    assert relative_error(changed, wanted) < relative_error(before, wanted)
    with pytest.raises(ValueError, match="can be merged only into float32, bfloat16 or float16"):
        apply_loras(load_transformer(info, Engine(quant=scheme), CPU), info, (Lora(NIGHT, 1.0),), "merge")
    remove_loras(network, applied)
    assert torch.equal(velocity(network, info), before)
    assert all(torch.equal(tensor, states[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(("scheme", "lora"), [("fp8", False), ("int8", True)])
@pytest.mark.parametrize("resident", [0, 3])
def test_streamed_equals_resident(scheme: str, lora: bool, resident: int) -> None:
    info = identify(T2V)
    network = load_transformer(info, Engine(quant=scheme), CPU)
    if lora:
        apply_loras(network, info, (Lora(NIGHT, 1.0),))
    wanted = velocity(network, info)
    stream = BlockStream({"": network}, CPU)
    with stream.open(resident, 1):
        found = velocity(stream.bring(), info, run=stream.around(run_blocks, None))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("path", [T2V, HIGH_NOISE], ids=["quantised as it is read", "as stored"])
def test_weights_that_stay_in_the_file_are_packed_on_their_way(path: Path) -> None:
    info = identify(path)
    engine = Engine(quant="fp8")
    wanted = velocity(load_transformer(info, engine, CPU), info)
    network = load_transformer(info, engine, CPU, left=lambda network: left_in_file(network, 2))
    assert sum(layer.weight.is_meta for layer in packed(network).values()) == 20
    stream = BlockStream({"": network}, CPU, headers={"": filling(network, info.header, CPU)})
    with stream.open(1, 1):
        for _ in range(2):
            assert torch.equal(velocity(stream.bring(), info, run=stream.around(run_blocks, None)), wanted)
    stream.release()


def test_another_attention_shares_packed_weights_and_loras() -> None:
    info, engine = identify(T2V), Engine(quant="int8")
    network = load_transformer(info, engine, CPU)
    apply_loras(network, info, (Lora(NIGHT, 1.0),))
    same = with_attention(network, info, engine, CPU)
    assert torch.equal(velocity(same, info), velocity(network, info))
    other = with_attention(network, info, replace(engine, attention="reference"), CPU)
    assert other.blocks[0]._kernels.names["attention"] == "reference" != network.blocks[0]._kernels.names["attention"]
    states = network.state_dict()
    for name, tensor in other.state_dict().items():
        assert tensor.data_ptr() == states[name].data_ptr(), name


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0], ids=lambda kind: kind.name)
def test_ggml_blocks_stay_and_compute_what_restored_ones_do(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    path = _gguf(tmp_path / f"demo-{kind.name}.gguf", kind)
    info = identify(path)
    network, restored = load_transformer(info, KEPT, CPU), load_transformer(info, Engine(), CPU)
    layers = packed(network)
    assert len(layers) == 10 * info.config.num_layers
    assert {layer.encoding for layer in layers.values()} == {kind.name} and not packed(restored)
    assert sum(layer.weight.nbytes for layer in layers.values()) < sum(
        restored.get_submodule(name).weight.nbytes for name in layers
    ) / (3.7 if kind.name == "Q8_0" else 7)
    assert_exact_enough(velocity(network, info), velocity(restored, info))
    applied = apply_loras(network, info, (Lora(NIGHT, 1.0),))
    assert applied.how == "branch"
    apply_loras(restored, info, (Lora(NIGHT, 1.0),))
    assert_exact_enough(velocity(network, info), velocity(restored, info), 1e-5)
    assert not any(
        isinstance(layer, GgufLinear) for layer in packed(load_transformer(info, Engine(quant="int8"), CPU)).values()
    )


def _gguf(path: Path, kind: GGMLQuantizationType) -> Path:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "wan")
    for name, tensor in load_file(T2V).items():
        if re.search(r"blocks\.\d+\.(self_attn|cross_attn|ffn)\..*weight$", name) and tensor.ndim == 2:
            writer.add_tensor(name, to_blocks(tensor.float().numpy(), kind), raw_dtype=kind)
        elif tensor.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
            writer.add_tensor(name, tensor.half().flatten(0, 2).numpy())
        else:
            writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("scheme", "most"), [("fp8", 0.08), ("int8", 0.03)])
def test_hunyuan_multiplies_in_8_bits(scheme: str, most: float, tmp_path: Path) -> None:
    tiny = tiny_hunyuan.make_tiny()
    save_file({name: tensor.contiguous() for name, tensor in tiny.state_dict().items()}, tmp_path / "m.safetensors")
    info = identify(tmp_path / "m.safetensors")
    network = load_transformer(info, Engine(dtype="fp32", quant=scheme), CPU)
    layers = packed(network)
    assert len(layers) == 12 * info.config.num_layers
    assert not any("_mod." in name or name.startswith("txt_in.") for name in layers)
    generator, config = torch.Generator().manual_seed(3), info.config
    asked = Conditioning(torch.randn(1, 6, config.text_dim, generator=generator))
    latents = torch.randn(1, 65, 2, 4, 4, generator=generator)
    with torch.inference_mode():
        found, wanted = (each(latents, torch.tensor([500.0]), asked) for each in (network, tiny))
    assert 0 < relative_error(found, wanted) < most


def streamed_velocity(info: CheckpointInfo, engine: Engine, device: torch.device) -> Tensor:
    """What `velocity` gives where two blocks stay on the device and the others pass through it."""
    stream = BlockStream({"": load_transformer(info, engine, device, CPU)}, device)
    with stream.open(2, 1):
        return velocity(stream.bring(), info, device, run=stream.around(run_blocks, None))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")
@pytest.mark.parametrize("path", [HIGH_NOISE, I2V, T2V], ids=["fp8 a row", "fp8 a tensor", "int8 as it is read"])
def test_a_gpu_multiplies_what_the_file_packs(path: Path) -> None:
    """With "auto", and as near to restored weights as rounding the tokens explains; streamed, to the bit."""
    gpu = torch.device("cuda")
    if path != T2V and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs sm_89 or newer")
    info, engine = identify(path), Engine(dtype="bf16", quant="int8" if path == T2V else "auto")
    network, restored = (
        load_transformer(info, engine, gpu),
        load_transformer(info, Engine(dtype="bf16", quant="none"), gpu),
    )
    assert len(packed(network)) == 10 * info.config.num_layers
    found = velocity(network, info, gpu)
    assert relative_error(found, velocity(restored, info, gpu)) < 0.06
    assert torch.equal(streamed_velocity(info, engine, gpu), found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")
@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0], ids=lambda kind: kind.name)
def test_a_gpu_restores_ggml_blocks_as_it_multiplies(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    gpu, info = torch.device("cuda"), identify(_gguf(tmp_path / f"demo-{kind.name}.gguf", kind))
    network = load_transformer(info, Engine(dtype="bf16"), gpu)
    assert {type(layer) for layer in packed(network).values()} == {GgufLinear}
    restored = load_transformer(info, Engine(dtype="bf16", quant="none"), gpu)
    assert relative_error(velocity(network, info, gpu), velocity(restored, info, gpu)) < 0.01
