"""The engine on a CUDA device against itself on the CPU, and what it takes of the device's memory."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from closeness import relative_error
from lightx2v import LightX2VPipeline
from lightx2v.blocks import Block, RunBlocks, added, run_blocks
from lightx2v.checkpoint import Header
from lightx2v.config import Sampling
from lightx2v.diffuse import Model, Start, diffuse
from lightx2v.guidance import Conditioning
from lightx2v.identify import CheckpointInfo
from lightx2v.memory import fused_by, transformer_activation_bytes
from lightx2v.models import ModelSpec, specs
from lightx2v.models.wan.config import WanConfig
from lightx2v.models.wan.transformer import WanTransformer
from lightx2v.vae import wan as wan_vae
from lightx2v_kernels import select

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEMO = Path(__file__).parents[2] / "demo" / "models" / "wan2.1_t2v"
WAN_1_3B = WanConfig(1536, 8960, 30, 16, 16, 4096, 256, (1, 2, 2))


def random_transformer(config: WanConfig, device: str, dtype: torch.dtype, attention: str = "auto") -> WanTransformer:
    """The same weights for the same config, drawn on the CPU."""
    kernels = select(attention=attention, device=torch.device(device), dtype=dtype, head_dim=128)
    generator = torch.Generator().manual_seed(0)
    model = WanTransformer(config, kernels).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
        elif ".norm_" in name:
            parameter.fill_(1.5)
    return model.to(device, dtype)


def test_half_precision_on_the_gpu_is_as_close_as_on_the_cpu() -> None:
    config = replace(WAN_1_3B, hidden_size=256, ffn_size=896, num_layers=3)
    generator = torch.Generator().manual_seed(1)
    latents, context = torch.randn(1, 16, 5, 16, 24, generator=generator), torch.randn(1, 64, 4096, generator=generator)
    timestep = torch.tensor([600.0])
    truth = random_transformer(config, "cpu", torch.float32)(latents, timestep, context)
    plain = random_transformer(config, "cpu", torch.bfloat16, "reference")(latents, timestep, context)
    gpu = random_transformer(config, "cuda", torch.bfloat16)
    actual = gpu(latents.cuda(), timestep.cuda(), context.cuda()).float().cpu()
    assert relative_error(actual, truth) <= 2 * relative_error(plain.float(), truth)


def demo_video(device: str, offload: bool = False) -> torch.Tensor:
    pipe = LightX2VPipeline(DEMO, device=device)
    pipe.create_generator(infer_steps=20, height=128, width=128, num_frames=17, guidance_scale=4.0)
    if offload:
        pipe.enable_offload(cpu_offload=True, offload_granularity="model")
    arguments = {"seed": 7, "prompt": "a red circle moves right over a white background", "progress": False}
    video = pipe.generate(**arguments, return_result_tensor=True)["video"]
    assert video is not None
    return video


@pytest.mark.skipif(not DEMO.is_dir(), reason="needs the demo models")
def test_the_same_video_on_both_devices() -> None:
    cpu, gpu = demo_video("cpu"), demo_video("cuda")
    assert (cpu - gpu).abs().mean() < 0.02
    assert torch.equal(demo_video("cuda", offload=True), gpu)


@pytest.mark.skipif(not DEMO.is_dir(), reason="needs the demo models")
def test_decoding_takes_no_more_memory_for_a_longer_video() -> None:
    vae = wan_vae.load(DEMO / "Wan2.1_VAE.safetensors", dtype=torch.bfloat16, device="cuda")

    def peak(frames: int) -> int:
        raw = torch.randn(1, 16, frames, 30, 52, generator=torch.Generator().manual_seed(0))
        out = torch.empty(1, 3, 4 * frames - 3, 240, 416)
        wan_vae.decode(vae, raw, out=out)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        wan_vae.decode(vae, raw, out=out)
        torch.cuda.synchronize()
        assert out.isfinite().all()
        return torch.cuda.max_memory_allocated() - before

    assert peak(21) < 1.1 * peak(5)


def test_activation_estimate_holds_at_480p() -> None:
    """The peak of a pass over 832x480, 81 frames is below the estimate and near it; layers do not add to it."""
    config = replace(WAN_1_3B, num_layers=2)
    model = random_transformer(config, "cuda", torch.bfloat16)
    latents, context = torch.randn(1, 16, 21, 60, 104, device="cuda"), torch.randn(1, 512, 4096, device="cuda")
    none, spec = Path("none"), spec_named("wan2.1_t2v_1.3b")
    info = CheckpointInfo(none, Header(none, {}, {}), spec, config, torch.bfloat16)
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.inference_mode():
            model(latents, torch.tensor([500.0], device="cuda"), context)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    estimate = transformer_activation_bytes(info, latents.shape, torch.bfloat16, fused=fused_by(model))
    print(f"peak {peak / 1e9:.2f} GB, estimate {estimate / 1e9:.2f} GB")
    assert 0.4 * estimate < peak < estimate


def test_what_is_kept_from_step_to_step_changes_no_bit_and_goes() -> None:
    assert_kept("cuda", torch.bfloat16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    assert_kept("cuda", torch.bfloat16)
    assert torch.cuda.memory_allocated() <= before


def spec_named(name: str) -> ModelSpec:
    return next(spec for spec in specs() if spec.name == name)


def assert_kept(device: str, dtype: torch.dtype) -> None:
    """Three guided steps at 14B's width with and without keeping; and blocks that add at once beside those that leave
    it to the next, as near to each other as rounding."""
    config = replace(WAN_1_3B, hidden_size=5120, ffn_size=2048, num_layers=3)
    network, generator = random_transformer(config, device, dtype), torch.Generator().manual_seed(1)
    cond, uncond = (Conditioning(torch.randn(1, 512, 4096, generator=generator)) for _ in range(2))
    place = torch.device(device)

    def made(keeps: bool, run: RunBlocks = run_blocks) -> torch.Tensor:
        model = Model(spec_named("wan2.1_t2v_14b"), place, lambda: network, keeps=keeps)
        sampling = Sampling(seed=7, steps=3, cfg_scale=3.0, scheduler="euler")
        return diffuse(model, Start(torch.zeros(1, 16, 3, 12, 20)), sampling, cond, uncond, run=run)

    def at_once(blocks: Sequence[Block], tokens: torch.Tensor, args: object) -> torch.Tensor:
        for block in blocks:
            tokens = added(block(tokens, args))
        return tokens

    kept = made(True)
    assert torch.equal(kept, made(False)) and relative_error(made(True, at_once), kept) < 0.01
