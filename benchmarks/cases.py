"""The shapes that the kernels are timed at: one entry an op and size, with its inputs, its work, and its gate."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightx2v_kernels import registry
from lightx2v_kernels.quantized import tensors

HEAD_DIM = 128
TEXT_TOKENS = 512


@dataclass(frozen=True)
class Size:
    """Tokens of one forward pass, and the width of the model that runs it."""

    name: str
    batch: int
    tokens: int
    hidden_size: int

    @property
    def num_heads(self) -> int:
        return self.hidden_size // HEAD_DIM


# 480p is 832 x 480 x 81 frames: 21 x 30 x 52 tokens. "demo" is the clip of the pack's own small model.
CUDA_SIZES = (Size("wan-1.3b-480p", 1, 32760, 1536), Size("wan-14b-480p", 1, 32760, 5120))
CPU_SIZES = (Size("demo", 1, 320, 256), Size("demo-long", 2, 1560, 256), Size("wan-1.3b-short", 1, 1560, 1536))


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
        truth = (op.truth or op.reference)(*(a.double() if isinstance(a, Tensor) else a for a in args))
        usual = (op.plain or op.reference)(*args)
        return registry.why_otherwise(out, usual) or registry.why_wrong(
            backend, tensors(out), tensors(truth), tensors(usual)
        )


def cases(device: torch.device) -> list[Case]:
    """Every op at every size of this kind of device."""
    return [case for size in (CUDA_SIZES if device.type == "cuda" else CPU_SIZES) for case in of_size(size)]


def of_size(size: Size) -> list[Case]:
    """Every op at one size."""
    b, n, d, h = size.batch, size.tokens, size.hidden_size, size.num_heads

    def tokens(device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.randn(b, n, d, device=device, dtype=dtype)

    def table(device: torch.device) -> tuple[Tensor, ...]:
        return (0.5 * torch.randn(b, 1, 6, d, device=device)).unbind(2)

    def attention(keys: int) -> Callable[[torch.device, torch.dtype], tuple[Any, ...]]:
        return lambda device, dtype: tuple(
            torch.randn(b, length, h, HEAD_DIM, device=device, dtype=dtype) for length in (n, keys, keys)
        )

    def rope(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        angles = 10 * torch.rand(n, HEAD_DIM // 2, device=device)
        return tokens(device, dtype).unflatten(-1, (h, HEAD_DIM)), angles.cos(), angles.sin()

    def weights(count: int) -> Callable[[torch.device, torch.dtype], tuple[Any, ...]]:
        return lambda device, dtype: (
            tokens(device, dtype),
            *(torch.randn(d, device=device, dtype=dtype) for _ in range(count)),
            1e-6,
        )

    return [
        Case("attention", f"{size.name} self", attention(n), _attention_flops, "TFLOP/s"),
        Case("attention", f"{size.name} text", attention(TEXT_TOKENS), _attention_flops, "TFLOP/s"),
        Case("rms_norm", size.name, weights(1), _bytes_moved, "GB/s"),
        Case("layer_norm", size.name, weights(2), _bytes_moved, "GB/s"),
        Case("modulate", size.name, lambda dev, dt: (tokens(dev, dt), *table(dev)[:2], 1e-6), _bytes_moved, "GB/s"),
        Case(
            "gated_residual",
            size.name,
            lambda dev, dt: (tokens(dev, dt), tokens(dev, dt), table(dev)[2]),
            _bytes_moved,
            "GB/s",
        ),
        Case("rope", size.name, rope, _bytes_moved, "GB/s"),
    ]


def _bytes_moved(args: tuple[Any, ...]) -> float:
    """Each input read once and a result like the first one written once: what no implementation can do without."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    return sum(t.numel() * t.element_size() for t in [tensors[0], *tensors])


def _attention_flops(args: tuple[Any, ...]) -> float:
    q, k, _ = args
    return 4.0 * q.numel() * k.shape[1]
