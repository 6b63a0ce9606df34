"""FlashAttention-3 (arXiv:2407.08608) for Hopper: the source build (flash_attn_interface) or the wheel fa3-fwd.

`flash_attn3` computes in the tokens' type. `flash_attn3_fp8` multiplies in e4m3, with a scale a head: 1.3 times as fast
on an H100, and 0.054 wrong on random data, for no smoothing prepares the keys (32760 tokens, 40 heads).
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightx2v_kernels.registry import Backend

MODULES = ("flash_attn_interface", "fa3_fwd_interface")
FP8_MAX = 448.0  # of e4m3
NEEDS: dict[str, Any] = {
    "package": MODULES,
    "fix": "pip install fa3-fwd, or build the folder hopper of flash-attention",
    "devices": frozenset({"cuda"}),
    "min_sm": (9, 0),
    "max_sm": (9, 0),
}


def flash_attn_func() -> Callable[..., Tensor]:
    """That function of whichever module is installed."""
    for name in MODULES:
        try:
            return importlib.import_module(name).flash_attn_func
        except ModuleNotFoundError as error:
            if error.name != name:
                raise  # it is there, and lacks something of its own
    raise ModuleNotFoundError(f"neither {' nor '.join(MODULES)} is installed", name=MODULES[0])


@functools.cache
def load() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from lightx2v_kernels.attention._package import one_op

    flash = flash_attn_func()
    return one_op("flash_attn3", lambda q, k, v: _result(flash(q, k, v)))


def load_partial() -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    flash = flash_attn_func()
    asked = {"return_attn_probs": True} if "return_attn_probs" in inspect.signature(flash).parameters else {}

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, *_ = flash(q, k, v, **asked)  # until 2025 it returned both without being asked
        return out, lse

    return attention


@functools.cache
def load_fp8() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from lightx2v_kernels.attention._package import one_op

    flash = flash_attn_func()

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (q8, q_scale), (k8, k_scale), (v8, v_scale) = quantised(q), quantised(k), quantised(v)
        out = _result(flash(q8, k8, v8, q_descale=q_scale, k_descale=k_scale, v_descale=v_scale))  # in bfloat16
        return out.to(q.dtype)

    return one_op("flash_attn3_fp8", attention)


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, L, H, D) -> e4m3 of that shape, and the scale (B, H) float32 that brings it back."""
    scale = x.abs().amax((1, 3)).float().div(FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny)  # of zeros: not 0 / 0
    return (x.float() / scale[:, None, :, None]).to(torch.float8_e4m3fn), scale


def _result(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out  # until 2025 it came with the softmax' logarithm


BACKENDS = (
    Backend(
        "attention",
        "flash_attn3",
        load,
        rank=50,
        dtypes=frozenset({torch.float16, torch.bfloat16}),  # fa3-fwd is built without float16: its self-test says so
        head_dims=frozenset(range(8, 257, 8)),
        partial=load_partial,
        **NEEDS,
    ),
    Backend(
        "attention",
        "flash_attn3_fp8",
        load_fp8,
        rank=80,
        dtypes=frozenset({torch.float16, torch.bfloat16}),
        head_dims=frozenset(range(16, 257, 16)),
        max_error=0.08,
        **NEEDS,
    ),
)
