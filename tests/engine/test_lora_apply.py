"""LoRAs on a model: merged and beside the weights, off again, of another strength."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from closeness import relative_error
from lightx2v.checkpoint import CheckpointError, Packed, TensorInfo, read_header
from lightx2v.config import Engine
from lightx2v.identify import identify
from lightx2v.loading import load_transformer, with_attention
from lightx2v.lora import (
    Lora,
    apply_loras,
    change_loras,
    check_loras,
    merge,
    merging,
    remove_loras,
    share,
)
from lightx2v.lora.apply import Applied
from lightx2v.lora.branch import BranchedLinear
from lightx2v.lora.merging import Source, match_all, restore
from tiny_lora import (
    ALPHA,
    RANK,
    assert_same,
    diffusers_name,
    factors,
    run,
    state,
    tensors,
    transformer,
    write,
)

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
    source = Source(read_header(checkpoint))
    originals = merge(model, match_all([Lora(file)], model), source=source)
    assert [name for name, tensor in originals.items() if tensor is not None] == ["blocks.0.ffn.0.weight"]
    merged = state(model)
    with pytest.raises(ValueError, match="give the checkpoint to read"):
        restore(model, originals)
    save_file({**stored, "more": torch.zeros(1)}, checkpoint)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: has changed since the model was loaded"):
        restore(model, originals, source)
    assert_same(model, merged)
    save_file(stored, checkpoint)
    restore(model, originals, Source(read_header(checkpoint)))
    assert_same(model, before)


def test_packed_weights_come_back_unpacked(model: nn.Module, file: Path, tmp_path: Path) -> None:
    name = "blocks.0.ffn.0.weight"
    packed = model.get_parameter(name).to(torch.float8_e4m3fn)
    save_file({"w": packed, "s": torch.tensor(0.37)}, tmp_path / "model.safetensors")
    raw = read_header(tmp_path / "model.safetensors")
    parts = {"weight": raw.tensors["w"], "scale": raw.tensors["s"]}
    unpack = Packed("fp8", "", parts, lambda found: found["weight"].float() * found["scale"])
    info = TensorInfo(packed.dtype, tuple(packed.shape), raw.path, packed=unpack)
    source = Source(replace(raw, tensors={name: info}))
    with torch.no_grad():
        model.get_parameter(name).copy_(packed.float() * 0.37)
    before = state(model)
    originals = merge(model, match_all([Lora(file)], model), source=source)
    assert originals[name] is None
    restore(model, originals, source)
    assert_same(model, before)


def stored(layout: str) -> dict[str, Tensor]:
    """The transformer's weights as a checkpoint of that layout holds them."""
    weights = dict(transformer().state_dict())
    if layout == "diffusers":
        return {diffusers_name(name): tensor for name, tensor in weights.items()}
    if layout == "fp8":
        for name in [name for name in weights if name.startswith("blocks.") and weights[name].ndim == 2]:
            scale = weights[name].abs().amax(dim=1, keepdim=True) / 448
            weights[f"{name}_scale"] = scale
            weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
    return weights


@pytest.mark.parametrize("layout", ["original", "diffusers", "fp8"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_no_copies_are_kept_of_what_a_checkpoint_holds(layout: str, dtype: str, file: Path, tmp_path: Path) -> None:
    info = identify(write(tmp_path / "model.safetensors", stored(layout)))
    model = load_transformer(info, Engine(dtype=dtype), torch.device("cpu"))
    before = state(model)
    applied = apply_loras(model, info, [Lora(file)])
    assert applied.how == "merge" and len(applied.originals) > 20
    assert set(applied.originals.values()) == {None}
    assert relative_error(model.get_parameter("blocks.0.ffn.0.weight"), before["blocks.0.ffn.0.weight"]) > 1e-2
    remove_loras(model, applied)
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


def test_an_empty_stack_changes_nothing(model: nn.Module) -> None:
    before = state(model)
    assert apply_loras(model, None, ()) == Applied()
    assert_same(model, before)


def test_strength_zero_touches_nothing(model: nn.Module, file: Path) -> None:
    """Not even by reading: no weight has to be put back."""
    assert not apply_loras(model, None, [Lora(file, 0.0)]).originals


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


def test_another_attention_keeps_the_branches(file: Path, tmp_path: Path) -> None:
    info = identify(write(tmp_path / "model.safetensors", transformer().state_dict()))
    model = load_transformer(info, Engine(), torch.device("cpu")).requires_grad_(False)
    apply_loras(model, info, [Lora(file)], "branch")
    other = with_attention(model, info, Engine(attention="reference"), torch.device("cpu"))
    assert relative_error(run(other), run(model)) < 1e-6
    assert relative_error(run(other), run(transformer())) > 1e-2


def test_a_stack_is_checked_against_a_checkpoint_without_its_weights(file: Path, tmp_path: Path) -> None:
    info = identify(write(tmp_path / "model.safetensors", transformer().state_dict()))
    (coverage,) = check_loras([Lora(file)], info)
    assert coverage == apply_loras(transformer(), None, [Lora(file)]).coverage[0]
    wide = {"diffusion_model.blocks.0.ffn.0.lora_A": torch.zeros(4, 384)}
    wide |= {"diffusion_model.blocks.0.ffn.0.lora_B": torch.zeros(384, 4)}
    with pytest.raises(
        CheckpointError, match=r"is for 384 x 384, the model's 'blocks\.0\.ffn\.0\.weight' is 320 x 256"
    ):
        check_loras([Lora(write(tmp_path / "wide.safetensors", wide))], info)


def test_two_stacks_of_branches_are_refused(model: nn.Module, file: Path) -> None:
    apply_loras(model, None, [Lora(file)], "branch")
    with pytest.raises(ValueError, match="has LoRA branches already"):
        apply_loras(model, None, [Lora(file)], "branch")
