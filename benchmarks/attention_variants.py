"""What `benchmarks.attention` times: the ways to cut our kernels, and the attention of others, for comparison."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightx2v_kernels.attention import _triton, _triton_ops, _triton_quantize
from lightx2v_kernels.attention._triton import Config
from lightx2v_kernels.norm.reference import rms_norm
from lightx2v_kernels.rope.reference import rope

HEAD_DIM = 128
INT8_ERROR = 0.02


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


def peers() -> list[Variant]:
    found = [Variant("peer", "SDPA cuDNN", _sdpa(SDPBackend.CUDNN_ATTENTION))]
    found += [Variant("peer", "SDPA flash", _sdpa(SDPBackend.FLASH_ATTENTION))]
    for module in ("flash_attn_interface", "fa3_fwd_interface"):
        if flash := _imported(module, "flash_attn_func"):
            found.append(Variant("peer", f"FlashAttention-3 ({module})", _calls(flash)))
    if sage := _imported("sageattention", "sageattn"):
        found.append(Variant("peer", "SageAttention", _calls(lambda q, k, v: sage(q, k, v, tensor_layout="NHD"))))
    return found


def tuned(device: torch.device) -> list[Variant]:
    """What the backends take on this device."""
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
    return list({variant.name: variant for variant in [*tuned(device), *found]}.values())


def producers(heads: int, tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Norm, rope and rounding of q and k in one go, against the same steps one by one."""
    q, k = torch.randn(2, 1, tokens, heads * HEAD_DIM, device=device).to(dtype).unbind(0)
    v = torch.randn(1, tokens, heads, HEAD_DIM, device=device).to(dtype)
    norms = torch.ones(2, heads * HEAD_DIM, device=device, dtype=dtype).unbind(0)
    angles = 10 * torch.rand(tokens, HEAD_DIM // 2, device=device)
    cos, sin = angles.cos(), angles.sin()
    block = _triton_ops.config(device, int8=True).block_n

    def turned(x: Tensor, weight: Tensor) -> Tensor:
        return rope(rms_norm(x, weight, 1e-6).unflatten(-1, (heads, HEAD_DIM)), cos, sin)

    compiled = torch.compile(turned) if device.type == "cuda" else turned
    heads_q, heads_k = turned(q, norms[0]), turned(k, norms[1])
    return {
        "norm, rope, int8 fused": lambda: _triton_quantize.quantize_rotary(
            q, k, norms, (cos, sin), 1e-6, HEAD_DIM, block
        ),
        "norm, rope (torch.compile)": lambda: (compiled(q, norms[0]), compiled(k, norms[1])),
        "int8 alone": lambda: _triton_quantize.quantize(heads_q, heads_k, block),
        "int8 attention from projections": lambda: _triton_ops.rotary_attention_int8(
            q, k, v, norms[0], norms[1], cos, sin, 1e-6
        ),
        "int8 attention from heads": lambda: _triton_ops.attention_int8(heads_q, heads_k, v),
    }


def _sdpa(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Callable[[], Tensor]]:
    def prepare(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]

        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)

        return run

    return prepare


def _calls(attention: Callable[..., Any]) -> Callable[[Tensor, Tensor, Tensor], Callable[[], Tensor]]:
    def prepare(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        def run() -> Tensor:
            out = attention(q, k, v)
            return out[0] if isinstance(out, tuple) else out

        return run

    return prepare


def _imported(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        return None
