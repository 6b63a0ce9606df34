"""A small random Wan, ten steps of it, and figures by which a cache skips some of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightx2v.blocks import run_blocks
from lightx2v.cache.figures import Figures
from lightx2v.config import Sampling
from lightx2v.diffuse import Model, Start, diffuse
from lightx2v.guidance import Conditioning
from lightx2v.models import specs
from lightx2v.models.wan.config import WanConfig
from lightx2v.models.wan.transformer import WanTransformer
from lightx2v.tokens import patch_tokens
from lightx2v_kernels import Kernels, select

CPU = torch.device("cpu")
EMPTY = torch.zeros(1, 16, 2, 4, 6)
COND = Conditioning(torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(3)))
UNCOND = Conditioning(torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(4)))
TEN = Sampling(seed=7, steps=10, cfg_scale=3.0, scheduler="euler")
T2V = next(spec for spec in specs() if spec.name == "wan2.1_t2v")
EVEN = Figures("even", tea=(0.04,), tea_projected=(0.04,), mag=(1.0, *[0.98] * 9), mag_uncond=(1.0, *[0.9] * 9))


def wan(channels: int = 16, kernels: Kernels | None = None) -> nn.Module:
    config = WanConfig(128, 64, 2, channels, channels, 32, 64, (1, 2, 2))
    torch.manual_seed(0)
    kernels = kernels or select(device=CPU, dtype=torch.float32, head_dim=128)
    return WanTransformer(config, kernels).eval().requires_grad_(False)


def run(transformer: nn.Module, cache: object, sampling: Sampling = TEN, **options) -> Tensor:
    model = options.pop("model", Model(T2V, CPU, lambda: transformer))
    start = options.pop("start", Start(EMPTY))
    return diffuse(model, start, sampling, COND, UNCOND, cache=cache, **options)


def part(**changes) -> Sampling:
    return Sampling(**{**TEN.__dict__, **changes})


class Walked:
    """The innermost walk: notes each pass whose blocks run."""

    def __init__(self) -> None:
        self.passes = 0

    def __call__(self, blocks: Sequence, tokens: Tensor, args: object) -> Tensor:
        self.passes += 1
        return run_blocks(blocks, tokens, args)


class Seen:
    """Every pass of a network: the blocks' input and output, by hooks on the network and on its head."""

    def __init__(self, transformer: nn.Module) -> None:
        self.outputs: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self._hooks = [
            transformer.head.register_forward_pre_hook(lambda module, given: self.outputs.append(given[0])),
            transformer.register_forward_pre_hook(
                lambda module, given: self.inputs.append(patch_tokens(module.patch_embedding, given[0]))
            ),
        ]

    def __enter__(self) -> Seen:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
