"""The Wan diffusion transformer (arXiv:2503.20314), with the parameter names of the original checkpoints.

Precision: tokens and matmuls run in the dtype of the weights; the timestep path, modulation, norms, RoPE and the
residual additions compute in float32 (as in Wan2.1 wan/modules/model.py under its autocast rules).
"""

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor, nn

from lightx2v.blocks import RunBlocks, run_blocks
from lightx2v.kept import Keep, anew
from lightx2v.models.wan.config import WanConfig
from lightx2v.parallel.cut import Cut, Stream
from lightx2v.quant.feeding import (
    Reads,
    Tokens,
    agreed,
    gelu_between,
    in_pieces,
    modulate,
    residual_layer_norm,
    residual_modulate,
    shaped_as,
)
from lightx2v.tokens import AffineNorm, RMSNorm, image_projector, patch_tokens, rope_table, sinusoidal
from lightx2v_kernels import Kernels

Read = tuple[tuple[Tensor, Tensor], ...]  # keys and values, each (B, S, H, D): of the text, of an image


@dataclass(frozen=True)
class BlockArgs:
    """What every block of one forward pass reads."""

    modulation: Tensor  # (B, G, 6, D) float32: shift, scale, gate of attention, then of the feed-forward
    context: Tensor  # (B, S, D) text tokens
    rope: tuple[Tensor, Tensor]  # cos and sin, each (L, head_dim / 2) float32
    image: Tensor | None = None  # (B, I, D) image tokens
    keep: Keep = anew  # keys and values of both

    def streams(self, tokens: int) -> tuple[Stream, ...]:
        """How so many tokens may be shared out: of every run with its own modulation a part."""
        runs = self.modulation.shape[1]
        return (Stream(runs, tokens // runs),)

    def cut(self, cut: Cut) -> "BlockArgs":
        """The same for that part of the tokens."""
        cos, sin = (cut.of(table, 0, self.modulation.shape[1]) for table in self.rope)
        return replace(self, rope=(cos, sin))


def rope_channels(head_dim: int) -> tuple[int, int, int]:
    """A head's channels that carry T, H and W: 44, 42, 42 of 128. Source: Wan2.1 wan/modules/model.py."""
    sixth = head_dim // 6
    return head_dim - 4 * sixth, 2 * sixth, 2 * sixth


class Attention(nn.Module):
    """Multi-head attention with RMS-normed q and k: to a context, or of tokens to each other (`project`, `attend`).

    reads_image: the same queries attend to image tokens apart from the text, and both results are added.
    """

    def __init__(self, config: WanConfig, kernels: Kernels, reads_image: bool = False) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_heads
        self.q = nn.Linear(size, size)
        self.k = nn.Linear(size, size)
        self.v = nn.Linear(size, size)
        self.o = nn.Linear(size, size)
        self.norm_q = RMSNorm(size, config.eps, kernels)
        self.norm_k = RMSNorm(size, config.eps, kernels)
        if reads_image:
            self.k_img = nn.Linear(size, size)
            self.v_img = nn.Linear(size, size)
            self.norm_k_img = RMSNorm(size, config.eps, kernels)
        self._kernels = kernels

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b l (h d) -> b l h d", h=self.num_heads)

    def project(self, x: Tokens) -> list[Tensor]:
        """x (B, L, D) -> q, k (B, L, D) and v (B, L, H, D), for `attend`."""
        return [self.q(x), self.k(x), self._heads(self.v(x))]

    def attend(self, projected: list[Tensor], rope: tuple[Tensor, Tensor]) -> Tensor:
        """Self-attention -> (B, L, D). projected: from `project`, taken out of the list, so that nothing but the kernel
        holds q and k any longer: they need not outlive being turned."""
        (cos, sin), take, q_norm, k_norm = rope, projected.pop, self.norm_q, self.norm_k
        # no `*`: a tuple of arguments would hold them
        y = self._kernels.rotary_attention(
            take(0), take(0), take(0), q_norm.weight, k_norm.weight, cos, sin, q_norm.eps
        )
        return self.o(rearrange(y, "b l h d -> b l (h d)"))

    def read(self, context: Tensor, image: Tensor | None = None) -> Read:
        """Keys and values for cross-attention. context (B, S, D), image (B, I, D) or None."""
        text = self._heads(self.norm_k(self.k(context))), self._heads(self.v(context))
        if image is None:
            return (text,)
        return text, (self._heads(self.norm_k_img(self.k_img(image))), self._heads(self.v_img(image)))

    def forward(self, x: Tokens, read: Read) -> Tensor:
        """Cross-attention: x (B, L, D) to what was read -> (B, L, D)."""
        q = self._heads(self.norm_q(self.q(x)))
        text, *image = read
        y = self._kernels.cross_attention(q, *text)
        for each in image:
            y = y + self._kernels.cross_attention(q, *each)
        del q
        return self.o(rearrange(y, "b l h d -> b l (h d)"))


class Unadded:
    """x + y * gate before it is added; x and y (B, L, D), gate (B, G, D) float32, one for each of G runs of tokens.

    The next block adds it in the pass that norms and modulates the sum, which is one reading of all tokens less. It
    takes it out, so that nobody who passed it on holds x and y any longer.
    """

    def __init__(self, x: Tensor, y: Tensor, gate: Tensor, kernels: Kernels) -> None:
        self._parts = [(x, y, gate)]
        self._kernels = kernels

    def take(self) -> tuple[Tensor, Tensor, Tensor]:
        """x, y and gate, once."""
        return self._parts.pop()

    def added(self) -> Tensor:
        """The sum (B, L, D), which leaves it as it is."""
        ((x, y, gate),) = self._parts
        return self._kernels.gated_residual(_runs(x, gate), _runs(y, gate), _samples(gate)).view_as(x)


class WanBlock(nn.Module):
    def __init__(self, config: WanConfig, kernels: Kernels) -> None:
        super().__init__()
        size = config.hidden_size
        self.self_attn = Attention(config, kernels)
        self.norm3 = AffineNorm(size, config.eps, kernels)
        self.cross_attn = Attention(config, kernels, reads_image=config.image_dim > 0)
        self.ffn = nn.Sequential(
            nn.Linear(size, config.ffn_size), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_size, size)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, size) / size**0.5)
        self.eps = config.eps
        self._kernels = kernels

    def _modulate(self, tokens: Tensor | Unadded, shift: Tensor, scale: Tensor, reads: Reads) -> tuple[Tensor, Tokens]:
        """The tokens (B, L, D), and those modulated. shift, scale: (B, G, D), one for each of G runs of tokens."""
        if isinstance(tokens, Unadded):
            x, y, gate = tokens.take()
            return self._add_and_modulate(x, y, gate, shift, scale, reads)
        runs = _runs(tokens, shift)
        modulated = modulate(self._kernels, reads, runs, _samples(shift), _samples(scale), self.eps)
        return tokens, shaped_as(tokens, modulated)

    def _add_and_norm(self, x: Tensor, y: Tensor, gate: Tensor, reads: Reads) -> tuple[Tensor, Tokens]:
        """x + y * gate, and that under norm3."""
        norm, kernels = self.norm3, self._kernels
        x, normed = residual_layer_norm(
            kernels, reads, _runs(x, gate), _runs(y, gate), _samples(gate), norm.weight, norm.bias, norm.eps
        )
        return x.view_as(y), shaped_as(y, normed)

    def _add_and_modulate(
        self, x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, reads: Reads
    ) -> tuple[Tensor, Tokens]:
        """x + y * gate, or x + y, and that modulated."""
        gates, change = None if gate is None else _samples(gate), (_samples(shift), _samples(scale))
        x, modulated = residual_modulate(
            self._kernels, reads, _runs(x, shift), _runs(y, shift), gates, *change, self.eps
        )
        return x.view_as(y), shaped_as(y, modulated)

    def forward(self, tokens: Tensor | Unadded, args: BlockArgs) -> Unadded:
        """tokens (B, L, D), or as the block before left them."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.modulation.float() + args.modulation).unbind(2)
        own, text, ffn = self.self_attn, self.cross_attn, self.ffn
        # `del`: each of these is 0.8 GB of a 14B at 720p, and would live until the end of the block
        x, modulated = self._modulate(tokens, shift, scale, agreed(own.q, own.k, own.v))
        projected = own.project(modulated)
        del modulated
        attended = own.attend(projected, args.rope)
        x, normed = self._add_and_norm(x, attended, gate, agreed(text.q))
        del attended
        described = text(normed, args.keep(text, lambda: text.read(args.context, args.image)))
        del normed
        x, modulated = self._add_and_modulate(x, described, None, ffn_shift, ffn_scale, agreed(ffn[0]))
        del described
        fed = in_pieces(lambda piece: gelu_between(self._kernels, ffn, ffn[0], ffn[2], piece), modulated)
        del modulated
        return Unadded(x, fed, ffn_gate, self._kernels)


def _runs(x: Tensor, per_run: Tensor) -> Tensor:
    """x (B, L, D), per_run (B, G, D) -> (B * G, L / G, D)"""
    return x.reshape(-1, x.shape[1] // per_run.shape[1], x.shape[2])


def _samples(per_run: Tensor) -> Tensor:
    """(B, G, D) -> (B * G, 1, D)"""
    return per_run.reshape(-1, 1, per_run.shape[2])


class Head(nn.Module):
    def __init__(self, config: WanConfig, kernels: Kernels) -> None:
        super().__init__()
        pt, ph, pw = config.patch_size
        self.head = nn.Linear(config.hidden_size, config.out_channels * pt * ph * pw)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.hidden_size) / config.hidden_size**0.5)
        self.eps = config.eps
        self._modulate = kernels.modulate

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B, L, D), time (B, G, D) float32 -> (B, L, patch volume * out_channels)"""
        shift, scale = (self.modulation.float() + time.unsqueeze(2)).unbind(2)
        return self.head(self._modulate(_runs(x, shift), _samples(shift), _samples(scale), self.eps).view_as(x))


class ImageEmbedding(nn.Module):
    """CLIP image tokens (B, I, image_dim) -> (B, I, D)."""

    def __init__(self, config: WanConfig, kernels: Kernels) -> None:
        super().__init__()
        self.proj = image_projector(config.image_dim, config.hidden_size, kernels)
        if config.image_positions:
            self.emb_pos = nn.Parameter(torch.zeros(1, config.image_positions, config.image_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        if hasattr(self, "emb_pos"):
            if tokens.shape[1] > self.emb_pos.shape[1]:
                raise ValueError(
                    f"{tokens.shape[1]} image tokens, the model has {self.emb_pos.shape[1]} positions: "
                    "give one start and one end image"
                )
            tokens = tokens + self.emb_pos[:, : tokens.shape[1]]
        return self.proj(tokens)


class WanTransformer(nn.Module):
    """Velocity of the flow, from noisy latents, a timestep, text and, where the model was trained on them, images."""

    def __init__(self, config: WanConfig, kernels: Kernels) -> None:
        super().__init__()
        size, patch = config.hidden_size, config.patch_size
        self.config = config
        self.kernels = kernels
        self.patch_embedding = nn.Conv3d(config.in_channels, size, kernel_size=patch, stride=patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, size), nn.GELU(approximate="tanh"), nn.Linear(size, size)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, size), nn.SiLU(), nn.Linear(size, size))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(size, 6 * size))
        self.blocks = nn.ModuleList([WanBlock(config, kernels) for _ in range(config.num_layers)])
        self.head = Head(config, kernels)

        if config.image_dim:
            self.img_emb = ImageEmbedding(config, kernels)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        context: Tensor,
        run: RunBlocks = run_blocks,
        *,
        image: Tensor | None = None,
        clip: Tensor | None = None,
        keep: Keep = anew,
    ) -> Tensor:
        """latents (B, C, T, H, W) model space, context (B, S, text_dim) -> velocity (B, out_channels, T, H, W).

        timestep: (B,) in [0, 1000], or (B, T), one a latent frame.
        image: (B, C', T, H, W) further input channels, C + C' = in_channels (image-to-video: mask and image latents).
        clip: (B, I, image_dim) tokens of the start (and end) image, for models that read them.
        keep: of passes with the same context and clip, which are then embedded and turned to keys and values once.
        The result is in the weights' dtype. T, H, W must be multiples of the patch.
        """
        config, dtype = self.config, self.patch_embedding.weight.dtype
        if image is not None:
            latents = torch.cat([latents, image.to(latents)], dim=1)
        self._check(latents, timestep)
        (_, _, t, h, w), (pt, ph, pw) = latents.shape, config.patch_size
        grid = (t // pt, h // ph, w // pw)
        tokens = patch_tokens(self.patch_embedding, latents.to(dtype))
        time = self.time_embedding(
            sinusoidal(timestep.reshape(len(timestep), -1), config.freq_dim).to(
                self.time_embedding.get_parameter("0.weight").dtype
            )
        )
        args = BlockArgs(
            modulation=rearrange(self.time_projection(time).float(), "b g (six d) -> b g six d", six=6),
            context=keep(self.text_embedding, lambda: self.text_embedding(context.to(dtype))),
            rope=rope_table(grid, rope_channels(config.hidden_size // config.num_heads), 10000.0, latents.device),
            image=None if clip is None else keep(self.img_emb, lambda: self.img_emb(clip.to(dtype))),
            keep=keep,
        )
        patches = self.head(run(list(self.blocks), tokens, args), time.float())
        (t, h, w) = grid
        return rearrange(
            patches, "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)", t=t, h=h, w=w, pt=pt, ph=ph, pw=pw
        )

    def _check(self, latents: Tensor, timestep: Tensor) -> None:
        config, (channels, *sizes) = self.config, latents.shape[1:]
        if any(size % patch for size, patch in zip(sizes, config.patch_size, strict=True)):
            raise ValueError(f"latents {tuple(sizes)} are not multiples of the patch {config.patch_size}")
        if channels != config.in_channels:
            raise ValueError(f"{channels} input channels given, the model reads {config.in_channels}")
        if timestep.ndim == 2 and timestep.shape[1] * config.patch_size[0] != sizes[0]:
            raise ValueError(f"{timestep.shape[1]} timesteps given for {sizes[0]} latent frames")
