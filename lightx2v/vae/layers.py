"""Layers of Wan's causal video autoencoders, 2.1 and 2.2.

Every layer works on a chunk of any number of frames. What a layer must remember of earlier chunks travels in a `State`
that the caller owns: None means "this chunk is the whole clip" (training), an empty dict "this chunk starts a clip",
and the dict that a call has filled continues it. Both ways compute the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightx2v.vae.fused import convolve_causally, frame_kernels

AT_ONCE = 2  # frames: as many as a convolution over three looks back on

State = dict[nn.Module, Tensor]
"""Frames (B, C, 1 or 2, h, w) that a layer needs again with the next chunk, keyed by the layer.
Tensors are replaced, never written to, so a shallow copy of the dict is a snapshot."""


@dataclass(frozen=True)
class Reach:
    """Rows beside its own that a layer reads, `above` and `below`, and how many rows it makes of one.

    A layer that states its `reach` may be given some rows of a picture instead of all: lightx2v/parallel/frames.py.
    """

    above: int
    below: int
    scale: float = 1


class Everywhere(nn.Module):
    """Keys and values (..., positions, C) as they are: a place where those of a picture's other rows can be joined."""

    def forward(self, x: Tensor) -> Tensor:
        return x


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

    @property
    def reach(self) -> Reach:
        return Reach(self.kernel_size[1] // 2, self.kernel_size[1] // 2)

    def forward(
        self, x: Tensor, state: State | None = None, *, norm: RMSNorm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """residual + conv(x); with a norm, of silu(norm(x))."""
        past = None if state is None else state.get(self)
        kernels = frame_kernels(x, self.weight)
        if kernels is not None and self.kernel_size != (1, 1, 1):
            gamma = None if norm is None else norm.gamma
            y, last = convolve_causally(kernels, self, x, past, gamma=gamma, residual=residual)
            if state is not None:
                state[self] = last
            return y
        y = self.convolve_next(x if norm is None else F.silu(norm(x)), past, state)
        return y if residual is None else residual + y

    def convolve_next(self, x: Tensor, past: Tensor | None, state: State | None) -> Tensor:
        lead = self.kernel_size[0] - 1
        if not lead:
            return convolve(self, x)
        x = F.pad(x, (0, 0, 0, 0, lead, 0)) if past is None else torch.cat([past, x], 2)
        if state is not None:
            state[self] = x[:, :, -lead:].clone()
        return convolve(self, x)


class Chain(nn.Sequential):
    """A Sequential that hands the state to those of its layers that use one."""

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        for layer in self:
            x = advance(layer, x, state)
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
        norm1, _, conv1, norm2, _, _, conv2 = self.residual
        y = conv1(x, state, norm=norm1)
        return conv2(y, state, norm=norm2, residual=self.shortcut(x))


class Head(nn.Sequential):
    """Norm, SiLU and a convolution."""

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        norm, _, conv = self
        y: Tensor = conv(x, state, norm=norm)
        return y


class AttentionBlock(nn.Module):
    """Single-head attention over the positions of each frame by itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, frames=False)
        self.to_qkv = nn.Conv2d(channels, channels * 3, 1)
        self.proj = nn.Conv2d(channels, channels, 1)
        self.everywhere = Everywhere()

    def forward(self, x: Tensor) -> Tensor:
        frames, batch = fold_time(x)
        n, c, h, w = frames.shape
        # (n, 3c, h, w) -> (n, 1, h w, 3c) -> three times (n, 1, h w, c)
        q, kv = self.to_qkv(self.norm(frames)).reshape(n, 1, 3 * c, h * w).transpose(2, 3).split((c, 2 * c), -1)
        k, v = self.everywhere(kv).chunk(2, -1)
        y = F.scaled_dot_product_attention(q, k, v)
        y = self.proj(y.reshape(n, h, w, c).permute(0, 3, 1, 2))
        return x + unfold_time(y, batch)


class Upsample(nn.Module):
    """Doubles height and width; with `time`, doubles every frame but the clip's first."""

    reach = Reach(1, 1, scale=2)

    def __init__(self, channels: int, out_channels: int, *, time: bool) -> None:
        super().__init__()
        # The interpolation has no weights: Identity holds the place of key 0.
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.time_conv = CausalConv3d(channels, channels * 2, (3, 1, 1)) if time else None

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        if self.time_conv is not None:
            x = self.double_frames(x, self.time_conv, state)
        conv = self.resample[1]
        assert isinstance(conv, nn.Conv2d) and conv.bias is not None
        if (kernels := frame_kernels(x, conv.weight)) is not None:
            return kernels.doubled_conv(x, conv.weight, conv.bias)
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

    reach = Reach(0, 1, scale=0.5)

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


STATELESS = (nn.Identity, nn.SiLU, RMSNorm, AttentionBlock)


def advance(layer: nn.Module, x: Tensor, state: State | None) -> Tensor:
    """layer(x), which continues what `state` remembers if the layer looks back in time."""
    return layer(x) if isinstance(layer, STATELESS) else layer(x, state)


def run(stages: Sequence[nn.Module], x: Tensor, state: State | None) -> Tensor:
    """x through all stages in a row, where it has many frames `AT_ONCE` of them all the way.

    The stages may double frames but not halve them. To a causal network that makes no difference; it takes the less
    memory the larger its frames become, and what a convolution needs again is what it was just given.
    """
    for index, stage in enumerate(stages):
        if state is not None and x.shape[2] > AT_ONCE:
            return torch.cat([run(stages[index:], part, state) for part in x.split(AT_ONCE, 2)], 2)
        x = advance(stage, x, state)
    return x


class Encoder(nn.Module):
    """widths: channels of frames, at the start and the end of `downsamples`, and of what comes out."""

    def __init__(self, widths: tuple[int, int, int, int], downsamples: Chain) -> None:
        super().__init__()
        frames, first, last, out = widths
        self.conv1 = CausalConv3d(frames, first, (3, 3, 3))
        self.downsamples = downsamples
        self.middle = middle(last)
        self.head = head(last, out)

    def stages(self) -> list[nn.Module]:
        """What frames go through, in order."""
        return [self.conv1, *self.downsamples, *self.middle, self.head]

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        stages = self.stages()
        large = next(index for index, stage in enumerate(stages) if halves_frames(stage))
        x = run(stages[:large], x, state)
        for stage in stages[large:]:
            x = advance(stage, x, state)
        return x


def halves_frames(stage: nn.Module) -> bool:
    return any(isinstance(layer, Downsample) and layer.time_conv is not None for layer in stage.modules())


class Decoder(nn.Module):
    """widths: channels of latents, at the start and the end of `upsamples`, and of what comes out."""

    def __init__(self, widths: tuple[int, int, int, int], upsamples: Chain) -> None:
        super().__init__()
        latents, first, last, out = widths
        self.conv1 = CausalConv3d(latents, first, (3, 3, 3))
        self.middle = middle(first)
        self.upsamples = upsamples
        self.head = head(last, out)

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        return run([self.conv1, *self.middle, *self.upsamples, self.head], x, state)


def middle(channels: int) -> Chain:
    return Chain(ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels))


def head(in_channels: int, out_channels: int) -> Head:
    return Head(RMSNorm(in_channels, frames=True), nn.SiLU(), CausalConv3d(in_channels, out_channels, (3, 3, 3)))


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
