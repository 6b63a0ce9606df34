"""The Wan2.1 VAE by itself: chunks and whole clips, shapes, files, gradients, memory. Parity is in tests/parity."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from closeness import relative_error
from lightx2v.checkpoint import CheckpointError, Header, TensorInfo
from lightx2v.vae.wan import State, WanVAE, WanVAEConfig, config_from_header, decode, encode, load
from tiny_vae import tiny_vae

MANIFESTS = Path(__file__).parents[1] / "formats" / "manifests"
EXACT = 1e-12


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return tiny_vae()


@pytest.fixture(scope="module")
def wide_vae() -> WanVAE:
    """In float64, where two ways to the same value agree to 1e-12."""
    return tiny_vae().double()


def random_frames(count: int, height: int = 16, width: int = 24) -> Tensor:
    return torch.rand(1, 3, count, height, width, dtype=torch.float64) * 2 - 1


def random_latents(count: int) -> Tensor:
    return torch.randn(1, 16, count, 2, 3, dtype=torch.float64)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_decode_in_chunks_is_decode_in_one(wide_vae: WanVAE, chunk: int) -> None:
    raw = random_latents(5)
    out = torch.empty(1, 3, 17, 16, 24, dtype=torch.float64)
    assert decode(wide_vae, raw, chunk=chunk, out=out) is out
    assert relative_error(out, wide_vae.reconstruct(raw).clamp(-1, 1)) < EXACT


@pytest.mark.parametrize("frames", [1, 5, 17])
@pytest.mark.parametrize("chunk", [4, 8, 400])
def test_encode_in_chunks_is_encode_in_one(wide_vae: WanVAE, frames: int, chunk: int) -> None:
    pixels = random_frames(frames)
    whole, _ = wide_vae.posterior(pixels)
    raw = encode(wide_vae, pixels, chunk=chunk)
    assert raw.dtype == torch.float32 and raw.shape == (1, 16, (frames - 1) // 4 + 1, 2, 3)
    assert relative_error(raw, whole) < 1e-7  # of rounding the result to float32


@pytest.mark.parametrize("lengths", [(5, 4, 8), (1, 12, 4), (9, 8), (13, 4)])
def test_uneven_chunks(wide_vae: WanVAE, lengths: tuple[int, ...]) -> None:
    pixels = random_frames(17)
    state: State = {}
    parts = [wide_vae.posterior(part, state)[0] for part in pixels.split(lengths, 2)]
    assert relative_error(torch.cat(parts, 2), wide_vae.posterior(pixels)[0]) < EXACT


def test_a_copied_state_is_a_snapshot(wide_vae: WanVAE) -> None:
    raw = random_latents(4)
    state: State = {}
    wide_vae.reconstruct(raw[:, :, :2], state)
    snapshot = dict(state)
    once = wide_vae.reconstruct(raw[:, :, 2:3], state)
    wide_vae.reconstruct(raw[:, :, 3:], state)
    assert torch.equal(once, wide_vae.reconstruct(raw[:, :, 2:3], snapshot))


def test_the_past_never_sees_the_future(wide_vae: WanVAE) -> None:
    raw, pixels = random_latents(4), random_frames(13)
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


def test_results_are_ordinary_tensors(vae: WanVAE) -> None:
    frames = decode(vae, random_latents(2).float())
    frames.add_(1).mul_(0.5)  # an inference tensor refuses this
    raw = encode(vae, random_frames(5).float())
    scale = torch.ones((), requires_grad=True)
    (raw * scale).sum().backward()
    assert frames.dtype == torch.float32 and frames.min() >= 0 and frames.max() <= 1 and scale.grad is not None


def test_out_of_another_dtype_and_layout(vae: WanVAE) -> None:
    raw = random_latents(2).float()
    out = torch.full((1, 16, 24, 5, 3), torch.nan, dtype=torch.float16).permute(0, 4, 3, 1, 2)
    assert decode(vae, raw, out=out).data_ptr() == out.data_ptr()
    assert (out.float() - decode(vae, raw)).abs().max() < 1e-3


def test_progress_and_cancel(vae: WanVAE) -> None:
    seen: list[tuple[int, int]] = []
    decode(vae, random_latents(5).float(), chunk=2, on_chunk=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    seen.clear()
    encode(vae, random_frames(17).float(), chunk=8, on_chunk=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 5), (3, 5), (5, 5)]

    def cancel(done: int, total: int) -> None:
        seen.append((done, total))
        raise KeyboardInterrupt

    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        decode(vae, random_latents(5).float(), on_chunk=cancel)
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
def test_encode_refuses(vae: WanVAE, shape: tuple[int, ...], chunk: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        encode(vae, torch.zeros(shape), chunk=chunk)


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
def test_decode_refuses(vae: WanVAE, shape: tuple[int, ...], options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decode(vae, torch.zeros(shape), **options)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes; views of the output buffer are not made but taken."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not result._is_view():
            self.elements = max(self.elements, result.numel())
        return result


def test_no_tensor_but_the_output_grows_with_the_clip(vae: WanVAE) -> None:
    peaks = {}
    for length in (3, 9):
        raw, pixels = random_latents(length).float(), random_frames(4 * length - 3).float()
        out = torch.empty(1, 3, 4 * length - 3, 16, 24)
        with LargestTensor() as decoding:
            out = decode(vae, raw, out=out)
        with LargestTensor() as encoding:
            encode(vae, pixels)
        peaks[length] = decoding.elements, encoding.elements
    assert peaks[3] == peaks[9]


def gradients(vae: WanVAE, pixels: Tensor) -> dict[str, Tensor]:
    vae.requires_grad_(True).zero_grad()
    mean, log_variance = vae.posterior(pixels)
    made = vae.reconstruct(mean)
    ((made - pixels).square().mean() + 0.1 * log_variance.square().mean()).backward()
    return {name: parameter.grad.double() for name, parameter in vae.named_parameters() if parameter.grad is not None}


def test_gradients_reach_every_weight() -> None:
    pixels = random_frames(9)
    narrow, wide = gradients(tiny_vae(), pixels.float()), gradients(tiny_vae().double(), pixels)
    assert narrow.keys() == dict(tiny_vae().named_parameters()).keys()
    for name, gradient in narrow.items():
        assert gradient.norm() > 0, name
        assert relative_error(gradient, wide[name]) < 1e-3, name


def test_trains_under_bfloat16_autocast() -> None:
    pixels = random_frames(5).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = gradients(tiny_vae(), pixels)
    exact = gradients(tiny_vae(), pixels)
    cosine = {n: torch.cosine_similarity(g.flatten(), exact[n].flatten(), 0).item() for n, g in narrow.items()}
    assert narrow.keys() == exact.keys() and min(cosine.values()) > 0.8, min(cosine.items(), key=lambda item: item[1])


def test_a_whole_clip_compiles_to_one_graph(vae: WanVAE) -> None:
    raw = random_latents(3).float()
    compiled = torch.compile(vae.reconstruct, backend="eager", fullgraph=True)
    assert relative_error(compiled(raw), vae.reconstruct(raw)) < 1e-6


def test_a_frame_of_zeros_has_finite_gradients() -> None:
    vae = tiny_vae()
    for name, parameter in vae.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    assert all(gradient.isfinite().all() for gradient in gradients(vae, torch.zeros(1, 3, 5, 16, 16)).values())


def written(folder: Path, layout: str, vae: WanVAE) -> Path:
    """The VAE as one file: 'pth', 'safetensors', or 'diffusers' (its key names, from diffusers itself)."""
    weights = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    path = folder / f"vae.{'pth' if layout == 'pth' else 'safetensors'}"
    if layout == "pth":
        torch.save(weights, path)
    elif layout == "diffusers":
        from diffusers import AutoencoderKLWan

        from lightx2v.vae.layouts import from_diffusers

        with torch.device("meta"):
            names = list(AutoencoderKLWan(base_dim=vae.config.base_channels).state_dict())
        save_file({name: weights[from_diffusers(name)] for name in names}, path)
    else:
        save_file({f"vae.{name}" if layout == "prefixed" else name: weights[name] for name in weights}, path)
    return path


@pytest.mark.parametrize("layout", ["pth", "safetensors", "diffusers", "prefixed"])
@pytest.mark.parametrize("width", [8, 12])
def test_load(tmp_path: Path, layout: str, width: int) -> None:
    vae = tiny_vae(width)
    loaded = load(written(tmp_path, layout, vae), dtype=torch.float32, device="cpu")
    assert loaded.config == WanVAEConfig(width) and not loaded.training
    raw = random_latents(2).float()
    assert torch.equal(decode(loaded, raw), decode(vae, raw))


@pytest.mark.parametrize(("dtype", "psnr"), [(torch.bfloat16, 25), (torch.float16, 45)])
def test_load_narrow(tmp_path: Path, vae: WanVAE, dtype: torch.dtype, psnr: float) -> None:
    loaded = load(written(tmp_path, "safetensors", vae), dtype=dtype, device="cpu")
    raw, pixels = random_latents(2).float(), random_frames(5).float()
    made, exact = decode(loaded, raw), decode(vae, raw)
    assert made.dtype == torch.float32 and 10 * torch.log10(4 / (made - exact).square().mean()) > psnr
    assert relative_error(encode(loaded, pixels), encode(vae, pixels)) < 0.2


def header_of(tensors: dict[str, tuple[int, ...]]) -> Header:
    path = Path("some/file.safetensors")
    return Header(path, {name: TensorInfo(torch.float32, shape, path) for name, shape in tensors.items()}, {})


def manifest_header(name: str) -> Header:
    tensors = json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))["tensors"]
    return header_of({key: tuple(tensor["shape"]) for key, tensor in tensors.items()})


def test_the_published_checkpoint_fits() -> None:
    header = manifest_header("comfyui_wan_2.1_vae")
    with torch.device("meta"):
        vae = WanVAE(config_from_header(header))
    assert {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()} == {
        name: info.shape for name, info in header.tensors.items()
    }


WAN22 = {
    "encoder.conv1.weight": (160, 12, 3, 3, 3),
    "encoder.downsamples.0.downsamples.0.residual.0.gamma": (160, 1, 1, 1),
    "decoder.conv1.weight": (1024, 48, 3, 3, 3),
    "decoder.head.0.gamma": (256, 1, 1, 1),
}


def wrong_headers() -> Iterator[tuple[Header, str]]:
    yield manifest_header("taew2_1"), "a tiny autoencoder"
    yield manifest_header("wan2.1_t2v_1.3B"), "a diffusion transformer"
    yield manifest_header("diffusers_wan2.1_t2v_1.3B"), "a diffusion transformer"
    yield manifest_header("comfyui_umt5_xxl_fp16"), "a text encoder"
    yield manifest_header("lora_kijai_lightx2v_i2v_14B_rank64_bf16"), "a LoRA"
    wan22 = {"encoder.conv1.weight": (160, 12, 3, 3, 3), "encoder.downsamples.0.downsamples.0.residual.0.gamma": (160,)}
    yield (
        header_of(wan22 | {"decoder.conv1.weight": (1024, 48, 3, 3, 3), "decoder.head.0.gamma": (256, 1, 1, 1)}),
        "Wan2.2 VAE",
    )
    yield header_of({"decoder.mid.block_1.conv1.conv.weight": (1024, 1024, 3, 3, 3)}), "autoencoder of another model"
    yield header_of({"something.weight": (1,)}), r"unknown \(1 tensors, first 'something.weight'\)"


@pytest.mark.parametrize(("header", "words"), list(wrong_headers()))
def test_another_file_is_named(header: Header, words: str) -> None:
    with pytest.raises(CheckpointError, match=f"some/file.safetensors: this is .*{words}.*choose a Wan2.1 VAE"):
        config_from_header(header)


def test_an_incomplete_file_is_refused(tmp_path: Path, vae: WanVAE) -> None:
    weights = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    del weights["decoder.upsamples.3.time_conv.bias"]
    save_file(weights, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match=r"1 of 194 tensors are missing.*decoder.upsamples.3.time_conv.bias"):
        load(tmp_path / "vae.safetensors", dtype=torch.float32, device="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 5e-3), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
def test_on_a_gpu_with_frames_in_main_memory(vae: WanVAE, dtype: torch.dtype, limit: float) -> None:
    pixels, raw = random_frames(9).float(), random_latents(3).float()
    out = torch.empty(1, 3, 9, 16, 24)
    placed = tiny_vae().to("cuda", dtype)
    encoded = encode(placed, pixels)
    assert encoded.is_cuda and encoded.dtype == torch.float32
    assert decode(placed, raw, out=out) is out
    assert relative_error(encoded.cpu(), encode(vae, pixels)) < limit
    assert relative_error(out, decode(vae, raw)) < limit
