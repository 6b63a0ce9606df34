"""The optimiser of the demo models: orthogonalised momentum for hidden matrices, AdamW for everything else.

Weights may rest in bfloat16, as they do at inference; the optimiser keeps float32 masters and averages those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Settings:
    """Learning rates are per step at the schedule's plateau; `average` is the decay of the weight average.

    A matrix (R, C) changes by 3.2 * matrix_rate * sqrt(R / C) in spectral norm (G. Yang et al., "A spectral condition
    for feature learning", 2023): for 256 x 256, entries change by 0.2 * matrix_rate, as AdamW's do.
    """

    rate: float  # AdamW
    matrix_rate: float  # orthogonalised updates, scaled to the size that AdamW's have
    betas: tuple[float, float] = (0.9, 0.99)
    momentum: float = 0.95
    matrix_decay: float = 0.0
    average: float = 0.9985
    clip: float = 1.0


def orthogonalise(matrices: Tensor, rounds: int = 5) -> Tensor:
    """(N, R, C) -> the nearest matrices whose singular values are all about 1, by a quintic Newton-Schulz iteration.

    Coefficients: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024).
    """
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.transpose(1, 2)
    x = wide.bfloat16() if matrices.is_cuda else wide.float()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    x = x.to(matrices.dtype)
    return x if matrices.shape[1] <= matrices.shape[2] else x.transpose(1, 2)


def plateau(progress: float, *, warm: float, decay: float) -> float:
    """Schedule over progress 0..1: a rise over `warm`, a plateau at 1, a line to almost 0 over the last `decay`."""
    if progress < warm:
        return max(progress / warm, 0.02)
    return min(1.0, max((1 - progress) / decay, 0.003))


class Optimizer:
    """Trains the parameters of some modules; call `step` after backward."""

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], settings: Settings, is_matrix: Callable[[str, Tensor], bool]
    ) -> None:
        kept = [(name, p) for name, p in named if p.requires_grad]
        self.settings = settings
        self.names = [name for name, _ in kept]
        self.weights = [p for _, p in kept]
        self.masters = [p.detach().float().clone() for p in self.weights]
        self.averages = [m.clone() for m in self.masters]
        self.steps = 0
        shapes: dict[tuple[int, int], list[int]] = {}
        rest = []
        for index, (name, p) in enumerate(kept):
            if is_matrix(name, p):
                shapes.setdefault((p.shape[0], p[0].numel()), []).append(index)
            else:
                rest.append(index)
        self._rest = rest
        self._groups = list(shapes.values())
        device = self.masters[0].device
        self._grads = [torch.zeros_like(m) for m in self.masters]
        kinds: dict[torch.dtype, list[int]] = {}
        for index, p in enumerate(self.weights):
            kinds.setdefault(p.dtype, []).append(index)
        self._kinds = list(kinds.values())
        self._momenta = [torch.zeros(len(group), *shape, device=device) for shape, group in shapes.items()]
        self._first = [torch.zeros_like(self.masters[i]) for i in rest]
        self._second = [torch.zeros_like(self.masters[i]) for i in rest]
        names = ("rate", "correction", "matrix_rate", "matrix_keep", "renewal")
        self._numbers = {name: torch.zeros((), device=device) for name in names}

    def prepare(self, factor: float) -> None:
        """Count a step and set its numbers, for learning rates times `factor`. Never waits for the device."""
        self.steps += 1
        settings, (beta1, beta2) = self.settings, self.settings.betas
        average = min(settings.average, (1 + self.steps) / (10 + self.steps))
        numbers = {
            "rate": settings.rate * factor / (1 - beta1**self.steps),
            "correction": math.sqrt(1 - beta2**self.steps),
            "matrix_rate": settings.matrix_rate * factor,
            "matrix_keep": 1 - settings.matrix_rate * factor * settings.matrix_decay,
            "renewal": 1 - average,
        }
        for name, value in numbers.items():
            self._numbers[name].fill_(value)

    @torch.no_grad()
    def apply(self) -> Tensor:
        """The prepared step, from the gradients; clears them and returns their norm (a scalar).

        Reads nothing from the host, so that a CUDA graph can hold it.
        """
        grads = self._gradients()
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_mul_(grads, (self.settings.clip / (norm + 1e-6)).clamp(max=1.0))
        self._adam([grads[i] for i in self._rest])
        for group, momentum in zip(self._groups, self._momenta, strict=True):
            self._orthogonal(group, momentum, grads)
        self._fill_weights()
        change = torch._foreach_sub(self.masters, self.averages)
        torch._foreach_mul_(change, self._numbers["renewal"])
        torch._foreach_add_(self.averages, change)
        for p in self.weights:
            p.grad = None
        return norm

    def _gradients(self) -> list[Tensor]:
        """All of them as float32, zeros where a weight had no part. One dtype at a time: that is a few large copies."""
        for kind in self._kinds:
            reached = [i for i in kind if self.weights[i].grad is not None]
            if reached:
                given = [self.weights[i].grad for i in reached]
                torch._foreach_copy_([self._grads[i] for i in reached], given)
        unused = [buffer for buffer, p in zip(self._grads, self.weights, strict=True) if p.grad is None]
        if unused:
            torch._foreach_zero_(unused)
        return self._grads

    def _fill_weights(self) -> None:
        for kind in self._kinds:
            torch._foreach_copy_([self.weights[i].data for i in kind], [self.masters[i] for i in kind])

    def step(self, factor: float) -> Tensor:
        """`prepare` and `apply`."""
        self.prepare(factor)
        return self.apply()

    def _adam(self, grads: list[Tensor]) -> None:
        if not grads:
            return
        beta1, beta2 = self.settings.betas
        torch._foreach_lerp_(self._first, grads, 1 - beta1)
        torch._foreach_mul_(self._second, beta2)
        torch._foreach_addcmul_(self._second, grads, grads, 1 - beta2)
        scale = torch._foreach_sqrt(self._second)
        torch._foreach_div_(scale, self._numbers["correction"])
        torch._foreach_add_(scale, 1e-9)
        update = torch._foreach_div(self._first, scale)
        torch._foreach_mul_(update, self._numbers["rate"])
        torch._foreach_sub_([self.masters[i] for i in self._rest], update)

    def _orthogonal(self, group: list[int], momentum: Tensor, grads: list[Tensor]) -> None:
        stacked = torch.stack([grads[i].reshape(momentum.shape[1:]) for i in group])
        momentum.mul_(self.settings.momentum).add_(stacked)
        # By sqrt(R / C), outputs change alike in every layer. Without it the layers that read the 4096 channels of text
        # change 16 times too fast: their weights grew until the encoder's output was chaotic in the words around.
        rows, columns = momentum.shape[1:]
        size = self._numbers["matrix_rate"] * (3.2 * math.sqrt(rows / columns))
        update = orthogonalise(stacked + self.settings.momentum * momentum) * size
        masters = [self.masters[i] for i in group]
        torch._foreach_mul_(masters, self._numbers["matrix_keep"])
        torch._foreach_sub_(masters, [u.view_as(m) for u, m in zip(update.unbind(0), masters, strict=True)])

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights by parameter name, float32."""
        return {name: value.clone() for name, value in zip(self.names, self.averages, strict=True)}

    def state(self) -> dict[str, Any]:
        """Everything needed to go on later."""
        return {
            "names": self.names,
            "steps": self.steps,
            "tensors": [self.masters, self.averages, self._momenta, self._first, self._second],
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()` of an optimiser of the same parameters; the weights become its masters."""
        if state["names"] != self.names:
            raise ValueError(
                "the saved optimiser state belongs to other parameters; delete the state folder and start again"
            )
        self.steps = state["steps"]
        mine = [self.masters, self.averages, self._momenta, self._first, self._second]
        for here, saved in zip(mine, state["tensors"], strict=True):
            torch._foreach_copy_(here, [value.to(here[0].device) for value in saved])
        self._fill_weights()
