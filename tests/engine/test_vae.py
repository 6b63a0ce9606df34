"""Wan's VAEs by themselves: chunks and whole clips, shapes, gradients, memory. Files are in test_vae_files.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from closeness import relative_error
from lightx2v.vae.layers import State
from lightx2v.vae.loading import VAE
from lightx2v.vae.stream import decode, encode
from tiny_vae import tiny_vae, tiny_vae22

Make = Callable[[], VAE]
EXACT = 1e-12


@pytest.fixture(scope="module", params=[tiny_vae, tiny_vae22], ids=["wan2.1", "wan2.2"])
def make(request: pytest.FixtureRequest) -> Make:
    return request.param


@pytest.fixture(scope="module")
def vae(make: Make) -> VAE:
    return make()


@pytest.fixture(scope="module")
def wide_vae(make: Make) -> VAE:
    """In float64, where two ways to the same value agree to 1e-12."""
    return make().double()


def random_frames(vae: VAE, count: int) -> Tensor:
    """Two cells high and three wide."""
    return torch.rand(shape_of(vae, count), dtype=torch.float64) * 2 - 1


def random_latents(vae: VAE, count: int) -> Tensor:
    return torch.randn(1, vae.space.channels, count, 2, 3, dtype=torch.float64)


def shape_of(vae: VAE, count: int) -> tuple[int, int, int, int, int]:
    """Of `count` frames of the clips below."""
    return 1, 3, count, 2 * vae.space.stride[1], 3 * vae.space.stride[2]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_decode_in_chunks_is_decode_in_one(wide_vae: VAE, chunk: int) -> None:
    raw = random_latents(wide_vae, 5)
    out = torch.empty(shape_of(wide_vae, 17), dtype=torch.float64)
    assert decode(wide_vae, raw, chunk=chunk, out=out) is out
    assert relative_error(out, wide_vae.reconstruct(raw).clamp(-1, 1)) < EXACT


@pytest.mark.parametrize("frames", [1, 5, 17])
@pytest.mark.parametrize("chunk", [4, 8, 400])
def test_encode_in_chunks_is_encode_in_one(wide_vae: VAE, frames: int, chunk: int) -> None:
    pixels = random_frames(wide_vae, frames)
    whole, _ = wide_vae.posterior(pixels)
    raw = encode(wide_vae, pixels, chunk=chunk)
    assert raw.dtype == torch.float32 and raw.shape == (1, wide_vae.space.channels, (frames - 1) // 4 + 1, 2, 3)
    assert relative_error(raw, whole) < 1e-7  # of rounding the result to float32


@pytest.mark.parametrize("lengths", [(5, 4, 8), (1, 12, 4), (9, 8), (13, 4)])
def test_uneven_chunks(wide_vae: VAE, lengths: tuple[int, ...]) -> None:
    pixels = random_frames(wide_vae, 17)
    state: State = {}
    parts = [wide_vae.posterior(part, state)[0] for part in pixels.split(lengths, 2)]
    assert relative_error(torch.cat(parts, 2), wide_vae.posterior(pixels)[0]) < EXACT


def test_a_copied_state_is_a_snapshot(wide_vae: VAE) -> None:
    raw = random_latents(wide_vae, 4)
    state: State = {}
    wide_vae.reconstruct(raw[:, :, :2], state)
    snapshot = dict(state)
    once = wide_vae.reconstruct(raw[:, :, 2:3], state)
    wide_vae.reconstruct(raw[:, :, 3:], state)
    assert torch.equal(once, wide_vae.reconstruct(raw[:, :, 2:3], snapshot))


def test_the_past_never_sees_the_future(wide_vae: VAE) -> None:
    raw, pixels = random_latents(wide_vae, 4), random_frames(wide_vae, 13)
    other_raw, other_pixels = raw.clone(), pixels.clone()
    other_raw[:, :, 2:] += 1
    other_pixels[:, :, 5:] *= -1
    made, other = wide_vae.reconstruct(raw), wide_vae.reconstruct(other_raw)
    assert (
        relative_error(made[:, :, :5], other[:, :, :5]) < EXACT
        and relative_error(made[:, :, 5:], other[:, :, 5:]) > 0.1
    )
    mean, other = wide_vae.posterior(pixels)[0], wide_vae.posterior(other_pixels)[0]
    assert (
        relative_error(mean[:, :, :2], other[:, :, :2]) < EXACT
        and relative_error(mean[:, :, 2:], other[:, :, 2:]) > 0.1
    )


def test_results_are_ordinary_tensors(vae: VAE) -> None:
    frames = decode(vae, random_latents(vae, 2).float())
    frames.add_(1).mul_(0.5)  # an inference tensor refuses this
    raw = encode(vae, random_frames(vae, 5).float())
    scale = torch.ones((), requires_grad=True)
    (raw * scale).sum().backward()
    assert frames.dtype == torch.float32 and frames.min() >= 0 and frames.max() <= 1 and scale.grad is not None


def test_out_of_another_dtype_and_layout(vae: VAE) -> None:
    raw = random_latents(vae, 2).float()
    rows = [shape_of(vae, 5)[dim] for dim in (0, 3, 4, 2, 1)]
    out = torch.full(rows, torch.nan, dtype=torch.float16).permute(0, 4, 3, 1, 2)
    assert decode(vae, raw, out=out).data_ptr() == out.data_ptr()
    assert (out.float() - decode(vae, raw)).abs().max() < 1e-3


def test_progress_and_cancel(vae: VAE) -> None:
    seen: list[tuple[int, int]] = []
    decode(vae, random_latents(vae, 5).float(), chunk=2, on_chunk=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    seen.clear()
    encode(vae, random_frames(vae, 17).float(), chunk=8, on_chunk=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 5), (3, 5), (5, 5)]

    def cancel(done: int, total: int) -> None:
        seen.append((done, total))
        raise KeyboardInterrupt

    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        decode(vae, random_latents(vae, 5).float(), chunk=1, on_chunk=cancel)
    assert seen == [(1, 5)]


@pytest.mark.parametrize(
    ("shape", "chunk", "words"),
    [
        ((1, 3, 6, 16, 16), 4, "6 frames: expected 4n.*cut the clip to 5 or repeat frames up to 9"),
        ((1, 3, 0, 16, 16), 4, "0 frames: .*cut the clip to 1 or repeat"),
        ((1, 3, 5, 20, 33), 4, "33x20 pixels.*resize to 32x16"),
        ((1, 3, 5, 0, 16), 4, "16x0 pixels.*resize to 16x8"),
        ((1, 4, 5, 16, 16), 4, r"\(1, 4, 5, 16, 16\); expected \(B, 3, F, H, W\)"),
        ((3, 5, 16, 16), 4, "expected"),
        ((1, 3, 5, 16, 16), 6, "chunk is 6 frames: expected a multiple of 4"),
        ((1, 3, 5, 16, 16), 0, "chunk is 0"),
    ],
)
def test_encode_refuses(shape: tuple[int, ...], chunk: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        encode(tiny_vae(), torch.zeros(shape), chunk=chunk)


def test_sizes_are_those_of_the_vae() -> None:
    encode(tiny_vae(), torch.zeros(1, 3, 1, 24, 40))
    with pytest.raises(ValueError, match="40x24 pixels: expected multiples of 16; crop or resize to 32x16"):
        encode(tiny_vae22(), torch.zeros(1, 3, 1, 24, 40))
    with pytest.raises(ValueError, match=r"\(1, 16, 1, 2, 2\); this VAE decodes \(B, 48, T, h, w\)"):
        decode(tiny_vae22(), torch.zeros(1, 16, 1, 2, 2))


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ((1, 48, 2, 2, 2), {}, r"\(1, 48, 2, 2, 2\); this VAE decodes \(B, 16, T, h, w\)"),
        ((16, 2, 2, 2), {}, "this VAE decodes"),
        ((1, 16, 0, 2, 2), {}, "at least 1"),
        ((1, 16, 2, 2, 2), {"chunk": 0}, "chunk is 0"),
        ((1, 16, 2, 2, 2), {"out": torch.zeros(1, 3, 8, 16, 16)}, r"decode to floating point \(1, 3, 5, 16, 16\)"),
        ((1, 16, 2, 2, 2), {"out": torch.zeros(1, 3, 5, 16, 16, dtype=torch.uint8)}, "out is torch.uint8"),
    ],
)
def test_decode_refuses(shape: tuple[int, ...], options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decode(tiny_vae(), torch.zeros(shape), **options)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes; views of what it was given are not made but taken."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:
            self.elements = max(self.elements, result.numel())
        return result


def test_no_tensor_but_the_output_grows_with_the_clip(vae: VAE) -> None:
    peaks = {}
    for length in (3, 9):
        raw, pixels = random_latents(vae, length).float(), random_frames(vae, 4 * length - 3).float()
        out = torch.empty(shape_of(vae, 4 * length - 3))
        with LargestTensor() as decoding:
            out = decode(vae, raw, out=out, chunk=2)
        with LargestTensor() as encoding:
            encode(vae, pixels)
        peaks[length] = decoding.elements, encoding.elements
    assert peaks[3] == peaks[9]


def gradients(vae: VAE, pixels: Tensor) -> dict[str, Tensor]:
    vae.requires_grad_(True).zero_grad()
    mean, log_variance = vae.posterior(pixels)
    made = vae.reconstruct(mean)
    ((made - pixels).square().mean() + 0.1 * log_variance.square().mean()).backward()
    return {name: parameter.grad.double() for name, parameter in vae.named_parameters() if parameter.grad is not None}


def test_gradients_reach_every_weight(make: Make, vae: VAE) -> None:
    pixels = random_frames(vae, 9)
    narrow, wide = gradients(make(), pixels.float()), gradients(make().double(), pixels)
    assert narrow.keys() == dict(vae.named_parameters()).keys()
    for name, gradient in narrow.items():
        assert gradient.norm() > 0, name
        assert relative_error(gradient, wide[name]) < 1e-3, name


def test_trains_under_bfloat16_autocast(make: Make, vae: VAE) -> None:
    pixels = random_frames(vae, 5).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = gradients(make(), pixels)
    exact = gradients(make(), pixels)
    cosine = {n: torch.cosine_similarity(g.flatten(), exact[n].flatten(), 0).item() for n, g in narrow.items()}
    assert narrow.keys() == exact.keys() and min(cosine.values()) > 0.8, min(cosine.items(), key=lambda item: item[1])


def test_a_whole_clip_compiles_to_one_graph(vae: VAE) -> None:
    raw = random_latents(vae, 3).float()
    compiled = torch.compile(vae.reconstruct, backend="eager", fullgraph=True)
    assert relative_error(compiled(raw), vae.reconstruct(raw)) < 1e-6


def test_a_frame_of_zeros_has_finite_gradients(make: Make) -> None:
    vae = make()
    for name, parameter in vae.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    assert all(gradient.isfinite().all() for gradient in gradients(vae, torch.zeros(shape_of(vae, 5))).values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 5e-3), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
def test_on_a_gpu_with_frames_in_main_memory(make: Make, vae: VAE, dtype: torch.dtype, limit: float) -> None:
    pixels, raw = random_frames(vae, 9).float(), random_latents(vae, 3).float()
    out = torch.empty(shape_of(vae, 9))
    placed = make().to("cuda", dtype)
    encoded = encode(placed, pixels)
    assert encoded.is_cuda and encoded.dtype == torch.float32
    assert decode(placed, raw, out=out) is out
    assert relative_error(encoded.cpu(), encode(vae, pixels)) < limit
    assert relative_error(out, decode(vae, raw)) < limit
