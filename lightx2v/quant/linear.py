"""Linear layers whose weights stay as they are stored: 8-bit numbers with scales, GGML's blocks, NVFP4 or MXFP8."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightx2v.quant.microscaled import room
from lightx2v_kernels import Quantized

Multiply = Callable[..., Tensor]
Quantize = Callable[[Tensor, torch.dtype], Quantized]


class ScaledLinear(nn.Module):
    """A layer that multiplies in 8 bits: y = (tokens . weight^T) * scale of the token * scale of the row + bias.

    weight: (N, K) int8 or float8_e4m3fn. weight_scale: (N,) float32. bias: (N,) in the dtype of the results, or None.
    reads: the 8-bit dtype in which it takes tokens; others are quantised first.
    multiply: an implementation of the op `int8_linear` or `fp8_linear`.
    """

    weight_scale: Tensor

    def __init__(self, linear: nn.Linear, reads: torch.dtype, multiply: Multiply, quantize: Quantize) -> None:
        super().__init__()
        self.in_features, self.out_features, self.reads = linear.in_features, linear.out_features, reads
        self.weight = nn.Parameter(torch.empty_like(linear.weight, dtype=reads), requires_grad=False)
        self.register_buffer("weight_scale", torch.empty_like(linear.weight[:, 0], dtype=torch.float32))
        self.bias = linear.bias
        self._dtype, self._multiply, self._quantize = linear.weight.dtype, multiply, quantize

    def forward(self, x: Tensor | Quantized) -> Tensor:
        """x (..., K) -> (..., N) in the dtype that the layer was built for"""
        tokens = x if isinstance(x, Quantized) else self._quantize(x, self.reads)
        return self._multiply(tokens.values, tokens.scale, self.weight, self.weight_scale, self.bias, self._dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, reads={self.reads}"


class GgufLinear(nn.Module):
    """A layer whose weight rests in GGML's blocks, restored to the tokens' dtype as it multiplies.

    weight: (bytes,) uint8, the blocks of (N, K) values in `encoding`. multiply: an implementation of `gguf_linear`.
    """

    def __init__(self, linear: nn.Linear, encoding: str, nbytes: int, multiply: Multiply) -> None:
        super().__init__()
        self.in_features, self.out_features, self.encoding = linear.in_features, linear.out_features, encoding
        blocks = torch.empty(nbytes, dtype=torch.uint8, device=linear.weight.device)
        self.weight = nn.Parameter(blocks, requires_grad=False)
        self.bias = linear.bias
        self._multiply = multiply

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N) in the dtype of x"""
        return self._multiply(x, self.weight, self.encoding, (self.out_features, self.in_features), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, encoding={self.encoding}"


class MicroscaledLinear(nn.Module):
    """A layer whose weight rests in NVFP4 or MXFP8, with the tokens plain.

    weight: (N, K / 2) or (N, K) uint8. weight_scale: uint8, in tiles. unit: (1,) float32, of NVFP4 alone.
    high_first: see `lightx2v_kernels.microscaled`. multiply: an implementation of `nvfp4_linear` or `mxfp8_linear`.
    """

    weight_scale: Tensor
    unit: Tensor

    def __init__(self, linear: nn.Linear, scheme: str, high_first: bool, multiply: Multiply) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = linear.in_features, linear.out_features, scheme
        device = linear.weight.device
        for name, (shape, dtype) in room(scheme, self.out_features, self.in_features).items():
            tensor = torch.empty(shape, dtype=dtype, device=device)
            if name == "weight":
                self.weight = nn.Parameter(tensor, requires_grad=False)
            else:
                self.register_buffer(name, tensor)
        self.bias = linear.bias
        self.high_first, self._multiply = high_first, multiply

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N) in the dtype of x"""
        if self.scheme == "nvfp4":
            return self._multiply(x, self.weight, self.weight_scale, self.unit, self.high_first, self.bias)
        return self._multiply(x, self.weight, self.weight_scale, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme}"


PACKED = (ScaledLinear, GgufLinear, MicroscaledLinear)


def kind_of(layer: nn.Module) -> str:
    """In what a linear layer multiplies, in a word: "bfloat16", "int8", "Q4_K", "nvfp4"."""
    if isinstance(layer, GgufLinear):
        return layer.encoding
    if isinstance(layer, MicroscaledLinear):
        return layer.scheme
    return str(layer.get_parameter("weight").dtype).removeprefix("torch.")
