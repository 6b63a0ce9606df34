"""The shapes that the kernels are timed at: one entry an op and size, with its inputs, its work, and its gate."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases_linear import MICROSCALED, PACKED, flops, gguf, microscaled, scaled
from benchmarks.size import CPU_SIZES, CUDA_SIZES, CUDA_TOKENWISE_SIZES, HEAD_DIM, Size
from benchmarks.tokenwise import bytes_moved, variants
from lightx2v_kernels import TOKENWISE, registry
from lightx2v_kernels.quantized import tensors

TEXT_TOKENS = 512


@dataclass(frozen=True)
class Case:
    """One op at one size. `work` is bytes moved at least ("GB/s"), or multiply-adds counted twice ("TFLOP/s")."""

    op: str
    label: str
    make: Callable[[torch.device, torch.dtype], tuple[Any, ...]]
    work: Callable[[tuple[Any, ...]], float]
    unit: str

    def gate(self, backend: registry.Backend, args: tuple[Any, ...]) -> str | None:
        """Why this backend's result at this very size is wrong, by the rule of the tests; None if it is right."""
        op = registry.registry(self.op).op
        out = backend.load()(*args)
        if self.op == "attention":
            # Every 257th query and the last one against all keys: the whole score matrix in fp64 would not fit.
            rows = torch.unique(torch.tensor([*range(0, args[0].shape[1], 257), args[0].shape[1] - 1])).to(out.device)
            out, args = out[:, rows], (args[0][:, rows], *args[1:])
        if self.op.endswith("_linear") or self.op == "linear_gelu":
            # Every 257th token and the last: a product of all in fp64 would take seconds.
            rows = torch.unique(torch.tensor([*range(0, len(args[0]), 257), len(args[0]) - 1])).to(out.device)
            out, args = out[rows], (_rows(args[0], rows), *args[1:])
            args = (args[0], args[1][rows], *args[2:]) if self.op in PACKED else args
        truth = (op.truth or op.reference)(*(a.double() if isinstance(a, Tensor) else a for a in args))
        usual = (op.plain or op.reference)(*args)
        return registry.why_otherwise(out, usual) or registry.why_wrong(
            backend, tensors(out), tensors(truth), tensors(usual)
        )


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """PyTorch 2.6 picks no rows of 8-bit floats on a CPU."""
    return x[rows] if x.itemsize > 1 else x.view(torch.uint8)[rows].view(x.dtype)


def cases(device: torch.device) -> list[Case]:
    """Every op at every size of this kind of device."""
    if device.type != "cuda":
        return [case for size in CPU_SIZES for case in of_size(size)]
    at_length = [case for size in CUDA_SIZES for case in (*attention(size), *packed_linear(size), *linear_gelu(size))]
    return at_length + [case for size in CUDA_TOKENWISE_SIZES for case in tokenwise(size)]


def of_size(size: Size) -> list[Case]:
    """Every op at one size."""
    return [*attention(size), *packed_linear(size), *linear_gelu(size), *tokenwise(size)]


def attention(size: Size) -> list[Case]:
    """Of the video's tokens to each other, and to the text."""

    def make(keys: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        lengths = (size.tokens, keys, keys)
        return tuple(torch.randn(size.batch, n, size.num_heads, HEAD_DIM, device=device, dtype=dtype) for n in lengths)

    return [
        Case("attention", f"{size.name} {kind}", partial(make, keys), _attention_flops, "TFLOP/s")
        for kind, keys in (("self", size.tokens), ("text", TEXT_TOKENS))
    ]


def packed_linear(size: Size) -> list[Case]:
    """The first layer of the feed-forward, with its weight in 8 bits, in GGML's blocks, in NVFP4 and MXFP8."""
    sizes = size.batch * size.tokens, size.ffn_size, size.hidden_size
    return [
        *(Case(op, size.name, partial(scaled, packed, *sizes), flops, "TFLOP/s") for op, packed in PACKED.items()),
        Case("gguf_linear", size.name, partial(gguf, *sizes), flops, "TFLOP/s"),
        *(Case(op, size.name, partial(microscaled, op, *sizes), flops, "TFLOP/s") for op in MICROSCALED),
    ]


def linear_gelu(size: Size) -> list[Case]:
    """The first layer of the feed-forward and GELU, unpacked."""

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        shapes = (size.batch * size.tokens, size.hidden_size), (size.ffn_size, size.hidden_size), (size.ffn_size,)
        x, weight, bias = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
        return x, weight * size.hidden_size**-0.5, bias

    return [Case("linear_gelu", size.name, make, _linear_flops, "TFLOP/s")]


def tokenwise(size: Size) -> list[Case]:
    """All ops that work token by token."""
    return [
        Case(op, label, make, partial(bytes_moved, op), "GB/s")
        for op in TOKENWISE
        for label, make in variants(op, size)
    ]


def _attention_flops(args: tuple[Any, ...]) -> float:
    q, k, _ = args
    return 4.0 * q.numel() * k.shape[1]


def _linear_flops(args: tuple[Any, ...]) -> float:
    x, weight, _ = args
    return 2.0 * x.numel() * len(weight)
