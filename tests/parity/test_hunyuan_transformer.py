"""Our HunyuanVideo-1.5 transformer against diffusers' and ComfyUI's own, float32 on the CPU, random weights.

Large q/k norm weights keep attention from being flat, and the grid has three different sizes, so that a swapped axis
shows. What the peers differ in among themselves is stated where it stands.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from closeness import relative_error
from lightx2v.models.hunyuan_video_15.config import HunyuanConfig
from lightx2v.models.hunyuan_video_15.transformer import Conditioning, HunyuanTransformer
from tiny_hunyuan import CONFIG, DISTILLED, make_tiny, to_comfyui, to_diffusers

TOLERANCE = 1e-6
GRID = (3, 4, 6)
SMALL = torch.tensor([0.25, 1.0])
LARGE = torch.tensor([437.0, 999.0])


@dataclass(frozen=True)
class Inputs:
    latents: Tensor  # (2, 32, T, H, W)
    image: Tensor  # (2, 33, T, H, W): latents of the given frames, mask
    asked: Conditioning

    def all_channels(self) -> Tensor:
        return torch.cat([self.latents, self.image], 1)


def make_inputs(*, i2v: bool = False, glyphs: bool = True, padded: bool = False) -> Inputs:
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    image = torch.zeros(2, 33, *GRID)
    latents, start = randn(2, 32, *GRID), randn(2, 32, *GRID[1:])
    if i2v:
        image[:, :32, 0], image[:, 32, 0] = start, 1
    asked = Conditioning(
        text=randn(2, 11, CONFIG.text_dim),
        glyphs=randn(2, 7, CONFIG.glyph_dim) if glyphs else None,
        image=randn(2, 5, CONFIG.image_dim) if i2v else None,
    )
    if padded:
        text, quoted = torch.zeros(2, 11), torch.zeros(2, 7)
        text[0, :9], text[1, :4] = 1, 1
        quoted[0, :3] = 1  # the second sample quotes nothing
        asked = replace(asked, text_mask=text, glyphs_mask=quoted)
    return Inputs(latents, image, asked)


Peer = Callable[[Inputs, Tensor, Tensor | None], Tensor]


def make_diffusers(ours: HunyuanTransformer) -> Peer:
    from diffusers import HunyuanVideo15Transformer3DModel

    config = ours.config
    theirs = HunyuanVideo15Transformer3DModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_attention_heads=config.num_heads,
        num_layers=config.num_layers,
        text_embed_dim=config.text_dim,
        text_embed_2_dim=config.glyph_dim,
        image_embed_dim=config.image_dim,
        use_meanflow=config.reads_step_end,
    ).eval()
    theirs.load_state_dict(to_diffusers(ours.state_dict()))

    def call(given: Inputs, timestep: Tensor, step_end: Tensor | None) -> Tensor:
        asked, ones = given.asked, torch.ones(2, 11)
        glyphs = torch.zeros(2, 7, config.glyph_dim) if asked.glyphs is None else asked.glyphs
        valid = torch.ones(2, 7) if asked.glyphs_mask is None else asked.glyphs_mask
        return theirs(
            given.all_channels(),
            timestep,
            asked.text,
            ones if asked.text_mask is None else asked.text_mask,
            timestep_r=step_end,
            encoder_hidden_states_2=glyphs,
            encoder_attention_mask_2=valid * (asked.glyphs is not None),
            image_embeds=torch.zeros(2, 5, config.image_dim) if asked.image is None else asked.image,
            return_dict=False,
        )[0]

    return call


def make_comfyui(ours: HunyuanTransformer) -> Peer:
    """Sample by sample without padding, which is how ComfyUI's text encoder hands over its tokens: with a mask its mean
    of the prompt counts the padding (comfy/ldm/hunyuan_video/model.py, TokenRefiner)."""
    import comfy.ldm.hunyuan_video.model
    import comfy.ops

    config = ours.config
    theirs = comfy.ldm.hunyuan_video.model.HunyuanVideo(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        vec_in_dim=None,
        context_in_dim=config.text_dim,
        hidden_size=config.hidden_size,
        mlp_ratio=4.0,
        num_heads=config.num_heads,
        depth=config.num_layers,
        depth_single_blocks=0,
        axes_dim=[16, 56, 56],
        theta=256,
        patch_size=[1, 1, 1],
        qkv_bias=True,
        guidance_embed=False,
        byt5=True,
        meanflow=config.reads_step_end,
        use_cond_type_embedding=True,
        vision_in_dim=config.image_dim,
        operations=comfy.ops.manual_cast,
        dtype=torch.float32,
        device="cpu",
    ).eval()
    state = to_comfyui(ours.state_dict())
    if config.reads_step_end:
        # Here this release takes the mean of both timesteps' embeddings; the original and diffusers take their sum.
        # Twice each is a mean of the same size.
        state = {k: 2 * t if k.startswith(("time_in.out", "time_r_in.out")) else t for k, t in state.items()}
    theirs.load_state_dict(state)

    def call(given: Inputs, timestep: Tensor, step_end: Tensor | None) -> Tensor:
        rows = []
        for i, at in enumerate(timestep):
            asked = given.asked
            text = asked.text[i] if asked.text_mask is None else asked.text[i][asked.text_mask[i].bool()]
            glyphs = asked.glyphs if asked.glyphs is None else asked.glyphs[i]
            if glyphs is not None and asked.glyphs_mask is not None:
                glyphs = glyphs[asked.glyphs_mask[i].bool()]
            options: dict[str, object] = {}
            if step_end is not None:
                sigmas = torch.stack([at, step_end[i]]) / 1000
                options = {"sigmas": sigmas[:1], "sample_sigmas": sigmas}
            rows.append(
                theirs(
                    given.all_channels()[i : i + 1],
                    at[None],
                    text[None],
                    txt_byt5=None if glyphs is None else glyphs[None],
                    clip_fea=None if asked.image is None else asked.image[i : i + 1],
                    disable_time_r=step_end is None,
                    transformer_options=options,
                )
            )
        return torch.cat(rows)

    return call


PEERS = {"diffusers": make_diffusers, "comfyui": make_comfyui}
CASES = {
    "t2v": make_inputs(glyphs=False),
    "t2v quoting": make_inputs(),
    "t2v padded": make_inputs(padded=True),
    "i2v": make_inputs(i2v=True),
    "i2v padded": make_inputs(i2v=True, padded=True),
}


def run_ours(ours: HunyuanTransformer, given: Inputs, timestep: Tensor, step_end: Tensor | None = None) -> Tensor:
    return ours(given.latents, timestep, given.asked, image=given.image, step_end=step_end)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_agrees_with_peer(case: str, peer: str, comfy: object) -> None:
    ours, given = make_tiny(), CASES[case]
    theirs = PEERS[peer](ours)
    for timestep in (SMALL, LARGE):
        actual, expected = run_ours(ours, given, timestep), theirs(given, timestep, None)
        assert actual.shape == expected.shape == (2, 32, *GRID)
        assert relative_error(actual, expected) < TOLERANCE


@pytest.mark.parametrize("peer", PEERS)
@torch.no_grad()
def test_the_end_of_a_step_is_read(peer: str, comfy: object) -> None:
    ours, given, end = make_tiny(DISTILLED), CASES["i2v"], torch.tensor([0.125, 0.5])
    actual = run_ours(ours, given, SMALL, end)
    assert relative_error(actual, PEERS[peer](ours)(given, SMALL, end)) < TOLERANCE
    assert relative_error(run_ours(ours, given, SMALL, end / 2), actual) > 1e-4


@torch.no_grad()
def test_the_peers_agree_among_themselves(comfy: object) -> None:
    """To some 5e-7, at small and large timesteps alike: less than that is not asked of us."""
    ours, given = make_tiny(), CASES["i2v"]
    for timestep in (SMALL, LARGE):
        a, b = (make(ours)(given, timestep, None) for make in PEERS.values())
        assert relative_error(a, b) < TOLERANCE


@torch.no_grad()
def test_padding_is_as_if_it_were_not_there() -> None:
    """A sample among longer ones is, to rounding, what it is alone; what its padding holds changes nothing at all."""
    ours, given = make_tiny(), CASES["i2v padded"]
    both, asked = run_ours(ours, given, SMALL), given.asked
    assert asked.text_mask is not None and asked.image is not None
    alone = Conditioning(asked.text[1:, :4], image=asked.image[1:])
    one = ours(given.latents[1:], SMALL[1:], alone, image=given.image[1:])
    assert relative_error(both[1:], one) < TOLERANCE
    noise = torch.where(asked.text_mask[..., None] > 0, asked.text, 1e3)
    assert torch.equal(run_ours(ours, replace(given, asked=replace(asked, text=noise)), SMALL), both)


@torch.no_grad()
def test_the_walk_sees_video_and_text_in_one_tensor() -> None:
    ours, given = make_tiny(), CASES["t2v"]
    seen = []

    def walk(blocks, tokens, args):  # type: ignore[no-untyped-def]
        for block in blocks:
            before = tokens.clone()
            after = block(tokens, args)
            assert torch.equal(tokens, before)  # caches keep what they hand in
            seen.append(tokens.shape)
            tokens = after
        return tokens

    changed = ours(given.latents, SMALL, given.asked, walk, image=given.image)
    assert torch.equal(changed, run_ours(ours, given, SMALL))
    assert seen == [(2, 3 * 4 * 6 + 11, 256)] * 3


@pytest.mark.parametrize(
    ("channels", "config", "end", "complaint"),
    [
        (32, CONFIG, None, "32 input channels given, the model reads 65"),
        (65, CONFIG, torch.zeros(1), "reads one timestep a step: step_end must not be given"),
        (65, DISTILLED, None, "reads the timestep that a step goes to: step_end must be given"),
    ],
)
def test_refuses_inputs_that_do_not_fit(
    channels: int, config: HunyuanConfig, end: Tensor | None, complaint: str
) -> None:
    asked = Conditioning(torch.zeros(1, 4, CONFIG.text_dim))
    with pytest.raises(ValueError, match=complaint):
        make_tiny(config)(torch.zeros(1, channels, 2, 4, 4), torch.zeros(1), asked, step_end=end)


def test_refuses_a_prompt_without_tokens() -> None:
    asked = Conditioning(torch.zeros(1, 4, CONFIG.text_dim), text_mask=torch.zeros(1, 4))
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        make_tiny()(torch.zeros(1, 65, 2, 4, 4), torch.zeros(1), asked)
