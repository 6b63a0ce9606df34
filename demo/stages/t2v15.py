"""Stage 3 for HunyuanVideo-1.5: its transformer and a Qwen2.5-VL of next to no size, trained together from nothing.

The transformer's layers rest in GGML's Q4_0, and learn so: after each step weights are rounded to what a file can hold.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.chat_tokenizer import MARKS, make_tokenizer, read_tokenizer
from demo.optim import Optimizer, Settings
from demo.stages.gguf import BLOCK, round_q4_0
from demo.stages.loop import learn
from demo.stages.pool import Ids, Pool
from demo.stages.run import Run
from demo.stages.t2v import CLIPS, Draw, Mixture, add_noise
from lightx2v.latents import HUNYUAN15
from lightx2v.models.hunyuan_video_15.config import ROPE_CHANNELS, ROPE_THETA, HunyuanConfig
from lightx2v.models.hunyuan_video_15.spec import IN_CHANNELS, keep_float32
from lightx2v.models.hunyuan_video_15.text import TextRefiner
from lightx2v.models.hunyuan_video_15.transformer import TEXT, BlockArgs, HunyuanTransformer
from lightx2v.text import qwen
from lightx2v.text.chat import END, TURN, ChatTokenizer
from lightx2v.tokens import rope_table
from lightx2v_kernels import references

TOKENS = 36  # of a prompt and what closes its turn; the longest of the grammar take 35
TEXT_DIM = 32  # 3584 in Qwen2.5-VL-7B
CONFIG = HunyuanConfig(
    hidden_size=128,
    ffn_size=128,
    num_layers=5,
    refiner_layers=1,
    refiner_ffn_size=64,
    in_channels=IN_CHANNELS,
    out_channels=HUNYUAN15.channels,
    text_dim=TEXT_DIM,
    glyph_dim=32,
    glyph_size=32,
    image_dim=32,
    freq_dim=64,
    patch_size=(1, 1, 1),
)
DRY_CONFIG = dataclasses.replace(CONFIG, num_layers=1)
MIXTURE = Mixture()
SETTINGS = Settings(rate=1.5e-3, matrix_rate=2e-3, matrix_decay=0.02)
# What reads pictures and what reads quoted letters: text-to-video meets neither.
UNUSED = ("byt5_in.", "vision_in.")
PLAIN = ("final_layer.linear", "cond_type_embedding")  # never rounded


@dataclass
class Valid:
    """Which keys count in the attention that comes next: what training adds to the scores, (B, 1, 1, S) float32."""

    bias: Tensor | None = None

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, L, H, D) -> (B, L, H, D). At inference nothing is padded; here captions of all lengths meet."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        if self.bias is not None:
            scores = scores + self.bias
        return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)


@dataclass(frozen=True)
class Networks:
    """What is trained together, and what of it is constant.

    prefix: (P,) ids of what the template says before a prompt. closing: (5,) what closes it. empty: (TOKENS,) an empty
    prompt. turns: cos and sin for the language model. rope: for the video. causal: (L, L) added to the scores.
    """

    encoder: nn.Module
    transformer: HunyuanTransformer
    prefix: Tensor
    closing: Tensor
    empty: Tensor
    turns: tuple[Tensor, Tensor]
    rope: tuple[Tensor, Tensor]
    causal: Tensor
    video: Valid = field(default_factory=Valid)
    text: Valid = field(default_factory=Valid)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        parts = (("encoder", self.encoder), ("transformer", self.transformer))
        named = [(f"{prefix}.{name}", p) for prefix, part in parts for name, p in part.named_parameters()]
        return [(name, p) for name, p in named if p.requires_grad]

    def rounded(self) -> list[Tensor]:
        """The weights that Q4_0 keeps."""
        return [p.data for name, p in self.transformer.named_parameters() if is_rounded(name, p)]


def is_rounded(name: str, weight: Tensor) -> bool:
    """Whether a weight of the transformer is Q4_0 in its file."""
    return weight.ndim == 2 and weight.shape[1] % BLOCK == 0 and not name.startswith(PLAIN)


def tokenizer_of(run: Run) -> ChatTokenizer:
    """The run's tokenizer, made at the first call."""
    folder = run.state / "tokenizer"
    if not (folder / "vocab.json").exists():
        make_tokenizer(folder)
    return read_tokenizer(folder)


def padding(tokenizer: ChatTokenizer) -> int:
    return int(tokenizer.words.convert_tokens_to_ids(MARKS[0]))


def chat_ids(tokenizer: ChatTokenizer) -> Ids:
    """As the language model reads captions, without what the template says before them."""
    pad = padding(tokenizer)

    def to_ids(texts: list[str]) -> Tensor:
        asked = [f"{text or ' '}{END}\n{TURN}assistant\n" for text in texts]  # `ChatTokenizer.asked` from the prompt on
        rows = tokenizer.words(asked, add_special_tokens=False)["input_ids"]
        longest = max(map(len, rows))
        if longest > TOKENS:
            raise ValueError(f"a caption has {longest} tokens, training takes {TOKENS}")
        return torch.tensor([row + [pad] * (TOKENS - len(row)) for row in rows])

    return to_ids


def new_encoder(vocabulary: int, device: torch.device, generator: torch.Generator) -> nn.Module:
    """Qwen2.5-VL's language part with one block that is read; fresh float32 weights."""
    sizes = qwen.Sizes(
        vocabulary, TEXT_DIM, num_heads=1, num_kv_heads=1, ffn_size=32, num_layers=1 + qwen.SKIPPED_BLOCKS
    )
    encoder = qwen.empty(sizes)
    state = {name: fresh(name, weight.shape, device, generator) for name, weight in encoder.state_dict().items()}
    encoder.load_state_dict(state, assign=True)
    encoder.rotary_emb.to(device)
    return encoder


def fresh(name: str, shape: torch.Size, device: torch.device, generator: torch.Generator) -> Tensor:
    """A weight of the language model to begin with."""
    if len(shape) == 1:
        return torch.ones(shape, device=device) if "norm" in name else torch.zeros(shape, device=device)
    spread = 0.7 if "embed" in name else shape[1] ** -0.5
    return torch.randn(shape, device=device, generator=generator) * spread


def new_transformer(
    config: HunyuanConfig, device: torch.device, generator: torch.Generator
) -> tuple[HunyuanTransformer, Valid, Valid]:
    """A float32 transformer: zero output, calm modulation; and what its two kinds of attention read."""
    video, text = Valid(), Valid()
    kernels = references(attention=video.attention, cross_attention=text.attention)
    model = HunyuanTransformer(config, kernels).to(device)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)
    with torch.no_grad():
        nn.init.xavier_uniform_(model.img_in.proj.weight.flatten(1), generator=generator)
        model.img_in.proj.weight[:, config.out_channels :] = 0  # given frames: none here
        nn.init.zeros_(model.img_in.proj.bias)
        nn.init.normal_(model.cond_type_embedding.weight, std=0.02, generator=generator)
        nn.init.zeros_(model.final_layer.linear.weight)
        for name, weight in model.named_parameters():
            if "_mod.linear" in name or "adaLN_modulation" in name:
                spread = 0.01 if weight.ndim == 2 else config.hidden_size**-0.5
                weight.normal_(std=spread, generator=generator)
                if "refiner" in name and weight.ndim == 1:
                    weight.add_(0.5)  # gates: the words are to be mixed from the start
            elif name.startswith(UNUSED):
                weight.requires_grad_(False)
    return model, video, text


def new_networks(run: Run) -> Networks:
    """Fresh networks in the dtypes that the engine runs: bfloat16 on a GPU but for the parts it keeps in float32."""
    generator, device, tokenizer = run.generator(3), run.device, tokenizer_of(run)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    transformer, video, text = new_transformer(DRY_CONFIG if run.dry else CONFIG, device, generator)
    for name, weight in transformer.named_parameters():
        weight.data = weight.data.to(torch.float32 if keep_float32(name) else dtype)
    encoder = new_encoder(len(tokenizer.words), device, generator)
    if run.compile:
        refiner = transformer.txt_in.individual_token_refiner.blocks
        for block in (*transformer.double_blocks, *refiner, transformer.final_layer):
            block.compile(dynamic=False)
    ids, start = tokenizer.asked("a")
    length = start + TOKENS
    with torch.no_grad():
        turns = encoder.rotary_emb(torch.zeros(1, device=device), torch.arange(length, device=device)[None])
    causal = torch.full((length, length), torch.finfo(torch.float32).min, device=device).triu(1)
    return Networks(
        encoder,
        transformer,
        prefix=torch.tensor(ids[:start], device=device),
        closing=torch.tensor(ids[start + 1 :], device=device),
        empty=chat_ids(tokenizer)([""])[0].to(device),
        turns=turns,
        rope=rope_table((5, 8, 8), ROPE_CHANNELS, ROPE_THETA, device),
        causal=causal,
        video=video,
        text=text,
    )


def is_matrix(name: str, weight: Tensor) -> bool:
    """Hidden matrices; embeddings, output, modulation and the timestep path are left to AdamW."""
    inside = "_blocks." in name or ".layers." in name or "refiner.blocks" in name or "input_embedder" in name
    return inside and weight.ndim == 2 and "_mod." not in name and "adaLN" not in name


def encode_text(networks: Networks, ids: Tensor) -> Tensor:
    """(B, TOKENS) ids -> (B, TOKENS, TEXT_DIM) float32, as `lightx2v.text.qwen` computes them.

    The attention is causal: what pads a prompt changes nothing before it, and the template before all prompts is the
    same for all of them. There is one block, so of the template only keys and values are read, once a batch.
    """
    (layer,) = networks.encoder.layers
    attention, (cos, sin), before = layer.self_attn, networks.turns, len(networks.prefix)
    hidden = networks.encoder.embed_tokens(ids)
    normed = layer.input_layernorm(hidden)
    template = layer.input_layernorm(networks.encoder.embed_tokens(networks.prefix[None]))
    q = _turned(attention.q_proj(normed), cos[:, before:], sin[:, before:])
    k = _turned(attention.k_proj(normed), cos[:, before:], sin[:, before:])
    of_template = _turned(attention.k_proj(template), cos[:, :before], sin[:, :before])
    scores = torch.cat([q @ of_template.transpose(1, 2), q @ k.transpose(1, 2)], 2) * q.shape[-1] ** -0.5
    shares = (scores + networks.causal[before:]).softmax(-1)
    seen = shares[:, :, :before] @ attention.v_proj(template) + shares[:, :, before:] @ attention.v_proj(normed)
    hidden = hidden + attention.o_proj(seen)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of one head (B, S, D): the halves of a head are pairs, as in Qwen's models."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _bias(valid: Tensor) -> Tensor:
    """(B, S) bool -> what is added to scores, (B, 1, 1, S)."""
    return torch.zeros(valid.shape, device=valid.device).masked_fill(~valid, -1e9)[:, None, None]


def refine(refiner: TextRefiner, words: Tensor, valid: Tensor, timestep: Tensor) -> Tensor:
    """`TextRefiner.forward` where lengths are known to the device alone: words (B, S, text_dim), zeros for padding."""
    mean = words.float().sum(1) / valid.sum(1, keepdim=True)
    x = refiner.input_embedder(words)
    summary = refiner.t_embedder(timestep).float() + refiner.c_embedder(mean.to(words.dtype)).float()
    for block in refiner.individual_token_refiner.blocks:
        x = block(x, summary, None)
    return x


def velocity(networks: Networks, noisy: Tensor, timestep: Tensor, words: Tensor, valid: Tensor) -> Tensor:
    """`HunyuanTransformer.forward` of text-to-video on padded prompts: noisy (B, 32, T, h, w), words (B, S, text_dim),
    valid (B, S) -> (B, 32, T, h, w)."""
    model = networks.transformer
    dtype = model.img_in.proj.weight.dtype
    # No frames are given: only the noisy channels are read, and patches are single cells.
    patch = model.img_in.proj
    tokens = F.linear(
        noisy.to(dtype).flatten(2).transpose(1, 2), patch.weight[:, : noisy.shape[1]].flatten(1), patch.bias
    )
    time = F.silu(model.time_in(timestep).float())
    networks.text.bias = _bias(valid)
    text = refine(model.txt_in, (words * valid[..., None]).to(dtype), valid, timestep)
    text = text + model.cond_type_embedding.weight[TEXT].to(dtype)
    video = tokens.shape[1]
    networks.video.bias = F.pad(networks.text.bias, (video, 0))
    args = BlockArgs(time, video, networks.rope, None)
    tokens = torch.cat([tokens, text], 1)
    for block in model.double_blocks:
        tokens = block(tokens, args)
    patches = model.final_layer(tokens[:, :video], time)
    return patches.transpose(1, 2).unflatten(2, noisy.shape[2:])


def _captions(networks: Networks, pool: Pool, chosen: Tensor, mixture: Mixture, generator: torch.Generator) -> Tensor:
    """(clips, TOKENS) ids; some rows are empty prompts, some random tokens."""
    count, device, closing = len(chosen), chosen.device, networks.closing
    pick = torch.randint(pool.ids.shape[1], (count,), device=device, generator=generator)
    ids = pool.ids[chosen, pick].long()
    words, pad = networks.encoder.config.vocab_size - len(MARKS), networks.empty[-1]
    noise = torch.randint(words, ids.shape, device=device, generator=generator)
    length = torch.randint(1, TOKENS - len(closing), (count, 1), device=device, generator=generator)
    after = torch.arange(TOKENS, device=device) - length
    noise = torch.where(after >= 0, closing[after.clamp(0, len(closing) - 1)], noise)
    noise = torch.where(after >= len(closing), pad, noise)
    chance = torch.rand(count, 1, device=device, generator=generator)
    ids = torch.where(chance < mixture.no_caption + mixture.gibberish, noise, ids)
    return torch.where(chance < mixture.no_caption, networks.empty, ids)


def draw_batch(networks: Networks, pool: Pool, clips: int, generator: torch.Generator, mixture: Mixture) -> Draw:
    """Choose clips, captions, noise and noise levels."""
    chosen = torch.randint(len(pool), (clips,), device=pool.latents.device, generator=generator)
    return add_noise(pool, chosen, _captions(networks, pool, chosen, mixture, generator), mixture, generator)


def training_loss(
    networks: Networks, pool: Pool, clips: int, generator: torch.Generator, mixture: Mixture = MIXTURE
) -> tuple[Tensor, Tensor]:
    """The loss to minimise and, detached, the plain mean square error of the velocity."""
    drawn = draw_batch(networks, pool, clips, generator, mixture)
    ids = drawn.context[:: mixture.noises]  # each caption is read once
    words = encode_text(networks, ids).repeat_interleave(mixture.noises, 0)
    valid = drawn.context != networks.empty[-1]
    error = drawn.error(velocity(networks, drawn.noisy(), drawn.levels * 1000, words, valid))
    return (error * drawn.weight(mixture)).mean(), error.detach().mean()


def warm_up(run: Run) -> None:
    """Compile the networks at the training's shapes, so that a later process finds them in the compiler's cache."""
    networks, device = new_networks(run), run.device
    pool = Pool(
        torch.randn(CLIPS, HUNYUAN15.channels, 5, 8, 8, device=device).half(),
        torch.zeros(CLIPS, 5, 8, 8, dtype=torch.uint8, device=device),
        networks.empty.expand(CLIPS, 1, -1).to(torch.int16),
    )
    for _ in range(2):
        training_loss(networks, pool, CLIPS, run.generator(9))[0].backward()
    run.synchronize()
    run.log("compiled")


def train_t2v(run: Run, pool: Pool, seconds: float) -> tuple[dict[str, Tensor], float]:
    """Train until `seconds` of training in all invocations together, or until the deadline.

    Returns the averaged weights (names start with encoder. or transformer.) and the progress, 0..1. State: t2v.pt.
    """
    networks = new_networks(run)
    optimizer = Optimizer(networks.named_parameters(), SETTINGS, is_matrix)
    clips, rounded = 2 if run.dry else CLIPS, networks.rounded()

    def loss(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return training_loss(networks, pool, clips, generator)

    weights, progress = learn(run, "t2v", optimizer, loss, seconds, after=lambda: round_q4_0(rounded))
    untouched = {f"transformer.{n}": p.detach().float() for n, p in networks.transformer.named_parameters()}
    return {**untouched, **weights}, progress
