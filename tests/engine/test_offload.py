"""Streamed blocks against resident ones: bit-equal, whatever stays, whatever is copied ahead, whatever goes wrong."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightx2v.blocks import run_blocks
from lightx2v.cache.walk import FeatureCache
from lightx2v.config import Cache, Sampling
from lightx2v.diffuse import Hooks, Model, Start, diffuse
from lightx2v.lora import Lora, apply_loras
from lightx2v.models.wan.config import WanConfig
from lightx2v.models.wan.transformer import WanTransformer
from lightx2v.offload.plan import measure, streamed_bytes
from lightx2v.offload.slab import ALIGNMENT, PAGE, Slab
from lightx2v.offload.stream import BlockStream, parts_of, spread
from lightx2v_kernels import select
from strict_lane import GARBAGE, StrictLane
from tiny_cache import COND, CPU, EMPTY, EVEN, T2V, TEN, UNCOND
from tiny_lora import factors, tensors, write

LAYERS = 5


def wan(seed: int = 0, layers: int = LAYERS) -> WanTransformer:
    torch.manual_seed(seed)
    config = WanConfig(128, 64, layers, 16, 16, 32, 64, (1, 2, 2))
    return WanTransformer(config, select(device=CPU, dtype=torch.float32, head_dim=128)).eval().requires_grad_(False)


def one(network: nn.Module) -> Model:
    return Model(T2V, CPU, lambda: network)


def streamed(stream: BlockStream, *, low: bool = False) -> Model:
    if low:
        return Model(T2V, CPU, lambda: stream.bring("high"), lambda: stream.bring("low"), around=stream.around)
    return Model(T2V, CPU, stream.bring, around=stream.around)


def video(model: Model, sampling: Sampling = TEN, **options) -> Tensor:

    return diffuse(model, Start(EMPTY), sampling, COND, UNCOND, **options)


THREE = Sampling(seed=7, steps=3, cfg_scale=3.0, scheduler="euler")


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return video(one(wan()), THREE)


def at_rest(network: nn.Module, before: dict[str, Tensor]) -> bool:
    """Whether every weight is in main memory, of its first value."""
    after = network.state_dict()
    return list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def values(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("resident", range(LAYERS + 1))
@pytest.mark.parametrize("prefetch", [0, 1, 2, 7])
def test_streamed_equals_resident(expected: Tensor, resident: int, prefetch: int) -> None:
    network = wan()
    before = values(network)
    stream = BlockStream({"": network}, CPU, lane=StrictLane())
    for _ in range(2):  # a second video by the same stream
        with stream.open(resident, prefetch):
            assert torch.equal(video(streamed(stream), THREE), expected)
        assert at_rest(network, before)
        assert stream.device_bytes == 0


def test_plain_copies_equal_resident(expected: Tensor) -> None:
    stream = BlockStream({"": wan()}, CPU)
    with stream.open(2, 1), torch.inference_mode():
        assert torch.equal(video(streamed(stream), THREE), expected)


def test_made_in_inference_mode_and_changed_outside(expected: Tensor) -> None:
    with torch.inference_mode():
        network = wan()
        stream = BlockStream({"": network}, CPU)
    for parameter in network.parameters():
        parameter.mul_(2).mul_(0.5)  # as merging a LoRA does, in place
    with stream.open(1):
        assert torch.equal(video(streamed(stream), THREE), expected)


def test_between_passes_a_moving_block_is_at_rest() -> None:
    network = wan()
    before = values(network)
    stream = BlockStream({"": network}, CPU, lane=StrictLane())
    steps: list[int] = []

    def check(step, x0) -> None:
        steps.append(step.index)
        for index in spread(LAYERS, LAYERS - 2):
            block = network.blocks[index].state_dict()
            assert all(torch.equal(tensor, before[f"blocks.{index}.{name}"]) for name, tensor in block.items())

    with stream.open(2, 1):
        video(streamed(stream), THREE, hooks=Hooks(check))
    assert steps == [0, 1, 2]


def test_each_pass_copies_the_moving_blocks_once() -> None:
    """Across passes the next first block is on its way already: nothing is fetched twice, nothing at the end."""
    lane = StrictLane()
    network = wan()
    stream = BlockStream({"": network}, CPU, lane=lane)
    sizes = measure(network)
    with stream.open(2, 1):
        video(streamed(stream), THREE)
    passes = 2 * THREE.steps
    moving = sum(sizes.blocks[index] for index in spread(LAYERS, LAYERS - 2))
    assert lane.copied == sizes.total - moving + passes * moving


def test_the_next_pass_has_its_first_blocks_already() -> None:
    """Also where the next pass is the other expert's, and of that one after the last nothing is fetched."""
    networks = {"high": wan(), "low": wan(1)}
    sampling = Sampling(**{**THREE.__dict__, "steps": 3, "boundary_step": 1})
    lane = StrictLane()
    stream = BlockStream(networks, CPU, lane=lane)
    sizes = measure(networks["high"])
    block, passes = sizes.blocks[0], 2 * sampling.steps
    copied: list[int] = []
    with stream.open(0, 1):
        video(streamed(stream, low=True), sampling, hooks=Hooks(on_block=lambda: copied.append(lane.copied)))
    experts = [1, 1, 2, 2, 2, 2]  # brought until then
    starts = [sizes.rest * experts[index] + (LAYERS * index + 2 * (index > 0)) * block for index in range(passes)]
    assert copied[::LAYERS] == starts
    assert lane.copied == 2 * sizes.rest + passes * LAYERS * block


def test_device_memory_is_what_the_plan_counts() -> None:
    networks = {"high": wan(), "low": wan(1, layers=3)}
    sizes = tuple(measure(network) for network in networks.values())
    stream = BlockStream(networks, CPU)
    for resident in range(LAYERS + 1):
        for prefetch in range(3):
            with stream.open(resident, prefetch):
                assert stream.device_bytes == streamed_bytes(sizes, resident, prefetch)
                stream.bring("high")
                assert stream.device_bytes == streamed_bytes(sizes, resident, prefetch)
    assert stream.host_bytes == sum(size.total for size in sizes)


@pytest.mark.parametrize("resident", [0, 2, LAYERS])
@pytest.mark.parametrize("low_layers", [LAYERS, 3])
def test_two_experts(resident: int, low_layers: int) -> None:
    high, low = wan(), wan(1, layers=low_layers)
    sampling = Sampling(**{**THREE.__dict__, "steps": 4, "boundary": 0.8, "boundary_step": 2})
    resident_model = Model(T2V, CPU, lambda: high, lambda: low)
    truth = video(resident_model, sampling)
    assert not torch.equal(truth, video(Model(T2V, CPU, lambda: high, lambda: high), sampling))
    before = values(high), values(low)
    lane = StrictLane()
    sizes = measure(high), measure(low)
    stream = BlockStream({"high": high, "low": low}, CPU, lane=lane)
    with stream.open(resident, 1):
        assert torch.equal(video(streamed(stream, low=True), sampling), truth)
    assert at_rest(high, before[0]) and at_rest(low, before[1])
    copied = 0
    for size in sizes:  # of each expert two steps of two passes; what stays is copied once
        count = len(size.blocks)
        moving = sum(size.blocks[index] for index in spread(count, max(0, count - resident)))
        copied += size.total - moving + 4 * moving
    assert lane.copied == copied, "the low expert's first blocks came during the high one's last pass"


@pytest.mark.parametrize("how", ["branch", "merge"])
def test_with_loras(tmp_path: Path, how: str) -> None:
    network, other = wan(), wan()
    pairs = factors(network)
    pairs = {name: pair for name, pair in pairs.items() if not name.startswith("blocks.1.")}  # blocks that differ
    path = write(tmp_path / "lora.safetensors", tensors(pairs, "comfy"))
    for each in (network, other):
        apply_loras(each, None, (Lora(path, 0.7),), how)
    truth = video(one(network), THREE)
    stream = BlockStream({"": other}, CPU, lane=StrictLane())
    with stream.open(1, 1):
        assert torch.equal(video(streamed(stream), THREE), truth)


@pytest.mark.parametrize("method", ["teacache", "magcache"])
def test_with_a_cache_that_skips(method: str) -> None:
    cache = FeatureCache(Cache(method, 0.12), (EVEN,))
    network = wan()
    truth = video(one(network), cache=cache)
    assert not torch.equal(truth, video(one(network)))
    lane = StrictLane()
    stream = BlockStream({"": network}, CPU, lane=lane)
    with stream.open(0, 1):
        assert torch.equal(video(streamed(stream), cache=cache), truth)
    sizes = measure(network)
    whole = sizes.rest + 20 * sum(sizes.blocks)
    assert lane.copied < 0.9 * whole, "skipped passes copy nothing"


class Stop(Exception):
    pass


def stop_at(count: int) -> Iterator[None]:
    for _ in range(count):
        yield
    raise Stop


@pytest.mark.parametrize("blocks", [0, 1, 6, 8, 14])
@pytest.mark.parametrize("resident", [0, 3])
def test_cancel_in_the_middle(expected: Tensor, blocks: int, resident: int) -> None:
    network = wan()
    before = values(network)
    stream = BlockStream({"": network}, CPU, lane=StrictLane())
    countdown = stop_at(blocks)
    with pytest.raises(Stop), stream.open(resident, 1):
        video(streamed(stream), THREE, hooks=Hooks(on_block=lambda: next(countdown)))
    assert at_rest(network, before)
    with stream.open(resident, 1):
        assert torch.equal(video(streamed(stream), THREE), expected)


@pytest.mark.parametrize("index", [0, 2, LAYERS - 1])
def test_an_error_inside_a_block_and_on(expected: Tensor, index: int) -> None:
    """The stream stays open, as under a sampler that tries again."""
    network = wan()
    stream = BlockStream({"": network}, CPU, lane=StrictLane())

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError

    with stream.open(2, 2):
        hook = network.blocks[index].ffn[2].register_forward_hook(fail)
        with pytest.raises(torch.OutOfMemoryError):
            video(streamed(stream), THREE)
        hook.remove()
        assert torch.equal(video(streamed(stream), THREE), expected)


def test_one_piece_a_block_of_every_type() -> None:
    layer = nn.Module()
    layer.register_buffer("packed", torch.arange(100, dtype=torch.uint8))
    layer.register_buffer("scale", torch.rand(3).to(torch.float8_e4m3fn), persistent=False)
    layer.weight = nn.Parameter(torch.randn(4, 6).bfloat16().t(), requires_grad=False)
    layer.tied, layer.none = layer.weight, None
    layer.register_buffer("empty", torch.zeros(0, 7))
    before = [layer.packed.clone(), layer.scale.clone(), layer.weight.clone()]
    slab = Slab([layer])
    assert slab.nbytes == 3 * ALIGNMENT and slab.host.data_ptr() % PAGE == 0
    assert [tensor.untyped_storage().data_ptr() for tensor in (layer.packed, layer.scale, layer.weight)] == [
        slab.host.untyped_storage().data_ptr()
    ] * 3
    assert isinstance(layer.weight, nn.Parameter) and layer.tied is layer.weight
    device = torch.empty(slab.nbytes, dtype=torch.uint8).fill_(GARBAGE)
    slab.point(slab.views(device))
    assert layer.weight.isnan().all() and layer.tied is layer.weight and layer.empty.shape == (0, 7)
    device.copy_(slab.host)
    after = [layer.packed, layer.scale, layer.weight]
    assert all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(after[:2], before[:2], strict=True)
    )
    assert torch.equal(layer.weight, before[2])
    device.fill_(GARBAGE)
    slab.point_home()
    assert torch.equal(layer.weight, before[2]) and torch.equal(layer.packed, before[0])


def test_weights_at_rest_are_not_copied_again() -> None:
    network = wan()
    first = BlockStream({"": network}, CPU)
    lying = {name: tensor.data_ptr() for name, tensor in network.state_dict().items()}
    second = BlockStream({"": network}, CPU)
    assert {name: tensor.data_ptr() for name, tensor in network.state_dict().items()} == lying
    assert first.host_bytes == second.host_bytes == measure(network).total


def test_blocks_that_move_are_spread_evenly() -> None:
    for count in range(1, 12):
        for moving in range(count + 1):
            found = spread(count, moving)
            assert len(found) == len(set(found)) == moving and all(0 <= index < count for index in found)
            gaps = [b - a for a, b in pairwise((*found, found[0] + count))] if found else []
            assert not gaps or max(gaps) - min(gaps) <= 1


def test_what_is_refused() -> None:
    stream = BlockStream({"": wan()}, CPU)
    with pytest.raises(RuntimeError, match="open the stream before"):
        stream.bring()
    with pytest.raises(ValueError, match="resident=-1"), stream.open(-1):
        pass
    with stream.open(0), pytest.raises(RuntimeError, match="streamed already"), stream.open(0):
        pass
    with stream.open(0), pytest.raises(RuntimeError, match="2 blocks are walked whose network was not brought"):
        stream.around(run_blocks, None)([nn.Identity(), nn.Identity()], EMPTY, None)
    with torch.device("meta"), pytest.raises(ValueError, match="read the weights before"):
        Slab([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="Linear has 0 lists of blocks"):
        parts_of(nn.Linear(2, 2))
