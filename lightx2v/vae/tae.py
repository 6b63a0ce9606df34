"""Tiny autoencoders (TAEHV): frames (B, 3, F, H, W) <-> raw latents, F = 4 (T - 1) + 1, of Wan2.1, Wan2.2 and
HunyuanVideo-1.5.

They approximate a model's own VAE with a fraction of the work: 2D convolutions that see each frame and the one before.
The network and its key names are those of madebyollin/taehv, taehv.py; the LightTAE files are ModelTC/LightX2V's, which
have the same names and shapes. Which file speaks which latents is `KINDS`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lightx2v.checkpoint import CheckpointError, Header, Packed, read_header
from lightx2v.latents import HUNYUAN15, WAN21, WAN22, LatentFormat
from lightx2v.vae.fused import convolve_beside_past, frame_kernels
from lightx2v.vae.layers import State, fold_time, unfold_time
from lightx2v.vae.layouts import PREFIXES
from lightx2v.vae.stream import fill

CHUNK = 4  # frames of one latent frame
SEVEN = 7 * 60 * 104  # places of as many latent frames of 832x480


@dataclass(frozen=True)
class Kind:
    """What a published file expects and gives, which its tensors do not tell.

    patch: pixels a side that the last convolution makes at once. normalised: it was trained on the latents of
    diffusion (mean 0, deviation 1) and not on the VAE's raw ones. signed: its pixels are in [-1, 1] and not in [0, 1].
    slope: of its activations below zero. encodes: what its encoder takes is known.
    """

    name: str
    space: LatentFormat
    patch: int
    normalised: bool
    signed: bool = False
    slope: float = 0.0
    encodes: bool = True


# taew*, taehv1_5: madebyollin/taehv. lighttae*: LightX2V's hf/tae.py, need_scaled in its pipeline, hf/hunyuanvideo15/
# lighttae_hy15.py (ComfyUI 0.3.75 hands that one normalised latents instead, 3.7 % larger). Nothing says in which range
# the encoder of lighttaehy1_5 takes pixels.
KINDS = {
    kind.name: kind
    for kind in (
        Kind("taew2_1", WAN21, 1, normalised=True),
        Kind("lighttaew2_1", WAN21, 1, normalised=False),
        Kind("taew2_2", WAN22, 2, normalised=True),
        Kind("lighttaew2_2", WAN22, 2, normalised=False),
        Kind("taehv1_5", HUNYUAN15, 2, normalised=True),
        Kind("lighttaehy1_5", HUNYUAN15, 2, normalised=False, signed=True, slope=0.2, encodes=False),
    )
}


@dataclass(frozen=True)
class TAEConfig:
    """kind: of `KINDS`. decoder_channels: at 1, 2, 4 and 8 times the size of the latents. encoder_channels: None for a
    file without an encoder. The defaults are the published widths."""

    kind: str = "taew2_1"
    decoder_channels: tuple[int, int, int, int] = (256, 128, 64, 64)
    encoder_channels: int | None = 64


class Stack(nn.ModuleList):
    """Layers in a row over frames (B t, C, H, W). Those that look back are told how many clips B there are."""

    def forward(self, x: Tensor, batch: int, state: State | None = None) -> Tensor:
        for layer in self:
            x = layer(x, batch, state) if isinstance(layer, Remember) else layer(x)
        return x


class Remember(nn.Module):
    """Three convolutions over each frame beside the one before it, added to the frame; before a clip are zeros."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            convolution(channels * 2, channels), act, convolution(channels, channels), act,
            convolution(channels, channels),
        )  # fmt: skip
        self.act = act

    def forward(self, x: Tensor, batch: int, state: State | None = None) -> Tensor:
        before = None if state is None else state.get(self)
        conv, act, *rest = self.conv
        assert isinstance(conv, nn.Conv2d)
        kernels, cuts = frame_kernels(x, conv.weight), isinstance(act, nn.ReLU)
        if kernels is not None:
            y, last = convolve_beside_past(kernels, conv, unfold_time(x, batch), before, relu=cuts)
            y = fold_time(y)[0]
        else:
            rows = x.movedim(1, -1).unflatten(0, (batch, -1))  # (B, t, H, W, C): whole rows keep channels-last memory
            before = torch.zeros_like(rows[:, :1]) if before is None else before
            past = torch.cat([before, rows[:, :-1]], 1).flatten(0, 1).movedim(-1, 1)
            y, last = conv(torch.cat([x, past], 1)), rows[:, -1:].clone()
        if state is not None:
            state[self] = last
        if kernels is not None and cuts:
            second, third = ((layer.get_parameter("weight"), layer.get_parameter("bias")) for layer in rest[::2])
            return kernels.conv2d_relu(kernels.conv2d_relu(y, *second, None), *third, x)
        y = act(y)
        for layer in rest:
            y = layer(y)
        result: Tensor = self.act(x + y)
        return result


class Grow(nn.Module):
    """Each frame becomes `times` frames.

    The original doubles height and width first; a 1x1 convolution gives the same before, at a quarter of the places.
    """

    def __init__(self, channels: int, times: int) -> None:
        super().__init__()
        self.times = times
        self.conv = nn.Conv2d(channels, channels * times, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.conv(x).movedim(1, -1), "n h w (s c) -> (n s) h w c", s=self.times).movedim(-1, 1)


class DoubledConv(nn.Conv2d):
    """A 3x3 convolution over twice the height and width, and what follows it."""

    def __init__(self, channels: int, out_channels: int, act: nn.Module) -> None:
        super().__init__(channels, out_channels, 3, padding=1, bias=False)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        if (kernels := frame_kernels(x, self.weight)) is None:
            y = super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        else:
            cuts = isinstance(self.act, nn.ReLU)
            y = fold_time(kernels.doubled_conv(unfold_time(x, 1), self.weight, None, cuts))[0]
            if cuts:
                return y
        result: Tensor = self.act(y)
        return result


class Pool(nn.Module):
    """Each `times` frames become one."""

    def __init__(self, channels: int, times: int) -> None:
        super().__init__()
        self.times = times
        self.conv = nn.Conv2d(channels * times, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = rearrange(x.movedim(1, -1), "(n s) h w c -> n h w (s c)", s=self.times)
        return self.conv(rows.movedim(-1, 1))


class SoftClamp(nn.Module):
    """3 tanh(x / 3): latents beyond +-3 are rare, and not to be trusted."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def convolution(channels: int, out_channels: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=bias)


def decoder(latents: int, widths: tuple[int, int, int, int], out: int, act: nn.Module) -> Stack:
    layers: list[nn.Module] = [SoftClamp(), convolution(latents, widths[0]), act]
    # Identity holds the place of the doublings and, at the end, of what follows the last.
    for width, after, times, follows in zip(widths, widths[1:], (1, 2, 2), (None, None, act), strict=False):
        layers += [Remember(width, act) for _ in range(3)]
        layers += [nn.Identity(), Grow(width, times), DoubledConv(width, after, follows or nn.Identity())]
    return Stack([*layers, nn.Identity(), convolution(widths[3], out)])


def encoder(channels: int, width: int, latents: int, act: nn.Module) -> Stack:
    layers: list[nn.Module] = [convolution(channels, width), act]
    for times in (2, 2, 1):
        layers += [Pool(width, times), convolution(width, width, stride=2, bias=False)]
        layers += [Remember(width, act) for _ in range(3)]
    return Stack([*layers, convolution(width, latents)])


class TinyVAE(nn.Module):
    """The network, with the key names of taew2_1.pth.

    `to_latents` and `reconstruct` are differentiable and take a whole clip (state None) or a chunk of one.
    """

    first_chunk = CHUNK

    def __init__(self, config: TAEConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or TAEConfig()
        self.kind = kind = KINDS[config.kind]
        act = nn.LeakyReLU(kind.slope) if kind.slope else nn.ReLU()
        pixels, latents = 3 * kind.patch**2, kind.space.channels
        width = config.encoder_channels
        self.encoder = None if width is None else encoder(pixels, width, latents, act)
        self.decoder = decoder(latents, config.decoder_channels, pixels, act)

    @property
    def space(self) -> LatentFormat:
        return self.kind.space

    def at_once(self, height: int, width: int) -> int:
        return frames_at_once(height, width)

    def to_latents(self, frames: Tensor, state: State | None = None) -> Tensor:
        """Raw latents (B, z, T, h, w) float32 of frames (B, 3, F, H, W) in [-1, 1].

        Every four frames become one latent frame; at the end of a clip the last frame is repeated, as taehv does.
        Raises ValueError for a file that cannot encode.
        """
        if self.encoder is None or not self.kind.encodes:
            why = "the file has no encoder" if self.encoder is None else f"{self.kind.name} is published as a decoder"
            raise ValueError(f"this tiny autoencoder cannot encode: {why}; encode with the model's full VAE")
        frames = torch.cat([frames, frames[:, :, -1:].expand(-1, -1, -frames.shape[2] % CHUNK, -1, -1)], 2)
        x, batch = fold_time(frames if self.kind.signed else (frames + 1) / 2)
        x = F.pixel_unshuffle(x, self.kind.patch) if self.kind.patch > 1 else x
        made = unfold_time(self.encoder(channels_last(x), batch, state), batch).float()
        return self.space.denormalize(made) if self.kind.normalised else made

    def reconstruct(self, raw: Tensor, state: State | None = None) -> Tensor:
        """Frames (B, 3, F, H, W), not clamped to [-1, 1], of raw latents (B, z, T, h, w).

        F is 4T - 3 for a whole clip or its first chunk, 4T for a later chunk: the network makes four frames of every
        latent frame, of which the first three of a clip are before its start.
        """
        starts = not state
        latents = self.space.normalize(raw) if self.kind.normalised else raw
        x, batch = fold_time(latents.to(next(self.decoder.parameters()).dtype))
        x = self.decoder(channels_last(x), batch, state)
        x = F.pixel_shuffle(x, self.kind.patch) if self.kind.patch > 1 else x
        frames = unfold_time(x, batch)[:, :, CHUNK - 1 if starts else 0 :]
        return frames if self.kind.signed else frames * 2 - 1


def frames_at_once(height: int, width: int) -> int:
    """Latent frames of so many places that are decoded at a time: seven up to 832x480, three from 1280x720 on.

    Fewer keep a GPU waiting for launches: 832x480 on an H100 takes 100 ms one at a time, 51 by threes, 37 by sevens and
    35 as a whole, in 0.4, 1.0, 2.3 and 6.5 GB (benchmarks/results/h100-vae-480p-decode.json).
    """
    return max(3, min(7, SEVEN // (height * width)))


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def is_tiny(header: Header) -> bool:
    """Whether a header is laid out as TAEHV, of whichever model."""
    return "decoder.22.weight" in header.tensors and "decoder.3.conv.0.weight" in header.tensors


def kind_of_name(path: Path) -> Kind | None:
    """The kind that a file's name says: taew2_1.pth, lighttaew2_2-bf16.safetensors, lighttae_hy1_5.pth."""
    said = _bare(path.name)
    # The longest that fits: "lighttaew2_1" contains "taew2_1".
    return max((kind for kind in KINDS.values() if _bare(kind.name) in said), key=lambda k: len(k.name), default=None)


def _bare(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def config_from_header(header: Header) -> TAEConfig:
    """Kind and widths of a tiny autoencoder.

    Raises CheckpointError for one of another model, and for a name that leaves open which latents the file expects.
    """
    header = header.without_prefix(*PREFIXES)
    first, last = header.shape("decoder.1.weight"), header.shape("decoder.22.weight")
    one, two, four, eight = ((header.shape(f"decoder.{place}.weight") or (0,))[0] for place in (1, 8, 14, 20))
    if not first or not last or len(first) != 4 or not all((one, two, four, eight)):
        raise CheckpointError(f"{header.path}: this is not a complete tiny autoencoder; download the file again")
    sizes = (first[1], last[0])
    fitting = [kind.name for kind in KINDS.values() if (kind.space.channels, 3 * kind.patch**2) == sizes]
    named = kind_of_name(header.path)
    if not fitting or _bare(header.path.stem) == "taehv":  # of the first HunyuanVideo: the same shapes as taew2_1
        raise CheckpointError(
            f"{header.path}: this is a tiny autoencoder of another model ({first[1]} latent channels); "
            f"choose one of {', '.join(KINDS)}"
        )
    if named is None or named.name not in fitting:
        raise CheckpointError(
            f"{header.path}: its tensors fit {' and '.join(fitting)}, which expect different latents, and only the "
            "file's name tells them apart: put the right one of these into it"
        )
    reads = header.shape("encoder.0.weight")
    return TAEConfig(named.name, (one, two, four, eight), reads[0] if reads else None)


def load(path: str | Path, *, dtype: torch.dtype, device: torch.device | str) -> TinyVAE:
    """Read a tiny autoencoder of any width: a .safetensors or .pth file.

    Raises CheckpointError when the file is damaged or another kind of model.
    """
    header = read_header(path).without_prefix(*PREFIXES)
    with torch.device("meta"):
        vae = TinyVAE(config_from_header(header))
    return fill(vae, _cut(header, vae), rename=str, dtype=dtype, device=device)


def _cut(header: Header, vae: TinyVAE) -> Header:
    """The header with kernels of `Grow` that make more frames than are used cut to the last ones, as taehv does."""
    tensors = dict(header.tensors)
    for index, layer in enumerate(vae.decoder):
        if isinstance(layer, Grow) and (info := tensors.get(name := f"decoder.{index}.conv.weight")) is not None:
            rows, shape = info.shape[0], tuple(layer.conv.weight.shape)
            if info.shape[1:] == shape[1:] and rows > shape[0] and rows % shape[0] == 0:
                last = Packed("cut", f"the last {shape[0]} of {rows} rows", {"weight": info}, partial(_last, shape[0]))
                tensors[name] = replace(info, shape=shape, stored=info.stored or name, packed=last)
    return replace(header, tensors=tensors)


def _last(rows: int, parts: Mapping[str, Tensor]) -> Tensor:
    return parts["weight"][-rows:].float()
