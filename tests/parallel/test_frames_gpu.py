"""Split VAEs with their fused kernels on one GPU: the ranks are threads of this process, which hand over tensors.

What NCCL does is not tested here; that each rank's kernels are given the right rows is. On a CPU it runs too, without
the kernels.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from closeness import assert_close, relative_error
from lightx2v.parallel.frames import SplitVAE, decode
from lightx2v.parallel.mesh import Line
from lightx2v.parallel.rows import Parcel, Rows
from lightx2v.vae import stream
from lightx2v.vae.fused import frame_kernels
from lightx2v.vae.stream import arrange
from tiny_vae import tiny_vae, tiny_vae15, tiny_vae22

NARROW: dict[str, Callable[[], Any]] = {
    "wan": lambda: tiny_vae(8),
    "wan22": lambda: tiny_vae22(8, 8),
    "hunyuan": lambda: tiny_vae15((8, 16, 32, 64, 64)),
}
WIDE: dict[str, Callable[[], Any]] = {
    "wan": lambda: tiny_vae(32),
    "wan22": lambda: tiny_vae22(32, 32),
    "hunyuan": lambda: tiny_vae15((32, 64, 128, 128, 128)),
}
RANKS = 3


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> ThreadPoolExecutor:
    """One a rank; what ranks send each other goes through queues."""
    boxes: dict[tuple[int, int], queue.Queue[Tensor]] = {
        (source, target): queue.Queue() for source in range(RANKS) for target in range(RANKS)
    }

    def start(self: Rows, sent: Sequence[Parcel], received: Sequence[Parcel]) -> Callable[[], None]:
        for place, what in sent:
            boxes[self.line.place, place].put(what.clone())

        def arrive() -> None:
            for place, room in received:
                came = boxes[place, self.line.place].get(timeout=60)
                assert came.shape == room.shape and came.dtype == room.dtype
                room.copy_(came)

        return arrive

    monkeypatch.setattr(Rows, "_start", start)
    return ThreadPoolExecutor(RANKS)


def both_ways(threads: ThreadPoolExecutor, vae: Any, raw: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
    def rank(place: int) -> tuple[Tensor | None, Tensor]:
        split = SplitVAE(vae, Line(tuple(range(RANKS)), place))
        return decode(split, raw, clamp=False), stream.encode(split, frames)

    (decoded, encoded), *others = threads.map(rank, range(RANKS))
    assert decoded is not None and all(made is None and torch.equal(found, encoded) for made, found in others)
    return decoded, encoded


def clips(vae: Any, device: str) -> tuple[Tensor, Tensor]:
    """Latents and pictures of 7 rows, which 3 ranks do not share evenly."""
    generator = torch.Generator().manual_seed(1)
    raw = torch.randn(1, vae.space.channels, 3, 7, 3, generator=generator)
    frames = torch.rand(1, 3, 9, 7 * vae.space.stride[1], 2 * vae.space.stride[2], generator=generator) * 2 - 1
    return raw.to(device), frames.to(device)


@pytest.mark.parametrize("name", NARROW)
def test_by_threads(threads: ThreadPoolExecutor, name: str) -> None:
    vae = NARROW[name]()
    raw, frames = clips(vae, "cpu")
    decoded, encoded = both_ways(threads, vae, raw, frames)
    assert relative_error(decoded, stream.decode(vae, raw, clamp=False)) < 1e-5
    assert relative_error(encoded, stream.encode(vae, frames)) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", WIDE)
def test_with_fused_kernels(threads: ThreadPoolExecutor, name: str, dtype: torch.dtype) -> None:
    """As near to float32 as one rank is."""
    vae = WIDE[name]()
    raw, frames = clips(vae, "cuda")
    wide = vae.to("cuda")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        truth = stream.decode(wide, raw, clamp=False), stream.encode(wide, frames)
    half = arrange(wide.to(dtype))
    with torch.inference_mode():
        assert frame_kernels(raw.to(dtype), next(half.parameters())) is not None, "the fused kernels do not run here"
    alone = stream.decode(half, raw, clamp=False), stream.encode(half, frames)
    for what, made, exact, one in zip(
        ("decode", "encode"), both_ways(threads, half, raw, frames), truth, alone, strict=True
    ):
        assert_close(f"{name} {what}", made, exact, one)
