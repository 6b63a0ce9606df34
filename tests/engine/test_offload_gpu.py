"""Streaming on a CUDA device: bit-equal, within its memory, and copies that run while blocks compute."""

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightx2v import LightX2VPipeline
from lightx2v.blocks import run_blocks
from lightx2v.checkpoint import Header, read_header
from lightx2v.models.wan.config import WanConfig
from lightx2v.models.wan.transformer import WanTransformer
from lightx2v.offload import Home, Plan
from lightx2v.offload.disk import left_in_file
from lightx2v.offload.lane import Lane, link_rate, pin
from lightx2v.offload.plan import GB, RESERVE, Machine, Needs, measure, plan, streamed_bytes, tighter
from lightx2v.offload.shortage import Advice, once_more
from lightx2v.offload.slab import PAGE, host_memory
from lightx2v.offload.stream import BlockStream
from lightx2v.paired import Paired, in_turn
from lightx2v_kernels import select
from tiny_cache import T2V

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
DEMO = Path(__file__).parents[2] / "demo" / "models" / "wan2.1_t2v"
LAYERS = 8
CONFIG = WanConfig(1536, 6144, LAYERS, 16, 16, 4096, 256, (1, 2, 2))  # 75 MB a block in bf16
LATENTS = (1, 16, 9, 30, 52)


@pytest.fixture(autouse=True)
def empty_device() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def wan(seed: int = 0, config: WanConfig = CONFIG) -> WanTransformer:
    """In main memory; made on the device, which is faster."""
    torch.manual_seed(seed)
    kernels = select(device=CUDA, dtype=torch.bfloat16, head_dim=128)
    with CUDA:
        network = WanTransformer(config, kernels)
    return network.eval().requires_grad_(False).to(torch.bfloat16).to("cpu")


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents, context = torch.randn(LATENTS, generator=generator), torch.randn(1, 64, 4096, generator=generator)
    return latents.to(CUDA), torch.tensor([500.0], device=CUDA), context.to(CUDA)


@torch.inference_mode()
def passes(bring: Callable[[int], tuple[WanTransformer, Callable]], count: int = 4) -> list[Tensor]:
    """Passes in a row, without waiting in between, each with other latents."""
    latents, timestep, context = inputs()
    outputs = []
    for index in range(count):
        network, run = bring(index)
        outputs.append(network(latents * (1 + index), timestep, context, run))
    return outputs


def streamed(stream: BlockStream, name: str = "") -> Callable[[int], tuple]:
    return lambda index: (stream.bring(name), stream.around(run_blocks, name))


def resident(network: WanTransformer) -> Callable[[int], tuple]:
    return lambda index: (network, run_blocks)


@cache
def truth() -> list[Tensor]:
    """Four passes of the resident network; made within the first test that asks, under the settings of tests."""
    return passes(resident(wan().to(CUDA)))


def same(found: list[Tensor]) -> bool:
    """As many of those as there are."""
    return bool(found) and all(torch.equal(a, b) for a, b in zip(found, truth(), strict=False))


def test_streamed_equals_resident() -> None:
    truth()
    stream = BlockStream({"": wan()}, CUDA)
    assert stream.pinned_bytes >= stream.host_bytes
    for stays in (0, 3, LAYERS):
        for prefetch in (0, 1, 2):
            for _ in range(2):
                with stream.open(stays, prefetch):
                    assert same(passes(streamed(stream))), (stays, prefetch)


def left_in(folder: Path, network: WanTransformer) -> Header:
    """Of a file with the network's weights; those of all blocks are nowhere else any longer."""
    path = folder / "wan.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path)
    for name in left_in_file(network, LAYERS):
        owner, _, leaf = name.rpartition(".")
        module = network.get_submodule(owner)
        module._parameters[leaf] = torch.nn.Parameter(module._parameters[leaf].to("meta"), requires_grad=False)
    return read_header(path)


def test_both_passes_of_guidance_over_one_copy(tmp_path: Path) -> None:
    """Two passes that walk together, several steps without waiting in between, also of weights in their file."""
    latents, timestep, context = inputs()
    conds = context, -context
    network = wan()

    @torch.inference_mode()
    def steps(bring: Callable[[], WanTransformer], around: Callable, paired: bool) -> list[Tensor]:
        pair, outputs = Paired(run_blocks), []
        both = pair.both if paired else in_turn
        for index in range(3):
            forward = [
                lambda cond=cond, index=index: bring()(latents * (1 + index), timestep, cond, around(pair, ""))
                for cond in conds
            ]
            outputs += both(*forward)
        return outputs

    network.to(CUDA)
    expected = steps(lambda: network, lambda run, following: run, False)
    assert not torch.equal(expected[0], expected[1])
    network.to("cpu")
    stream = BlockStream({"": network}, CUDA)
    for stays, prefetch in ((0, 0), (0, 1), (3, 1), (3, 2)):
        for paired in (True, False):
            with stream.open(stays, prefetch):
                found = steps(stream.bring, stream.around, paired)
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (stays, prefetch, paired)
    stream.release()
    stream = BlockStream({"": network}, CUDA, headers={"": left_in(tmp_path, network)})
    with stream.open(0, 1):
        found = steps(stream.bring, stream.around, True)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    stream.release()


def test_without_pinning_too() -> None:
    stream = BlockStream({"": wan()}, CUDA, pin_limit=0)
    assert stream.pinned_bytes == 0
    with stream.open(2, 1):
        assert same(passes(streamed(stream)))


def test_experts_by_turns() -> None:
    networks = wan(), wan(1, replace(CONFIG, num_layers=5))
    expected = [*truth()[:2], *passes(resident(wan(1, networks[1].config).to(CUDA)))[2:]]
    stream = BlockStream(dict(zip(("high", "low"), networks, strict=True)), CUDA)
    names = ["high", "high", "low", "low", ""]

    def bring(index: int) -> tuple:
        return stream.bring(names[index]), stream.around(run_blocks, names[index + 1] or None)

    for stays in (0, 3, LAYERS):
        with stream.open(stays, 1):
            assert all(torch.equal(a, b) for a, b in zip(passes(bring), expected, strict=True))


def test_peak_memory_is_what_the_plan_counts() -> None:
    latents = inputs()[0]
    network = wan().to(CUDA)
    passes(resident(network), 1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    passes(resident(network), 2)
    activations = torch.cuda.max_memory_allocated() - before
    network.to("cpu")
    del latents
    sizes, stream = measure(network), BlockStream({"": network}, CUDA)
    for stays in (0, 6):
        gc.collect()
        torch.cuda.synchronize()
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with stream.open(stays, 1):
            passes(streamed(stream), 2)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - base
        counted = streamed_bytes((sizes,), stays, 1)
        print(f"{stays} stay: peak {peak / 1e6:.0f} MB, weights {counted / 1e6:.0f}, passes {activations / 1e6:.0f}")
        assert counted <= peak <= counted + 1.05 * activations + 32e6
        assert torch.cuda.memory_allocated() <= base + 1e6, "all of it is given back"


def elapsed(work: Callable[[], object]) -> float:
    """Milliseconds on the device, of the second of two calls."""
    work()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def test_copies_run_while_blocks_compute() -> None:
    """Printed for the log: how a streamed pass compares with the longer of computing and copying."""
    network = wan()
    sizes = measure(network)
    rate = link_rate(CUDA)
    assert rate is not None
    copying = 4 * sum(sizes.blocks) / rate * 1000
    stream = BlockStream({"": network}, CUDA)
    times = {}
    for prefetch in (0, 1, 2):
        with stream.open(0, prefetch):
            times[prefetch] = elapsed(lambda: passes(streamed(stream)))
    stream.release()
    network.to(CUDA)
    computing = elapsed(lambda: passes(resident(network)))
    for prefetch, time in times.items():
        share = time / max(computing, copying)
        print(
            f"prefetch {prefetch}: {time:.1f} ms, {share:.2f} x max(computing {computing:.1f}, copying {copying:.1f})"
        )
    print(f"link {rate / 1e9:.1f} GB/s")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        again = BlockStream({"": network.to("cpu")}, CUDA)
        with again.open(0, 1):
            passes(streamed(again))
        torch.cuda.synchronize()
    assert overlap(profile) > 0


def overlap(profile: torch.profiler.profile) -> float:
    """Microseconds in which a copy to the device and a kernel ran at once."""
    ran = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA and "Memset" not in e.name]
    spans = [(e.time_range.start, e.time_range.end, "HtoD" in e.name) for e in ran]
    copies = [(start, end) for start, end, copy in spans if copy]
    kernels = [(start, end) for start, end, copy in spans if not copy]
    return sum(max(0, min(e, b) - max(s, a)) for s, e in copies for a, b in kernels)


@pytest.mark.skipif(not DEMO.is_dir(), reason="needs the demo models")
def test_the_same_demo_video_however_it_is_placed() -> None:
    pipe = LightX2VPipeline(DEMO, device="cuda")
    pipe.create_generator(infer_steps=4, height=128, width=128, num_frames=17, guidance_scale=4.0)

    def video() -> Tensor:
        made = pipe.generate(7, "a red circle moves right", progress=False, return_result_tensor=True)["video"]
        assert made is not None
        return made

    whole = video()
    assert pipe.memory_plan is not None and pipe.memory_plan.whole
    for granularity in ("block", "model", "auto"):
        pipe.enable_offload(True, granularity, vae_offload=True)
        assert torch.equal(video(), whole), granularity
    pipe.enable_offload(True)
    assert torch.equal(video(), whole)
    assert pipe.memory_plan.streamed and pipe.memory_plan.pinned and pipe.memory_plan.seconds
    pipe.enable_offload(True, ram_budget_gb=1e-6)
    assert torch.equal(video(), whole)
    assert pipe.memory_plan.filed == pipe.memory_plan.streamed and pipe.memory_plan.paired
    assert "peak" in pipe.report.text() and pipe.report.stages[1].peak


@torch.inference_mode()
def test_blocks_that_their_network_calls_itself() -> None:
    network = wan()
    stream = BlockStream({"": network}, CUDA, pin_limit=0)
    for stays in (0, 3):
        with stream.open(stays, 1), stream.hooked():
            assert same([network(*inputs())])


def test_a_home_is_left_and_found_again() -> None:
    truth()
    network = wan()
    home = Home(network)
    base = torch.cuda.memory_allocated()
    for _ in range(2):
        home.copy_to(CUDA)
        assert same(passes(resident(network), 2))
        home.leave()
        assert torch.cuda.memory_allocated() <= base + 1e6
    assert not any(parameter.is_cuda for parameter in network.parameters())


def test_memory_that_really_runs_out() -> None:
    """Under a cap that the whole network exceeds: the second try streams, and gives the same."""
    network = wan(config=replace(CONFIG, num_layers=2 * LAYERS)).to(CUDA)
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    expected = passes(resident(network), 2)
    sizes = measure(network)
    activations = torch.cuda.max_memory_allocated() - base
    network.to("cpu")
    gc.collect()
    torch.cuda.empty_cache()
    room = streamed_bytes((sizes,), 0, 1) + activations
    cap = torch.cuda.memory_reserved() + room + int(0.3 * activations) + 150_000_000
    assert cap < sizes.total
    needs = Needs((sizes,), activations)
    plans = [plan(needs, Machine(100 * int(GB), 100 * int(GB), 0))]

    def work(failed: Plan | None) -> list[Tensor]:
        if failed is None:
            return passes(resident(network.to(CUDA)), 2)
        # most of what a plan keeps in reserve is for others than PyTorch, whose cap this is
        plans.append(tighter(needs, Machine(room + RESERVE, 100 * int(GB), 0), failed))
        stream = BlockStream({"": network}, CUDA)
        with stream.open(plans[-1].resident, plans[-1].prefetch):
            return passes(streamed(stream), 2)

    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction(cap / total)
    try:
        advice = Advice(T2V, LATENTS)
        found = once_more(work, lambda: plans[-1], lambda: network.to("cpu"), advice)  # type: ignore[arg-type,return-value]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(plans) == 2 and plans[1].streamed and all(map(torch.equal, found, expected))


def test_weights_that_stay_in_their_file(tmp_path: Path) -> None:
    """What is read ahead while blocks compute, in bf16 straight from the file."""
    network = wan()
    stream = BlockStream({"": network}, CUDA, headers={"": left_in(tmp_path, network)})
    assert stream.host_bytes < measure(network).total / 2
    for stays, ahead in ((0, 1), (0, 2), (5, 1), (LAYERS, 0)):
        with stream.open(stays, ahead):
            assert same(passes(streamed(stream))), (stays, ahead)
    stream.release()


def test_a_buffer_is_not_filled_while_it_is_read() -> None:
    """A long kernel reads the buffer; the next copy must wait for it, the host must not."""
    lane, size = Lane(CUDA), 1 << 26
    buffer = lane.buffer(size)
    ones, twos = host_memory(size).fill_(1), host_memory(size).fill_(2)
    pins = pin([ones, twos], CUDA)
    assert pins.nbytes == 2 * size
    sums = []
    for source in (ones, twos) * 3:
        buffer.fill(source)
        buffer.use()
        torch.cuda._sleep(20_000_000)
        sums.append(buffer.memory.sum(dtype=torch.int64))
        buffer.release()
    assert [int(total) for total in sums] == [size, 2 * size] * 3


def test_pinned_memory_is_given_back() -> None:
    """What is pinned cannot be pinned again. (`Tensor.is_pinned` need not know of memory that was registered.)"""
    piece = host_memory(10 * PAGE)
    for _ in range(3):
        pins = pin([piece], CUDA)
        assert pins.nbytes == 10 * PAGE
        assert pin([piece], CUDA).nbytes == 0
        pins.release()
    pins = pin([piece], CUDA)
    assert pins.nbytes == 10 * PAGE
    del pins
    gc.collect()
    assert pin([piece], CUDA).nbytes == 10 * PAGE


def test_a_pin_that_is_refused_leaves_no_error_behind(caplog: pytest.LogCaptureFixture) -> None:
    piece = host_memory(10 * PAGE)
    first = pin([piece], CUDA)
    assert first.nbytes == 10 * PAGE
    assert pin([piece], CUDA).nbytes == 0 and "could be pinned" in caplog.text
    assert torch.ones(4, device=CUDA).sum().item() == 4
