"""The ops a video transformer spends its time in, each behind a choice of implementations.

    kernels = select(attention="auto", device=torch.device("cuda"), dtype=torch.bfloat16, head_dim=128)
    out = kernels.attention(q, k, v)

An op is a folder: `__init__.py` is its contract, `reference.py` its definition in plain PyTorch (and what runs on a
CPU), any other file one faster backend with what it needs. `registry.py` chooses, once, when a model is built;
`timings.py` measures for it; `closeness.py` is how a backend proves itself.

How a Triton or CUDA backend is written, so that torch.compile and CUDA graphs see one opaque op and training still
works:

- `<op>/triton.py` holds `BACKENDS` and imports `<op>/_triton.py` when one is taken; that alone imports triton and holds
  the `@triton.jit` code;
- there the launch is wrapped by `opaque.opaque`: a `torch.library.custom_op("lightx2v::<op>")` with a fake (shape and
  dtype, no data) and an autograd whose backward differentiates the reference on the saved inputs: a fused op saves
  memory traffic, not derivations. Plain eager calls skip the dispatcher;
- how many tokens a program takes is a fixed rule in `tiles.py`;
- outputs are allocated inside with torch.empty, addresses are int64, and the file adds a test and a benchmark entry
  before it gets a rank.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightx2v_kernels import registry
from lightx2v_kernels.quantized import Quantized
from lightx2v_kernels.registry import UnsupportedBackendError

__all__ = ["AttentionFn", "Kernels", "Quantized", "UnsupportedBackendError", "references", "select"]

AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (B, L, H, D), k and v (B, S, H, D) -> (B, L, H, D)


@dataclass(frozen=True)
class Kernels:
    """The implementations chosen for one device, dtype and head_dim. Every callable returns the dtype of its first
    argument, and those of a name with "quantize" 8-bit tokens in the dtype that is their last argument.

    attention: of tokens to each other. cross_attention: to the few tokens of a text or an image: always exact, for it
        takes little time and all that was asked for comes in there.
    names: op -> backend that was chosen, for reports.
    """

    attention: AttentionFn
    cross_attention: AttentionFn
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]  # x (..., D), weight (D,), eps -> (..., D)
    layer_norm: Callable[
        [Tensor, Tensor | None, Tensor | None, float], Tensor
    ]  # x (..., D), weight, bias (D,), eps -> (..., D)
    modulate: Callable[
        [Tensor, Tensor, Tensor, float], Tensor
    ]  # x (B, L, D), shift, scale (B, 1 | L, D), eps -> (B, L, D)
    gated_residual: Callable[[Tensor, Tensor, Tensor], Tensor]  # x, y (B, L, D), gate (B, 1 | L, D) -> (B, L, D)
    rope: Callable[[Tensor, Tensor, Tensor], Tensor]  # x (B, L, H, D), cos, sin (L, D/2) -> (B, L, H, D)
    # x (B, L, H·D), weight (H·D,) or (D,), cos, sin (L, D/2), eps -> (B, L, H, D)
    norm_rope: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
    # x, y (B, L, D), gate (B, 1 | L, D) or None (1), then as modulate or layer_norm -> x + y · gate, and that normed
    residual_modulate: Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    residual_layer_norm: Callable[
        [Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, float], tuple[Tensor, Tensor]
    ]
    linear_gelu: Callable[[Tensor, Tensor, Tensor], Tensor]  # x (..., K), weight (N, K), bias (N,) -> (..., N)
    quantize: Callable[[Tensor, torch.dtype], Quantized]  # x (..., K), torch.int8 or torch.float8_e4m3fn
    gelu_quantize: Callable[[Tensor, torch.dtype], Quantized]
    layer_norm_quantize: Callable[[Tensor, Tensor | None, Tensor | None, float, torch.dtype], Quantized]
    modulate_quantize: Callable[[Tensor, Tensor, Tensor, float, torch.dtype], Quantized]
    residual_modulate_quantize: Callable[
        [Tensor, Tensor, Tensor | None, Tensor, Tensor, float, torch.dtype], tuple[Tensor, Quantized]
    ]
    residual_layer_norm_quantize: Callable[
        [Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, float, torch.dtype], tuple[Tensor, Quantized]
    ]
    # q, k (B, L, H·D), v (B, L, H, D), the weights of both norms, cos, sin (L, D/2), eps -> (B, L, H, D):
    # attention(norm_rope(q), norm_rope(k), v)
    rotary_attention: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]
    names: Mapping[str, str] = field(default_factory=dict, compare=False)


def select(*, attention: str = registry.AUTO, device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernels:
    """Choose every op for one place. `dtype` is that of the tokens.

    attention: one of `registry.choices("attention")`: "auto" the fastest, "exact" the fastest of those that are not
        lossy, or a name. All other ops are chosen by "auto", cross-attention by "exact": what is fast at tens of
        thousands of keys is not at 512.
    Raises UnsupportedBackendError, with every reason, if the named attention or any op cannot run there.
    """
    asked = {"attention": attention}
    chosen = {op: registry.select(op, asked.get(op, registry.AUTO), device, dtype, head_dim) for op in _OPS}
    chosen["cross_attention"] = registry.select("attention", registry.EXACT, device, dtype, head_dim, workload="cross")
    functions: dict[str, Any] = {op: backend.load() for op, backend in chosen.items()}
    own = chosen["attention"].rotary
    functions["rotary_attention"] = own() if own else rotary_attention(functions["attention"], functions["norm_rope"])
    return Kernels(**functions, names={op: backend.name for op, backend in chosen.items()})


def references(**instead: Any) -> Kernels:
    """The definition of every op in plain PyTorch, some replaced by name: for training, and for checking others."""
    ops: dict[str, Any] = {op: registry.registry(op).op.reference for op in _OPS}
    ops = {"cross_attention": ops["attention"], **ops, **instead}
    return Kernels(**{"rotary_attention": rotary_attention(ops["attention"], ops["norm_rope"]), **ops})


def rotary_attention(attention: AttentionFn, norm_rope: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`Kernels.rotary_attention` of an attention that takes q and k as they are."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, norm_q: Tensor, norm_k: Tensor, cos: Tensor, sin: Tensor, eps: float
    ) -> Tensor:
        q = norm_rope(q, norm_q, cos, sin, eps)  # each by its name, so that what came in may go
        k = norm_rope(k, norm_k, cos, sin, eps)
        return attention(q, k, v)

    return attend


# The ops on each token by itself.
TOKENWISE = (
    "rms_norm",
    "layer_norm",
    "modulate",
    "gated_residual",
    "rope",
    "norm_rope",
    "residual_modulate",
    "residual_layer_norm",
    "quantize",
    "gelu_quantize",
    "layer_norm_quantize",
    "modulate_quantize",
    "residual_modulate_quantize",
    "residual_layer_norm_quantize",
)
_OPS = ("attention", "linear_gelu", *TOKENWISE)
