"""Networks over several processes compute what they compute over one: token counts that nothing divides, and batches
whose texts differ in length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from closeness import assert_close, relative_error
from lightx2v.blocks import RunBlocks, run_blocks
from lightx2v.config import Parallel
from lightx2v.models.hunyuan_video_15.transformer import Conditioning, HunyuanTransformer
from lightx2v.models.wan.config import WanConfig
from lightx2v.models.wan.transformer import WanTransformer
from lightx2v.parallel.cut import Cut, Stream
from lightx2v.parallel.mesh import Line, Mesh, join
from lightx2v.parallel.ring import mergeable, merged
from lightx2v.parallel.sequence import layout_of, shard
from lightx2v.parallel.ulysses import require_heads, spread
from lightx2v.parallel.wire import Wire
from lightx2v_kernels import Kernels, UnsupportedBackendError, select
from lightx2v_kernels.registry import registry
from ranks import Ranks
from tiny_hunyuan import CONFIG

CPU = torch.device("cpu")
SMALL = replace(CONFIG, hidden_size=512, ffn_size=256, refiner_ffn_size=256, num_layers=2, glyph_dim=64, glyph_size=64)
Call = Callable[[RunBlocks], Tensor]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(network: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in network.eval().requires_grad_(False).parameters():
        spread_ = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.copy_(spread_ * torch.randn(parameter.shape, generator=generator))
    return network


def wan(kernels: Kernels, batch: int = 1, frames: bool = False, clip: bool = False) -> Call:
    """45 tokens, 4 heads. frames: each of the 3 frames has a timestep of its own."""
    config = WanConfig(512, 256, 2, 16, 16, 32, 64, (1, 2, 2), image_dim=24 if clip else 0)
    network = filled(WanTransformer(config, kernels))
    timestep = torch.tensor([[0.0, 400.0, 900.0]]).expand(batch, -1) if frames else torch.full((batch,), 500.0)
    given = {"clip": random(batch, 6, 24, seed=3)} if clip else {}
    return lambda run: network(random(batch, 16, 3, 6, 10), timestep, random(batch, 7, 32, seed=1), run, **given)


def hunyuan(kernels: Kernels, batch: int = 1, text: int = 9, masked: bool = False) -> Call:
    """45 tokens of video and those of the text, 4 heads. masked: each sample's text is shorter than the one before."""
    network = filled(HunyuanTransformer(SMALL, kernels))
    mask = torch.arange(text)[None] < torch.tensor([text - 3 * row for row in range(batch)])[:, None]
    asked = Conditioning(random(batch, text, SMALL.text_dim, seed=1), mask if masked else None)
    return lambda run: network(random(batch, 65, 3, 3, 5), torch.full((batch,), 500.0), asked, run)


CALLS: dict[str, Callable[[Kernels], Call]] = {
    "wan": wan,
    "wan, batch": partial(wan, batch=2, clip=True),
    "wan, a timestep a frame": partial(wan, batch=2, frames=True),
    "hunyuan": hunyuan,
    "hunyuan, two tokens of text": partial(hunyuan, batch=2, text=2),
    "hunyuan, texts of several lengths": partial(hunyuan, batch=3, masked=True),
}


def errors(parallel: Parallel, names: tuple[str, ...]) -> dict[str, float]:
    """Of each call the relative error of the processes' result to that of one."""
    mesh = join(parallel, CPU)
    where: dict[str, Any] = {"device": CPU, "dtype": torch.float32, "head_dim": 128}
    merging = mergeable("exact", *where.values()).partial if parallel.ring > 1 else None
    alone = select(attention="exact", **where)
    shared = spread(alone, mesh, merging and merging())
    found = {}
    with torch.inference_mode():
        for name in names:
            one, all_ = CALLS[name](alone), CALLS[name](shared)
            whole = one(run_blocks)
            found[name] = relative_error(all_(shard(run_blocks, mesh)), whole)
            assert torch.equal(all_(run_blocks), whole), "outside of a sharded walk nothing is exchanged"
    return found


def worst(ranks: Ranks, parallel: Parallel, *names: str) -> float:
    found = ranks.run(errors, parallel, names or tuple(CALLS))
    return max(error for each in found for error in each.values())


@pytest.mark.parametrize("parallel", [Parallel(ulysses=2), Parallel(ring=2)], ids=Parallel.describe)
def test_two_processes(two: Ranks, parallel: Parallel) -> None:
    assert worst(two, parallel) < 2e-6


@pytest.mark.parametrize("parallel", [Parallel(ulysses=4), Parallel(ring=4), Parallel(2, 2)], ids=Parallel.describe)
def test_four_processes(four: Ranks, parallel: Parallel) -> None:
    assert worst(four, parallel) < 2e-6


@pytest.mark.parametrize("parallel", [Parallel(ulysses=2, exchange="fp8"), Parallel(ring=2, exchange="fp8")])
def test_an_exchange_in_8_bits_costs_little(two: Ranks, parallel: Parallel) -> None:
    """e4m3 keeps 3 bits behind the point, up to 6% of a number; 0.1 to 0.2% of what these blocks make."""
    assert 1e-4 < worst(two, parallel, "wan, batch", "hunyuan, texts of several lengths") < 0.004


def test_parts_of_attention_are_merged_by_every_kernel_that_says_how() -> None:
    """Of keys far apart in size, so that the parts weigh differently."""
    q, k, v = (random(2, length, 3, 64, seed=length) * scale for length, scale in ((17, 2), (50, 2), (50, 1)))
    k[:, 20:] *= 2
    whole = registry("attention").op.reference(q.double(), k.double(), v.double())
    able = [each for each in registry("attention").backends if each.partial and not each.why_not(CPU, q.dtype, 64)]
    assert {each.name for each in able} >= {"reference", "torch_sdpa"}
    for backend in able:
        parts = [backend.partial()(q, k[:, part], v[:, part]) for part in (slice(20), slice(20, 50))]
        assert parts[0][1].shape == (2, 3, 17) and parts[0][1].dtype == torch.float32
        out, total = merged(parts[0][0].float(), parts[0][1], *parts[1])
        assert relative_error(out, whole) < 1e-6, backend.name
        assert torch.allclose(total, backend.partial()(q, k, v)[1], atol=1e-5), backend.name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the kernels of GPUs run there alone")
def test_what_processes_exchange_on_a_gpu() -> None:
    """Without another GPU: parts merged by each of its kernels, and vectors in 8 bits written and read again."""
    gpu, attention = torch.device("cuda"), registry("attention")
    q, k, v = (random(1, length, 5, 128, seed=length).to(gpu, torch.bfloat16) for length in (1000, 1511, 1511))
    truth, plain = attention.op.reference(q.float(), k.float(), v.float()), attention.op.plain(q, k, v)
    able = [each for each in attention.backends if each.partial and not each.why_not(gpu, q.dtype, 128)]
    assert {each.name for each in able} >= {"torch_flash", "torch_cudnn", "torch_efficient", "torch_sdpa"}
    for backend in able:
        parts = [backend.partial()(q, k[:, part], v[:, part]) for part in (slice(700), slice(700, None))]
        assert parts[0][1].shape == (1, 5, 1000) and parts[0][1].dtype == torch.float32, backend.name
        out, _ = merged(parts[0][0].float(), parts[0][1], *parts[1])
        assert_close(backend.name, out.to(q.dtype), truth, plain)
    wire = Wire(select(device=gpu, dtype=q.dtype, head_dim=128).quantize)
    room = wire.empty(q, (4, 1000, 1, 3, 2))
    wire.write(room[:, :, :, 1].permute(2, 1, 0, 3, 4), torch.cat([q] * 2, 2)[:, :, :8].unflatten(2, (4, -1)))
    again = wire.read(room, q.dtype)[:, :, :, 1].permute(2, 1, 0, 3, 4).flatten(2, 3)
    assert relative_error(again, torch.cat([q] * 2, 2)[:, :, :8]) < 0.04


def test_runs_are_cut_one_by_one_and_text_that_is_too_short_is_padded() -> None:
    cut = Cut(1, 4)
    assert [Cut(place, 4).span(10) for place in range(4)] == [(0, 2), (2, 5), (5, 7), (7, 10)]
    assert cut.of(torch.arange(20), 0, runs=2).tolist() == [2, 3, 4, 12, 13, 14]
    layout = layout_of((Stream(1, 10), Stream(1, 4, (4, 1))), 2, 4)
    assert layout.sizes == (3, 4, 3, 4) and layout.lengths == ((3, 3), (4, 3), (3, 2), (4, 3))


def test_sizes_that_do_not_work_are_refused_with_those_that_do() -> None:
    require_heads(40, Parallel(ulysses=8), "Wan2.1 T2V")
    with pytest.raises(ValueError, match=r"ulysses=8 .* 12 heads of Wan2.1 T2V: choose 2, 3, 4, 6, 12, or ring, which"):
        require_heads(12, Parallel(ulysses=8), "Wan2.1 T2V")
    with pytest.raises(UnsupportedBackendError, match=r"'sage_attn2' cannot be merged in a ring.*torch_sdpa.* ulysses"):
        mergeable("sage_attn2", CPU, torch.float32, 128)
    with pytest.raises(UnsupportedBackendError, match="unknown attention backend 'sage'"):
        mergeable("sage", CPU, torch.float32, 128)
    few, mesh = (Stream(3, 3),), Mesh(Parallel(4), 0, CPU, *[Line((0, 1, 2, 3), 0)] * 5, control=None)  # type: ignore
    args = SimpleNamespace(streams=lambda tokens: few)
    with pytest.raises(ValueError, match="3 tokens a frame cannot be shared by 4 processes: make the video larger"):
        shard(run_blocks, mesh)([], torch.zeros(1, 9, 2), args)
