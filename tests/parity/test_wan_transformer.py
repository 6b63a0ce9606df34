"""Our Wan transformer against diffusers' and ComfyUI's own, float32 on the CPU, random weights.

Large q/k norm weights keep attention from being flat, and the grid has three different sizes, so that a swapped
axis shows: RoPE with T and H swapped is a relative error of about 5e-6 on flat attention.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from closeness import relative_error
from lightx2v.models.wan.config import WanConfig
from lightx2v.models.wan.transformer import WanTransformer, sinusoidal
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
    ("norm3", "norm2"),
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


@pytest.fixture(scope="module")
def ours() -> WanTransformer:
    kernels = select(device=torch.device("cpu"), dtype=torch.float32, head_dim=128)
    model = WanTransformer(CONFIG, kernels).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if ".norm_" in name:
            parameter.copy_(1.5 + 0.3 * noise)
        elif ".norm3." in name:
            parameter.copy_((1 if name.endswith("weight") else 0) + 0.2 * noise)
        elif name.endswith("modulation"):
            parameter.copy_(0.3 * noise)
        else:
            parameter.copy_(noise * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1))
    return model


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 16, 5, 8, 12, generator=generator)
    context = torch.randn(2, 33, 64, generator=generator)
    context[:, 20:] = 0  # padding rows are zero and attended
    return latents, context


# The peers compute the angles timestep * frequency in float32, Wan and we in float64. At timestep 1000 that alone is a
# relative error of some 5e-6 between the peers themselves, at 1 it is below rounding: the tight test stands there.
SMALL = torch.tensor([0.25, 1.0])
LARGE = torch.tensor([437.0, 999.0])


@pytest.fixture(scope="module")
def diffusers(ours: WanTransformer) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from diffusers import WanTransformer3DModel

    theirs = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=128,
        text_dim=64,
        freq_dim=256,
        ffn_dim=320,
        num_layers=CONFIG.num_layers,
    ).eval()
    theirs.load_state_dict({diffusers_name(name): tensor for name, tensor in ours.state_dict().items()})
    return lambda latents, timestep, context: theirs(latents, timestep, context, return_dict=False)[0]


@pytest.fixture(scope="module")
def comfyui(comfy: object, ours: WanTransformer) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    import comfy.ldm.wan.model
    import comfy.ops

    theirs = comfy.ldm.wan.model.WanModel(
        dim=256,
        ffn_dim=320,
        num_heads=2,
        num_layers=CONFIG.num_layers,
        text_dim=64,
        operations=comfy.ops.manual_cast,
        dtype=torch.float32,
        device="cpu",
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    return theirs


@pytest.mark.parametrize("peer", ["diffusers", "comfyui"])
@torch.no_grad()
def test_agrees_with_peer(
    peer: str, ours: WanTransformer, inputs: tuple[Tensor, Tensor], request: pytest.FixtureRequest
) -> None:
    theirs = request.getfixturevalue(peer)
    latents, context = inputs
    actual, expected = ours(latents, SMALL, context), theirs(latents, SMALL, context)
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) < TOLERANCE


@torch.no_grad()
def test_large_timesteps_differ_no_more_than_the_peers_do(
    ours: WanTransformer, inputs: tuple[Tensor, Tensor], diffusers: Callable, comfyui: Callable
) -> None:
    latents, context = inputs
    actual, a, b = (model(latents, LARGE, context) for model in (ours, diffusers, comfyui))
    between_peers = relative_error(a, b)
    assert between_peers < 1e-5
    assert relative_error(actual, a) < 1.5 * between_peers
    assert relative_error(actual, b) < 1.5 * between_peers


def test_timestep_embedding_is_the_published_formula() -> None:
    """cos then sin of t * 10000^(-i/128), in float64 (Wan2.1 wan/modules/model.py, sinusoidal_embedding_1d)."""
    values = sinusoidal(torch.tensor([999.0]), 256)[0]
    for i in (0, 1, 64, 127):
        angle = 999.0 * 10000.0 ** (-i / 128)
        assert values[i].item() == pytest.approx(math.cos(angle), abs=1e-7)
        assert values[128 + i].item() == pytest.approx(math.sin(angle), abs=1e-7)


def test_refuses_latents_that_do_not_fill_a_patch(ours: WanTransformer) -> None:
    with pytest.raises(ValueError, match=r"\(3, 7, 8\) are not multiples of the patch"):
        ours(torch.zeros(1, 16, 3, 7, 8), torch.zeros(1), torch.zeros(1, 4, 64))
