"""8-bit products and GGML's blocks in Triton."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightx2v_kernels.precision import FLOATS
from lightx2v_kernels.registry import Backend


def _int8() -> Callable[..., Tensor]:
    from lightx2v_kernels.linear._triton import int8_linear

    return int8_linear


def _fp8() -> Callable[..., Tensor]:
    from lightx2v_kernels.linear._triton import fp8_linear

    return fp8_linear


def _gguf() -> Callable[..., Tensor]:
    from lightx2v_kernels.linear._triton_gguf import gguf_linear

    return gguf_linear


CUDA = frozenset({"cuda"})
BACKENDS = (
    # Tensor cores multiply int8 from Ampere on, e4m3 from Ada on.
    Backend("int8_linear", "triton", _int8, rank=200, package="triton", devices=CUDA, min_sm=(8, 0), dtypes=FLOATS),
    Backend("fp8_linear", "triton", _fp8, rank=400, package="triton", devices=CUDA, min_sm=(8, 9), dtypes=FLOATS),
    Backend(
        "gguf_linear",
        "triton",
        _gguf,
        rank=200,
        package="triton",
        devices=CUDA,
        min_sm=(8, 0),
        dtypes=FLOATS - {torch.float32},
    ),
)
