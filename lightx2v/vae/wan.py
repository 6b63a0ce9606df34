"""Wan2.1's causal video autoencoder: frames (B, 3, F, H, W) <-> raw latents (B, 16, T, H/8, W/8), F = 4 (T - 1) + 1.

Every layer works on a chunk of any number of frames. What a layer must remember of earlier chunks travels in a `State`
that the caller owns: None means "this chunk is the whole clip" (training), an empty dict "this chunk starts a clip",
and the dict that a call has filled continues it. Both ways compute the same numbers.
The network and its key names are those of Wan-Video/Wan2.1, wan/modules/vae.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightx2v.checkpoint import Header, assign, read_header
from lightx2v.vae.layouts import require_wan_layout

State = dict[nn.Module, Tensor]
"""Frames (B, C, 1 or 2, h, w) that a layer needs again with the next chunk, keyed by the layer.
Tensors are replaced, never written to, so a shallow copy of the dict is a snapshot."""


@dataclass(frozen=True)
class WanVAEConfig:
    """Widths of the network: 96 and 16 are Wan2.1's own; LightVAE has 24 base channels."""

    base_channels: int = 96
    latent_channels: int = 16


class RMSNorm(nn.Module):
    """x / max(|x|, 1e-12) * sqrt(C) * gamma over the channels (dim 1), computed in float32."""

    def __init__(self, channels: int, *, frames: bool) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *((1, 1, 1) if frames else (1, 1))))

    def forward(self, x: Tensor) -> Tensor:
        # |x|^2 + 1e-24 under the root in place of the maximum: the same float32 unless |x| is below 1e-8.
        # In channels-last memory this is one fused kernel; F.normalize reads and writes several times as much.
        channels = x.shape[1]
        rows = x.movedim(1, -1)
        rows = F.rms_norm(rows, (channels,), self.gamma.flatten().to(x.dtype), 1e-24 / channels)
        return rows.movedim(-1, 1)


class CausalConv3d(nn.Conv3d):
    """Conv3d that sees the past only: frames before a chunk come from `state`, frames before a clip are zeros."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int]) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        lead = self.kernel_size[0] - 1
        if not lead:
            return convolve(self, x)
        past = None if state is None else state.get(self)
        x = F.pad(x, (0, 0, 0, 0, lead, 0)) if past is None else torch.cat([past, x], 2)
        if state is not None:
            state[self] = x[:, :, -lead:].clone()
        return convolve(self, x)


class Chain(nn.Sequential):
    """A Sequential that hands the state to those of its layers that use one."""

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        for layer in self:
            x = layer(x, state) if isinstance(layer, STATEFUL) else layer(x)
        return x


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = Chain(
            RMSNorm(in_channels, frames=True),
            nn.SiLU(),
            CausalConv3d(in_channels, out_channels, (3, 3, 3)),
            RMSNorm(out_channels, frames=True),
            nn.SiLU(),
            nn.Identity(),  # dropout in the original: it holds the place of key 5
            CausalConv3d(out_channels, out_channels, (3, 3, 3)),
        )
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else CausalConv3d(in_channels, out_channels, (1, 1, 1))

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        return self.shortcut(x) + self.residual(x, state)


class AttentionBlock(nn.Module):
    """Single-head attention over the positions of each frame by itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, frames=False)
        self.to_qkv = nn.Conv2d(channels, channels * 3, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        frames, batch = fold_time(x)
        n, c, h, w = frames.shape
        # (n, 3c, h, w) -> (n, 1, h w, 3c) -> three times (n, 1, h w, c)
        q, k, v = self.to_qkv(self.norm(frames)).reshape(n, 1, 3 * c, h * w).transpose(2, 3).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v)
        y = self.proj(y.reshape(n, h, w, c).permute(0, 3, 1, 2))
        return x + unfold_time(y, batch)


class Upsample(nn.Module):
    """Doubles height and width and halves the channels; with `time`, doubles every frame but the clip's first."""

    def __init__(self, channels: int, *, time: bool) -> None:
        super().__init__()
        # The interpolation has no weights: Identity holds the place of key 0.
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(channels, channels // 2, 3, padding=1))
        self.time_conv = CausalConv3d(channels, channels * 2, (3, 1, 1)) if time else None

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        if self.time_conv is not None:
            x = self.double_frames(x, self.time_conv, state)
        frames, batch = fold_time(x)
        frames = F.interpolate(frames, scale_factor=2.0, mode="nearest")
        return unfold_time(self.resample(frames), batch)

    @staticmethod
    def double_frames(x: Tensor, conv: CausalConv3d, state: State | None) -> Tensor:
        if state is not None and conv in state:
            return split_frames(conv(x, state))
        # The clip's first frame stays one frame, and to the convolution it counts as zeros, like what is before it.
        first, x = x[:, :, :1], x[:, :, 1:]
        if x.shape[2]:
            return torch.cat([first, split_frames(conv(x, state))], 2)
        if state is not None:
            state[conv] = torch.cat([torch.zeros_like(first)] * 2, 2)
        return first


class Downsample(nn.Module):
    """Halves height and width; with `time`, also the frames after the clip's first: 1 + 2n -> 1 + n, then 2n -> n."""

    def __init__(self, channels: int, *, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        frames, batch = fold_time(x)
        x = unfold_time(self.resample(frames), batch)
        return x if self.time_conv is None else self.halve_frames(x, self.time_conv, state)

    @staticmethod
    def halve_frames(x: Tensor, conv: nn.Conv3d, state: State | None) -> Tensor:
        past = None if state is None else state.get(conv)
        if state is not None:
            state[conv] = x[:, :, -1:].clone()
        if past is not None:
            return convolve(conv, torch.cat([past, x], 2))
        return x if x.shape[2] == 1 else torch.cat([x[:, :, :1], convolve(conv, x)], 2)


STATEFUL = (CausalConv3d, ResidualBlock, Upsample, Downsample)


class Encoder(nn.Module):
    def __init__(self, base: int, out_channels: int) -> None:
        super().__init__()
        widths = (base, base, base * 2, base * 4, base * 4)
        stages: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(widths)):
            stages += [ResidualBlock(before, after), ResidualBlock(after, after)]
            if i < 3:
                stages.append(Downsample(after, time=i > 0))
        self.conv1 = CausalConv3d(3, base, (3, 3, 3))
        self.downsamples = Chain(*stages)
        self.middle = middle(widths[-1])
        self.head = head(widths[-1], out_channels)

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        x = self.downsamples(self.conv1(x, state), state)
        return self.head(self.middle(x, state), state)


class Decoder(nn.Module):
    def __init__(self, base: int, in_channels: int) -> None:
        super().__init__()
        # Each upsampling halves the width, so a stage starts with half of what the stage before ended with.
        widths = ((base * 4, base * 4), (base * 2, base * 4), (base * 2, base * 2), (base, base))
        stages: list[nn.Module] = []
        for i, (before, after) in enumerate(widths):
            stages += [ResidualBlock(before, after), ResidualBlock(after, after), ResidualBlock(after, after)]
            if i < 3:
                stages.append(Upsample(after, time=i < 2))
        self.conv1 = CausalConv3d(in_channels, base * 4, (3, 3, 3))
        self.middle = middle(base * 4)
        self.upsamples = Chain(*stages)
        self.head = head(base, 3)

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        x = self.middle(self.conv1(x, state), state)
        return self.head(self.upsamples(x, state), state)


class WanVAE(nn.Module):
    """The network, with the key names of Wan2.1_VAE.pth.

    `posterior` and `reconstruct` are differentiable and take a whole clip (state None) or a chunk of one.
    """

    def __init__(self, config: WanVAEConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or WanVAEConfig()
        z = config.latent_channels
        self.encoder = Encoder(config.base_channels, z * 2)
        self.conv1 = CausalConv3d(z * 2, z * 2, (1, 1, 1))
        self.conv2 = CausalConv3d(z, z, (1, 1, 1))
        self.decoder = Decoder(config.base_channels, z)

    def posterior(self, frames: Tensor, state: State | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of raw latents, each (B, z, T, H/8, W/8) float32, of frames (B, 3, F, H, W) in [-1, 1].

        F is 4n + 1 for a whole clip or its first chunk, 4n for a later chunk.
        """
        hidden = self.encoder(frames.contiguous(memory_format=torch.channels_last_3d), state)
        mean, log_variance = convolve_wide(self.conv1, hidden).chunk(2, 1)
        return mean, log_variance

    def reconstruct(self, raw: Tensor, state: State | None = None) -> Tensor:
        """Frames (B, 3, F, H, W), not clamped to [-1, 1], of raw latents (B, z, T, h, w).

        F is 4T - 3 for a whole clip or its first chunk, 4T for a later chunk.
        """
        hidden = convolve_wide(self.conv2, raw).to(self.conv2.weight.dtype)
        return self.decoder(hidden.contiguous(memory_format=torch.channels_last_3d), state)


PREFIXES = ("vae.", "first_stage_model.")  # of a VAE cut out of a larger checkpoint


def config_from_header(header: Header) -> WanVAEConfig:
    """The widths of a checkpoint in the original or the diffusers layout.

    Raises CheckpointError, which says what the file is, for anything but a Wan2.1 VAE.
    """
    base, latent, _ = require_wan_layout(header.without_prefix(*PREFIXES))
    return WanVAEConfig(base, latent)


def load(path: str | Path, *, dtype: torch.dtype, device: torch.device | str) -> WanVAE:
    """Read a Wan2.1 VAE or LightVAE of any width: a .safetensors or .pth file, original or diffusers key names.

    Raises CheckpointError when the file is damaged or another kind of model.
    """
    header = read_header(path).without_prefix(*PREFIXES)
    base, latent, rename = require_wan_layout(header)
    with torch.device("meta"):
        vae = WanVAE(WanVAEConfig(base, latent))
    assign(vae, header, rename=rename, dtype=dtype, device=device)
    for parameter in vae.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
        elif parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return vae.eval()


OnChunk = Callable[[int, int], None]
"""Called after each chunk with the latent frames done and their total. What it raises ends the work."""


def encode(vae: WanVAE, frames: Tensor, *, chunk: int = 4, on_chunk: OnChunk | None = None) -> Tensor:
    """Raw latents (B, z, T, H/8, W/8) float32 of frames (B, 3, F, H, W) in [-1, 1]: the posterior's mean.

    F is 4n + 1, H and W are multiples of 8; else ValueError. After the first frame `chunk` frames (a multiple of 4)
    are encoded at a time; more take more memory and give the same latents. The frames may be in main memory while the
    VAE is on a GPU; the latents are on the VAE's device.
    """
    if frames.ndim != 5 or frames.shape[1] != 3:
        raise ValueError(f"frames are {tuple(frames.shape)}; expected (B, 3, F, H, W)")
    b, _, count, height, width = frames.shape
    if count % 4 != 1:
        less = max((count - 1) // 4 * 4 + 1, 1)
        raise ValueError(f"{count} frames: expected 4n + 1; cut the clip to {less} or repeat frames up to {less + 4}")
    if height % 8 or width % 8 or not height or not width:
        whole = f"{max(width // 8, 1) * 8}x{max(height // 8, 1) * 8}"
        raise ValueError(f"frames are {width}x{height} pixels: expected multiples of 8; crop or resize to {whole}")
    if chunk < 4 or chunk % 4:
        raise ValueError(f"chunk is {chunk} frames: expected a multiple of 4")
    weight, total = vae.conv2.weight, (count - 1) // 4 + 1
    shape = (b, vae.config.latent_channels, total, height // 8, width // 8)
    raw = torch.empty(shape, dtype=torch.float32, device=weight.device)
    state: State = {}
    with torch.inference_mode():
        for start, stop in ((0, 1), *((at, min(at + chunk, count)) for at in range(1, count, chunk))):
            mean, _ = vae.posterior(frames[:, :, start:stop].to(weight), state)
            done = (stop - 1) // 4 + 1
            raw[:, :, done - mean.shape[2] : done] = mean
            if on_chunk is not None:
                on_chunk(done, total)
    return raw


def decode(
    vae: WanVAE,
    raw: Tensor,
    *,
    chunk: int = 1,
    on_chunk: OnChunk | None = None,
    out: Tensor | None = None,
    clamp: bool = True,
) -> Tensor:
    """Frames (B, 3, 4T - 3, 8h, 8w) float32 of raw latents (B, z, T, h, w), clamped to [-1, 1] unless told not to.

    `chunk` latent frames are decoded at a time; more take more memory and give the same frames. They are written into
    `out`, which is allocated on the VAE's device unless given; it may be in main memory, or of another floating dtype.
    Raises ValueError for latents or an `out` of another shape.
    """
    channels = vae.config.latent_channels
    if raw.ndim != 5 or raw.shape[1] != channels or not raw.numel():
        raise ValueError(
            f"latents are {tuple(raw.shape)}; this VAE decodes (B, {channels}, T, h, w), T, h and w at least 1"
        )
    if chunk < 1:
        raise ValueError(f"chunk is {chunk} latent frames: expected at least 1")
    b, _, total, h, w = raw.shape
    shape = (b, 3, 4 * total - 3, 8 * h, 8 * w)
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=vae.conv2.weight.device)
    elif tuple(out.shape) != shape or not out.is_floating_point():
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}; these latents decode to floating point {shape}")
    state: State = {}
    with torch.inference_mode():
        for start in range(0, total, chunk):
            stop = min(start + chunk, total)
            frames = vae.reconstruct(raw[:, :, start:stop].to(vae.conv2.weight.device), state)
            end = 4 * stop - 3
            out[:, :, end - frames.shape[2] : end] = frames.clamp_(-1, 1) if clamp else frames
            if on_chunk is not None:
                on_chunk(stop, total)
    return out


def middle(channels: int) -> Chain:
    return Chain(ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels))


def head(in_channels: int, out_channels: int) -> Chain:
    return Chain(RMSNorm(in_channels, frames=True), nn.SiLU(), CausalConv3d(in_channels, out_channels, (3, 3, 3)))


def convolve(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """conv(x), through oneDNN for float32 on a CPU.

    PyTorch's own rule (aten/src/ATen/native/Convolution.cpp, use_mkldnn) counts batch * channels * frames * height and
    below 20480 takes a plain loop, which for the short chunks of a stream is 3 to 15 times slower.
    """
    plain = torch.compiler.is_compiling() or x.device.type != "cpu" or not torch.backends.mkldnn.is_available()
    if plain or x.dtype != torch.float32 or conv.weight.dtype != torch.float32 or isinstance(conv.padding, str):
        return nn.Conv3d.forward(conv, x)
    return torch.mkldnn_convolution(x, conv.weight, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups)


def convolve_wide(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """The 1x1x1 conv beside the latents in float32 or wider, whatever the weights or autocast say: raw latents reach
    +-10, where bfloat16 has steps of 1/16."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return F.conv3d(x.to(wide), conv.weight.to(wide), None if conv.bias is None else conv.bias.to(wide))


def fold_time(x: Tensor) -> tuple[Tensor, int]:
    """(B, C, t, H, W) -> (B t, C, H, W), and B.

    Reshapes rows, as the two functions below do: reshaping frames costs channels-last memory a copy, and where B t is 1
    it leaves strides that a convolution takes for channels first.
    """
    b, c, t, h, w = x.shape
    return x.permute(0, 2, 3, 4, 1).reshape(b * t, h, w, c).permute(0, 3, 1, 2), b


def unfold_time(x: Tensor, batch: int) -> Tensor:
    """(B t, C, H, W) -> (B, C, t, H, W)."""
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(batch, n // batch, h, w, c).permute(0, 4, 1, 2, 3)


def split_frames(x: Tensor) -> Tensor:
    """(B, 2C, t, H, W) -> (B, C, 2t, H, W): the halves of the channels are neighbours in time."""
    rows = x.permute(0, 2, 3, 4, 1).unflatten(4, (2, -1))  # (B, t, H, W, 2, C)
    return rows.permute(0, 1, 4, 2, 3, 5).flatten(1, 2).contiguous().permute(0, 4, 1, 2, 3)
