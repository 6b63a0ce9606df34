"""8-bit products, GGML's blocks, NVFP4 and MXFP8 in Triton.

fp8 has two. `triton` is for Hopper: it adds up in the tensor core's own registers, as PyTorch's does with fast
accumulation, at the same error (0.20 % of the product of 5120 values, 0.26 % of 13824, where rounding to bf16 alone is
0.17 %), and is the fastest there at Wan's sizes. `triton_exact` promotes its sums to fp32 every 128 values: 0.17 %, 840
to 865 TFLOP/s on an H100. It runs from Ada on.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
from torch import Tensor

from lightx2v_kernels.precision import FLOATS
from lightx2v_kernels.registry import Backend


def _load(file: str, function: str) -> Callable[..., Tensor]:
    return getattr(import_module(f"lightx2v_kernels.linear.{file}"), function)


CUDA = frozenset({"cuda"})
BACKENDS = (
    # Tensor cores multiply int8 from Ampere on, e4m3 from Ada on.
    Backend(
        "int8_linear",
        "triton",
        partial(_load, "_triton", "int8_linear"),
        rank=200,
        package="triton",
        devices=CUDA,
        min_sm=(8, 0),
        dtypes=FLOATS,
    ),
    Backend(
        "fp8_linear",
        "triton",
        partial(_load, "_triton", "fp8_linear"),
        rank=80,
        package="triton",
        devices=CUDA,
        min_sm=(9, 0),
        max_sm=(9, 0),
        dtypes=FLOATS,
    ),
    Backend(
        "fp8_linear",
        "triton_exact",
        partial(_load, "_triton", "fp8_linear_exact"),
        rank=400,
        package="triton",
        devices=CUDA,
        min_sm=(8, 9),
        dtypes=FLOATS,
    ),
    Backend(
        "gguf_linear",
        "triton",
        partial(_load, "_triton_gguf", "gguf_linear"),
        rank=200,
        package="triton",
        devices=CUDA,
        min_sm=(8, 0),
        dtypes=FLOATS - {torch.float32},
    ),
    *(
        Backend(
            op,
            "triton",
            partial(_load, "_triton_microscaled", op),
            rank=200,
            package="triton",
            devices=CUDA,
            min_sm=(8, 0),
            dtypes=FLOATS - {torch.float32},
        )
        for op in ("nvfp4_linear", "mxfp8_linear")
    ),
)
