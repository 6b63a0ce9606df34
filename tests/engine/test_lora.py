"""LoRAs: one change in every dialect, merged and beside the weights; on, off, of another strength; what is refused."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from closeness import relative_error
from lightx2v.checkpoint import CheckpointError, Header, Packed, TensorInfo, read_header
from lightx2v.lora import (
    Lora,
    apply_loras,
    change_loras,
    for_expert,
    is_lora,
    merge,
    merging,
    read_lora,
    remove_loras,
    share,
)
from lightx2v.lora.apply import Applied
from lightx2v.lora.branch import BranchedLinear
from lightx2v.lora.merging import Source, match_all, restore
from tiny_lora import ALPHA, DIALECTS, RANK, diffusers_module, expected, factors, tensors, transformer, write

FILE = "a.safetensors"


@pytest.fixture
def model() -> nn.Module:
    return transformer()


@pytest.fixture
def file(tmp_path: Path, model: nn.Module) -> Path:
    """Every linear layer, and one of each kind of whole difference."""
    generator = torch.Generator().manual_seed(2)

    def noise(name: str) -> Tensor:
        return 0.1 * torch.randn(model.get_parameter(name).shape, generator=generator)

    content = tensors(factors(model), "comfy")
    content["diffusion_model.blocks.0.self_attn.q.diff_b"] = noise("blocks.0.self_attn.q.bias")
    content["diffusion_model.blocks.1.cross_attn.norm_k.diff"] = noise("blocks.1.cross_attn.norm_k.weight")
    content["diffusion_model.blocks.1.norm3.diff"] = noise("blocks.1.norm3.weight")
    content["diffusion_model.blocks.1.norm3.diff_b"] = noise("blocks.1.norm3.bias")
    content["diffusion_model.blocks.1.diff_m"] = noise("blocks.1.modulation")
    content["diffusion_model.patch_embedding.diff_b"] = noise("patch_embedding.bias")
    return write(tmp_path / FILE, content)


def run(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 16, 2, 4, 6, generator=generator)
    context = torch.randn(1, 5, 64, generator=generator)
    with torch.no_grad():
        return model(latents, torch.tensor([500.0]), context).float()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert not [name for name in before if not torch.equal(after[name], before[name])]


# --- dialects


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


# --- scale


def pair(rank: int, prefix: str = "diffusion_model.") -> dict[str, Tensor]:
    layer = f"{prefix}blocks.0.self_attn.q"
    return {f"{layer}.lora_A.weight": torch.randn(rank, 256), f"{layer}.lora_B.weight": torch.randn(256, rank)}


ALPHA_KEY = "diffusion_model.blocks.0.self_attn.q.alpha"


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


# --- on, off, of another strength


def test_merged_is_the_branch_to_rounding(model: nn.Module, file: Path, tmp_path: Path) -> None:
    second = write(tmp_path / "b.safetensors", tensors(factors(model, rank=7, seed=5), "diffusers"))
    stack = [Lora(file, 0.8), Lora(second, -0.3)]
    plain = run(model)
    applied = apply_loras(model, None, stack, "merge")
    merged = run(model)
    remove_loras(model, applied)
    apply_loras(model, None, stack, "branch")
    assert relative_error(run(model), merged) < 1e-5
    assert relative_error(merged, plain) > 1e-2
    layer = model.get_submodule("blocks.0.self_attn.q")
    assert isinstance(layer, BranchedLinear) and layer.lora.down.shape == (RANK + 7, 256)  # one pair of matmuls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["merge", "branch"])
def test_removal_is_bit_exact(how: str, dtype: torch.dtype, file: Path) -> None:
    model = transformer(dtype)
    before, plain = state(model), run(model)
    applied = apply_loras(model, None, [Lora(file), Lora(file, 0.5)], how)
    assert not torch.equal(run(model), plain)
    remove_loras(model, applied)
    assert_same(model, before)
    assert torch.equal(run(model), plain)


@pytest.mark.parametrize("how", ["merge", "branch"])
def test_another_strength_is_as_if_it_had_been_given_first(how: str, file: Path) -> None:
    model, fresh = transformer(torch.bfloat16), transformer(torch.bfloat16)
    before = state(model)
    applied = apply_loras(model, None, [Lora(file, 2.0), Lora(file, 0.0)], how)
    stack = [Lora(file, 0.3), Lora(file, 0.4)]
    applied = change_loras(model, applied, stack)
    apply_loras(fresh, None, stack, how)
    assert applied.loras == tuple(stack) and applied.how == how
    assert torch.equal(run(model), run(fresh))
    remove_loras(model, applied)
    assert_same(model, before)


def test_one_stack_after_another(model: nn.Module, file: Path, tmp_path: Path) -> None:
    before = state(model)
    other = write(tmp_path / "b.safetensors", tensors(factors(model, seed=5), "kohya"))
    applied = apply_loras(model, None, [])
    for stack in ([Lora(file)], [Lora(other), Lora(file)], [Lora(other, 0.2)], []):
        applied = change_loras(model, applied, stack)
        fresh = transformer()
        apply_loras(fresh, None, stack)
        assert_same(model, state(fresh))
    assert_same(model, before)


def test_a_bad_stack_leaves_the_old_one_on(model: nn.Module, file: Path, tmp_path: Path) -> None:
    applied = apply_loras(model, None, [Lora(file)])
    before = state(model)
    with pytest.raises(CheckpointError):
        change_loras(model, applied, [Lora(tmp_path / "absent.safetensors")])
    assert_same(model, before)


def test_all_changes_of_a_weight_are_rounded_once(file: Path) -> None:
    model = transformer(torch.bfloat16)
    name = "blocks.1.ffn.0"
    down, up = factors(transformer())[name]
    exact = model.get_parameter(f"{name}.weight").double() + (1.0 + 0.5) * ALPHA / RANK * (up @ down).double()
    apply_loras(model, None, [Lora(file), Lora(file, 0.5)])
    wrong = (model.get_parameter(f"{name}.weight") != exact.bfloat16()).float().mean().item()
    assert wrong < 1e-3  # float32 sums fall on the other side of a tie now and then


def test_weights_come_back_from_the_checkpoint(file: Path, tmp_path: Path) -> None:
    model = transformer(torch.bfloat16)
    before = state(model)
    checkpoint = tmp_path / "model.safetensors"
    # One tensor is not in the file as the model has it, as in a layout that fuses it: a copy is kept of that one.
    stored = {name: tensor for name, tensor in before.items() if name != "blocks.0.ffn.0.weight"}
    save_file(stored, checkpoint)
    source = Source.of(read_header(checkpoint))
    originals = merge(model, match_all([Lora(file)], model), source=source)
    assert [name for name, tensor in originals.items() if tensor is not None] == ["blocks.0.ffn.0.weight"]
    merged = state(model)
    with pytest.raises(ValueError, match="give the checkpoint to read"):
        restore(model, originals)
    save_file({**stored, "more": torch.zeros(1)}, checkpoint)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is gone or has changed since it was loaded"):
        restore(model, originals, source)
    assert_same(model, merged)
    save_file(stored, checkpoint)
    restore(model, originals, Source.of(read_header(checkpoint)))
    assert_same(model, before)


def test_packed_weights_come_back_unpacked(model: nn.Module, file: Path, tmp_path: Path) -> None:
    name = "blocks.0.ffn.0.weight"
    packed = model.get_parameter(name).to(torch.float8_e4m3fn)
    save_file({"w": packed, "s": torch.tensor(0.37)}, tmp_path / "model.safetensors")
    raw = read_header(tmp_path / "model.safetensors")
    parts = {"weight": raw.tensors["w"], "scale": raw.tensors["s"]}
    parts = {
        role: TensorInfo(i.dtype, i.shape, i.file, stored)
        for (role, i), stored in zip(parts.items(), "ws", strict=True)
    }
    unpack = Packed("fp8", "", parts, lambda found: found["weight"].float() * found["scale"])
    info = TensorInfo(packed.dtype, tuple(packed.shape), raw.path, packed=unpack)
    source = Source.of(Header(raw.path, {name: info}, {}))
    with torch.no_grad():
        model.get_parameter(name).copy_(packed.float() * 0.37)
    before = state(model)
    originals = merge(model, match_all([Lora(file)], model), source=source)
    assert originals[name] is None
    restore(model, originals, source)
    assert_same(model, before)


@pytest.mark.parametrize("how", ["merge", "branch"])
def test_a_failure_on_the_way_puts_everything_back(
    how: str, model: nn.Module, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, calls = state(model), []

    def fail_later(*given: object) -> None:
        calls.append(given)
        if len(calls) == 3:
            raise MemoryError("no memory left")
        original(*given)

    original: Callable = merging.add
    monkeypatch.setattr(merging, "add", fail_later)
    with pytest.raises(MemoryError):
        apply_loras(model, None, [Lora(file)], how)
    assert_same(model, before)
    assert not [layer for layer in model.modules() if isinstance(layer, BranchedLinear)]


# --- beside the weights


class Int8Linear(nn.Module):
    """What a quantised layer looks like from outside."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("weight_scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.weight_scale, self.bias)


def quantised() -> nn.Module:
    model = transformer()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.startswith("blocks."):
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._modules[leaf] = Int8Linear(layer)
    return model


def test_quantised_weights_get_a_branch(file: Path) -> None:
    model = quantised()
    before = state(model)
    reference = transformer()
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, Int8Linear):
                reference.get_parameter(f"{name}.weight").copy_(layer.weight * layer.weight_scale)
    apply_loras(reference, None, [Lora(file, 0.6)], "merge")
    applied = apply_loras(model, None, [Lora(file, 0.6)])
    assert applied.how == "branch" and not applied.coverage[0].skipped
    assert list(model.state_dict()) == list(before)
    assert relative_error(run(model), run(reference)) < 1e-5
    remove_loras(model, applied)
    assert_same(model, before)


def test_merging_into_quantised_weights_is_refused(file: Path) -> None:
    model = quantised()
    before = state(model)
    with pytest.raises(ValueError, match=r"'blocks\.0\..+\.weight' is quantised.*how='branch'"):
        apply_loras(model, None, [Lora(file)], "merge")
    assert_same(model, before)


def test_a_branch_follows_its_layer(model: nn.Module, file: Path) -> None:
    """Whatever moves, casts or replaces the weights sees them under their names, once."""
    names = list(model.state_dict())
    count = sum(1 for _ in model.parameters())
    apply_loras(model, None, [Lora(file)], "branch")
    assert list(model.state_dict()) == names and sum(1 for _ in model.parameters()) == count
    layer = model.get_submodule("blocks.0.ffn.0")
    assert isinstance(layer, BranchedLinear)
    model.to(torch.bfloat16)
    assert layer.weight is layer.base.weight and layer.weight.dtype == layer.lora.down.dtype == torch.bfloat16
    model.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}, assign=True)
    assert layer.base.weight is layer.weight and not layer.base.weight.any()
    x = torch.randn(2, 256, dtype=torch.bfloat16)
    assert layer(x).any()  # the branch alone


def test_a_second_network_over_the_same_weights_shares_the_branches(file: Path) -> None:
    model, other = transformer(), transformer()
    applied = apply_loras(model, None, [Lora(file)], "branch")
    other.load_state_dict(model.state_dict(), assign=True)
    share(model, other)
    assert torch.equal(run(other), run(model))
    change_loras(model, applied, [Lora(file, 0.5)])
    assert torch.equal(run(other), run(model))


def test_two_stacks_of_branches_are_refused(model: nn.Module, file: Path) -> None:
    apply_loras(model, None, [Lora(file)], "branch")
    with pytest.raises(ValueError, match="has LoRA branches already"):
        apply_loras(model, None, [Lora(file)], "branch")


# --- what is reported


def test_the_line_and_what_was_left_over(model: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = tensors({"blocks.0.ffn.0": factors(model)["blocks.0.ffn.0"]}, "comfy")
    content |= {f"diffusion_model.blocks.{n}.cross_attn.k_img.lora_A": torch.zeros(4, 256) for n in (0, 1)}
    content |= {f"diffusion_model.blocks.{n}.cross_attn.k_img.lora_B": torch.zeros(256, 4) for n in (0, 1)}
    content["lora_te_text_model.lora_down.weight"] = torch.zeros(4, 8)
    content["diffusion_model.blocks.0.extra.weight"] = torch.zeros(4)
    content["diffusion_model.blocks.7.ffn.0.alpha"] = torch.tensor(1.0)
    with caplog.at_level(logging.INFO):
        applied = apply_loras(model, None, [Lora(write(tmp_path / FILE, content), 1.0)])
    line, warning = [record.getMessage() for record in caplog.records]
    assert line == "a.safetensors: 3 of 10 tensors applied (rank 4, scale 0.5 x strength 1)" == applied.lines()[0]
    assert warning.startswith("a.safetensors: 7 tensors not applied: ") and warning.endswith("; and 2 more")
    assert caplog.records[1].levelno == logging.WARNING
    (coverage,) = applied.coverage
    assert coverage.applied | set(coverage.skipped) == set(content) and not coverage.applied & set(coverage.skipped)
    assert coverage.skipped["lora_te_text_model.lora_down.weight"] == "changes a text encoder, not this model"
    assert coverage.skipped["diffusion_model.blocks.0.extra.weight"] == "is not a LoRA's tensor"
    assert coverage.skipped["diffusion_model.blocks.7.ffn.0.alpha"] == "scales a layer that is not in the file"
    reason = "names a layer that this model does not have"
    assert coverage.skipped["diffusion_model.blocks.1.cross_attn.k_img.lora_B"] == reason


def test_a_few_of_another_shape_are_left_out(model: nn.Module, tmp_path: Path) -> None:
    """A text-to-video LoRA on an image-to-video model: only the layer that reads the latents differs."""
    content = tensors(factors(model), "comfy")
    content["diffusion_model.patch_embedding.diff"] = torch.zeros(256, 36, 1, 2, 2)
    (coverage,) = apply_loras(model, None, [Lora(write(tmp_path / FILE, content))]).coverage
    assert coverage.skipped == {
        "diffusion_model.patch_embedding.diff": "is for 256 x 36 x 2 x 2, "
        "the model's 'patch_embedding.weight' is 256 x 16 x 1 x 2 x 2"
    }


# --- what is refused


def refuse(content: dict[str, Tensor], folder: Path, metadata: dict[str, str] | None = None) -> str:
    path = write(folder / FILE, content, metadata)
    model = transformer()
    before = state(model)
    with pytest.raises(CheckpointError) as caught:
        apply_loras(model, None, [Lora(path)])
    assert str(path) in str(caught.value)
    assert_same(model, before)
    return str(caught.value)


def test_another_width_names_both_shapes(tmp_path: Path) -> None:
    layer = "diffusion_model.blocks.0.self_attn.q"
    content = {f"{layer}.lora_down.weight": torch.zeros(8, 384), f"{layer}.lora_up.weight": torch.zeros(384, 8)}
    told = refuse({**content, "diffusion_model.blocks.0.self_attn.q.diff_b": torch.zeros(384)}, tmp_path)
    assert "made for another model" in told
    assert "'diffusion_model.blocks.0.self_attn.q.lora_up.weight' is for 384 x 384" in told
    assert "the model's 'blocks.0.self_attn.q.weight' is 256 x 256" in told


def test_no_layer_of_the_model_names_both_shapes(tmp_path: Path) -> None:
    layer = "lora_unet_double_blocks_0_img_attn_q"
    content = {f"{layer}.lora_down.weight": torch.zeros(8, 2048), f"{layer}.lora_up.weight": torch.zeros(2048, 8)}
    told = refuse(content, tmp_path)
    assert "none of its 1 layers is in the model" in told and "is for 2048 x 2048" in told
    assert "the model has for example 'text_embedding.0.weight', 256 x 64" in told


Q = "diffusion_model.blocks.0.self_attn.q"


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({f"{Q}.dora_scale": torch.ones(256)}, "is a DoRA adapter"),
        ({f"{Q}.lora_magnitude_vector": torch.ones(256)}, "is a DoRA adapter"),
        ({f"{Q}.lora_magnitude_vector.default.weight": torch.ones(256)}, "is a DoRA adapter"),
        ({f"{Q}.hada_w1_a": torch.ones(4, 4)}, "is a LoHa adapter"),
        ({f"{Q}.lokr_w1": torch.ones(4, 4)}, "is a LoKr adapter"),
        ({f"{Q}.a1.weight": torch.ones(4, 4)}, "is a GLoRA adapter"),
        ({f"{Q}.oft_blocks": torch.ones(4, 4)}, "is a OFT adapter"),
        ({f"{Q}.lora_mid.weight": torch.ones(4, 4, 1, 1)}, "is a Tucker adapter"),
        ({ALPHA_KEY: torch.tensor(float("nan"))}, r"q.alpha' is nan, expected a number"),
        ({ALPHA_KEY: torch.ones(2)}, "q.alpha' must be one number, is [2]"),
        ({f"{Q}.lora_A.other.weight": torch.ones(4, 256)}, "change the same layer; keep one adapter in a file"),
        ({"diffusion_model.blocks.0.self_attn.k.lora_up.weight": torch.ones(256, 4)}, "lacks its counterpart"),
        ({"diffusion_model.blocks.0.self_attn.k.lora_B.bias": torch.ones(256)}, "lacks its counterpart"),
        (
            {
                "diffusion_model.blocks.0.self_attn.k.lora_up.weight": torch.ones(256, 4),
                "diffusion_model.blocks.0.self_attn.k.lora_down.weight": torch.ones(5, 256),
            },
            "self_attn.k.lora_down.weight' [5, 256] are no factors of one matrix",
        ),
    ],
)
def test_files_that_cannot_be_applied_as_they_are(extra: dict[str, Tensor], words: str, tmp_path: Path) -> None:
    assert words in refuse({**pair(4), **extra}, tmp_path)


def test_files_without_a_layer(tmp_path: Path) -> None:
    assert "changes only a text encoder" in refuse({"lora_te1_a.lora_down.weight": torch.ones(2, 2)}, tmp_path)
    whole = {name: tensor for name, tensor in transformer().state_dict().items()}
    assert "holds no LoRA tensors; it is" in refuse(whole, tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"lora_alpha": "much"}', '{"lora_alpha": 1, "alpha_pattern": {"(": 1}}'])
def test_damaged_settings(text: str, tmp_path: Path) -> None:
    told = refuse(pair(4), tmp_path, {"lora_adapter_metadata": text})
    assert "its metadata 'lora_adapter_metadata' is damaged" in told


def test_a_missing_file_is_named(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.safetensors: no such file"):
        apply_loras(model, None, [Lora(tmp_path / "absent.safetensors")])


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), "1", None, True])
def test_a_strength_that_is_no_number(strength: object) -> None:
    with pytest.raises(ValueError, match=r"a\.safetensors: LoRA strength must be a finite number"):
        Lora(Path(FILE), strength)  # type: ignore[arg-type]


def test_unknown_words() -> None:
    with pytest.raises(ValueError, match="expert='middle' is not one of both, high, low"):
        Lora(Path(FILE), expert="middle")
    with pytest.raises(ValueError, match="how='hook' is not one of auto, merge, branch"):
        apply_loras(nn.Linear(2, 2), None, [], "hook")


def test_is_lora(tmp_path: Path) -> None:
    assert is_lora(write(tmp_path / FILE, pair(4)))
    with pytest.raises(CheckpointError):
        is_lora(write(tmp_path / "model.safetensors", {"blocks.0.weight": torch.ones(1)}))


# --- experts


def test_each_expert_gets_its_own() -> None:
    both, high, low = (Lora(Path(f"{expert}.safetensors"), expert=expert) for expert in ("both", "high", "low"))
    assert for_expert([both, high, low], "high") == (both, high)
    assert for_expert([both, high, low], "low") == (both, low)
    assert for_expert([both], None) == (both,)
    with pytest.raises(ValueError, match=r"high\.safetensors: is set for the high-noise expert, but one network"):
        for_expert([both, high, low], None)


def test_an_empty_stack_changes_nothing(model: nn.Module) -> None:
    before = state(model)
    assert apply_loras(model, None, ()) == Applied()
    assert_same(model, before)


def test_names_of_diffusers_are_those_of_the_published_checkpoint() -> None:
    from lightx2v.models.wan.names import to_diffusers

    for name in factors(transformer()):
        assert to_diffusers(name) == diffusers_module(name)
