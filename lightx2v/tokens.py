"""What video transformers share: the embeddings of time and place, and norms that hold their weights."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lightx2v_kernels import Kernels


@lru_cache(maxsize=8)
def rope_table(
    grid: tuple[int, int, int], channels: tuple[int, int, int], theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin of the 3D rotary embedding, each (T*H*W, sum(channels) / 2) float32, angles computed in float64.

    channels: of a head, given to T, H and W; along each axis the pair i of n turns by position * theta^(-i/n).
    Source: Su et al. 2021, arXiv:2104.09864, applied to each axis by itself.
    """
    with torch.inference_mode(False):  # the table outlives the call and may be used under autograd
        angles = []
        for axis, (size, count) in enumerate(zip(grid, channels, strict=True)):
            frequency = theta ** -(torch.arange(0, count, 2, dtype=torch.float64) / count)
            angle = torch.outer(torch.arange(size, dtype=torch.float64), frequency)
            view = [1, 1, 1, count // 2]
            view[axis] = size
            angles.append(angle.view(view).expand(*grid, count // 2))
        table = torch.cat(angles, dim=-1).flatten(0, 2)
        return table.cos().float().to(device), table.sin().float().to(device)


def sinusoidal(timestep: Tensor, channels: int) -> Tensor:
    """timestep (...) in [0, 1000] -> (..., channels) float32: cosines, then sines, of geometric frequencies."""
    half = channels // 2
    frequency = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angle = timestep.double()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


def patch_tokens(patch: nn.Conv3d, x: Tensor) -> Tensor:
    """What a convolution whose stride is its kernel makes of x (B, C, T, H, W), as tokens (B, L, D), T then H then W.

    One matrix product over the patches writes them as they are wanted. The convolution writes channels first: adding
    its bias and turning that, in two places, took 3.4 ms of a pass of Wan 14B at 480p on an H100, where nothing but
    reading and writing takes time (benchmarks/results/h100-forward-14b.json, the profile of torch_sdpa).
    """
    pt, ph, pw = patch.kernel_size
    patches = rearrange(x, "b c (t pt) (h ph) (w pw) -> b (t h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)
    return F.linear(patches, patch.weight.flatten(1), patch.bias)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self._norm = kernels.rms_norm

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x, self.weight, self.eps)


class AffineNorm(nn.Module):
    def __init__(self, size: int, eps: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps
        self._norm = kernels.layer_norm

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x, self.weight, self.bias, self.eps)


def image_projector(image_dim: int, hidden_size: int, kernels: Kernels) -> nn.Sequential:
    """An image encoder's tokens (B, I, image_dim) -> (B, I, hidden_size), as Wan and HunyuanVideo-1.5 both have it."""
    return nn.Sequential(
        AffineNorm(image_dim, 1e-5, kernels),
        nn.Linear(image_dim, image_dim),
        nn.GELU(),
        nn.Linear(image_dim, hidden_size),
        AffineNorm(hidden_size, 1e-5, kernels),
    )
