"""What `benchmarks.attention` times: the ways to cut our kernels, and the attention of others, for comparison."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightx2v_kernels import registry
from lightx2v_kernels.attention import _triton, _triton_ops, _triton_quantize
from lightx2v_kernels.attention._triton import Config

HEAD_DIM = 128
INT8_ERROR = 0.02
OURS = frozenset({"triton", "triton_int8", "reference"})  # reference: its scores would not fit


@dataclass(frozen=True)
class Variant:
    """kind: exact, int8 (q and k rounded beforehand) or peer. prepare: q, k, v -> what is timed."""

    kind: str
    name: str
    prepare: Callable[[Tensor, Tensor, Tensor], Callable[[], Tensor]]


def ours(kind: str, config: Config) -> Variant:
    def exact(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        return lambda: _triton.exact(q, k, v, config)

    def int8(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        tokens = _triton_quantize.quantize(q, k, config.block_n)
        return lambda: _triton.from_int8(tokens, v, config)

    marks = [f"{config.block_m}x{config.block_n}", f"w{config.warps}", f"s{config.stages}"]
    marks += [mark for mark in ("ahead", "tma", "specialize") if getattr(config, mark)]
    marks += [f"r{config.registers}"] if config.registers else []
    return Variant(kind, f"{kind} {' '.join(marks)}", exact if kind == "exact" else int8)


def on_hopper(kind: str, cut: Any) -> Variant:
    """A cut (`_hopper.Cut`) of the kernel in Gluon."""
    from lightx2v_kernels.attention import _hopper as kernel

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        return lambda: kernel.exact(q, k, v, cut)

    def int8(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        tokens = _triton_quantize.quantize(q, k, cut.keys)
        return lambda: kernel.from_int8(tokens, v, cut)

    name = f"{kind} gluon {cut.groups} groups {cut.keys} keys s{cut.stages}{' early' if cut.early else ''}"
    return Variant(kind, name, exact if kind == "exact" else int8)


def peers(device: torch.device, dtype: torch.dtype) -> list[Variant]:
    """The other backends of the registry that can run here."""
    return [
        Variant("peer", backend.name, _calls(backend.load))
        for backend in registry.registry("attention").ranked()
        if backend.name not in OURS and backend.why_not(device, dtype, HEAD_DIM) is None
    ]


def tuned(device: torch.device) -> list[Variant]:
    """What the backends take on this device."""
    if kernel := _triton_ops.hopper(device):
        return [on_hopper("exact", kernel.EXACT), on_hopper("int8", kernel.INT8)]
    return [
        ours("exact", _triton_ops.config(device, int8=False)),
        ours("int8", _triton_ops.config(device, int8=True)),
    ]


def candidates(device: torch.device) -> list[Variant]:
    """The cuts worth trying: those that do not spill on sm_90 and whose products stay asynchronous there."""
    if device.type != "cuda":
        return [ours(kind, Config(32, 32, tma=tma)) for kind in ("exact", "int8") for tma in (False, True)]
    wide, tall = Config(128, 128, 8, 2, tma=True), Config(64, 128, 4, 2, tma=True)
    int8 = [
        tall,
        replace(tall, ahead=True),
        Config(64, 64, 4, 3, tma=True),
        Config(64, 64, 4, 4, tma=True, ahead=True),
        Config(64, 64, 4, 3, tma=True, registers=168),
        wide,
        replace(wide, ahead=True),
        replace(wide, tma=False),
        Config(128, 64, 8, 3, tma=True),
        Config(128, 64, 8, 4, tma=True, ahead=True),
    ]
    exact = [
        wide,
        replace(wide, ahead=True),
        replace(wide, tma=False),
        tall,
        replace(tall, tma=False),
        Config(64, 64, 4, 3, tma=True),
        Config(64, 64, 4, 3, tma=True, ahead=True),
        Config(128, 64, 8, 3, tma=True),
        Config(128, 64, 8, 3, tma=True, ahead=True),
    ]
    found = [ours("int8", c) for c in int8] + [ours("exact", c) for c in exact]
    if kernel := _triton_ops.hopper(device):
        cuts = [kernel.Cut(3, 64, 4, early) for early in (False, True)]
        int8_cuts = [*cuts, *(kernel.Cut(2, 128, 4, early) for early in (False, True)), kernel.Cut(2, 64, 4, True)]
        exact_cuts = [*cuts, *(kernel.Cut(2, 128, stages, True) for stages in (2, 3)), kernel.Cut(2, 64, 4, True)]
        found = [on_hopper("int8", c) for c in int8_cuts] + [on_hopper("exact", c) for c in exact_cuts] + found
    return list({variant.name: variant for variant in [*tuned(device), *found]}.values())


def producers(heads: int, tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Norm, rope and rounding of q and k in one go, against the same steps one by one."""
    q, k = torch.randn(2, 1, tokens, heads * HEAD_DIM, device=device).to(dtype).unbind(0)
    v = torch.randn(1, tokens, heads, HEAD_DIM, device=device).to(dtype)
    norms = torch.ones(2, heads * HEAD_DIM, device=device, dtype=dtype).unbind(0)
    angles = 10 * torch.rand(tokens, HEAD_DIM // 2, device=device)
    cos, sin = angles.cos(), angles.sin()
    hopper = _triton_ops.hopper(device)
    block = hopper.INT8.keys if hopper else _triton_ops.config(device, int8=True).block_n

    norm_rope = registry.select("norm_rope", "auto", device, dtype, HEAD_DIM).load()

    def turned(x: Tensor, weight: Tensor) -> Tensor:
        return norm_rope(x, weight, cos, sin, 1e-6)

    heads_q, heads_k = turned(q, norms[0]), turned(k, norms[1])
    return {
        "norm, rope, int8 fused": lambda: _triton_quantize.quantize_rotary(
            q, k, norms, (cos, sin), 1e-6, HEAD_DIM, block
        ),
        "norm_rope of q and k": lambda: (turned(q, norms[0]), turned(k, norms[1])),
        "int8 alone": lambda: _triton_quantize.quantize(heads_q, heads_k, block),
        "int8 attention from projections": lambda: _triton_ops.rotary_attention_int8(
            q, k, v, norms[0], norms[1], cos, sin, 1e-6
        ),
        "int8 attention from heads": lambda: _triton_ops.attention_int8(heads_q, heads_k, v),
    }


def _calls(load: Callable[[], Callable[..., Any]]) -> Callable[[Tensor, Tensor, Tensor], Callable[[], Tensor]]:
    def prepare(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        attention = load()
        return lambda: attention(q, k, v)

    return prepare
