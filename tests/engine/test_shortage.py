"""Memory that runs out: once more with less on the device, and the same video; then an error that says what fits."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightx2v import LightX2VPipeline
from lightx2v.config import Engine
from lightx2v.folder import ModelFolder
from lightx2v.memory import TEXT_ENCODER_ACTIVATION_BYTES
from lightx2v.offload import DoesNotFitError
from lightx2v.offload.placing import held_bytes
from lightx2v.offload.plan import GB, LESS, RESERVE, Machine, Needs, Sizes, measure, plan, streamed_bytes, tighter
from lightx2v.offload.shortage import once_there_is_room, ran_out
from lightx2v.parts import Parts
from lightx2v.shapes import LatentShape, VideoShape, smaller
from tiny_pipeline import pipeline, plan_of, video, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("wan"))


class Allocator:
    """A device that has no memory at some calls of a network's second block, counted from 0."""

    def __init__(self, *fails: int, error: Callable[[], Exception] = lambda: torch.OutOfMemoryError("no room")) -> None:
        self.fails, self.error, self.calls = fails, error, 0

    def of(self, pipe: LightX2VPipeline) -> "Allocator":
        for network in pipe._parts._transformers:
            network.blocks[1].register_forward_pre_hook(self._call)
        return self

    def _call(self, *_: object) -> None:
        self.calls += 1
        if self.calls - 1 in self.fails:
            raise self.error()


def budgeted(folder: Path) -> LightX2VPipeline:
    """All blocks stay within its budget."""
    pipe = pipeline(folder)
    pipe.enable_offload(True, vram_budget_gb=1.0)
    return pipe


@pytest.mark.parametrize("call", [0, 3])
def test_the_second_try_makes_the_same_video(folder: Path, call: int, caplog: pytest.LogCaptureFixture) -> None:
    pipe = budgeted(folder)
    expected = video(pipe)
    assert plan_of(pipe).whole
    allocator = Allocator(call).of(pipe)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(video(pipe), expected)
    assert allocator.calls == call + 1 + 4, "from the beginning: two steps of two passes"
    made = plan_of(pipe)
    assert made.resident == 0 and made.streamed == 2 and made.vae == "visits"
    (said,) = [record.message for record in caplog.records if "ran out" in record.message]
    assert "once more with less of the model on the GPU" in said
    assert pipe._parts._placing.device_bytes == 0
    allocator.fails = ()
    assert torch.equal(video(pipe), expected) and plan_of(pipe).whole, "the next video is planned afresh"


def test_what_other_libraries_say_counts_too(folder: Path) -> None:
    pipe = budgeted(folder)
    expected = video(pipe)
    said = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    Allocator(1, error=lambda: RuntimeError(said)).of(pipe)
    assert torch.equal(video(pipe), expected)
    Allocator(0, error=lambda: RuntimeError("the sizes do not match")).of(pipe)
    with pytest.raises(RuntimeError, match="the sizes do not match"):
        video(pipe)
    assert ran_out(RuntimeError("Triton Error [CUDA]: out of memory")) and not ran_out(ValueError("out of memory"))


def test_twice_is_an_error_that_says_what_fits(folder: Path) -> None:
    pipe = budgeted(folder)
    expected = video(pipe)
    allocator = Allocator(2, 4).of(pipe)
    with pytest.raises(DoesNotFitError) as caught:
        video(pipe)
    message = str(caught.value)
    assert "ran out twice" in message and "with 0 of 2 blocks on the GPU" in message and "no room" in message
    assert message.endswith("instead of 5 frames of 48x32, 1 frames of 48x32 or 5 frames of 32x16 should fit")
    assert pipe._parts._placing.device_bytes == 0
    allocator.fails = ()
    assert torch.equal(video(pipe), expected), "and the pipeline goes on"


def test_without_a_plan_there_is_nothing_to_tighten(folder: Path) -> None:
    pipe = pipeline(folder)
    expected = video(pipe)
    pipe.enable_offload(True, "model")
    assert torch.equal(video(pipe), expected)
    Allocator(1).of(pipe)
    with pytest.raises(DoesNotFitError, match="use auto or block"):
        video(pipe)
    assert torch.equal(video(pipe), expected)


BLOCKS = Sizes((int(GB),) * 40, 0)
PLENTY = Machine(100 * int(GB), 100 * int(GB), 0)


@pytest.mark.parametrize("free", [100, 30, 8, 4])
def test_each_plan_that_fails_has_a_tighter_one_until_there_is_none(free: int) -> None:
    needs, machine = Needs((BLOCKS,), int(GB), vae=int(GB) // 4), Machine(free * int(GB), 100 * int(GB), 0)
    made = plan(needs, machine)
    while made.prefetch or made.whole:
        tight = tighter(needs, machine, made)
        assert tight.peak <= made.peak - int(GB) or (tight.resident, tight.prefetch) == (0, 0)
        assert tight.peak < made.peak and tight.vae == "visits"
        made = tight
    with pytest.raises(
        DoesNotFitError, match=r"ran out with one block at a time on the GPU and 2\.6 GB planned"
    ) as caught:
        tighter(needs, machine, made)
    assert caught.value.share == LESS


def test_memory_that_others_took_is_counted() -> None:
    needs = Needs((BLOCKS,), 2 * int(GB))
    failed = plan(needs, PLENTY)
    with pytest.raises(DoesNotFitError, match=r"3\.6 GB of GPU memory are needed at least .* 2\.0 GB may") as caught:
        tighter(needs, Machine(2 * int(GB), 100 * int(GB), 0), failed)
    assert caught.value.share == pytest.approx((1e9 - RESERVE) / 2e9)


def test_what_fits_is_shorter_or_smaller() -> None:
    wan = {"stride": (4, 8, 8), "patch_size": (1, 2, 2)}
    found = smaller(LatentShape(21, 60, 104), 0.5, **wan)
    assert found == [VideoShape(37, 480, 832), VideoShape(81, 336, 576)]
    assert smaller(LatentShape(21, 60, 104), 1, **wan) == [VideoShape(81, 480, 832)] * 2
    assert smaller(LatentShape(1, 2, 2), 0.9, **wan) == [] == smaller(LatentShape(21, 60, 104), -1, **wan)


class Encoder(nn.Module):
    """Four blocks below a part, as umT5 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Module()
        self.inside.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.head = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.inside.blocks:
            x = block(x).tanh()
        return self.head(x)


def visits(folder: Path, room: int) -> tuple[Parts, Encoder, int]:
    """Parts with a budget of so many bytes for an encoder's weights, and what `Encoder` takes when it is streamed."""
    parts, encoder = Parts(ModelFolder(folder), (), torch.device("cpu")), Encoder()
    beside = TEXT_ENCODER_ACTIVATION_BYTES + RESERVE
    parts.use_engine(Engine(offload="block", vram_budget_gb=(beside + room + 0.5) / GB))
    return parts, encoder, streamed_bytes((measure(encoder),), 0, 1)


@torch.inference_mode()
def test_an_encoder_passes_through_block_by_block_or_computes_on_the_cpu(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    x, (_, encoder, least) = torch.randn(3, 64), visits(tmp_path, 0)
    expected = encoder(x)
    assert least < held_bytes(encoder)
    ways = {held_bytes(encoder): "", least: "passes through the GPU block by block", least - 1: "it runs on the CPU"}
    for room, said in ways.items():
        caplog.clear()
        parts = visits(tmp_path, room)[0]
        with caplog.at_level(logging.INFO):
            assert torch.equal(parts.visit(encoder, lambda: encoder(x)), expected)
        assert said in caplog.text and bool(said) == bool(caplog.text), room
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in encoder.inside.blocks)


@torch.inference_mode()
@pytest.mark.parametrize("fails", [1, 2])
def test_an_encoder_that_runs_out_of_memory_takes_the_next_way(
    tmp_path: Path, fails: int, caplog: pytest.LogCaptureFixture
) -> None:
    parts, encoder, _ = visits(tmp_path, 10**6)
    x = torch.randn(3, 64)
    expected, calls = encoder(x), []

    def full(*_: object) -> None:
        calls.append(1)
        if len(calls) <= fails:
            raise torch.OutOfMemoryError("no room")

    encoder.inside.blocks[1].register_forward_pre_hook(full)
    with caplog.at_level(logging.INFO):
        assert torch.equal(parts.visit(encoder, lambda: encoder(x)), expected)
    assert len(calls) == fails + 1 and "block by block" in caplog.text
    assert ("runs on the CPU" in caplog.text) == (fails == 2)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        parts.visit(encoder, lambda: encoder(x[:, :5]))


def test_other_work_runs_once_more_when_there_is_room() -> None:
    done: list[str] = []

    def work() -> int:
        done.append("work")
        if done.count("work") <= fails:
            raise torch.OutOfMemoryError("no room\nand much more")
        return 7

    for fails in (0, 1):
        done.clear()
        assert once_there_is_room(work, lambda: done.append("room"), "encoding") == 7
        assert done == ["work", "room", "work"][: 1 + 2 * fails]
    fails = 9
    with pytest.raises(DoesNotFitError, match=r"ran out twice while encoding \(no room\): make"):
        once_there_is_room(work, lambda: None, "encoding")
