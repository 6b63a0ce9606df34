"""The HunyuanVideo-1.5 diffusion transformer (8.3 B parameters), with the parameter names of the original checkpoints.

Video and text are two streams with weights of their own that attend to each other in every block. Between blocks they
lie in one tensor, the video first, so that whoever wraps the walk sees tokens like any other family's.

Precision: tokens and matmuls run in the dtype of the weights; the timestep path in float32, and so do modulation,
norms, RoPE and the residual additions inside the kernels.
Source of the structure: Tencent-Hunyuan/HunyuanVideo-1.5, hyvideo/models/transformers/hunyuanvideo_1_5_transformer.py.
"""

from dataclasses import dataclass, replace
from math import prod

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lightx2v.blocks import RunBlocks, run_blocks
from lightx2v.kept import Keep, anew
from lightx2v.models.hunyuan_video_15.config import HEAD_DIM, ROPE_CHANNELS, ROPE_THETA, HunyuanConfig
from lightx2v.models.hunyuan_video_15.text import (
    Embedder,
    FeedForward,
    GlyphMapper,
    ImageProjector,
    Sequences,
    TextRefiner,
    attend,
    packed,
)
from lightx2v.parallel.cut import Cut, Stream
from lightx2v.quant.feeding import agreed, gelu_between, modulate, residual_modulate
from lightx2v.tokens import RMSNorm, rope_table
from lightx2v_kernels import Kernels

TEXT, GLYPHS, IMAGE = range(3)  # rows of cond_type_embedding


@dataclass(frozen=True)
class Conditioning:
    """What is asked of the video, as the encoders give it. Masks are (B, S), true where a token counts; None: all do.

    text: (B, S, text_dim) of the language model. glyphs: (B, S', glyph_dim) of byT5, None where nothing is quoted.
    image: (B, S'', image_dim) of the image encoder, None without an image.
    """

    text: Tensor
    text_mask: Tensor | None = None
    glyphs: Tensor | None = None
    glyphs_mask: Tensor | None = None
    image: Tensor | None = None


@dataclass(frozen=True)
class BlockArgs:
    """What every block of one forward pass reads."""

    time: Tensor  # (B, D) float32, after SiLU
    video: int  # how many of the tokens are the video's; those behind are the text's
    rope: tuple[Tensor, Tensor]  # cos and sin of the video's tokens, each (video, head_dim / 2) float32
    lengths: tuple[int, ...] | None  # of video and text together, of each sample; None: none is padded

    def streams(self, tokens: int) -> tuple[Stream, ...]:
        """How so many tokens may be shared out: a part of the video's and a part of the text's."""
        text = None if self.lengths is None else tuple(length - self.video for length in self.lengths)
        return Stream(1, self.video), Stream(1, tokens - self.video, text)

    def cut(self, cut: Cut) -> "BlockArgs":
        """The same for that part of the tokens; which of them count, the attention over all parts knows."""
        cos, sin = (cut.of(table, 0) for table in self.rope)
        return replace(self, video=cut.size(self.video), rope=(cos, sin), lengths=None)


class Modulation(nn.Module):
    """time (B, D) -> (6, B, 1, D) float32: shift, scale, gate of attention, then of the feed-forward."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, 6 * size)

    def forward(self, time: Tensor, dtype: torch.dtype) -> Tensor:
        return rearrange(self.linear(time.to(dtype)).float(), "b (six d) -> six b 1 d", six=6)


class DoubleBlock(nn.Module):
    """One block of both streams. The names are flat because those of the checkpoints are."""

    def __init__(self, config: HunyuanConfig, kernels: Kernels) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_heads
        self.eps = config.eps
        self._kernels = kernels
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_mod", Modulation(size))
            for part in ("q", "k", "v", "proj"):
                self.add_module(f"{stream}_attn_{part}", nn.Linear(size, size))
            for part in ("q", "k"):
                self.add_module(f"{stream}_attn_{part}_norm", RMSNorm(HEAD_DIM, config.eps, kernels))
            self.add_module(f"{stream}_mlp", FeedForward(size, config.ffn_size, nn.GELU(approximate="tanh")))

    def _part(self, stream: str, name: str) -> nn.Module:
        return self.get_submodule(f"{stream}_{name}")

    def _qkv(self, stream: str, x: Tensor, change: Tensor, rope: tuple[Tensor, Tensor] | None) -> list[Tensor]:
        """q, k and v, each (B, L, H, D), of tokens (B, L, D) under shift and scale `change` (6, B, 1, D).

        rope: of tokens that have a place; None: only normed.
        """
        projections = [self._part(stream, f"attn_{part}") for part in "qkv"]
        tokens = modulate(self._kernels, agreed(*projections), x, change[0], change[1], self.eps)
        q, k, v = (projection(tokens) for projection in projections)
        return [self._normed(stream, "q", q, rope), self._normed(stream, "k", k, rope), self._heads(v)]

    def _normed(self, stream: str, part: str, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        norm = self._part(stream, f"attn_{part}_norm")
        if rope is None:
            return norm(self._heads(x))
        return self._kernels.norm_rope(x, norm.get_parameter("weight"), *rope, self.eps)

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b l (h d) -> b l h d", h=self.num_heads)

    def _finish(self, stream: str, x: Tensor, heads: Tensor, change: Tensor) -> Tensor:
        """The stream's tokens after what attention gave them, heads (B, L, H, D), and after the feed-forward."""
        attended = self._part(stream, "attn_proj")(rearrange(heads, "b l h d -> b l (h d)"))
        mlp, fc1, fc2 = (self._part(stream, part) for part in ("mlp", "mlp.fc1", "mlp.fc2"))
        x, modulated = residual_modulate(
            self._kernels, agreed(fc1), x, attended, change[2], change[3], change[4], self.eps
        )
        return self._kernels.gated_residual(x, gelu_between(self._kernels, mlp, fc1, fc2, modulated), change[5])

    def forward(self, x: Tensor, args: BlockArgs) -> Tensor:
        """x (B, L, D), the video's tokens and then the text's -> (B, L, D)"""
        video, text = x[:, : args.video], x[:, args.video :]
        changes = {stream: self._part(stream, "mod")(args.time, x.dtype) for stream in ("img", "txt")}
        of_video = self._qkv("img", video, changes["img"], args.rope)
        of_text = self._qkv("txt", text, changes["txt"], None)
        both = [torch.cat(pair, 1) for pair in zip(of_video, of_text, strict=True)]
        y = attend(self._kernels.attention, both[0], both[1], both[2], args.lengths)
        video = self._finish("img", video, y[:, : args.video], changes["img"])
        return torch.cat([video, self._finish("txt", text, y[:, args.video :], changes["txt"])], 1)


class PatchEmbedding(nn.Module):
    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel_size=patch, stride=patch)

    def forward(self, latents: Tensor) -> Tensor:
        return self.proj(latents)


class Head(nn.Module):
    def __init__(self, config: HunyuanConfig, kernels: Kernels) -> None:
        super().__init__()
        size = config.hidden_size
        self.linear = nn.Linear(size, config.out_channels * prod(config.patch_size))
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(size, 2 * size))  # SiLU came with `time`
        self.eps = config.eps
        self._modulate = kernels.modulate

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B, L, D), time (B, D) float32, after SiLU -> (B, L, out_channels * patch volume)"""
        shift, scale = self.adaLN_modulation(time.to(x.dtype)).float()[:, None].chunk(2, -1)
        return self.linear(self._modulate(x, shift, scale, self.eps))


class HunyuanTransformer(nn.Module):
    """Velocity of the flow, from noisy latents, those of given frames, a timestep and what is asked."""

    def __init__(self, config: HunyuanConfig, kernels: Kernels) -> None:
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.kernels = kernels
        self.img_in = PatchEmbedding(config)
        self.time_in = Embedder(config.freq_dim, size)
        if config.reads_step_end:
            self.time_r_in = Embedder(config.freq_dim, size)
        self.txt_in = TextRefiner(config, kernels)
        self.byt5_in = GlyphMapper(config, kernels)
        self.vision_in = ImageProjector(config, kernels)
        self.cond_type_embedding = nn.Embedding(3, size)
        self.double_blocks = nn.ModuleList([DoubleBlock(config, kernels) for _ in range(config.num_layers)])
        self.final_layer = Head(config, kernels)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        context: Conditioning,
        run: RunBlocks = run_blocks,
        *,
        image: Tensor | None = None,
        step_end: Tensor | None = None,
        keep: Keep = anew,
    ) -> Tensor:
        """latents (B, C, T, H, W) model space -> velocity (B, out_channels, T, H, W), in the weights' dtype.

        timestep: (B,) in [0, 1000]. step_end: (B,), the timestep that the step goes to, for step-distilled models.
        image: (B, C', T, H, W) further input channels, C + C' = in_channels: latents of the given frames, then the mask
        (1 where given); all zeros for text-to-video. T, H, W must be multiples of the patch.
        keep: of passes with the same context, whose glyphs and image are then embedded once.
        """
        config, dtype = self.config, self.img_in.proj.weight.dtype
        if image is not None:
            latents = torch.cat([latents, image.to(latents)], dim=1)
        self._check(latents, step_end)
        tokens = self.img_in(latents.to(dtype))
        grid = (tokens.shape[2], tokens.shape[3], tokens.shape[4])
        time = self.time_in(timestep).float()
        if step_end is not None:
            time = time + self.time_r_in(step_end).float()
        time = F.silu(time)
        asked = self._asked(context, timestep, dtype, keep)
        video = prod(grid)
        args = BlockArgs(
            time=time,
            video=video,
            rope=rope_table(grid, ROPE_CHANNELS, ROPE_THETA, latents.device),
            lengths=None if asked.lengths is None else tuple(video + length for length in asked.lengths),
        )
        tokens = torch.cat([rearrange(tokens, "b d t h w -> b (t h w) d"), asked.tokens], 1)
        tokens = run(list(self.double_blocks), tokens, args)
        patches = self.final_layer(tokens[:, :video], time)
        (t, h, w), (pt, ph, pw) = grid, config.patch_size
        return rearrange(
            patches, "b (t h w) (c pt ph pw) -> b c (t pt) (h ph) (w pw)", t=t, h=h, w=w, pt=pt, ph=ph, pw=pw
        )

    def _asked(self, given: Conditioning, timestep: Tensor, dtype: torch.dtype, keep: Keep) -> Sequences:
        """Image, glyphs and text, each marked for what it is: only tokens that count, in this order."""
        kinds = self.cond_type_embedding.weight.to(dtype)
        text = keep(self.txt_in, lambda: packed([(given.text.to(dtype), given.text_mask)]))
        refined = self.txt_in(text, timestep) + kinds[TEXT]
        parts: list[tuple[Tensor, Tensor | None]] = []
        if (image := given.image) is not None:
            parts.append((keep(self.vision_in, lambda: self.vision_in(image.to(dtype)) + kinds[IMAGE]), None))
        if (glyphs := given.glyphs) is not None:
            embedded = keep(self.byt5_in, lambda: self.byt5_in(glyphs.to(dtype)) + kinds[GLYPHS])
            parts.append((embedded, given.glyphs_mask))
        return packed([*parts, (refined, _valid(text))])

    def _check(self, latents: Tensor, step_end: Tensor | None) -> None:
        config, (channels, *sizes) = self.config, latents.shape[1:]
        if any(size % patch for size, patch in zip(sizes, config.patch_size, strict=True)):
            raise ValueError(f"latents {tuple(sizes)} are not multiples of the patch {config.patch_size}")
        if channels != config.in_channels:
            raise ValueError(f"{channels} input channels given, the model reads {config.in_channels}")
        if (step_end is not None) != config.reads_step_end:
            reads = "reads the timestep that a step goes to" if config.reads_step_end else "reads one timestep a step"
            raise ValueError(f"this model {reads}: step_end must {'' if config.reads_step_end else 'not '}be given")


def _valid(sequences: Sequences) -> Tensor | None:
    """(B, S), true where a token is no padding; None where none is."""
    if sequences.lengths is None:
        return None
    device = sequences.tokens.device
    places = torch.arange(sequences.tokens.shape[1], device=device)
    return places[None] < torch.tensor(sequences.lengths, device=device)[:, None]
