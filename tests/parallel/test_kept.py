"""What is kept from step to step, where several processes make one video together."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightx2v.config import Parallel, Sampling
from lightx2v.diffuse import Model, Start, diffuse
from lightx2v.parallel.mesh import join
from lightx2v.parallel.ring import mergeable
from lightx2v.parallel.ulysses import spread
from lightx2v_kernels import select
from ranks import Ranks
from tiny_cache import COND, CPU, T2V, UNCOND, wan

GUIDED = Sampling(seed=7, steps=3, cfg_scale=3.0, scheduler="euler")


def videos(parallel: Parallel) -> tuple[Tensor, Tensor, dict[str, int]]:
    """With and without keeping, and how often each layer that reads the prompt was called with it."""
    mesh = join(parallel, CPU)
    merging = mergeable("exact", CPU, torch.float32, 128).partial
    kernels = select(attention="exact", device=CPU, dtype=torch.float32, head_dim=128)
    network = wan(kernels=spread(kernels, mesh, merging() if merging else None))
    calls: Counter[str] = Counter()
    for name, module in network.named_modules():
        if name.endswith(("cross_attn.k", "cross_attn.v")):
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    model = Model(T2V, CPU, lambda: network, mesh=mesh)

    def made(keeps: bool) -> Tensor:
        start = Start(torch.zeros(1, 16, 3, 6, 10))
        return diffuse(replace(model, keeps=keeps), start, GUIDED, COND, UNCOND)

    kept = made(True)
    counted: dict[str, Any] = dict(calls)
    return kept, made(False), counted


@pytest.mark.parametrize(
    "parallel, branches", [(Parallel(ring=2), 2), (Parallel(cfg=2), 1)], ids=["tokens shared", "guidance shared"]
)
def test_each_process_reads_the_prompt_once(two: Ranks, parallel: Parallel, branches: int) -> None:
    for kept, computed, calls in two.run(videos, parallel):
        assert torch.equal(kept, computed) and kept.abs().max() > 0.1
        assert len(calls) == 4 and set(calls.values()) == {branches}
