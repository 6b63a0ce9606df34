"""The ops that work token by token: their inputs, the bytes they move, and what they add up to in one forward pass."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.size import HEAD_DIM, Size

Make = Callable[[torch.device, torch.dtype], tuple[Any, ...]]
EPS = 1e-6
BITS8 = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}

# How often a Wan block runs each op over the video's tokens. In 8 bits every linear layer reads quantised tokens:
# those of attention (twice) by themselves, all others from the op before. GELU in bfloat16 is not counted.
IN_BF16 = {"modulate": 1, "norm_rope": 2, "residual_layer_norm": 1, "rms_norm": 1, "residual_modulate": 1}
IN_BF16 |= {"gated_residual": 1}
IN_8_BITS = {"modulate_quantize": 1, "norm_rope": 2, "residual_layer_norm_quantize": 1, "rms_norm": 1}
IN_8_BITS |= {"residual_modulate_quantize": 1, "gelu_quantize": 1, "gated_residual": 1, "quantize": 2}


@dataclass(frozen=True)
class Inputs:
    """Random arguments of every op at one size. Tables are slices of one tensor and weights have the tokens' dtype, as
    in a model."""

    size: Size
    device: torch.device
    dtype: torch.dtype

    def tokens(self, width: int | None = None) -> Tensor:
        size = self.size
        shape = (size.batch, size.tokens, width or size.hidden_size)
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def runs(self) -> Tensor:
        """The tokens as (batch * runs, L, D): one run for each timestep of a sample."""
        return self.tokens().view(self.size.batch * self.size.runs, -1, self.size.hidden_size)

    def table(self, count: int) -> tuple[Tensor, ...]:
        rows = self.size.batch * self.size.runs
        return (0.5 * torch.randn(rows, 1, count, self.size.hidden_size, device=self.device)).unbind(2)

    def weights(self, count: int) -> tuple[Tensor, ...]:
        return torch.randn(count, self.size.hidden_size, device=self.device, dtype=self.dtype).unbind(0)

    def angles(self) -> tuple[Tensor, Tensor]:
        angles = 10 * torch.rand(self.size.tokens, HEAD_DIM // 2, device=self.device)
        return angles.cos(), angles.sin()

    def of(self, op: str) -> tuple[Any, ...]:
        """The arguments of one op; of a quantising op, all but the dtype."""
        plain = op.removesuffix("_quantize")
        if plain == "gelu":
            return (self.tokens(self.size.ffn_size),)
        if plain == "quantize":
            return (self.tokens(),)
        if plain == "rope":
            return self.tokens().unflatten(-1, (-1, HEAD_DIM)), *self.angles()
        if plain == "norm_rope":
            return self.tokens(), *self.weights(1), *self.angles(), EPS
        if plain in ("rms_norm", "layer_norm"):
            return self.tokens(), *self.weights(1 if plain == "rms_norm" else 2), EPS
        if plain == "modulate":
            return self.runs(), *self.table(2), EPS
        if plain == "gated_residual":
            return self.runs(), self.runs(), *self.table(1)
        if plain == "residual_modulate":
            return self.runs(), self.runs(), None, *self.table(2), EPS
        if plain == "residual_layer_norm":
            return self.runs(), self.runs(), *self.table(1), *self.weights(2), EPS
        raise ValueError(f"no benchmark inputs for op '{op}'")


def variants(op: str, size: Size) -> Iterator[tuple[str, Make]]:
    """(label, how its arguments are made) of an op at a size: one, or one for each 8-bit type."""

    def make(kinds: tuple[torch.dtype, ...], device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        return *Inputs(size, device, dtype).of(op), *kinds

    if op.endswith("quantize"):
        yield from ((f"{size.name} {name}", partial(make, (kind,))) for name, kind in BITS8.items())
    else:
        yield size.name, partial(make, ())


def bytes_moved(op: str, args: tuple[Any, ...]) -> float:
    """Each input read once and each result written once: what no implementation can do without."""
    x = args[0]
    size = x.numel() * x.element_size()
    read = sum(a.numel() * a.element_size() for a in args if isinstance(a, Tensor))
    kept = size if op.startswith("residual_") else 0
    return read + kept + (x.numel() * (1 + 4 / x.shape[-1]) if op.endswith("quantize") else size)


def forward_ms(rows: list[dict[str, Any]], size: Size) -> dict[str, float]:
    """What the fastest measured backends add up to in one forward pass of a Wan model of that size: path -> ms.

    rows: of `kernels.measure`. A path with an op that was not measured is left out.
    """
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        if row["ms"]:
            key = row["op"], row["case"]
            best[key] = min(row["ms"], best.get(key, float("inf")))
    paths = {"bf16": IN_BF16, "fp8": IN_8_BITS, "int8": IN_8_BITS}
    found = {}
    for path, ops in paths.items():
        cases = {op: (op, f"{size.name} {path}" if op.endswith("quantize") else size.name) for op in ops}
        if all(case in best for case in cases.values()):
            found[path] = round(size.layers * sum(count * best[cases[op]] for op, count in ops.items()), 2)
    return found
