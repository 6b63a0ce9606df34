"""Our Wan transformer against diffusers' and ComfyUI's own, float32 on the CPU, random weights.

Large q/k norm weights keep attention from being flat, and the grid has three different sizes, so that a swapped
axis shows: RoPE with T and H swapped is a relative error of about 5e-6 on flat attention.
"""

import pytest
import torch
from closeness import relative_error
from torch import Tensor

from lightx2v.models.wan.spec import WanConfig
from lightx2v.models.wan.transformer import WanTransformer
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
            parameter.copy_(2 + 0.3 * noise)
        elif ".norm3." in name:
            parameter.copy_((1 if name.endswith("weight") else 0) + 0.2 * noise)
        elif name.endswith("modulation"):
            parameter.copy_(0.3 * noise)
        else:
            parameter.copy_(noise * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1))
    return model


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 16, 5, 8, 12, generator=generator)
    context = torch.randn(2, 33, 64, generator=generator)
    context[:, 20:] = 0  # padding rows are zero and attended
    return latents, torch.tensor([437.0, 999.0]), context


def test_agrees_with_diffusers(ours: WanTransformer, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    from diffusers import WanTransformer3DModel

    theirs = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=128,
        text_dim=64,
        freq_dim=256,
        ffn_dim=320,
        num_layers=3,
    ).eval()
    theirs.load_state_dict({diffusers_name(name): tensor for name, tensor in ours.state_dict().items()})
    latents, timestep, context = inputs
    with torch.no_grad():
        expected = theirs(latents, timestep, context, return_dict=False)[0]
        actual = ours(latents, timestep, context)
    print(relative_error(actual, expected)); assert actual.shape == expected.shape
    assert relative_error(actual, expected) < TOLERANCE


def test_agrees_with_comfyui(comfy: object, ours: WanTransformer, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    import comfy.ldm.wan.model
    import comfy.ops

    theirs = comfy.ldm.wan.model.WanModel(
        dim=256,
        ffn_dim=320,
        num_heads=2,
        num_layers=3,
        text_dim=64,
        operations=comfy.ops.manual_cast,
        dtype=torch.float32,
        device="cpu",
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    latents, timestep, context = inputs
    with torch.no_grad():
        expected = theirs(latents, timestep, context)
        actual = ours(latents, timestep, context)
    assert relative_error(actual, expected) < TOLERANCE


def test_refuses_latents_that_do_not_fill_a_patch(ours: WanTransformer) -> None:
    with pytest.raises(ValueError, match=r"\(3, 7, 8\) are not multiples of the patch"):
        ours(torch.zeros(1, 16, 3, 7, 8), torch.zeros(1), torch.zeros(1, 4, 64))
