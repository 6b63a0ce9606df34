"""Our Wan transformer against diffusers' and ComfyUI's own, float32 on the CPU, random weights.

Large q/k norm weights keep attention from being flat, and the grid has three different sizes, so that a swapped
axis shows: RoPE with T and H swapped is a relative error of about 5e-6 on flat attention.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from closeness import relative_error
from lightx2v.models.wan.config import WanConfig
from lightx2v.models.wan.transformer import WanTransformer
from lightx2v.tokens import sinusoidal
from lightx2v_kernels import select

CONFIG = WanConfig(
    hidden_size=256,
    ffn_size=320,
    num_layers=3,
    in_channels=16,
    out_channels=16,
    text_dim=64,
    freq_dim=256,
    patch_size=(1, 2, 2),
)
IMAGE_DIM = 1280  # ComfyUI fixes it
CONFIGS = {
    "t2v": CONFIG,
    "i2v": replace(CONFIG, in_channels=36, image_dim=IMAGE_DIM),
    "flf2v": replace(CONFIG, in_channels=36, image_dim=IMAGE_DIM, image_positions=514),
    "a14b_i2v": replace(CONFIG, in_channels=36),
    "ti2v": replace(CONFIG, in_channels=48, out_channels=48),
}
IMAGE_TOKENS = {"i2v": 257, "flf2v": 514}
TOLERANCE = 1e-6

TO_DIFFUSERS = (
    ("head.modulation", "scale_shift_table"),
    (".modulation", ".scale_shift_table"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("head.head", "proj_out"),
    ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    ("norm3", "norm2"),
    (".k_img.", ".add_k_proj."),
    (".v_img.", ".add_v_proj."),
    (".norm_k_img.", ".norm_added_k."),
    ("self_attn.", "attn1."),
    ("cross_attn.", "attn2."),
    (".q.", ".to_q."),
    (".k.", ".to_k."),
    (".v.", ".to_v."),
    (".o.", ".to_out.0."),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
)


def diffusers_name(name: str) -> str:
    for ours, theirs in TO_DIFFUSERS:
        name = name.replace(ours, theirs)
    return name


@dataclass(frozen=True)
class Inputs:
    latents: Tensor  # (B, out_channels, T, H, W)
    extra: Tensor | None  # (B, in_channels - out_channels, T, H, W)
    context: Tensor
    clip: Tensor | None

    def all_channels(self) -> Tensor:
        return self.latents if self.extra is None else torch.cat([self.latents, self.extra], 1)


def make_inputs(family: str, rows: int = 512) -> Inputs:
    """rows: of text. diffusers fixes 512 where images are read too; ComfyUI's CPU attention rounds more from there."""
    config, generator = CONFIGS[family], torch.Generator().manual_seed(1)
    latents = torch.randn(2, config.out_channels, 5, 8, 12, generator=generator)
    extra = config.in_channels - config.out_channels
    context = torch.randn(2, rows, config.text_dim, generator=generator)
    context[:, 20:] = 0  # padding rows are zero and attended
    tokens = IMAGE_TOKENS.get(family)
    return Inputs(
        latents,
        torch.randn(2, extra, 5, 8, 12, generator=generator) if extra else None,
        context,
        torch.randn(2, tokens, IMAGE_DIM, generator=generator) if tokens else None,
    )


Peer = Callable[[Inputs, Tensor], Tensor]


def make_ours(config: WanConfig) -> WanTransformer:
    kernels = select(device=torch.device("cpu"), dtype=torch.float32, head_dim=128)
    model = WanTransformer(config, kernels).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if ".norm_" in name:
            parameter.copy_(1.5 + 0.3 * noise)
        elif ".norm3." in name or "proj.0." in name or "proj.4." in name:
            parameter.copy_((1 if name.endswith("weight") else 0) + 0.2 * noise)
        elif name.endswith("modulation") or name.endswith("emb_pos"):
            parameter.copy_(0.3 * noise)
        else:
            parameter.copy_(noise * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1))
    return model


# The peers compute the angles timestep * frequency in float32, Wan and we in float64. At timestep 1000 that alone is a
# relative error of some 5e-6 between the peers themselves, at 1 it is below rounding: the tight test stands there.
SMALL = torch.tensor([0.25, 1.0])
LARGE = torch.tensor([437.0, 999.0])


def make_diffusers(ours: WanTransformer) -> Peer:
    from diffusers import WanTransformer3DModel

    config = ours.config
    theirs = WanTransformer3DModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_attention_heads=2,
        attention_head_dim=128,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_size,
        num_layers=config.num_layers,
        image_dim=config.image_dim or None,
        added_kv_proj_dim=config.hidden_size if config.image_dim else None,
        pos_embed_seq_len=config.image_positions or None,
    ).eval()
    theirs.load_state_dict({diffusers_name(name): tensor for name, tensor in ours.state_dict().items()})

    def call(given: Inputs, timestep: Tensor) -> Tensor:
        if timestep.ndim == 2:  # one a token there, one a frame here
            timestep = timestep.repeat_interleave(4 * 6, dim=1)
        clip = given.clip
        if clip is not None and config.image_positions:
            clip = clip.reshape(-1, clip.shape[1] // 2, clip.shape[2])  # there each of the two images is a sample
        return theirs(given.all_channels(), timestep, given.context, clip, return_dict=False)[0]

    return call


def make_comfyui(ours: WanTransformer) -> Peer:
    import comfy.ldm.wan.model
    import comfy.ops

    config = ours.config
    theirs = comfy.ldm.wan.model.WanModel(
        model_type="i2v" if config.image_dim else "t2v",
        in_dim=config.in_channels,
        out_dim=config.out_channels,
        dim=256,
        ffn_dim=config.ffn_size,
        num_heads=2,
        num_layers=config.num_layers,
        text_dim=config.text_dim,
        flf_pos_embed_token_number=config.image_positions or None,
        operations=comfy.ops.manual_cast,
        dtype=torch.float32,
        device="cpu",
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    return lambda given, timestep: theirs(given.all_channels(), timestep, given.context, clip_fea=given.clip)


def run_ours(ours: WanTransformer, given: Inputs, timestep: Tensor) -> Tensor:
    return ours(given.latents, timestep, given.context, image=given.extra, clip=given.clip)


PEERS = {"diffusers": make_diffusers, "comfyui": make_comfyui}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_agrees_with_peer(family: str, peer: str, comfy: object) -> None:
    ours, given = make_ours(CONFIGS[family]), make_inputs(family, 33 if peer == "comfyui" else 512)
    theirs = PEERS[peer](ours)
    timesteps = [SMALL]
    if family == "ti2v":  # a clean first frame among noisy ones
        timesteps.append(torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0], [0.25, 0.5, 0.0, 1.0, 0.75]]))
    for timestep in timesteps:
        actual, expected = run_ours(ours, given, timestep), theirs(given, timestep)
        assert actual.shape == expected.shape
        assert relative_error(actual, expected) < TOLERANCE


@torch.no_grad()
def test_large_timesteps_differ_no_more_than_the_peers_do(comfy: object) -> None:
    ours, given = make_ours(CONFIG), make_inputs("t2v", 33)
    actual, a, b = run_ours(ours, given, LARGE), *(make(ours)(given, LARGE) for make in PEERS.values())
    between_peers = relative_error(a, b)
    assert between_peers < 1e-5
    assert relative_error(actual, a) < 1.5 * between_peers
    assert relative_error(actual, b) < 1.5 * between_peers


@torch.no_grad()
def test_one_start_image_uses_the_first_positions_of_a_first_last_frame_model(comfy: object) -> None:
    ours, given = make_ours(CONFIGS["flf2v"]), make_inputs("flf2v", 33)
    assert given.clip is not None
    start = replace(given, clip=given.clip[:, :257])
    assert relative_error(run_ours(ours, start, SMALL), make_comfyui(ours)(start, SMALL)) < TOLERANCE


def test_timestep_embedding_is_the_published_formula() -> None:
    """cos then sin of t * 10000^(-i/128), in float64 (Wan2.1 wan/modules/model.py, sinusoidal_embedding_1d)."""
    values = sinusoidal(torch.tensor([[999.0]]), 256)[0, 0]
    for i in (0, 1, 64, 127):
        angle = 999.0 * 10000.0 ** (-i / 128)
        assert values[i].item() == pytest.approx(math.cos(angle), abs=1e-7)
        assert values[128 + i].item() == pytest.approx(math.sin(angle), abs=1e-7)


@pytest.mark.parametrize(
    ("family", "latents", "timestep", "clip", "complaint"),
    [
        ("t2v", (1, 16, 3, 7, 8), (1,), None, r"\(3, 7, 8\) are not multiples of the patch"),
        ("a14b_i2v", (1, 16, 3, 8, 8), (1,), None, "16 input channels given, the model reads 36"),
        ("t2v", (1, 16, 3, 8, 8), (1, 2), None, "2 timesteps given for 3 latent frames"),
        ("flf2v", (1, 36, 3, 8, 8), (1,), 771, "771 image tokens, the model has 514 positions"),
    ],
)
def test_refuses_inputs_of_the_wrong_shape(
    family: str, latents: tuple[int, ...], timestep: tuple[int, ...], clip: int | None, complaint: str
) -> None:
    tokens = None if clip is None else torch.zeros(1, clip, IMAGE_DIM)
    with pytest.raises(ValueError, match=complaint):
        make_ours(CONFIGS[family])(torch.zeros(latents), torch.zeros(timestep), torch.zeros(1, 4, 64), clip=tokens)
