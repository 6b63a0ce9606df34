"""HunyuanVideo-1.5's causal video autoencoder: frames (B, 3, F, H, W) <-> raw latents (B, 32, T, H/16, W/16),
F = 4 (T - 1) + 1.

The network and its key names are those of Tencent-Hunyuan/HunyuanVideo-1.5, hyvideo/models/autoencoders. Sizes change
by moving pixels into channels and back, beside a shortcut that does the same without weights (DC-AE, arXiv:2410.10733).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from lightx2v.checkpoint import CheckpointError, Header, read_header
from lightx2v.kinds import in_words
from lightx2v.latents import HUNYUAN15
from lightx2v.vae.fused import convolve_causally, frame_kernels
from lightx2v.vae.layers import Everywhere, Head, Reach, RMSNorm, State, convolve, run
from lightx2v.vae.layouts import PREFIXES
from lightx2v.vae.stream import fill

NEEDED = "choose a HunyuanVideo-1.5 VAE (hunyuanvideo15_vae_fp16.safetensors, or Tencent's vae folder)"
LOOKS_BACK = 2  # frames that a convolution over three reads of the past


@dataclass(frozen=True)
class HunyuanVAEConfig:
    """Widths of the network, from full size to the latents': (128, 256, 512, 1024, 1024) are the published ones.

    The first two halvings are of height and width, the other two of time as well.
    """

    widths: tuple[int, int, int, int, int] = (128, 256, 512, 1024, 1024)
    latent_channels: int = 32

    def __post_init__(self) -> None:
        if self.widths[-1] % (2 * self.latent_channels):
            raise ValueError(
                f"the innermost width is {self.widths[-1]}: expected a multiple of {2 * self.latent_channels}"
            )


class EdgeConv3d(nn.Module):
    """A 3x3x3 convolution that sees the past only. Beyond the frame's edge, and before the clip, the last pixel and the
    first frame go on."""

    reach = Reach(1, 1)

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 3)

    def forward(
        self, x: Tensor, state: State | None = None, *, norm: RMSNorm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """residual + conv(x); with a norm, of silu(norm(x))."""
        past = None if state is None else state.get(self)
        if (kernels := frame_kernels(x, self.conv.weight)) is not None:
            gamma = None if norm is None else norm.gamma
            y, last = convolve_causally(kernels, self.conv, x, past, gamma=gamma, residual=residual, replicate=True)
        else:
            x = x if norm is None else F.silu(norm(x))
            x = torch.cat([x[:, :, :1]] * LOOKS_BACK + [x], 2) if past is None else torch.cat([past, x], 2)
            y = convolve(self.conv, F.pad(x, (1, 1, 1, 1, 0, 0), mode="replicate"))
            y = y if residual is None else residual + y
            last = x[:, :, -LOOKS_BACK:].clone()
        if state is not None:
            state[self] = last
        return y


class ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(channels, frames=True)
        self.conv1 = EdgeConv3d(channels, channels)
        self.norm2 = RMSNorm(channels, frames=True)
        self.conv2 = EdgeConv3d(channels, channels)

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        y = self.conv1(x, state, norm=self.norm1)
        return self.conv2(y, state, norm=self.norm2, residual=x)


class AttentionBlock(nn.Module):
    """Single-head attention over the positions of a frame and of all frames before it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, frames=True)
        self.q, self.k, self.v, self.proj_out = (nn.Conv3d(channels, channels, 1) for _ in range(4))
        self.everywhere = Everywhere()

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        """Keeps keys and values of all frames so far in `state`: at the latents' size, some 15 MB a latent frame of a
        720p clip in half precision."""
        t, h, w = x.shape[2:]
        normed = self.norm(x)
        q, k, v = (rearrange(conv(normed), "b c t h w -> b 1 t (h w) c") for conv in (self.q, self.k, self.v))
        kv = self.everywhere(torch.stack([k, v]))
        if state is not None:
            kv = torch.cat([state[self], kv], 3) if self in state else kv
            state[self] = kv
        known = kv.shape[3] - t
        frames = []
        for i in range(t):  # frame by frame in place of a mask: nothing is computed that would be thrown away
            seen = kv[:, :, :, : known + i + 1].flatten(3, 4)
            frames.append(F.scaled_dot_product_attention(q[:, :, i], seen[0], seen[1]))
        y = rearrange(torch.cat(frames, 2), "b 1 (t h w) c -> b c t h w", h=h, w=w)
        return x + self.proj_out(y)


def fold(x: Tensor, frames: int) -> Tensor:
    """(B, C, t * frames, 2h, 2w) -> (B, frames * 4 * C, t, h, w)"""
    return rearrange(x, "b c (t r) (h p) (w q) -> b (r p q c) t h w", r=frames, p=2, q=2)


def unfold(x: Tensor, frames: int) -> Tensor:
    """(B, frames * 4 * C, t, h, w) -> (B, C, t * frames, 2h, 2w)"""
    return rearrange(x, "b (r p q c) t h w -> b c (t r) (h p) (w q)", r=frames, p=2, q=2)


def averaged(x: Tensor, channels: int) -> Tensor:
    """Neighbouring channels averaged until there are `channels`."""
    return reduce(x, "b (c g) t h w -> b c t h w", "mean", c=channels)


def repeated(x: Tensor, channels: int) -> Tensor:
    """Each channel repeated until there are `channels`."""
    return x.repeat_interleave(channels // x.shape[1], 1)


class Downsample(nn.Module):
    """Halves height and width; with `time`, also the frames after the clip's first: 1 + 2n -> 1 + n, then 2n -> n."""

    def __init__(self, channels: int, out_channels: int, *, time: bool) -> None:
        super().__init__()
        self.time, self.out_channels = time, out_channels
        self.conv = EdgeConv3d(channels, out_channels // (8 if time else 4))

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        begins = state is None or self.conv not in state
        y, out = self.conv(x, state), self.out_channels
        if not self.time:
            return fold(y, 1) + averaged(fold(x, 1), out)
        if not begins:
            return fold(y, 2) + averaged(fold(x, 2), out)
        # The clip's first frame stays alone: it counts as both of the two that others come in.
        first = torch.cat([fold(y[:, :, :1], 1)] * 2, 1) + averaged(fold(x[:, :, :1], 1), out)
        if x.shape[2] == 1:
            return first
        return torch.cat([first, fold(y[:, :, 1:], 2) + averaged(fold(x[:, :, 1:], 2), out)], 2)


class Upsample(nn.Module):
    """Doubles height and width; with `time`, doubles every frame but the clip's first."""

    def __init__(self, channels: int, out_channels: int, *, time: bool) -> None:
        super().__init__()
        self.time, self.out_channels = time, out_channels
        self.conv = EdgeConv3d(channels, out_channels * (8 if time else 4))

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        begins = state is None or self.conv not in state
        y, out = self.conv(x, state), self.out_channels
        if not self.time:
            return unfold(y, 1) + repeated(unfold(x, 1), out)
        if not begins:
            return unfold(y, 2) + repeated(unfold(x, 2), out)
        # Of the two frames that the clip's first would become, the first is kept.
        first = unfold(y[:, :, :1], 1)[:, :out] + repeated(unfold(x[:, :, :1], 1), out)
        if x.shape[2] == 1:
            return first
        return torch.cat([first, unfold(y[:, :, 1:], 2) + repeated(unfold(x[:, :, 1:], 2), out)], 2)


class Stage(nn.Module):
    """Residual blocks of one width, then the change to the next."""

    def __init__(self, channels: int, blocks: int, change: tuple[str, nn.Module] | None) -> None:
        super().__init__()
        self.block = nn.ModuleList([ResidualBlock(channels) for _ in range(blocks)])
        if change is not None:
            self.add_module(*change)

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        for part in (*self.block, *(module for name, module in self.named_children() if name != "block")):
            x = part(x, state)
        return x


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResidualBlock(channels)

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x, state), state), state)


class Encoder(nn.Module):
    def __init__(self, config: HunyuanVAEConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = EdgeConv3d(3, widths[0])
        stages = [
            Stage(width, 2, ("downsample", Downsample(width, after, time=i >= 2)))
            for i, (width, after) in enumerate(pairwise(widths))
        ]
        self.down = nn.ModuleList([*stages, Stage(widths[-1], 2, None)])
        self.mid = Middle(widths[-1])
        self.norm_out = RMSNorm(widths[-1], frames=True)
        self.conv_out = EdgeConv3d(widths[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        """Frames -> mean and log-variance, (B, 2 z, T, h, w)."""
        x = self.conv_in(x, state)
        for stage in (*self.down, self.mid):
            x = stage(x, state)
        y = self.conv_out(x, state, norm=self.norm_out)
        return y + averaged(x, y.shape[1])


class Decoder(nn.Module):
    def __init__(self, config: HunyuanVAEConfig) -> None:
        super().__init__()
        widths = config.widths[::-1]
        self.conv_in = EdgeConv3d(config.latent_channels, widths[0])
        self.mid = Middle(widths[0])
        stages = [
            Stage(width, 3, ("upsample", Upsample(width, after, time=i < 2)))
            for i, (width, after) in enumerate(pairwise(widths))
        ]
        self.up = nn.ModuleList([*stages, Stage(widths[-1], 3, None)])
        self.norm_out = RMSNorm(widths[-1], frames=True)
        self.conv_out = EdgeConv3d(widths[-1], 3)

    def forward(self, raw: Tensor, state: State | None = None) -> Tensor:
        x = self.conv_in(raw, state)
        x = x + repeated(raw, x.shape[1])
        last = Head(self.norm_out, nn.SiLU(), self.conv_out)
        return run([self.mid, *self.up, last], x, state)


class HunyuanVAE(nn.Module):
    """The network, with the key names of the original checkpoint.

    `posterior` and `reconstruct` are differentiable and take a whole clip (state None) or a chunk of one.
    """

    space = HUNYUAN15
    first_chunk = 1

    def __init__(self, config: HunyuanVAEConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or HunyuanVAEConfig()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def at_once(self, height: int, width: int) -> int:
        return 1

    def posterior(self, frames: Tensor, state: State | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of raw latents, each (B, 32, T, H/16, W/16), of frames (B, 3, F, H, W) in [-1, 1].

        F is 4n + 1 for a whole clip or its first chunk, 4n for a later chunk.
        """
        mean, log_variance = self.encoder(_rows(frames), state).chunk(2, 1)
        return mean, log_variance

    def to_latents(self, frames: Tensor, state: State | None = None) -> Tensor:
        """The mean of `posterior`."""
        return self.posterior(frames, state)[0]

    def reconstruct(self, raw: Tensor, state: State | None = None) -> Tensor:
        """Frames (B, 3, F, H, W), not clamped to [-1, 1], of raw latents (B, 32, T, h, w).

        F is 4T - 3 for a whole clip or its first chunk, 4T for a later chunk.
        """
        return self.decoder(_rows(raw.to(self.decoder.conv_in.conv.weight.dtype)), state)


def _rows(x: Tensor) -> Tensor:
    """In the memory order that the norms, the attention and a GPU's convolutions work in."""
    return x.contiguous(memory_format=torch.channels_last_3d)


NAMES = (
    (r"\b(down|up)_blocks\.(\d+)\.resnets\b", r"\1.\2.block"),
    (r"\b(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\b", r"\1.\2.\3sample"),
    (r"\bmid_block\.resnets\.0\b", "mid.block_1"),
    (r"\bmid_block\.resnets\.1\b", "mid.block_2"),
    (r"\bmid_block\.attentions\.0\.to_([qkv])\b", r"mid.attn_1.\1"),
    (r"\bmid_block\.attentions\.0\b", "mid.attn_1"),
)


def from_diffusers(name: str) -> str:
    """The original name of a tensor of diffusers' AutoencoderKLHunyuanVideo15; other names are returned as they are."""
    for pattern, own in NAMES:
        name = re.sub(pattern, own, name)
    return name


def is_hunyuan15(header: Header) -> bool:
    """Whether a header is of this VAE, in the original or diffusers' layout."""
    shapes = (header.shape("decoder.conv_in.conv.weight"), header.shape("encoder.conv_in.conv.weight"))
    gamma = header.shape("encoder.norm_out.gamma")
    return (
        gamma is not None
        and all(shape is not None and len(shape) == 5 for shape in shapes)
        and ((shapes[0] or (0, 0))[1] == HUNYUAN15.channels)
    )


def config_from_header(header: Header) -> HunyuanVAEConfig:
    """The widths of a checkpoint in the original or the diffusers layout.

    Raises CheckpointError, which says what the file is, for anything else.
    """
    header = header.without_prefix(*PREFIXES).renamed_by(from_diffusers)
    widths = [header.shape(f"encoder.down.{i}.block.0.conv1.conv.weight") for i in range(5)]
    if not is_hunyuan15(header) or None in widths:
        raise CheckpointError(f"{header.path}: this is {in_words(header)}, not the HunyuanVideo-1.5 VAE; {NEEDED}")
    a, b, c, d, e = (width[0] for width in widths if width)
    return HunyuanVAEConfig((a, b, c, d, e))


def load(path: str | Path, *, dtype: torch.dtype, device: torch.device | str) -> HunyuanVAE:
    """Read a HunyuanVideo-1.5 VAE of any width: a .safetensors or .pth file, original or diffusers key names.

    Raises CheckpointError when the file is damaged or another kind of model.
    """
    header = read_header(path).without_prefix(*PREFIXES)
    config = config_from_header(header)
    with torch.device("meta"):
        vae = HunyuanVAE(config)
    return fill(vae, header, rename=from_diffusers, dtype=dtype, device=device)
