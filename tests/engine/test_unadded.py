"""What a Wan block leaves to the next one to add: the same bits as adding it at once, and taken by one block alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightx2v.blocks import Block, added, interruptible, run_blocks
from lightx2v.models.wan.config import WanConfig
from lightx2v.models.wan.transformer import Unadded, WanTransformer
from lightx2v_kernels import select

CPU = torch.device("cpu")


def network() -> WanTransformer:
    torch.manual_seed(0)
    config = WanConfig(128, 64, 4, 16, 16, 32, 64, (1, 2, 2))
    return WanTransformer(config, select(device=CPU, dtype=torch.float32, head_dim=128)).eval().requires_grad_(False)


def at_once(blocks: list[Block], tokens: Tensor, args: Any) -> Tensor:
    for block in blocks:
        tokens = added(block(tokens, args))
    return tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("timestep", [torch.tensor([500.0, 20.0]), torch.tensor([[0.0, 500.0], [0.0, 20.0]])])
def test_adding_later_gives_the_same_bits(timestep: Tensor, dtype: torch.dtype) -> None:
    made, generator = network().to(dtype), torch.Generator().manual_seed(1)
    latents = torch.randn(2, 16, 2, 4, 6, generator=generator)
    context = torch.randn(2, 5, 32, generator=generator)
    counted: list[int] = []
    runs = (run_blocks, at_once, interruptible(run_blocks, lambda: counted.append(1)))
    first, *others = (made(latents, timestep, context, run) for run in runs)
    assert all(torch.equal(first, other) for other in others) and first.abs().max() > 0.01
    assert len(counted) == 4


def test_it_is_taken_once_and_the_sum_leaves_it() -> None:
    kernels = select(device=CPU, dtype=torch.float32, head_dim=128)
    x, y, gate = (
        torch.ones(1, 6, 8),
        torch.full((1, 6, 8), 2.0),
        torch.tensor([3.0, 5.0])[None, :, None].expand(1, 2, 8),
    )
    left = Unadded(x, y, gate, kernels)
    assert added(left)[0, :, 0].tolist() == [7.0] * 3 + [11.0] * 3 and torch.equal(left.added(), left.added())
    assert left.take()[1] is y
    with pytest.raises(IndexError):
        left.take()
