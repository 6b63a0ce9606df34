"""Both passes of guidance over one copy of each block: half the copies, the same bits, and nothing left of an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightx2v.blocks import added, run_blocks
from lightx2v.cache.turn import Turn
from lightx2v.cache.walk import FeatureCache
from lightx2v.config import Cache, Sampling
from lightx2v.diffuse import Hooks, Model, Start, diffuse
from lightx2v.guidance import Conditioning
from lightx2v.lora import Lora, apply_loras
from lightx2v.models import specs
from lightx2v.models.hunyuan_video_15.transformer import HunyuanTransformer
from lightx2v.models.wan.config import WanConfig
from lightx2v.models.wan.transformer import WanTransformer
from lightx2v.offload.plan import measure
from lightx2v.offload.stream import BlockStream, spread
from lightx2v.paired import Paired
from lightx2v_kernels import select
from strict_lane import StrictLane
from tiny_cache import COND, CPU, EMPTY, EVEN, TEN, UNCOND
from tiny_hunyuan import CONFIG
from tiny_lora import factors, tensors, write

LAYERS = 4
SPECS = {spec.name: spec for spec in specs()}
THREE = Sampling(seed=7, steps=3, cfg_scale=3.0, scheduler="euler")
KERNELS = select(device=CPU, dtype=torch.float32, head_dim=128)


def wan(seed: int = 0, channels: int = 16, layers: int = LAYERS) -> WanTransformer:
    torch.manual_seed(seed)
    config = WanConfig(128, 64, layers, channels, channels, 32, 64, (1, 2, 2))
    return WanTransformer(config, KERNELS).eval().requires_grad_(False)


def alone(network: nn.Module, name: str = "wan2.1_t2v") -> Model:
    return Model(SPECS[name], CPU, lambda: network)


def paired(stream: BlockStream, name: str = "wan2.1_t2v") -> Model:
    return Model(SPECS[name], CPU, stream.bring, around=stream.around, paired=True)


def video(model: Model, sampling: Sampling = THREE, start: Start | None = None, **options: Any) -> Tensor:
    conds = options.pop("conds", (COND, UNCOND))
    return diffuse(model, start or Start(EMPTY), sampling, *conds, **options)


def copies(network: nn.Module, resident: int, times: int) -> int:
    """Bytes, with every moving block copied so often."""
    sizes, count = measure(network), len(measure(network).blocks)
    moving = sum(sizes.blocks[index] for index in spread(count, count - resident))
    return sizes.total - moving + times * moving


@pytest.mark.parametrize("resident", [0, 1, 3, LAYERS])
@pytest.mark.parametrize("prefetch", [0, 1, 7])
def test_a_block_is_copied_once_a_step(resident: int, prefetch: int) -> None:
    network, lane = wan(), StrictLane()
    truth = video(alone(wan()))
    stream = BlockStream({"": network}, CPU, lane=lane)
    for videos in (1, 2):
        with stream.open(resident, prefetch):
            assert torch.equal(video(paired(stream)), truth)
        assert lane.copied == videos * copies(network, resident, THREE.steps)
    with stream.open(resident, prefetch):
        assert torch.equal(video(replace(paired(stream), paired=False)), truth)
    again = copies(network, resident, 2 * THREE.steps)
    assert lane.copied == 2 * copies(network, resident, THREE.steps) + again


def test_a_request_without_guidance_is_as_it_was() -> None:
    sampling, lane = replace(THREE, cfg_scale=1.0), StrictLane()
    stream = BlockStream({"": wan()}, CPU, lane=lane)
    with stream.open(0):
        assert torch.equal(video(paired(stream), sampling), video(alone(wan()), sampling))
    assert lane.copied == copies(wan(), 0, THREE.steps)


@pytest.mark.parametrize("cfg_low", [3.0, 1.0])
def test_experts_follow_each_other_with_their_first_blocks_there(cfg_low: float) -> None:
    sampling = replace(THREE, boundary_step=2, cfg_low=cfg_low)
    networks, lane = (wan(), wan(1)), StrictLane()
    truth = video(Model(SPECS["wan2.1_t2v"], CPU, lambda: networks[0], lambda: networks[1]), sampling)
    stream = BlockStream(dict(zip(("high", "low"), networks, strict=True)), CPU, lane=lane)
    with stream.open(1):
        bring = [lambda name=name: stream.bring(name) for name in ("high", "low")]
        model = Model(SPECS["wan2.1_t2v"], CPU, *bring, around=stream.around, paired=True)
        assert torch.equal(video(model, sampling), truth)
    assert lane.copied == copies(networks[0], 1, 2) + copies(networks[1], 1, 1), "nothing was fetched in vain"


class Ran:
    """The innermost walk: how often it walked, of one pass or of two together."""

    def __init__(self) -> None:
        self.walks = 0

    def __call__(self, blocks: Sequence, tokens: Tensor, args: Any) -> Tensor:
        self.walks += 1
        return run_blocks(blocks, tokens, args)


@pytest.mark.parametrize("method", ["teacache", "magcache"])
def test_a_pass_that_is_skipped_leaves_the_other_to_walk_alone(method: str) -> None:
    """MagCache skips other steps of each pass, so that each walks alone in some."""
    cache, ran, lane = FeatureCache(Cache(method, 0.12), (EVEN,)), Ran(), StrictLane()
    reports: list[Any] = []
    truth = video(alone(wan()), TEN, cache=replace(cache, on_report=reports.append))
    assert not torch.equal(truth, video(alone(wan()), TEN))
    network = wan()
    stream = BlockStream({"": network}, CPU, lane=lane)
    with stream.open(1):
        assert torch.equal(video(paired(stream), TEN, cache=cache, run=ran), truth)
    skipped = {branch: set(steps) for branch, steps in reports[0].skipped.items()}
    walks = TEN.steps - len(skipped["cond"] & skipped["uncond"])
    assert ran.walks == walks < TEN.steps and lane.copied == copies(network, 1, walks)
    assert method == "teacache" or skipped["uncond"] < skipped["cond"]


@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_either_may_be_the_one_that_walks(branch: str) -> None:
    def cache(turn: Turn, run: Callable) -> Callable:
        return lambda step, of: run if of == branch or step != 1 else lambda blocks, tokens, args: tokens * 0.5

    truth, lane = video(alone(wan()), cache=cache), StrictLane()
    stream = BlockStream({"": wan()}, CPU, lane=lane)
    with stream.open(0):
        assert torch.equal(video(paired(stream), cache=cache), truth)
    assert lane.copied == copies(wan(), 0, THREE.steps)


@pytest.mark.parametrize("how", ["branch", "merge"])
def test_with_loras_on_some_blocks(tmp_path: Path, how: str) -> None:
    network, other = wan(), wan()
    pairs = {name: pair for name, pair in factors(network).items() if not name.startswith("blocks.1.")}
    path = write(tmp_path / "lora.safetensors", tensors(pairs, "comfy"))
    for each in (network, other):
        apply_loras(each, None, (Lora(path, 0.7),), how)
    stream = BlockStream({"": other}, CPU, lane=StrictLane())
    with stream.open(1):
        assert torch.equal(video(paired(stream)), video(alone(network)))


def test_frames_with_their_own_timesteps_and_a_batch() -> None:
    clean = torch.randn(2, 48, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 1, 3, 4, 6)
    mask[:, :, 0] = 0
    stream = BlockStream({"": wan(channels=48)}, CPU, lane=StrictLane())
    truth = video(alone(wan(channels=48), "wan2.2_ti2v"), start=Start(clean, mask))
    with stream.open(2):
        assert torch.equal(video(paired(stream, "wan2.2_ti2v"), start=Start(clean, mask)), truth)


def test_hunyuan() -> None:
    def network() -> HunyuanTransformer:
        torch.manual_seed(0)
        return HunyuanTransformer(CONFIG, KERNELS).eval().requires_grad_(False)

    def given(seed: int) -> Conditioning:
        random = [
            torch.randn(*shape, generator=torch.Generator().manual_seed(seed + index))
            for index, shape in enumerate([(1, 8 + seed, 48), (1, 33, 2, 2, 3), (1, 5, 36), (1, 3, 1472)])
        ]
        return Conditioning(*random, mask=torch.arange(8 + seed)[None] < 7)

    options: dict[str, Any] = {"start": Start(torch.zeros(1, 32, 2, 2, 3)), "conds": (given(0), given(3))}
    lane = StrictLane()
    stream = BlockStream({"": network()}, CPU, lane=lane)
    with stream.open(1):
        found = video(paired(stream, "hunyuan1.5"), **options)
    assert torch.equal(found, video(alone(network(), "hunyuan1.5"), **options))
    assert lane.copied == copies(network(), 1, THREE.steps)


class Stop(Exception):
    pass


@pytest.mark.parametrize("calls", [0, 1, 2, 7, 9, 12])
@pytest.mark.parametrize("resident", [0, 2])
def test_cancelled_between_any_two_blocks_of_either_pass(calls: int, resident: int) -> None:
    network, asked = wan(), []
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    stream = BlockStream({"": network}, CPU, lane=StrictLane())

    def check() -> None:
        if len(asked) == calls:
            raise Stop
        asked.append(1)

    with stream.open(resident):
        with pytest.raises(Stop):
            video(paired(stream), hooks=Hooks(on_block=check))
        asked.extend([1] * 100)
        assert torch.equal(video(paired(stream), hooks=Hooks(on_block=check)), video(alone(wan()))), "still open"
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items()), "at home"
    assert len(asked) == calls + 100 + 2 * LAYERS * THREE.steps, "asked before every block of both"
    assert stream.device_bytes == 0 and not stream._walks


@pytest.mark.parametrize("index", [0, 2, LAYERS - 1])
@pytest.mark.parametrize("call", [1, 2])
def test_an_error_of_either_pass_ends_both(index: int, call: int) -> None:
    network, seen = wan(), []
    stream = BlockStream({"": network}, CPU, lane=StrictLane())

    def fail(*_: object) -> None:
        seen.append(1)
        if len(seen) == call:
            raise torch.OutOfMemoryError

    with stream.open(1, 2):
        hook = network.blocks[index].ffn[2].register_forward_hook(fail)
        with pytest.raises(torch.OutOfMemoryError):
            video(paired(stream))
        hook.remove()
        assert torch.equal(video(paired(stream)), video(alone(wan())))


@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_values_that_are_not_finite_are_said_of_their_pass(branch: str) -> None:
    network, rows = wan(), (COND if branch == "cond" else UNCOND).context.shape[1]

    def spoil(module: nn.Module, given: tuple, out: Any) -> Tensor:
        return added(out) * (float("inf") if given[1].context.shape[1] == rows else 1)

    network.blocks[2].register_forward_hook(spoil)
    stream = BlockStream({"": network}, CPU, lane=StrictLane())
    with stream.open(1), pytest.raises(FloatingPointError) as raised:
        video(paired(stream))
    assert "step 1 of 3" in str(raised.value) and f"first in block 3 of {LAYERS} ({branch} pass" in str(raised.value)
    assert stream.device_bytes == 0


def test_passes_that_are_not_given_to_both_walk_by_themselves() -> None:
    pair, blocks = Paired(run_blocks), [lambda tokens, args: tokens + args] * 3
    one, zero = torch.ones(1), torch.zeros(1)
    assert pair(blocks, zero, 2) == 6
    order: list[int] = []
    noting = [lambda tokens, args: (order.append(args), tokens + args)[1]] * 2
    found = pair.both(lambda: pair(noting, zero, 1) * 10, lambda: pair(noting, one, 2) * 100)
    assert found == (20, 500) and order == [1, 2, 1, 2]
    for spoilt in (0, 1):
        both = [lambda: pair(noting, one, 2), lambda: 1 / 0]
        with pytest.raises(ZeroDivisionError):
            pair.both(*(both if spoilt else reversed(both)))
        assert pair(blocks, one, 1) == 4
