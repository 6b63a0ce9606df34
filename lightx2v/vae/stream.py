"""Any VAE over a clip of any length: chunk by chunk, in memory that does not grow with the clip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from lightx2v.checkpoint import Header, assign
from lightx2v.finite import bad_weight, finite
from lightx2v.latents import LatentFormat
from lightx2v.vae.layers import CausalConv3d, Encoder, State
from lightx2v.vae.transfer import Landing, bring


class StreamedVAE(Protocol):
    """What all VAEs here have in common: both directions work on a whole clip (state None) or on its next chunk."""

    @property
    def space(self) -> LatentFormat: ...
    @property
    def first_chunk(self) -> int: ...  # frames that become the first latent frame: 1, or 4

    def at_once(self, height: int, width: int) -> int: ...  # latent frames of so many places to decode at a time
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def to_latents(self, frames: Tensor, state: State | None = None) -> Tensor: ...
    def reconstruct(self, raw: Tensor, state: State | None = None) -> Tensor: ...


class CausalVAE(StreamedVAE, Protocol):
    """What WanVAE and Wan22VAE have in common."""

    @property
    def encoder(self) -> Encoder: ...
    @property
    def conv2(self) -> CausalConv3d: ...  # beside the latents, at the decoder's side

    def prepare(self, frames: Tensor) -> Tensor: ...
    def moments(self, hidden: Tensor) -> tuple[Tensor, Tensor]: ...


Network = TypeVar("Network", bound=nn.Module)


def fill(
    vae: Network,
    header: Header,
    *,
    rename: Callable[[str], str],
    dtype: torch.dtype,
    device: torch.device | str,
) -> Network:
    """Read weights into a VAE on the meta device, and keep them in the memory order that its layers work in."""
    assign(vae, header, rename=rename, dtype=dtype, device=device)
    return arrange(vae).eval()


def arrange(vae: Network) -> Network:
    """The same VAE with its convolutions' weights channels last in memory."""
    for parameter in vae.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
        elif parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return vae


OnChunk = Callable[[int, int], None]
"""Called after each chunk with the latent frames done and their total. What it raises ends the work."""


def check_frames(vae: StreamedVAE, frames: Tensor) -> None:
    """Raise ValueError unless frames are (B, 3, F, H, W) of a size that the VAE divides."""
    if frames.ndim != 5 or frames.shape[1] != 3:
        raise ValueError(f"frames are {tuple(frames.shape)}; expected (B, 3, F, H, W)")
    height, width, cell = *frames.shape[3:], vae.space.stride[1]
    if height % cell or width % cell or not height or not width:
        whole = f"{max(width // cell, 1) * cell}x{max(height // cell, 1) * cell}"
        raise ValueError(f"frames are {width}x{height} pixels: expected multiples of {cell}; crop or resize to {whole}")


def check_count(count: int) -> None:
    """Raise ValueError unless a clip of `count` frames has a whole number of latent frames."""
    if count < 1 or count % 4 != 1:
        less = max((count - 1) // 4 * 4 + 1, 1)
        raise ValueError(f"{count} frames: expected 4n + 1; cut the clip to {less} or repeat frames up to {less + 4}")


def spans(count: int, chunk: int, first: int = 1) -> Iterator[tuple[int, int]]:
    """First frame and end of each chunk of a clip: `first` frames, then `chunk` at a time."""
    yield 0, min(first, count)
    for start in range(first, count, chunk):
        yield start, min(start + chunk, count)


def empty_latents(vae: StreamedVAE, frames: Tensor, count: int) -> Tensor:
    """Room for the raw latents of `count` frames like these, on the VAE's device."""
    st, sh, sw = vae.space.stride
    b, (height, width) = frames.shape[0], frames.shape[3:]
    shape = (b, vae.space.channels, (count - 1) // st + 1, height // sh, width // sw)
    return torch.empty(shape, dtype=torch.float32, device=next(vae.parameters()).device)


def encode(vae: StreamedVAE, frames: Tensor, *, chunk: int = 4, on_chunk: OnChunk | None = None) -> Tensor:
    """Raw latents (B, z, T, h, w) float32 of frames (B, 3, F, H, W) in [-1, 1]: the posterior's mean.

    F is 4n + 1, H and W are multiples of the VAE's stride (8, Wan2.2's 16); else ValueError. After the first frame
    `chunk` frames (a multiple of 4) are encoded at a time; more take more memory and give the same latents. The frames
    may be in main memory while the VAE is on a GPU; the latents are on the VAE's device.
    """
    check_frames(vae, frames)
    count = frames.shape[2]
    check_count(count)
    if chunk < 4 or chunk % 4:
        raise ValueError(f"chunk is {chunk} frames: expected a multiple of 4")
    raw, weight = empty_latents(vae, frames, count), next(vae.parameters())
    state: State = {}
    with torch.inference_mode():
        for start, stop in spans(count, chunk, vae.first_chunk):
            mean = vae.to_latents(bring(frames[:, :, start:stop], weight), state)
            done = (stop - 1) // 4 + 1
            raw[:, :, done - mean.shape[2] : done] = mean
            if on_chunk is not None:
                on_chunk(done, raw.shape[2])
    return raw


def decode(
    vae: StreamedVAE,
    raw: Tensor,
    *,
    chunk: int | None = None,
    on_chunk: OnChunk | None = None,
    out: Tensor | None = None,
    clamp: bool = True,
) -> Tensor:
    """Frames (B, 3, 4T - 3, H, W) float32 of raw latents (B, z, T, h, w), clamped to [-1, 1] unless told not to.

    `chunk` latent frames are decoded at a time, None: as many as suit the VAE; more take more memory and give the same
    frames. They are written into
    `out`, which is allocated on the VAE's device unless given; it may be in main memory, or of another floating dtype.
    Raises ValueError for latents or an `out` of another shape, FloatingPointError for frames that are not finite.
    """
    channels, device = vae.space.channels, next(vae.parameters()).device
    if raw.ndim != 5 or raw.shape[1] != channels or not raw.numel():
        raise ValueError(
            f"latents are {tuple(raw.shape)}; this VAE decodes (B, {channels}, T, h, w), T, h and w at least 1"
        )
    chunk = vae.at_once(*raw.shape[3:]) if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"chunk is {chunk} latent frames: expected at least 1")
    b, _, total, h, w = raw.shape
    _, sh, sw = vae.space.stride
    shape = (b, 3, 4 * total - 3, sh * h, sw * w)
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=device)
    elif tuple(out.shape) != shape or not out.is_floating_point():
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}; these latents decode to floating point {shape}")
    state: State = {}
    landing = Landing(out)
    sums: list[Tensor] = []  # of each chunk: looked at once, at the end, so that the device is never waited for
    with torch.inference_mode():
        for start in range(0, total, chunk):
            stop = min(start + chunk, total)
            frames = vae.reconstruct(raw[:, :, start:stop].to(device), state)
            sums.append(frames.sum(dtype=torch.float32))
            landing.put(frames.clamp_(-1, 1) if clamp else frames, 4 * stop - 3)
            if on_chunk is not None:
                on_chunk(stop, total)
        landing.finish()
        finite = torch.stack(sums).isfinite().tolist()
    if not all(finite):
        raise FloatingPointError(_broken(vae, raw, max(0, 4 * chunk * finite.index(False) - 3), out.shape[2]))
    return out


def _broken(vae: StreamedVAE, raw: Tensor, frame: int, count: int) -> str:
    weight, network = next(vae.parameters()), getattr(vae, "network", vae)  # of a VAE that is split over ranks
    said = f"decoding gave NaN or infinity from frame {frame + 1} of {count} on ({type(network).__name__}, "
    said += f"{str(weight.dtype)[6:]}): "
    if not finite(raw):
        return said + "the latents held them already; sample or encode again"
    if isinstance(network, nn.Module) and (name := bad_weight(network)) is not None:
        return f"{said}its {name} is not finite: the VAE's file is damaged; load another"
    return said + "its weights are finite: their type is too narrow for these latents; load it in bf16 or float32"
