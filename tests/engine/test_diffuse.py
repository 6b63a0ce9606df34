"""The border of the sampler: noise, emptiness, hand-over, masks, cancel. A tiny random Wan does the denoising."""

import logging

import pytest
import torch
from torch import Tensor, nn

from lightx2v.config import Sampling
from lightx2v.diffuse import Hooks, diffuse, noise_like
from lightx2v.guidance import Conditioning
from lightx2v.latents import WAN21
from lightx2v.models.wan.config import WanConfig
from lightx2v.models.wan.transformer import WanTransformer
from lightx2v_kernels import select

EMPTY = torch.zeros(1, 16, 2, 4, 6)
COND = Conditioning(torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(3)))
UNCOND = Conditioning(torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(4)))
EULER = Sampling(seed=7, steps=6, cfg_scale=3.0, scheduler="euler")


@pytest.fixture(scope="module")
def transformer() -> nn.Module:
    config = WanConfig(128, 64, 2, 16, 16, 32, 64, (1, 2, 2))
    torch.manual_seed(0)
    kernels = select(device=torch.device("cpu"), dtype=torch.float32, head_dim=128)
    return WanTransformer(config, kernels).eval().requires_grad_(False)


def run(transformer: nn.Module, latents: Tensor = EMPTY, sampling: Sampling = EULER, **options) -> Tensor:
    options.setdefault("uncond", UNCOND)
    uncond = options.pop("uncond")
    return diffuse(transformer, latents, sampling, COND, uncond, space=WAN21, **options)


def part(**changes) -> Sampling:
    return Sampling(**{**EULER.__dict__, **changes})


def test_same_seed_same_latents_and_nothing_global_is_seeded(transformer: nn.Module) -> None:
    before = torch.random.get_rng_state()
    first, again, other = run(transformer), run(transformer), run(transformer, sampling=part(seed=8))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.1
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.shape == EMPTY.shape
    assert first.dtype == torch.float32


def test_halves_make_the_whole(transformer: nn.Module) -> None:
    whole = run(transformer)
    half = run(transformer, sampling=part(end_step=3))
    rest = run(transformer, half, part(start_step=3, add_noise=False))
    assert (half - whole).abs().max() > 0.1
    torch.testing.assert_close(rest, whole, rtol=1e-4, atol=1e-4)


def test_empty_latents_may_have_other_channels(transformer: nn.Module) -> None:
    for empty in (torch.zeros(1, 4, 2, 4, 6), torch.zeros(1, 48, 2, 4, 6)):
        assert torch.equal(run(transformer, empty), run(transformer))
    assert run(transformer, torch.zeros(1, 4, 4, 6)).shape == (1, 16, 1, 4, 6)


def test_wrong_latents_are_refused(transformer: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"\(1, 48, 2, 4, 6\); expected \(B, 16, T, H, W\)"):
        run(transformer, torch.ones(1, 48, 2, 4, 6))


def test_batch_entries_can_be_cut_out(transformer: nn.Module) -> None:
    batch = noise_like(torch.zeros(3, 16, 2, 4, 6), 7)
    torch.testing.assert_close(noise_like(EMPTY, 7, [0]), batch[:1])
    cut = noise_like(torch.zeros(2, 16, 2, 4, 6), 7, [2, 0])
    assert torch.equal(cut, torch.cat([batch[2:], batch[:1]]))


def test_mask_keeps_what_it_covers(transformer: nn.Module) -> None:
    clean = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 1, 2, 4, 6)
    mask[:, :, 0] = 0
    out = run(transformer, clean, mask=mask)
    torch.testing.assert_close(out[:, :, 0], clean[:, :, 0], rtol=1e-5, atol=1e-5)
    assert (out[:, :, 1] - clean[:, :, 1]).abs().max() > 0.1


def test_cfg_one_runs_the_conditional_pass_only(transformer: nn.Module) -> None:
    calls = []
    handle = transformer.register_forward_hook(lambda *a: calls.append(1))
    try:
        run(transformer, sampling=part(cfg_scale=1.0), uncond=None)
        assert len(calls) == 6
        run(transformer)
        assert len(calls) == 6 + 12
    finally:
        handle.remove()


def test_guidance_needs_a_negative(transformer: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"cfg_scale=3\.0 needs a negative prompt"):
        run(transformer, uncond=None)


class Cancelled(Exception):
    pass


def test_cancel_within_a_step(transformer: nn.Module) -> None:
    blocks = []

    def cancel() -> None:
        blocks.append(1)
        if len(blocks) == 7:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(transformer, hooks=Hooks(on_block=cancel))
    assert len(blocks) == 7  # 2 blocks, 2 passes a step: the fourth block of the second step never ran
    assert torch.equal(run(transformer), run(transformer))


def test_steps_are_counted_over_the_whole_schedule(transformer: nn.Module) -> None:
    seen = []
    run(
        transformer, sampling=part(start_step=2, end_step=4), hooks=Hooks(lambda s, x0: seen.append((s.index, s.total)))
    )
    assert seen == [(2, 6), (3, 6)]


def test_four_distilled_steps_are_four_calls(transformer: nn.Module) -> None:
    seen = []
    sampling = Sampling(scheduler="distilled", cfg_scale=1.0)
    run(transformer, sampling=sampling, uncond=None, hooks=Hooks(lambda s, x0: seen.append(s.timestep)))
    assert seen == pytest.approx([1000.0, 937.5, 833.3333, 625.0], abs=1e-3)


def test_few_steps_with_guidance_are_warned_of(transformer: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run(transformer, sampling=part(steps=4))
        assert "4 steps with cfg 3" in caplog.text
        caplog.clear()
        run(transformer, sampling=part(steps=9))
        assert not caplog.text
