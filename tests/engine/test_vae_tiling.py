"""Tiles: where they lie, that they add up, and that no seam is seen with the trained VAE."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from closeness import relative_error
from demo.grammar import parse
from demo.stages.tae import MODEL
from demo.world import render, scene_of
from lightx2v.vae.loading import VAE, identify_vae, load_vae
from lightx2v.vae.stream import decode, encode
from lightx2v.vae.tiling import Tiling, decode_tiled, plan
from tiny_vae import tiny_tae, tiny_vae, tiny_vae22

WAN, WAN22 = (4, 8, 8), (4, 16, 16)
LEVELS = 127.5  # of 8 bits, in [-1, 1]
PROMPT = "a blue triangle moves up over vertical navy and black stripes"


def paint(raw: Tensor, stride: tuple[int, int, int] = WAN) -> Tensor:
    """A decoder without neighbours: every cell's value on its own pixels and frames."""
    time, rows, columns = stride
    frames = raw[:, :3].repeat_interleave(time, 2)[:, :, time - 1 :]
    return frames.repeat_interleave(rows, 3).repeat_interleave(columns, 4)


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 20, 31), (1, 33, 17), (2, 4, 90)])
@pytest.mark.parametrize("stride", [WAN, WAN22])
@pytest.mark.parametrize("tiling", [Tiling(), Tiling(128, 0), Tiling(200, 100), Tiling(64, 32, 21, 8)])
def test_tiles_add_up(shape: tuple[int, int, int], stride: tuple[int, int, int], tiling: Tiling) -> None:
    raw = torch.rand(1, 3, *shape)
    exact = paint(raw, stride)
    seen: list[tuple[int, int]] = []
    out = decode_tiled(lambda part: paint(part, stride), raw, stride, tiling, on_tile=lambda *done: seen.append(done))
    assert relative_error(out, exact) < 1e-6
    assert seen == [(index + 1, len(seen)) for index in range(len(seen))]
    for axis, cells in zip(plan(shape, stride, tiling)[1:], shape[1:], strict=True):
        assert all(stop - start <= max(tiling.size // stride[1], 2) for start, stop in axis.cells)
        assert axis.cells[0][0] == 0 and axis.cells[-1][1] == cells
        overlaps = [before - after for (_, before), (after, _) in zip(axis.cells, axis.cells[1:], strict=False)]
        assert all(overlap * stride[1] >= tiling.overlap for overlap in overlaps)


def test_small_latents_are_one_tile() -> None:
    assert [len(axis.cells) for axis in plan((21, 32, 16), WAN, Tiling())] == [1, 1, 1]
    vae, raw = tiny_vae(), torch.randn(1, 16, 3, 4, 5)
    assert torch.equal(decode_tiled(lambda part: decode(vae, part), raw, WAN, Tiling()), decode(vae, raw))


@pytest.mark.parametrize("vae", [tiny_vae(), tiny_vae22(), tiny_tae("lighttaew2_1", (12, 10, 8, 6))])
def test_any_vae_at_any_size(vae: VAE) -> None:
    """Random networks show every difference, so this is only about places: tiles are where they belong."""
    cell = vae.space.stride[1]
    raw = torch.randn(1, vae.space.channels, 2, 136 // cell, 200 // cell)
    whole = decode(vae, raw)
    out = decode_tiled(lambda part: decode(vae, part), raw, vae.space.stride, Tiling(96, 32))
    assert out.shape == whole.shape
    for side in (3, 4):
        assert relative_error(out, whole) < 0.75 * relative_error(out, whole.roll(cell, side))


@pytest.fixture(scope="module")
def trained() -> tuple[VAE, Tensor, Tensor]:
    """The small trained VAE, raw latents of a drawn clip of 320x256 pixels, and their frames."""
    vae = load_vae(identify_vae(MODEL / "Wan2.1_VAE.safetensors"), dtype=torch.float32, device="cpu")
    generator = torch.Generator().manual_seed(0)
    raw = encode(vae, render(scene_of([parse(PROMPT)]), generator, frames=5, height=256, width=320).frames)
    return vae, raw, decode(vae, raw)


@pytest.mark.parametrize(("tiling", "mean", "most"), [(Tiling(), 0.1, 4), (Tiling(128, 32), 0.3, 48)])
def test_no_seam_is_seen(trained: tuple[VAE, Tensor, Tensor], tiling: Tiling, mean: float, most: float) -> None:
    """Differences from the untiled decode in steps of 8 bits; a seam would be at most 1 on average."""
    vae, raw, whole = trained
    out = decode_tiled(lambda part: decode(vae, part), raw, WAN, tiling)
    error = (out - whole).abs() * LEVELS
    assert 0 < error.mean() < mean and error.max() < most


def test_without_an_overlap_seams_are_seen(trained: tuple[VAE, Tensor, Tensor]) -> None:
    vae, raw, whole = trained
    smooth, hard = (
        (decode_tiled(lambda part: decode(vae, part), raw, WAN, Tiling(128, overlap)) - whole).abs().mean()
        for overlap in (32, 0)
    )
    assert hard > 2 * smooth


def test_tiles_in_time_begin_with_what_was_before() -> None:
    vae = load_vae(identify_vae(MODEL / "Wan2.1_VAE.safetensors"), dtype=torch.float32, device="cpu")
    generator = torch.Generator().manual_seed(0)
    raw = encode(vae, render(scene_of([parse(PROMPT)]), generator, frames=49, height=64, width=64).frames)
    whole = decode(vae, raw)

    def error(tiling: Tiling) -> float:
        out = decode_tiled(lambda part: decode(vae, part), raw, WAN, tiling)
        return float((out - whole).abs().mean()) * LEVELS

    assert 0 < error(Tiling(frames=21)) < 1
    assert error(Tiling(frames=13, frame_overlap=4)) > 4, "the frames before matter, or this test shows nothing"


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Tiling(size=16), "a tile's size is 16: expected at least 32"),
        (lambda: Tiling(size=128, overlap=80), "tiles of 128 pixels overlap by 80: expected at most half"),
        (lambda: Tiling(frames=12), "tiles of 12 frames overlap by 16: expected 0 .* or at least 20"),
        (lambda: decode_tiled(paint, torch.rand(1, 4, 3, 8), WAN, Tiling()), r"latents are \(1, 4, 3, 8\); expected"),
        (
            lambda: decode_tiled(paint, torch.rand(1, 4, 1, 8, 8), WAN, Tiling(), out=torch.empty(1, 3, 1, 8, 8)),
            r"out is \(1, 3, 1, 8, 8\); these latents decode to \(1, 3, 1, 64, 64\)",
        ),
        (lambda: decode_tiled(lambda raw: raw, torch.rand(1, 4, 1, 8, 8), WAN, Tiling()), "a tile decoded to"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make()


def test_cancel_between_tiles() -> None:
    def cancel(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode_tiled(paint, torch.rand(1, 4, 1, 60, 104), WAN, Tiling(), on_tile=cancel)
