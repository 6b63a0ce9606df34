"""Low-rank factors on the linears of the blocks: trained, written in two dialects, and read back.

A step writes base + up @ down into the transformer's own weights and takes the factors' gradients from the weights'
gradients by the chain rule. So the network that trains is the network with the LoRA merged, and its compiled code is
that of any other fine-tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from demo.optim import Optimizer, Settings
from demo.stages.loop import Work
from lightx2v.models.wan.transformer import WanTransformer

SETTINGS = Settings(rate=2e-3, matrix_rate=0.0, average=0.997)


@dataclass(frozen=True)
class Group:
    """Linears of one shape: N of (out, in). down is (N, rank, in), up (N, out, rank), base (N, out, in) float32."""

    layers: tuple[str, ...]
    linears: tuple[nn.Linear, ...]
    base: Tensor
    down: nn.Parameter
    up: nn.Parameter


@dataclass(frozen=True)
class Factors:
    """The factors of a transformer's block linears; alpha equals the rank, so nothing is scaled."""

    rank: int
    groups: tuple[Group, ...]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        parts = ((f"{index}.{kind}", group, kind) for index, group in enumerate(self.groups) for kind in ("down", "up"))
        return [(name, getattr(group, kind)) for name, group, kind in parts]

    @torch.no_grad()
    def merge(self) -> None:
        """Write base + up @ down into the transformer."""
        for group in self.groups:
            merged = torch.baddbmm(group.base, group.up, group.down)
            torch._foreach_copy_([linear.weight.data for linear in group.linears], list(merged.unbind(0)))

    @torch.no_grad()
    def pull(self) -> None:
        """Turn the gradients of the merged weights into those of the factors."""
        for group in self.groups:
            found = [linear.weight.grad for linear in group.linears]
            grads = torch.stack([grad for grad in found if grad is not None]).float()
            group.down.grad = group.up.transpose(1, 2) @ grads
            group.up.grad = grads @ group.down.transpose(1, 2)


def new_factors(transformer: WanTransformer, rank: int, generator: torch.Generator) -> Factors:
    """Factors that change nothing yet."""
    shapes: dict[tuple[int, int], list[tuple[str, nn.Linear]]] = {}
    for name, module in transformer.blocks.named_modules():
        if isinstance(module, nn.Linear):
            shape = (module.out_features, module.in_features)
            shapes.setdefault(shape, []).append((f"blocks.{name}", module))
    groups = []
    for (rows, columns), members in shapes.items():
        names, linears = zip(*members, strict=True)
        base = torch.stack([linear.weight.detach().float() for linear in linears])
        down = torch.randn(len(members), rank, columns, device=base.device, generator=generator) * columns**-0.5
        up = torch.zeros(len(members), rows, rank, device=base.device)
        groups.append(Group(names, linears, base, nn.Parameter(down), nn.Parameter(up)))
    return Factors(rank, tuple(groups))


def lora_step(
    transformer: WanTransformer,
    factors: Factors,
    optimizer: Optimizer,
    loss: Callable[[], tuple[Tensor, Tensor]],
) -> Work:
    """One step of the factors. loss: what to minimise and the error to report, of the transformer as it is."""
    weights = list(transformer.parameters())

    def work() -> tuple[Tensor, Tensor]:
        factors.merge()
        value, error = loss()
        value.backward()
        factors.pull()
        for weight in weights:
            weight.grad = None
        return error, optimizer.apply()

    return work


def _average(factors: Factors, optimizer: Optimizer) -> Iterable[tuple[str, Tensor, Tensor]]:
    """(layer, down, up) of every linear, averaged over the training."""
    averages = optimizer.averaged()
    for index, group in enumerate(factors.groups):
        yield from zip(group.layers, averages[f"{index}.down"], averages[f"{index}.up"], strict=True)


def to_comfy(factors: Factors, optimizer: Optimizer) -> dict[str, Tensor]:
    """The names of the Lightning LoRAs in ComfyUI's repackaging: float weights, a whole-number alpha."""
    tensors = {}
    for layer, down, up in _average(factors, optimizer):
        tensors[f"diffusion_model.{layer}.lora_down.weight"] = down.cpu().half()
        tensors[f"diffusion_model.{layer}.lora_up.weight"] = up.cpu().half()
        tensors[f"diffusion_model.{layer}.alpha"] = torch.tensor(factors.rank)
    return tensors


def to_kohya(factors: Factors, optimizer: Optimizer) -> dict[str, Tensor]:
    """The names of kohya's and musubi-tuner's output: bfloat16, dots of the layer as underscores."""
    tensors = {}
    for layer, down, up in _average(factors, optimizer):
        name = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = down.cpu().bfloat16()
        tensors[f"{name}.lora_up.weight"] = up.cpu().bfloat16()
        tensors[f"{name}.alpha"] = torch.tensor(float(factors.rank), dtype=torch.bfloat16)
    return tensors


def merged(weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Weights with a LoRA file of either dialect added; ValueError if a layer of the file is not among them."""
    tensors, result = load_file(path), dict(weights)
    layers = {name.removesuffix(".weight"): name for name in weights if name.endswith(".weight")}
    known = {f"diffusion_model.{layer}": name for layer, name in layers.items()}
    known |= {f"lora_unet_{layer.replace('.', '_')}": name for layer, name in layers.items()}
    for name, down in tensors.items():
        if not name.endswith(".lora_down.weight"):
            continue
        layer = name.removesuffix(".lora_down.weight")
        if layer not in known:
            raise ValueError(f"{path}: no weight for '{layer}'")
        scale = float(tensors[f"{layer}.alpha"]) / down.shape[0]
        delta = tensors[f"{layer}.lora_up.weight"].float() @ down.float()
        result[known[layer]] = result[known[layer]] + scale * delta
    return result
