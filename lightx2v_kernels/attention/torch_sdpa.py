"""PyTorch's own fused attention.

`torch_sdpa` leaves the kernel to PyTorch, whose choice goes by rules (on a CPU there is one). The others are its three
GPU kernels, each called directly: no context manager, which would cost every call and be a global setting.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v_kernels.precision import FLOATS
from lightx2v_kernels.registry import Backend

HALVES = frozenset({torch.float16, torch.bfloat16})
CUDA = frozenset({"cuda"})
aten = torch.ops.aten


def torch_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, L, H, D), k and v (B, S, H, D) -> (B, L, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def torch_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention-2 as PyTorch carries it; shapes as in torch_sdpa."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return aten._scaled_dot_product_flash_attention(q, k, v)[0].transpose(1, 2)


def torch_cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """cuDNN's; shapes as in torch_sdpa."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return aten._scaled_dot_product_cudnn_attention(q, k, v, None, _trains(q, k, v))[0].transpose(1, 2)


def torch_efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The memory-efficient one, of xFormers; shapes as in torch_sdpa."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return aten._scaled_dot_product_efficient_attention(q, k, v, None, _trains(q, k, v))[0].transpose(1, 2)


def _trains(*tensors: Tensor) -> bool:
    """Whether a gradient will be asked for, which needs the softmax' logarithm kept."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def flash_partial(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """FlashAttention-2 with its logarithm: (B, L, H, D), (B, H, L) float32."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v)
    return out.transpose(1, 2), lse


def cudnn_partial(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """cuDNN's with its logarithm; shapes as above."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    return out.transpose(1, 2), lse.reshape(q.shape[:3])


def efficient_partial(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The memory-efficient one with its logarithm, whose rows are padded to a multiple of 32; shapes as above."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    return out.transpose(1, 2), lse[..., : q.shape[2]]


def sdpa_partial(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Of PyTorch's kernels the one that can; shapes as above."""
    if q.device.type == "cuda":
        return (flash_partial if q.dtype in HALVES else efficient_partial)(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out.transpose(1, 2), lse.float()


BACKENDS = (
    Backend(
        "attention",
        "torch_sdpa",
        lambda: torch_sdpa,
        rank=90,
        dtypes=FLOATS,
        variants=("torch_flash", "torch_cudnn", "torch_efficient"),
        partial=lambda: sdpa_partial,
    ),
    Backend(
        "attention",
        "torch_flash",
        lambda: torch_flash,
        rank=91,
        devices=CUDA,
        min_sm=(8, 0),
        dtypes=HALVES,
        head_dims=frozenset(range(8, 257, 8)),
        partial=lambda: flash_partial,
    ),
    Backend(
        "attention",
        "torch_cudnn",
        lambda: torch_cudnn,
        rank=92,
        devices=CUDA,
        min_sm=(8, 0),
        dtypes=HALVES,
        head_dims=frozenset(range(8, 129, 8)),
        partial=lambda: cudnn_partial,
    ),
    Backend(
        "attention",
        "torch_efficient",
        lambda: torch_efficient,
        rank=93,
        devices=CUDA,
        min_sm=(5, 0),
        dtypes=FLOATS,
        head_dims=frozenset(range(8, 257, 8)),
        partial=lambda: efficient_partial,
    ),
)
