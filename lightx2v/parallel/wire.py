"""How vectors travel between processes: as they are, or in 8 bits, each with its scale behind it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lightx2v.parallel.mesh import Line
from lightx2v_kernels import Quantized

FP8 = torch.float8_e4m3fn
SCALE = 4  # bytes of a float32


def from_all(own: Tensor, line: Line) -> Tensor:
    """(n, ...) of everybody's tensor along a line, in its order; all of one shape."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name until PyTorch 2.12
    everybody = own.new_empty(line.size, *own.shape)
    gather(everybody.flatten(0, 1), own.contiguous(), group=line.group)
    return everybody


@dataclass(frozen=True)
class Wire:
    """quantize: of `lightx2v_kernels.Kernels`; None: nothing is rounded.

    In 8 bits a vector of D numbers is D + 4 bytes: e4m3, then one float32 that brings it back. D divides by 4.
    """

    quantize: Callable[[Tensor, torch.dtype], Quantized] | None = None

    def empty(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        """Room for so many vectors, each as long as those of `like`."""
        size = like.shape[-1]
        if self.quantize is None:
            return like.new_empty(*shape, size)
        return like.new_empty(*shape, size + SCALE, dtype=torch.uint8)

    def write(self, room: Tensor, x: Tensor) -> None:
        """Vectors x (..., D) into room made by `empty`, or a part of it, of their shape."""
        if self.quantize is None:
            room.copy_(x)
            return
        packed = self.quantize(x, FP8)
        room[..., : x.shape[-1]] = packed.values.view(torch.uint8)
        room[..., x.shape[-1] :] = packed.scale.view(torch.uint8)

    def read(self, room: Tensor, dtype: torch.dtype) -> Tensor:
        """The vectors (..., D); as they are, a view."""
        if self.quantize is None:
            return room
        size = room.shape[-1] - SCALE
        return (room[..., :size].view(FP8).float() * room[..., size:].view(torch.float32)).to(dtype)
