"""VAEs split over ranks against the same VAEs on one: rows that do not divide, several chunks of time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from closeness import relative_error
from lightx2v import decoding as alone
from lightx2v.config import Parallel
from lightx2v.decoding import Decoding
from lightx2v.parallel.agreement import StoppedElsewhereError
from lightx2v.parallel.decoding import decode_video
from lightx2v.parallel.frames import SplitVAE, decode
from lightx2v.parallel.mesh import Line, Mesh, join
from lightx2v.vae import fused, stream
from lightx2v.vae.loading import VAEInfo
from lightx2v.vae.padded import encode_padded
from lightx2v.vae.tiling import Tiling
from lightx2v_kernels.conv2d_relu.torch_steps import conv2d_relu
from lightx2v_kernels.conv3d.reference import cudnn
from lightx2v_kernels.conv_input.reference import plain as conv_input
from lightx2v_kernels.doubled_conv.reference import plain as doubled_conv
from ranks import Ranks
from tiny_vae import tiny_tae, tiny_vae, tiny_vae15, tiny_vae22

CPU = torch.device("cpu")
VAES: dict[str, Callable[[], Any]] = {
    "wan": tiny_vae,
    "wan22": lambda: tiny_vae22(8, 8),
    "hunyuan": lambda: tiny_vae15((8, 16, 32, 64, 64)),
}
KERNELS = fused.FrameKernels(conv_input, cudnn, doubled_conv, conv2d_relu)
ROWS = 5  # of latents: odd, so that neither 2 nor 4 ranks have equal shares
TILES = Decoding("tiled", Tiling(32, 8))


@pytest.fixture(scope="module", params=["two", "four"])
def ranks(request: pytest.FixtureRequest) -> Ranks:
    started: Ranks = request.getfixturevalue(request.param)
    return started


@functools.cache
def mesh() -> Mesh:
    return join(Parallel(ulysses=torch.distributed.get_world_size()), CPU)


def latents(vae: Any, count: int, rows: int = ROWS) -> Tensor:
    made = torch.Generator().manual_seed(1)
    return torch.randn(1, vae.space.channels, count, rows, 3, generator=made)


def pictures(vae: Any, count: int) -> Tensor:
    made = torch.Generator().manual_seed(2)
    return torch.rand(1, 3, count, ROWS * vae.space.stride[1], 2 * vae.space.stride[2], generator=made) * 2 - 1


def results(name: str, split: bool, few: bool = False) -> dict[str, Tensor | None]:
    """All that a VAE can do, or the most important of it; on one rank unless it is split."""
    network = VAES[name]()
    vae, read = (SplitVAE(network, mesh().whole), decode) if split else (network, stream.decode)
    raw, frames = latents(network, 3), pictures(network, 9)
    made = {
        "decoded": read(vae, raw),
        "encoded": stream.encode(vae, frames),
    }
    if few:
        return made
    made["decoded two at once"] = read(vae, raw, chunk=2, clamp=False)
    if name != "hunyuan":
        made["padded"] = encode_padded(vae, 21, start=frames[:, :, :1], end=frames[:, :, 1:2])
    with (
        patch("lightx2v.vae.layers.frame_kernels", lambda *_: KERNELS),
        patch("lightx2v.vae.hunyuan15.frame_kernels", lambda *_: KERNELS),
    ):
        made["decoded by kernels"], made["encoded by kernels"] = read(vae, raw), stream.encode(vae, frames)
    return made


expected = functools.cache(functools.partial(results, split=False))


@pytest.mark.parametrize("name", VAES)
def test_as_on_one_rank(ranks: Ranks, name: str) -> None:
    first, *others = ranks.run(results, name, True, ranks.size == 4)
    for what in first:
        whole = expected(name)[what]
        assert first[what].shape == whole.shape and relative_error(first[what], whole) < 1e-5, what
        for other in others:
            assert other[what] is None if "decoded" in what else torch.equal(other[what], first[what]), what


def video(name: str, rows: int, how: Decoding) -> Tensor | None:
    network = (VAES | {"tiny": tiny_tae})[name]()
    info = VAEInfo(Path(name), network.config)
    args = (info, network, latents(network, 2, rows), how)
    return decode_video(mesh(), *args, progress=False)


@pytest.mark.parametrize(
    ("name", "rows", "how"),
    [("wan", ROWS, Decoding()), ("wan", 9, TILES), ("wan", 1, Decoding()), ("tiny", 4, Decoding())],
    ids=["whole", "tiles", "fewer rows than ranks", "tiny"],
)
def test_a_video_is_on_the_first_rank(ranks: Ranks, name: str, rows: int, how: Decoding) -> None:
    network = (VAES | {"tiny": tiny_tae})[name]()
    raw = latents(network, 2, rows)
    whole = alone.decode_video(VAEInfo(Path(name), network.config), network, raw, how, progress=False)
    first, *others = ranks.run(video, name, rows, how)
    assert relative_error(first, whole) < 1e-5 and others == [None] * len(others)


def tiles_by_memory(rank_with_least: int) -> tuple[int, ...]:
    """How much each rank knows to be free, and the tile that they take."""
    network, taken = tiny_vae(), []
    info, raw = VAEInfo(Path("wan"), network.config), latents(network, 1, 64)
    free = 400_000 if torch.distributed.get_rank() == rank_with_least else 1 << 40
    with patch("lightx2v.parallel.decoding._tiled", lambda *args: taken.append(args[3].size)):
        decode_video(mesh(), info, network, raw, Decoding(), free=free, progress=False)
    return tuple(taken)


def test_the_rank_with_the_least_memory_decides_for_all(ranks: Ranks) -> None:
    sizes = ranks.run(tiles_by_memory, ranks.size - 1)
    assert sizes[0] and sizes == [sizes[0]] * ranks.size


def broken(how: Decoding) -> str:
    """A weight of the second half of the decoder is infinite, on every rank."""
    network = tiny_vae()
    network.decoder.head[2].bias.fill_(torch.inf)
    try:
        decode_video(mesh(), VAEInfo(Path("wan"), network.config), network, latents(network, 2, 9), how, progress=False)
    except (FloatingPointError, StoppedElsewhereError) as error:
        return str(error)
    return "went on"


@pytest.mark.parametrize("how", [Decoding(), TILES], ids=["whole", "tiles"])
def test_frames_that_are_not_finite_stop_all(two: Ranks, how: Decoding) -> None:
    first, second = two.run(broken, how)
    assert "(WanVAE, float32): its decoder.head.2.bias is not finite" in first
    assert second == f"process 0 of this video stopped: {first}"


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most rows of any tensor that an operation makes."""

    rows = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.ndim == 5 and made.shape[1] != 3:
            self.rows = max(self.rows, made.shape[3])
        return made


def most_rows() -> int:
    split = SplitVAE(tiny_vae(), mesh().whole)
    with Largest() as seen:
        decode(split, latents(split, 1, 8)[..., :1])  # narrow, so that no other size is counted as rows
    return seen.rows


def test_no_rank_works_on_more_than_its_rows_and_those_beside(four: Ranks) -> None:
    own = 8 * 8 // 4
    assert all(own < rows <= own + 4 for rows in four.run(most_rows))  # one row above and below, before it is doubled


def test_weights_are_shared_and_the_vae_stays_as_it_was() -> None:
    vae = tiny_vae()
    split = SplitVAE(vae, Line((0, 1), 0))
    assert [id(p) for p in split.parameters()] == [id(p) for p in vae.parameters()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vae.modules())
    vae.reconstruct(latents(vae, 1))  # would wait for the other rank


def test_what_cannot_be_split_says_so() -> None:
    vae = tiny_vae()
    vae.decoder.extra = nn.Conv2d(3, 3, 5)
    with pytest.raises(TypeError, match=r"decoder\.extra reads 5 rows and no layer around it states its reach"):
        SplitVAE(vae, Line((0, 1), 0))
    split, frames = SplitVAE(tiny_vae(), Line((0, 1), 0)), pictures(vae, 1).requires_grad_(True)
    with pytest.raises(ValueError, match="no gradients"):
        split.to_latents(frames)
