"""A package's attention as one op of PyTorch, which torch.compile and CUDA graphs do not look into."""

from collections.abc import Callable

from torch import Tensor

from lightx2v_kernels.attention.torch_sdpa import torch_sdpa
from lightx2v_kernels.opaque import opaque


def one_op(name: str, run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`run` as the op lightx2v::<name>: (B, L, H, D), (B, S, H, D) twice -> (B, L, H, D), contiguous.

    Its gradient is that of PyTorch's attention on the same inputs: not every package has one of its own.
    """

    def launch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return run(q, k, v).contiguous()

    return opaque(name, launch, lambda q, k, v: q.new_empty(q.shape), torch_sdpa)
