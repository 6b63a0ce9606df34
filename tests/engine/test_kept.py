"""What steps compute alike is computed once, is bit by bit what each would compute, and goes when its turn is over."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightx2v.cache.walk import FeatureCache
from lightx2v.config import Cache, Sampling
from lightx2v.diffuse import Hooks, Model, Start, diffuse
from lightx2v.guidance import Conditioning
from lightx2v.kept import Kept, KeptByBranch, anew
from lightx2v.lora import Lora, apply_loras
from lightx2v.memory import text_bytes
from lightx2v.models import specs
from lightx2v.models.hunyuan_video_15.transformer import HunyuanTransformer
from lightx2v.models.wan.config import WanConfig
from lightx2v.models.wan.transformer import WanTransformer
from lightx2v.offload import Asked, rows_of
from lightx2v.offload.plan import GB, RESERVE, Machine, Needs, Sizes, plan, tighter
from lightx2v.offload.stream import BlockStream
from lightx2v_kernels import select
from tiny_cache import COND, CPU, EMPTY, EVEN, TEN, UNCOND
from tiny_hunyuan import CONFIG
from tiny_lora import factors, tensors, write

LAYERS, STEPS = 2, 4
FOUR = Sampling(seed=7, steps=STEPS, cfg_scale=3.0, scheduler="unipc")
WAN = WanConfig(128, 64, LAYERS, 16, 16, 32, 64, (1, 2, 2))
SPECS = {spec.name: spec for spec in specs()}
KERNELS = select(device=CPU, dtype=torch.float32, head_dim=128)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wan(seed: int = 0, **changes: Any) -> WanTransformer:
    torch.manual_seed(seed)
    return WanTransformer(replace(WAN, **changes), KERNELS).eval().requires_grad_(False)


def t2v(network: nn.Module, low: nn.Module | None = None) -> Model:
    return Model(SPECS["wan2.1_t2v"], CPU, lambda: network, None if low is None else lambda: low)


class Calls:
    """How often each module of a network is called whose name ends so."""

    def __init__(self, network: nn.Module, *ends: str) -> None:
        self.counts: Counter[str] = Counter()
        for name, module in network.named_modules():
            if name.endswith(ends):
                module.register_forward_hook(lambda *_, name=name: self.counts.update([name]))


def both(model: Model, sampling: Sampling, conds: tuple[Conditioning, Conditioning], **options: Any) -> Tensor:
    """The video with and without keeping anything, which must be the same one."""
    start = options.pop("start", Start(EMPTY))
    kept, computed = (
        diffuse(replace(model, keeps=keeps), start, sampling, *conds, **options) for keeps in (True, False)
    )
    assert torch.equal(kept, computed) and kept.abs().max() > 0.1
    return kept


READS = ("cross_attn.k", "cross_attn.v", "cross_attn.k_img", "cross_attn.v_img", "text_embedding", "img_emb")


@pytest.mark.parametrize("scale, branches", [(3.0, 2), (1.0, 1)])
def test_text_is_read_once_a_request_and_branch(scale: float, branches: int) -> None:
    network, sampling = wan(), replace(FOUR, cfg_scale=scale)
    calls = Calls(network, *READS)
    for requests in (1, 2):
        diffuse(t2v(network), Start(EMPTY), sampling, COND, UNCOND)
        assert set(calls.counts.values()) == {requests * branches} and len(calls.counts) == 2 * LAYERS + 1
    calls.counts.clear()
    diffuse(replace(t2v(network), keeps=False), Start(EMPTY), sampling, COND, UNCOND)
    assert set(calls.counts.values()) == {STEPS * branches}
    both(t2v(network), sampling, (COND, UNCOND))
    other = Conditioning(random(1, 9, 32, seed=11))  # a longer prompt after it: nothing of the first one is left
    assert not torch.equal(both(t2v(network), sampling, (other, UNCOND)), both(t2v(network), sampling, (COND, UNCOND)))


def test_images_are_read_once_too() -> None:
    network = wan(in_channels=36, image_dim=24)
    model = replace(t2v(network), spec=SPECS["wan2.1_i2v"])
    conds = tuple(
        replace(each, image=random(1, 20, 2, 4, 6, seed=5), clip=random(1, 6, 24, seed=6)) for each in (COND, UNCOND)
    )
    calls = Calls(network, *READS)
    diffuse(model, Start(EMPTY), FOUR, *conds)
    assert set(calls.counts.values()) == {2} and len(calls.counts) == 4 * LAYERS + 2
    both(model, FOUR, conds)
    batch = both(model, FOUR, conds, start=Start(EMPTY.repeat(2, 1, 1, 1, 1)))
    assert not torch.equal(batch[0], batch[1])


def test_frames_with_their_own_timesteps() -> None:
    network, clean = wan(in_channels=48, out_channels=48), random(1, 48, 3, 4, 6, seed=1)
    mask = torch.ones(1, 1, 3, 4, 6)
    mask[:, :, 0] = 0
    both(replace(t2v(network), spec=SPECS["wan2.2_ti2v"]), FOUR, (COND, UNCOND), start=Start(clean, mask))


def test_each_expert_reads_for_itself_and_the_first_ones_reading_goes() -> None:
    high, low = wan(), wan(1)
    sampling = replace(FOUR, boundary_step=2)
    calls = [Calls(each, *READS) for each in (high, low)]
    alive: list[weakref.ref[Tensor]] = []
    high.text_embedding.register_forward_hook(lambda module, given, out: alive.append(weakref.ref(out)))
    seen: list[int] = []

    def count(step: object, x0: Tensor) -> None:
        seen.append(sum(each() is not None for each in alive))

    diffuse(t2v(high, low), Start(EMPTY), sampling, COND, UNCOND, hooks=Hooks(on_step=count))
    assert [set(each.counts.values()) for each in calls] == [{2}, {2}]
    assert seen == [2, 0, 0, 0], "kept after the first of two steps, gone after the last"
    both(t2v(high, low), sampling, (COND, UNCOND))


@pytest.mark.parametrize("method", ["teacache", "magcache"])
def test_with_a_cache_that_skips(method: str) -> None:
    cache = FeatureCache(Cache(method, 0.12), (EVEN,))
    network = wan()
    assert not torch.equal(
        both(t2v(network), TEN, (COND, UNCOND), cache=cache), both(t2v(network), TEN, (COND, UNCOND))
    )


@pytest.mark.parametrize("how", ["branch", "merge"])
@pytest.mark.parametrize("resident", [None, 0, 1])
def test_with_loras_and_blocks_that_pass(tmp_path: Path, how: str, resident: int | None) -> None:
    network = wan()
    plain = both(t2v(network), FOUR, (COND, UNCOND))
    path = write(tmp_path / "lora.safetensors", tensors(factors(network), "comfy"))
    apply_loras(network, None, (Lora(path, 0.7),), how)
    resting = both(t2v(network), FOUR, (COND, UNCOND))
    assert not torch.equal(resting, plain)
    if resident is not None:
        stream = BlockStream({"": network}, CPU)
        with stream.open(resident, 1):
            model = Model(SPECS["wan2.1_t2v"], CPU, stream.bring, around=stream.around)
            assert torch.equal(both(model, FOUR, (COND, UNCOND)), resting)


def test_hunyuans_images_and_glyphs() -> None:
    torch.manual_seed(0)
    network = HunyuanTransformer(CONFIG, KERNELS).eval().requires_grad_(False)
    model = Model(SPECS["hunyuan1.5"], CPU, lambda: network)
    cond, uncond = (
        Conditioning(
            random(1, 8 + seed, CONFIG.text_dim, seed=seed),
            random(1, 33, 2, 2, 3, seed=3),
            random(1, 5, CONFIG.image_dim, seed=4),
            random(1, 3, CONFIG.glyph_dim, seed=5 + seed),
            torch.arange(8 + seed)[None] < 7,
        )
        for seed in (0, 1)
    )
    calls = Calls(network, "vision_in", "byt5_in")
    both(model, FOUR, (cond, uncond), start=Start(torch.zeros(1, 32, 2, 2, 3)))
    assert set(calls.counts.values()) == {2 + 2 * STEPS}


def test_of_one_step_nothing_is_kept() -> None:
    assert KeptByBranch(range(3, 4)).of(3, "cond") is anew
    kept = KeptByBranch(range(3, 5))
    first = kept.of(3, "cond")
    assert isinstance(first, Kept) and kept.of(4, "cond") is first is not kept.of(3, "uncond")
    one, two = nn.Identity(), nn.Identity()
    assert [first(one, lambda: 1), first(two, lambda: 2), first(one, lambda: 3)] == [1, 2, 1]


BLOCKS = Sizes((int(GB),) * 40, 0)
NEEDS = Needs((BLOCKS,), int(GB), kept=int(0.8 * GB))


def test_no_block_passes_for_what_is_kept() -> None:
    without, keeping = replace(NEEDS, kept=0), 0
    for free in range(int(2.7 * GB), int(45 * GB), int(GB) // 10):
        made, least = plan(NEEDS, Machine(free, 10**12, 0)), plan(without, Machine(free, 10**12, 0))
        assert replace(made, kept=0, peak=made.peak - made.kept) == least
        assert made.peak <= free and made.kept in (0, NEEDS.kept)
        assert bool(made.kept) == (least.peak + NEEDS.kept <= free)
        keeping += bool(made.kept)
    assert keeping > 40
    assert plan(NEEDS, Machine(10**12, 10**12, 0), least=True).kept == 0
    whole = plan(NEEDS, Machine(BLOCKS.total + 2 * int(GB) + RESERVE, 10**12, 0))
    assert "0.80 GB kept of prompt and images" in whole.line()
    assert tighter(NEEDS, Machine(whole.budget, 10**12, 0), whole).kept == 0
    assert whole.beside_weights == whole.budget - RESERVE - BLOCKS.total, "it is given back before others' stages"


def test_what_is_kept_is_counted() -> None:
    kept = Kept()
    with torch.inference_mode():
        wan()(EMPTY.repeat(3, 1, 1, 1, 1), torch.full((3,), 500.0), random(3, 7, 32), keep=kept)
    found = sum(
        tensor.numel() * tensor.element_size()
        for made in kept._made.values()
        for tensor in ([made] if isinstance(made, Tensor) else [each for pair in made for each in pair])
    )
    info = type("Info", (), {"config": WAN})()
    assert text_bytes(info, 3, 7, torch.float32) == found  # type: ignore[arg-type]
    clip = replace(COND, clip=random(1, 6, 24))
    assert rows_of(clip, UNCOND) == (11, 7) and rows_of(COND, None) == (5,) and Asked((1,)).rows == ()
