"""LoRAs beside the weights: y = base(x) + (x @ down.T * scale) @ up.T. For weights that cannot be changed exactly
(quantised), that come and go (streamed from disk), or whose strength is being tried out.

All LoRAs of a layer are one pair of matmuls, their ranks concatenated; scale is a vector with an entry per rank.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightx2v.lora.matching import Patch
from lightx2v.lora.merging import Matched, mergeable


@dataclass(frozen=True)
class Segment:
    """Which entries of a branch's scales belong to one LoRA of the stack; scale is the file's, without strength."""

    index: int
    start: int
    stop: int
    scale: float


@dataclass(frozen=True)
class Factors:
    """The parts of one layer's branch before they are joined."""

    downs: list[Tensor]  # each (rank, in)
    ups: list[Tensor]  # each (out, rank)
    biases: list[Tensor]  # each (out,)
    ranks: list[Segment]
    bias_rows: list[Segment]


class Branch(nn.Module):
    """The sum of all LoRAs of one linear layer. Its tensors move with the model but are not part of its state_dict."""

    down: Tensor  # (R, in)
    up: Tensor  # (out, R)
    scale: Tensor  # (R,)
    bias: Tensor  # (N, out), a row per bias
    bias_scale: Tensor  # (N,)

    def __init__(self, factors: Factors, linear: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        size_in, size_out = cast(int, linear.in_features), cast(int, linear.out_features)
        self._ranks, self._bias_rows = tuple(factors.ranks), tuple(factors.bias_rows)
        empty = torch.zeros(0)
        parts = {
            "down": torch.cat([empty.new_zeros(0, size_in), *factors.downs]),
            "up": torch.cat([empty.new_zeros(size_out, 0), *factors.ups], dim=1),
            "scale": torch.zeros(sum(up.shape[1] for up in factors.ups)),
            "bias": torch.stack(factors.biases) if factors.biases else empty.new_zeros(0, size_out),
            "bias_scale": torch.zeros(len(factors.biases)),
        }
        for name, tensor in parts.items():
            self.register_buffer(name, tensor.to(_device(linear), dtype).contiguous(), persistent=False)

    def without_contents(self) -> "Branch":
        """One of the same shapes on the meta device."""
        bare = copy.copy(self)
        bare.__dict__["_buffers"] = {name: tensor.to("meta") for name, tensor in self.named_buffers()}
        return bare

    def set_strength(self, index: int, strength: float) -> None:
        """strength: of the LoRA at `index` of the stack."""
        for segments, values in ((self._ranks, self.scale), (self._bias_rows, self.bias_scale)):
            for segment in segments:
                if segment.index == index:
                    values[segment.start : segment.stop] = segment.scale * strength

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in x's type"""
        y = F.linear(F.linear(x, self.down.to(x.dtype)) * self.scale.to(x.dtype), self.up.to(x.dtype))
        return y + (self.bias_scale @ self.bias).to(x.dtype) if self.bias.shape[0] else y


class BranchedLinear(nn.Module):
    """A linear layer and its branch under the layer's own name.

    It shares the layer's dictionaries of parameters and buffers instead of holding it as a submodule: names in
    state_dict stay, and whoever moves, casts or swaps the weights through either sees one and the same tensor.
    """

    def __init__(self, base: nn.Module, branch: Branch) -> None:
        super().__init__()
        self._parameters = base._parameters
        self._buffers = base._buffers
        self._non_persistent_buffers_set = base._non_persistent_buffers_set
        self._base = (base,)  # a tuple, so that it is not registered a second time
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora = branch

    @property
    def base(self) -> nn.Module:
        return self._base[0]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)"""
        y = self._base[0](x)
        return y + self.lora(x).to(y.dtype)


def is_linear(module: nn.Module) -> bool:
    """A layer that computes (..., in_features) -> (..., out_features), however its weight is stored."""
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(size, int) for size in sizes) and not any(True for _ in module.children())


def attach(module: nn.Module, matched: Sequence[Matched], dtype: torch.dtype | None = None) -> set[str]:
    """Give every linear layer that the LoRAs change a branch; returns the names of the parameters this accounts for.

    dtype: of the branches; None takes the layer's own float type, bfloat16 where it has none.
    What changes no linear layer (norms, modulation, convolutions) is left to `merge`. Raises ValueError for a model
    that has branches already: detach them first.
    """
    if any(True for _ in branched(module)):
        raise ValueError("this model has LoRA branches already; detach them before attaching others")
    changes: dict[str, list[tuple[int, Patch]]] = {}
    done: set[str] = set()
    for index, each in enumerate(matched):
        for patch in each.coverage.patches:
            owner, _, leaf = patch.parameter.rpartition(".")
            if leaf in ("weight", "bias") and is_linear(module.get_submodule(owner)):
                changes.setdefault(owner, []).append((index, patch))
                done.add(patch.parameter)
    for owner, found in changes.items():
        linear = module.get_submodule(owner)
        factors = Factors([], [], [], [], [])
        for index, patch in found:
            read = matched[index].read(patch)
            _add(factors, index, patch, [read[key] for key in patch.tensors])
        _replace(module, owner, BranchedLinear(linear, Branch(factors, linear, dtype or _dtype(linear))))
    for index, each in enumerate(matched):
        set_strength(module, index, each.lora.strength)
    return done


def _add(factors: Factors, index: int, patch: Patch, tensors: list[Tensor]) -> None:
    first = tensors[0].float()
    if patch.rows:
        first = first[patch.rows[0] : patch.rows[1]]
    if patch.parameter.endswith(".bias"):
        row = len(factors.biases)
        factors.biases.append(first.flatten())
        factors.bias_rows.append(Segment(index, row, row + 1, patch.scale))
        return
    if len(tensors) == 2:
        up, down = first.flatten(1), tensors[1].float().flatten(1)
    elif first.shape[0] <= first.shape[1]:  # a whole difference is a pair with a unit matrix, on its shorter side
        up, down = torch.eye(first.shape[0]), first
    else:
        up, down = first, torch.eye(first.shape[1])
    start = factors.ranks[-1].stop if factors.ranks else 0
    factors.ups.append(up)
    factors.downs.append(down)
    factors.ranks.append(Segment(index, start, start + up.shape[1], patch.scale))


def _device(linear: nn.Module) -> torch.device:
    stored = next((t for t in (*linear._parameters.values(), *linear._buffers.values()) if t is not None), None)
    return torch.device("cpu") if stored is None or stored.is_meta else stored.device


def _dtype(linear: nn.Module) -> torch.dtype:
    """What the layer is likely to be given: its weight's type, its bias's where the weight is quantised."""
    for name in ("weight", "bias"):
        tensor = getattr(linear, name, None)
        if isinstance(tensor, Tensor) and mergeable(tensor):
            return tensor.dtype
    return torch.bfloat16


def branched(module: nn.Module) -> Iterator[tuple[str, BranchedLinear]]:
    """Every layer with a branch, by name."""
    for name, child in module.named_modules():
        if isinstance(child, BranchedLinear):
            yield name, child


def set_strength(module: nn.Module, index: int, strength: float) -> None:
    """Change the strength of the LoRA at `index` of the attached stack, in place: nothing is read or moved."""
    for _, layer in branched(module):
        layer.lora.set_strength(index, strength)


def detach(module: nn.Module) -> None:
    """Take every branch away; the layers below were never changed."""
    for name, layer in list(branched(module)):
        _replace(module, name, layer.base)


def share(source: nn.Module, target: nn.Module) -> None:
    """Give `target`, another network over the same weights, the branches of `source`; their tensors are shared."""
    graft(target, {name: layer.lora for name, layer in branched(source)})


def graft(target: nn.Module, branches: Mapping[str, Branch]) -> None:
    """Give `target` these branches, by the names of their layers."""
    for name, branch in branches.items():
        _replace(target, name, BranchedLinear(target.get_submodule(name), branch))


def _replace(module: nn.Module, name: str, new: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._modules[leaf] = new
