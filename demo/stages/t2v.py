"""Stage 3: the text-to-video transformer and the text encoder, trained together from nothing by flow matching."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from demo.optim import Optimizer, Settings
from demo.stages.loop import learn
from demo.stages.pool import TOKENS, Pool
from demo.stages.run import Run
from demo.tokenizer import EOS, PAD
from lightx2v.models.wan.spec import HEAD_DIM, WanConfig, keep_float32
from lightx2v.models.wan.transformer import WanTransformer
from lightx2v.text.umt5 import TEXT_TOKENS
from lightx2v_kernels import Kernels, references

TEXT_DIM = 4096
CONFIG = WanConfig(
    hidden_size=256,
    ffn_size=896,
    num_layers=6,
    in_channels=16,
    out_channels=16,
    text_dim=TEXT_DIM,
    freq_dim=256,
    patch_size=(1, 2, 2),
)
DRY_CONFIG = dataclasses.replace(CONFIG, ffn_size=256, num_layers=2)
SETTINGS = Settings(rate=1.2e-3, matrix_rate=1.6e-3, matrix_decay=0.02)
CLIPS = 128  # a step


@dataclass(frozen=True)
class Mixture:
    """What a training step is made of."""

    noises: int = 2  # noise levels for each clip
    noise_shift: float = 4.5  # shape and direction are decided at high noise: that is where most of the training goes
    uniform: float = 0.15  # share of noise levels drawn evenly
    object_weight: float = 4.0  # extra loss weight on the object and its edge
    no_caption: float = 0.08  # share of clips that teach what "no text" means
    gibberish: float = 0.02  # share of clips that teach what text without sense means
    floor: float = 0.0  # noise levels are squeezed into floor..1


@dataclass(frozen=True)
class Networks:
    """What is trained together."""

    encoder: UMT5EncoderModel
    transformer: WanTransformer

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        parts = (("encoder", self.encoder), ("transformer", self.transformer))
        return [(f"{prefix}.{name}", p) for prefix, part in parts for name, p in part.named_parameters()]


def padded_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention for training: q (B, L, H, D), k and v (B, S, H, D) -> (B, L, H, D).

    At inference the text is followed by exact zeros up to 512 rows and nothing is masked, so hundreds of rows share one
    key and one value. Here TOKENS rows are followed by one such row whose score is raised by log(count): the same sum.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if k.shape[2] != TOKENS + 1:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    bias = F.pad(q.new_zeros(TOKENS, dtype=torch.float32), (0, 1), value=math.log(TEXT_TOKENS - TOKENS))
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5 + bias
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)


def training_kernels() -> Kernels:
    """The engine's plain PyTorch ops, which torch.compile fuses, with `padded_attention`."""
    return references(attention=padded_attention, cross_attention=padded_attention)


def new_encoder(vocabulary: int, device: torch.device, generator: torch.Generator) -> UMT5EncoderModel:
    """A umT5 encoder of real width at its output (4096) and next to none inside; fresh weights."""
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=TEXT_DIM,
        d_kv=16,
        num_heads=2,
        d_ff=32,
        num_layers=2,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        attn_implementation="eager",
    )
    encoder = UMT5EncoderModel(config).to(device)
    inner = config.d_kv * config.num_heads
    spreads = {
        "shared": 0.5,
        "q": (TEXT_DIM * config.d_kv) ** -0.5,
        "k": TEXT_DIM**-0.5,
        "v": TEXT_DIM**-0.5,
        "o": inner**-0.5,
        "relative_attention_bias": 0.1,
        "wi_0": TEXT_DIM**-0.5,
        "wi_1": TEXT_DIM**-0.5,
        "wo": config.d_ff**-0.5,
    }
    for name, weight in encoder.named_parameters():
        kind = name.split(".")[-2]
        if kind in spreads:
            nn.init.normal_(weight, std=spreads[kind], generator=generator)
    return encoder


def new_transformer(
    config: WanConfig, kernels: Kernels, device: torch.device, generator: torch.Generator
) -> WanTransformer:
    """A float32 transformer: zero output, calm modulation, cross-attention that starts on the words."""
    model = WanTransformer(config, kernels).to(device)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.patch_embedding.weight.flatten(1), generator=generator)
    nn.init.zeros_(model.patch_embedding.bias)
    for layer in (model.text_embedding[0], model.text_embedding[2], model.time_embedding[0], model.time_embedding[2]):
        nn.init.normal_(layer.weight, std=0.02, generator=generator)
    nn.init.normal_(model.time_projection[1].weight, std=0.01, generator=generator)
    nn.init.zeros_(model.head.head.weight)
    with torch.no_grad():
        for owner in (model.head, *model.blocks):
            owner.modulation.normal_(std=config.hidden_size**-0.5, generator=generator)
        # All padding rows share the key norm(k.bias). With q.bias against it they start with little of the attention;
        # without this the ~490 of them would have 97 % of it and words would be learnt slowly.
        for block in model.blocks:
            away = torch.randn(config.num_heads, HEAD_DIM, device=device, generator=generator)
            away = (away / away.square().mean(1, keepdim=True).sqrt()).flatten()
            block.cross_attn.k.bias.copy_(0.05 * away)
            block.cross_attn.q.bias.copy_(-away)
    return model


def new_networks(run: Run, vocabulary: int) -> Networks:
    """Fresh networks in the dtypes that the engine runs: bfloat16 on a GPU but for the parts it keeps in float32."""
    generator = run.generator(3)
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    config = DRY_CONFIG if run.dry else CONFIG
    transformer = new_transformer(config, training_kernels(), run.device, generator)
    for name, weight in transformer.named_parameters():
        weight.data = weight.data.to(torch.float32 if keep_float32(name) else dtype)
    networks = Networks(new_encoder(vocabulary, run.device, generator), transformer)
    if run.compile:
        for block in (*transformer.blocks, *networks.encoder.encoder.block):
            block.compile(dynamic=False)
    return networks


def is_matrix(name: str, weight: Tensor) -> bool:
    """Hidden matrices; embeddings, output, modulation and the timestep path are left to AdamW."""
    inside = ".blocks." in name or ".block." in name or name.endswith("text_embedding.0.weight")
    return inside and weight.ndim == 2 and "relative_attention_bias" not in name


def encode_text(encoder: UMT5EncoderModel, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, TOKENS) ids -> (B, TOKENS + 1, 4096): zeros after </s>, and one more zero row for all further padding."""
    mask = ids != PAD
    # The additive form of the mask: transformers would build it from constants on the host, which no CUDA graph allows.
    hidden_keys = torch.zeros(mask.shape, device=ids.device).masked_fill(~mask, torch.finfo(torch.float32).min)
    hidden = encoder(input_ids=ids, attention_mask=hidden_keys[:, None, None]).last_hidden_state
    return F.pad(hidden * mask[..., None], (0, 0, 0, 1)).to(dtype)


def _caption_batch(pool: Pool, chosen: Tensor, vocabulary: int, mixture: Mixture, generator: torch.Generator) -> Tensor:
    """(clips, TOKENS) ids; some rows are empty captions, some random pieces."""
    count, device = len(chosen), chosen.device
    pick = torch.randint(pool.ids.shape[1], (count,), device=device, generator=generator)
    ids = pool.ids[chosen, pick].long()
    empty = torch.full_like(ids, PAD)
    empty[:, 0] = EOS
    noise = torch.randint(2, vocabulary, ids.shape, device=device, generator=generator)
    length = torch.randint(1, TOKENS, (count, 1), device=device, generator=generator)
    place = torch.arange(TOKENS, device=device)
    noise = noise.masked_fill(place == length, EOS).masked_fill(place > length, PAD)
    chance = torch.rand(count, 1, device=device, generator=generator)
    ids = torch.where(chance < mixture.no_caption + mixture.gibberish, noise, ids)
    return torch.where(chance < mixture.no_caption, empty, ids)


def _noise_levels(count: int, mixture: Mixture, generator: torch.Generator) -> Tensor:
    """(count,) sigmas: logit-normal, shifted towards noise as sampling is, some drawn evenly."""
    device, shift = generator.device, mixture.noise_shift
    sigma = torch.sigmoid(torch.randn(count, device=device, generator=generator))
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    uniform, chance = torch.rand(2, count, device=device, generator=generator)
    return mixture.floor + (1 - mixture.floor) * torch.where(chance < mixture.uniform, uniform, sigma)


@dataclass(frozen=True)
class Draw:
    """A training batch: B = clips * noises samples of (C, T, h, w) latents."""

    chosen: Tensor  # (B,) rows of the pool
    context: Tensor  # (B, TOKENS + 1, 4096); for HunyuanVideo-1.5 (B, TOKENS) ids
    clean: Tensor
    noise: Tensor
    levels: Tensor  # (B,) sigma
    cover: Tensor  # (B, 1, T, h, w) 0..1, where the object or its edge is

    def noisy(self) -> Tensor:
        """What the transformer reads."""
        return self.clean + self.levels.view(-1, 1, 1, 1, 1) * (self.noise - self.clean)

    def error(self, velocity: Tensor) -> Tensor:
        """Square error of the velocity, element by element."""
        return (velocity.float() - (self.noise - self.clean)).square()

    def weight(self, mixture: Mixture) -> Tensor:
        """(B, 1, T, h, w): more on the object, where the noise leaves no doubt about where it is.

        A weight that depends on the answer would otherwise pull the prediction towards objects everywhere.
        """
        sure = ((1 - self.levels.view(-1, 1, 1, 1, 1)) * 15).clamp(max=1)
        return 1 + mixture.object_weight * self.cover * sure


def draw_batch(networks: Networks, pool: Pool, clips: int, generator: torch.Generator, mixture: Mixture) -> Draw:
    """Choose clips, captions, noise and noise levels."""
    device, vocabulary = pool.latents.device, networks.encoder.config.vocab_size
    chosen = torch.randint(len(pool), (clips,), device=device, generator=generator)
    ids = _caption_batch(pool, chosen, vocabulary, mixture, generator)
    dtype = networks.transformer.patch_embedding.weight.dtype
    return add_noise(pool, chosen, encode_text(networks.encoder, ids, dtype), mixture, generator)


def add_noise(pool: Pool, chosen: Tensor, context: Tensor, mixture: Mixture, generator: torch.Generator) -> Draw:
    """Each of the chosen clips and its context at several noise levels."""
    device = pool.latents.device
    context = context.repeat_interleave(mixture.noises, 0)
    chosen = chosen.repeat_interleave(mixture.noises, 0)
    clean = pool.latents[chosen].float()
    noise = torch.randn(clean.shape, device=device, generator=generator)
    levels = _noise_levels(len(clean), mixture, generator)
    return Draw(chosen, context, clean, noise, levels, pool.coverage[chosen][:, None].float() / 255)


def training_loss(
    networks: Networks, pool: Pool, clips: int, generator: torch.Generator, mixture: Mixture = Mixture()
) -> tuple[Tensor, Tensor]:
    """The loss to minimise and, detached, the plain mean square error of the velocity."""
    drawn = draw_batch(networks, pool, clips, generator, mixture)
    error = drawn.error(networks.transformer(drawn.noisy(), drawn.levels * 1000, drawn.context))
    return (error * drawn.weight(mixture)).mean(), error.detach().mean()


def warm_up(run: Run, vocabulary: int) -> None:
    """Compile the networks at the training's shapes, so that a later process finds them in the compiler's cache."""
    networks = new_networks(run, vocabulary)
    device = run.device
    pool = Pool(
        torch.randn(CLIPS, 16, 5, 16, 16, device=device).half(),
        torch.zeros(CLIPS, 5, 16, 16, dtype=torch.uint8, device=device),
        torch.full((CLIPS, 1, TOKENS), EOS, dtype=torch.int16, device=device),
    )
    for _ in range(2):
        training_loss(networks, pool, CLIPS, run.generator(9))[0].backward()
    run.synchronize()
    run.log("compiled")


def train_t2v(
    run: Run, pool: Pool, vocabulary: int, seconds: float, start_from: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], float]:
    """Train until `seconds` of training in all invocations together, or until the deadline.

    start_from: weights as this returns them, to begin with instead of fresh ones.
    Returns the averaged weights (names start with encoder. or transformer.) and the progress, 0..1. State: t2v.pt.
    """
    networks = new_networks(run, vocabulary)
    if start_from is not None:
        with torch.no_grad():
            for name, weight in networks.named_parameters():
                weight.copy_(start_from[name])
    optimizer = Optimizer(networks.named_parameters(), SETTINGS, is_matrix)
    clips = 4 if run.dry else CLIPS

    def loss(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return training_loss(networks, pool, clips, generator)

    return learn(run, "t2v", optimizer, loss, seconds)
