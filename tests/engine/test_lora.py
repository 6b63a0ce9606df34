"""LoRA files: one change in every dialect, every kind of tensor, and each layer's scale."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from closeness import relative_error
from lightx2v.lora import (
    Lora,
    apply_loras,
    read_lora,
    remove_loras,
)
from tiny_lora import (
    ALPHA,
    DIALECTS,
    RANK,
    assert_same,
    diffusers_module,
    expected,
    factors,
    pair,
    run,
    state,
    tensors,
    transformer,
    write,
)

FILE = "a.safetensors"
ALPHA_KEY = "diffusion_model.blocks.0.self_attn.q.alpha"


@pytest.fixture
def model() -> nn.Module:
    return transformer()


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_gives_the_same_weights(dialect: str, model: nn.Module, tmp_path: Path) -> None:
    pairs, before = factors(model), state(model)
    wanted = expected(model, pairs, 0.7 * ALPHA / RANK)
    path = write(tmp_path / FILE, tensors(pairs, dialect))
    applied = apply_loras(model, None, [Lora(path, 0.7)])
    assert applied.how == "merge" and not applied.coverage[0].skipped
    for name, tensor in model.state_dict().items():
        assert relative_error(tensor, wanted[name].float()) < 1e-6, name
    changed = {name for name in before if not torch.equal(before[name], model.state_dict()[name])}
    assert changed == {f"{layer}.weight" for layer in pairs}


KINDS: dict[str, tuple[str, str]] = {
    "diff": ("diffusion_model.head.head.diff", "head.head.weight"),
    "diff_b": ("diffusion_model.blocks.0.ffn.2.diff_b", "blocks.0.ffn.2.bias"),
    "diff_m of a block": ("diffusion_model.blocks.1.diff_m", "blocks.1.modulation"),
    "diff_m of the head": ("diffusion_model.head.diff_m", "head.modulation"),
    "diff of a modulation": ("diffusion_model.blocks.0.modulation.diff", "blocks.0.modulation"),
    "diffusers' modulation": ("transformer.blocks.1.scale_shift_table.diff", "blocks.1.modulation"),
    "norm": ("diffusion_model.blocks.0.self_attn.norm_q.diff", "blocks.0.self_attn.norm_q.weight"),
    "affine norm": ("diffusion_model.blocks.0.norm3.diff_b", "blocks.0.norm3.bias"),
    "diffusers' norm": ("transformer.blocks.0.norm2.diff", "blocks.0.norm3.weight"),
    "lycoris' norm": ("lycoris_blocks_0_norm3.w_norm", "blocks.0.norm3.weight"),
    "convolution": ("diffusion_model.patch_embedding.diff", "patch_embedding.weight"),
}


@pytest.mark.parametrize("how", ["merge", "branch"])
@pytest.mark.parametrize("kind", KINDS)
def test_whole_differences(kind: str, how: str, model: nn.Module, tmp_path: Path) -> None:
    key, parameter = KINDS[kind]
    before, plain = state(model), run(model)
    difference = 0.1 * torch.randn(before[parameter].shape)
    # An alpha beside a whole difference scales nothing.
    path = write(tmp_path / FILE, {key: difference, key.rpartition(".")[0] + ".alpha": torch.tensor(8)})
    reference = transformer()
    with torch.no_grad():
        reference.get_parameter(parameter).add_(0.5 * difference)
    applied = apply_loras(model, None, [Lora(path, 0.5)], how)
    assert not applied.coverage[0].skipped
    assert relative_error(run(model), run(reference)) < 1e-6
    assert relative_error(run(model), plain) > 1e-5
    remove_loras(model, applied)
    assert_same(model, before)


@pytest.mark.parametrize("how", ["merge", "branch"])
def test_a_bias_of_up_is_scaled_like_the_product(how: str, model: nn.Module, tmp_path: Path) -> None:
    layer, bias = "blocks.0.ffn.2", torch.randn(256)
    content = tensors({layer: factors(model)[layer]}, "comfy")
    without = write(tmp_path / "without.safetensors", content)
    path = write(tmp_path / FILE, {**content, f"diffusion_model.{layer}.lora_B.bias": bias})
    reference = transformer()
    apply_loras(reference, None, [Lora(without, 0.5)])
    with torch.no_grad():
        reference.get_parameter(f"{layer}.bias").add_(0.5 * ALPHA / RANK * bias)
    apply_loras(model, None, [Lora(path, 0.5)], how)
    assert relative_error(run(model), run(reference)) < 1e-6


@pytest.mark.parametrize("how", ["merge", "branch"])
def test_a_whole_difference_beside_a_scaled_pair_is_not_scaled(how: str, model: nn.Module, tmp_path: Path) -> None:
    layer, bias = "blocks.0.ffn.2", torch.randn(256)
    content = tensors({layer: factors(model)[layer]}, "comfy")
    path = write(tmp_path / FILE, {**content, f"diffusion_model.{layer}.diff_b": bias})
    reference = transformer()
    with torch.no_grad():
        for name, tensor in expected(model, {layer: factors(model)[layer]}, 0.5 * ALPHA / RANK).items():
            reference.state_dict()[name].copy_(tensor)
        reference.get_parameter(f"{layer}.bias").add_(0.5 * bias)
    apply_loras(model, None, [Lora(path, 0.5)], how)
    assert relative_error(run(model), run(reference)) < 1e-6


def test_a_pair_of_convolutions(model: nn.Module, tmp_path: Path) -> None:
    down, up = torch.randn(RANK, 16, 1, 2, 2), torch.randn(256, RANK, 1, 1, 1)
    before = state(model)["patch_embedding.weight"]
    key = "diffusion_model.patch_embedding.lora_"
    path = write(tmp_path / FILE, {f"{key}down.weight": down, f"{key}up.weight": up})
    for how in ("merge", "branch"):
        applied = apply_loras(model, None, [Lora(path)], how)
        difference = torch.einsum("orabc,rixyz->oixyz", up, down)
        assert relative_error(model.get_parameter("patch_embedding.weight"), before + difference) < 1e-6
        remove_loras(model, applied)


def test_a_fused_layer_is_split_over_ours(tmp_path: Path) -> None:
    """ComfyUI's img_attn.qkv of HunyuanVideo-1.5 is three layers of the original file, q, k and v from the top."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.img_attn_v, self.img_attn_k, self.img_attn_q = (nn.Linear(6, 4) for _ in range(3))

    network = nn.ModuleDict({"double_blocks": nn.ModuleList([Block()])}).requires_grad_(False)
    before = state(network)
    down, up, bias = torch.randn(2, 6), torch.randn(12, 2), torch.randn(12)
    key = "diffusion_model.double_blocks.0.img_attn.qkv"
    content = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.diff_b": bias}
    path = write(tmp_path / FILE, content)
    x = torch.randn(3, 6)
    outputs = {}
    for how in ("merge", "branch"):
        applied = apply_loras(network, None, [Lora(path)], how)
        block = network["double_blocks"][0]
        outputs[how] = torch.cat([block.img_attn_q(x), block.img_attn_k(x), block.img_attn_v(x)], dim=1)
        if how == "merge":
            for row, part in enumerate("qkv"):
                name = f"double_blocks.0.img_attn_{part}"
                rows = slice(4 * row, 4 * row + 4)
                torch.testing.assert_close(
                    network.state_dict()[f"{name}.weight"], before[f"{name}.weight"] + up[rows] @ down
                )
                torch.testing.assert_close(network.state_dict()[f"{name}.bias"], before[f"{name}.bias"] + bias[rows])
        remove_loras(network, applied)
        assert_same(network, before)
    assert relative_error(outputs["merge"], outputs["branch"]) < 1e-6


def test_names_of_diffusers_are_those_of_the_published_checkpoint() -> None:
    from lightx2v.models.wan.names import to_diffusers

    for name in factors(transformer()):
        assert to_diffusers(name) == diffusers_module(name)


@pytest.mark.parametrize(
    ("rank", "alpha", "scale"),
    [
        (64, torch.tensor(8), 0.125),  # Wan2.2-Lightning: 64-bit integers
        (64, torch.tensor(8, dtype=torch.int32), 0.125),
        (16, torch.tensor(16.0, dtype=torch.bfloat16), 1.0),
        (16, torch.tensor([4.0]), 0.25),
        (16, torch.tensor(24.0, dtype=torch.float16), 1.5),
        (16, None, 1.0),
    ],
)
def test_alpha_over_rank(rank: int, alpha: Tensor | None, scale: float, tmp_path: Path) -> None:
    content = pair(rank) if alpha is None else {**pair(rank), ALPHA_KEY: alpha}
    (layer,) = read_lora(write(tmp_path / FILE, content)).layers.values()
    assert layer.scale == scale


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"lora_alpha": 32}, 2.0),
        ({"lora_alpha": 32, "use_rslora": False}, 2.0),
        ({"lora_alpha": 32, "use_rslora": True}, 8.0),  # 32 / sqrt(16)
        ({"lora_alpha": 32, "alpha_pattern": {"self_attn.q": 8}}, 0.5),
        ({"lora_alpha": 32, "alpha_pattern": {"attn.q": 8}}, 2.0),  # no whole part of the name
        ({"r": 16}, 1.0),
    ],
)
@pytest.mark.parametrize("where", ["metadata", "diffusers' metadata", "folder", "beside"])
def test_settings_of_peft(settings: dict, scale: float, where: str, tmp_path: Path) -> None:
    path, metadata = tmp_path / "adapter_model.safetensors", None
    if where == "metadata":
        metadata = {"lora_adapter_metadata": json.dumps(settings)}
    elif where == "diffusers' metadata":
        text = {f"transformer.{key}": value for key, value in settings.items()}
        metadata = {"lora_adapter_metadata": json.dumps(text)}
    else:
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    write(path, pair(16, "base_model.model."), metadata)
    (layer,) = read_lora(tmp_path if where == "folder" else path).layers.values()
    assert layer.scale == scale


def test_an_alpha_in_the_file_goes_before_the_settings(tmp_path: Path) -> None:
    settings = {"lora_adapter_metadata": json.dumps({"lora_alpha": 32, "use_rslora": True})}
    path = write(tmp_path / FILE, {**pair(16), ALPHA_KEY: torch.tensor(2.0)}, settings)
    (layer,) = read_lora(path).layers.values()
    assert layer.scale == 2.0 / math.sqrt(16)


def test_a_config_beside_another_file_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 32}')
    (layer,) = read_lora(write(tmp_path / FILE, pair(16))).layers.values()
    assert layer.scale == 1.0
