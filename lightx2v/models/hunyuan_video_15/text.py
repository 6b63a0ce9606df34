"""What a HunyuanVideo-1.5 transformer reads beside the video: prompt, glyphs and image, brought to its own width."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lightx2v.models.hunyuan_video_15.config import HunyuanConfig
from lightx2v.tokens import AffineNorm, image_projector
from lightx2v_kernels import AttentionFn, Kernels


@dataclass(frozen=True)
class Sequences:
    """Token sequences of a batch, each as long as it is: rows behind `lengths[i]` of sample i are padding, zeros.

    tokens: (B, S, D). lengths: of each sample, or None where all of them are S long.
    """

    tokens: Tensor
    lengths: tuple[int, ...] | None = None


def packed(parts: Sequence[tuple[Tensor, Tensor | None]]) -> Sequences:
    """The valid tokens of several parts, in the order given, without a gap.

    parts: tokens (B, S_i, D) and which of them are valid, (B, S_i) bool or 0 and 1; None for all.
    Reads the masks back from their device, once; parts without masks cost nothing.
    """
    if all(valid is None for _, valid in parts):
        return Sequences(torch.cat([tokens for tokens, _ in parts], 1))
    masks = [tokens.new_ones(tokens.shape[:2]).bool() if valid is None else valid.bool() for tokens, valid in parts]
    everything, mask = torch.cat([tokens for tokens, _ in parts], 1), torch.cat(masks, 1)
    lengths = tuple(mask.sum(1).tolist())
    kept = everything.new_zeros(len(lengths), max(lengths), everything.shape[2])
    for row, (length, sample, valid) in enumerate(zip(lengths, everything, mask, strict=True)):
        kept[row, :length] = sample[valid]
    return Sequences(kept, None if min(lengths) == max(lengths) else lengths)


def attend(attention: AttentionFn, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...] | None) -> Tensor:
    """Attention of (B, L, H, D) where sample i is `lengths[i]` tokens long; behind them the result is zeros.

    Sample by sample where the lengths differ: kernels have no masks, and padding would be computed for nothing.
    """
    if lengths is None:
        return attention(q, k, v)
    y = torch.zeros_like(q)
    for i, length in enumerate(lengths):
        own = slice(i, i + 1), slice(0, length)
        y[own] = attention(q[own], k[own], v[own])
    return y


def sinusoidal(timestep: Tensor, channels: int) -> Tensor:
    """timestep (B,) in [0, 1000] -> (B, channels) float32: cosines, then sines, of geometric frequencies.

    In float32, as all that run this model compute them (diffusers models/embeddings.py, get_timestep_embedding; ComfyUI
    comfy/ldm/flux/layers.py, timestep_embedding). In float64, as Wan does, angles at timestep 1000 are up to 3e-5 off.
    """
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float32, device=timestep.device)
    angle = timestep.float()[:, None] * torch.exp(-math.log(10000) * steps / half)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Embedder(nn.Module):
    """timesteps (B,) in [0, 1000] -> (B, D), in the dtype of the weights."""

    def __init__(self, freq_dim: int, size: int) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.mlp = nn.Sequential(nn.Linear(freq_dim, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, timestep: Tensor) -> Tensor:
        return self.mlp(sinusoidal(timestep, self.freq_dim).to(self.mlp.get_parameter("0.bias").dtype))


class TextSummary(nn.Module):
    """The mean of a prompt's tokens (B, text_dim) -> (B, D)."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(config.text_dim, config.hidden_size)
        self.linear_2 = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, mean: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(mean)))


class FeedForward(nn.Module):
    def __init__(self, size: int, inner: int, activation: nn.Module) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size, inner)
        self.act = activation
        self.fc2 = nn.Linear(inner, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class RefinerBlock(nn.Module):
    """Self-attention among the prompt's tokens; `summary` (timestep and mean of the prompt) gates both halves."""

    def __init__(self, config: HunyuanConfig, kernels: Kernels) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_heads
        self.norm1 = AffineNorm(size, config.eps, kernels)
        self.self_attn_qkv = nn.Linear(size, 3 * size)
        self.self_attn_proj = nn.Linear(size, size)
        self.norm2 = AffineNorm(size, config.eps, kernels)
        self.mlp = FeedForward(size, config.refiner_ffn_size, nn.SiLU())
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(size, 2 * size))
        self._kernels = kernels

    def forward(self, x: Tensor, summary: Tensor, lengths: tuple[int, ...] | None) -> Tensor:
        """x (B, S, D), summary (B, D) -> (B, S, D)"""
        gate, ffn_gate = self.adaLN_modulation(summary.to(x.dtype)).float()[:, None].chunk(2, -1)
        qkv = rearrange(
            self.self_attn_qkv(self.norm1(x)), "b s (three h d) -> three b s h d", three=3, h=self.num_heads
        )
        y = attend(self._kernels.cross_attention, qkv[0], qkv[1], qkv[2], lengths)
        add = self._kernels.gated_residual
        x = add(x, self.self_attn_proj(rearrange(y, "b s h d -> b s (h d)")), gate)
        return add(x, self.mlp(self.norm2(x)), ffn_gate)


class Refiner(nn.Module):
    """The list of blocks, which has this name in the checkpoints."""

    def __init__(self, config: HunyuanConfig, kernels: Kernels) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([RefinerBlock(config, kernels) for _ in range(config.refiner_layers)])


class TextRefiner(nn.Module):
    """The language model's tokens, mixed among themselves before they meet the video."""

    def __init__(self, config: HunyuanConfig, kernels: Kernels) -> None:
        super().__init__()
        self.input_embedder = nn.Linear(config.text_dim, config.hidden_size)
        self.t_embedder = Embedder(config.freq_dim, config.hidden_size)
        self.c_embedder = TextSummary(config)
        self.individual_token_refiner = Refiner(config, kernels)

    def forward(self, text: Sequences, timestep: Tensor) -> Tensor:
        """text (B, S, text_dim) with zeros for padding, timestep (B,) -> (B, S, D)"""
        given, lengths = text.tokens, text.lengths
        counts = [given.shape[1]] * len(given) if lengths is None else lengths
        if not all(counts):
            raise ValueError("a prompt has no tokens: its mask is all zero; give at least the template's tokens")
        # A sum over a thousand tokens overflows float16.
        mean = given.float().sum(1) / torch.tensor(counts, dtype=torch.float32, device=given.device)[:, None]
        summary = self.t_embedder(timestep).float() + self.c_embedder(mean.to(given.dtype)).float()
        x = self.input_embedder(given)
        for block in self.individual_token_refiner.blocks:
            x = block(x, summary, lengths)
        return x


class GlyphMapper(nn.Module):
    """byT5's tokens of quoted text (B, S, glyph_dim) -> (B, S, D)."""

    def __init__(self, config: HunyuanConfig, kernels: Kernels) -> None:
        super().__init__()
        self.layernorm = AffineNorm(config.glyph_dim, 1e-5, kernels)
        self.fc1 = nn.Linear(config.glyph_dim, config.glyph_size)
        self.fc2 = nn.Linear(config.glyph_size, config.glyph_size)
        self.fc3 = nn.Linear(config.glyph_size, config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(self.layernorm(tokens))))))


class ImageProjector(nn.Module):
    """The image encoder's tokens (B, S, image_dim) -> (B, S, D)."""

    def __init__(self, config: HunyuanConfig, kernels: Kernels) -> None:
        super().__init__()
        self.proj = image_projector(config.image_dim, config.hidden_size, kernels)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.proj(tokens)
