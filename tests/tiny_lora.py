"""A small Wan transformer and one change of all its linear layers, written down in every dialect of LoRA files."""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightx2v.models.wan.config import WanConfig
from lightx2v.models.wan.transformer import WanTransformer
from lightx2v_kernels import select

CONFIG = WanConfig(
    hidden_size=256,
    ffn_size=320,
    num_layers=2,
    in_channels=16,
    out_channels=16,
    text_dim=64,
    freq_dim=64,
    patch_size=(1, 2, 2),
)
RANK, ALPHA = 4, 2.0
Factors = dict[str, tuple[Tensor, Tensor]]  # layer -> down (rank, in), up (out, rank)


def transformer(dtype: torch.dtype = torch.float32) -> WanTransformer:
    """The same weights at every call."""
    generator = torch.Generator().manual_seed(0)
    kernels = select(device=torch.device("cpu"), dtype=dtype, head_dim=128)
    model = WanTransformer(CONFIG, kernels).eval().requires_grad_(False)
    for parameter in model.parameters():
        size = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return model.to(dtype)


def factors(model: nn.Module, rank: int = RANK, seed: int = 1) -> Factors:
    """A pair for every linear layer."""
    generator = torch.Generator().manual_seed(seed)
    found: Factors = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            down = torch.randn(rank, layer.in_features, generator=generator) / math.sqrt(layer.in_features)
            found[name] = (down, 0.2 * torch.randn(layer.out_features, rank, generator=generator))
    return found


def expected(model: nn.Module, pairs: Factors, scale: float) -> dict[str, Tensor]:
    """The model's state with scale * up @ down added to each weight, in float64."""
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for name, (down, up) in pairs.items():
        state[f"{name}.weight"] += scale * (up.double() @ down.double())
    return state


def diffusers_name(parameter: str) -> str:
    """diffusers' name of a parameter, from the map that came with the published checkpoint."""
    path = Path(__file__).parent / "formats" / "manifests" / "diffusers_wan2.1_t2v_1.3B.json.gz"
    return json.loads(gzip.decompress(path.read_bytes()))["original_to_diffusers"][parameter]


def diffusers_module(name: str) -> str:
    return diffusers_name(f"{name}.weight").removesuffix(".weight")


# Dialect -> (layer -> what stands before and after "down" or "up" or "A" or "B"), and whether it stores an alpha.
DIALECTS: dict[str, tuple[Callable[[str, str], str], bool]] = {
    "kohya": (lambda name, part: f"lora_unet_{name.replace('.', '_')}.lora_{part}.weight", True),
    "wan_fun": (lambda name, part: f"lora_unet__{name.replace('.', '_')}.lora_{part}.weight", True),
    "peft": (lambda name, part: f"base_model.model.{name}.lora_{'AB'[part == 'up']}.weight", False),
    "peft_named": (lambda name, part: f"base_model.model.{name}.lora_{'AB'[part == 'up']}.default.weight", False),
    "diffusers": (lambda name, part: f"transformer.{diffusers_module(name)}.lora_{'AB'[part == 'up']}.weight", False),
    "diffusers_flat": (
        lambda name, part: f"lora_transformer_{re.sub('[.]', '_', diffusers_module(name))}.lora_{part}.weight",
        True,
    ),
    "comfy": (lambda name, part: f"diffusion_model.{name}.lora_{part}.weight", True),
    "kijai": (lambda name, part: f"diffusion_model.{name}.lora_{part}.weight", False),
    "diffsynth": (lambda name, part: f"diffusion_model.{name}.lora_{'AB'[part == 'up']}.weight", False),
    "lightx2v": (lambda name, part: f"{name}.lora_{'AB'[part == 'up']}", False),
    "lightx2v_old": (lambda name, part: f"model.diffusion_model.{name}.lora.{part}.weight", True),
}


def tensors(pairs: Factors, dialect: str, alpha: Tensor | None = None) -> dict[str, Tensor]:
    """What a file of that dialect holds; where it stores no alpha, up carries ALPHA / RANK."""
    named, has_alpha = DIALECTS[dialect]
    found: dict[str, Tensor] = {}
    for name, (down, up) in pairs.items():
        found[named(name, "down")] = down
        found[named(name, "up")] = up if has_alpha else up * (ALPHA / RANK)
        if has_alpha:
            layer = named(name, "down").split(".lora")[0]
            found[f"{layer}.alpha"] = torch.tensor(ALPHA) if alpha is None else alpha
    return found


def write(path: Path, content: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in content.items()}, path, metadata
    )
    return path


def run(model: nn.Module) -> Tensor:
    """The velocity for one small input, the same at every call; float32."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 16, 2, 4, 6, generator=generator)
    context = torch.randn(1, 5, 64, generator=generator)
    with torch.no_grad():
        return model(latents, torch.tensor([500.0]), context).float()


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every weight."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model: nn.Module, before: dict[str, Tensor]) -> None:
    """The model has these weights bit for bit, and no others."""
    after = model.state_dict()
    assert list(after) == list(before)
    assert not [name for name in before if not torch.equal(after[name], before[name])]


def pair(rank: int, prefix: str = "diffusion_model.") -> dict[str, Tensor]:
    """One layer's factors, without alpha."""
    layer = f"{prefix}blocks.0.self_attn.q"
    return {f"{layer}.lora_A.weight": torch.randn(rank, 256), f"{layer}.lora_B.weight": torch.randn(256, rank)}
