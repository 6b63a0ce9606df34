"""Report: what ran travels with the latent, through nodes that know nothing of it."""

import pytest
import torch

from host.graphs import base, keep, native_sampler, node, our_sampler

pytestmark = pytest.mark.host


def test_a_report_of_sampling_and_decoding(host, tiny_models) -> None:
    graph = {
        **base(tiny_models),
        "sample": our_sampler(steps=2, seed=31, offload="block"),
        "vae": node("LightX2VLoadVAE", vae_name=tiny_models.vae),
        "decode": node("LightX2VDecode", latent=["sample", 0], vae=["vae", 0]),
        "after_sample": node("LightX2VReport", latent=["sample", 0]),
        "after_decode": node("LightX2VReport", latent=["decode", 1]),
    }
    result = host.run(keep(graph, "sample")).expect()
    sampled, decoded = result.text("after_sample"), result.text("after_decode")
    model, kernels, memory, stages, *_ = sampled.splitlines()
    assert model.startswith(f"model: {tiny_models.diffusion_model.rsplit('/')[-1]}: Wan2.1 T2V")
    assert "attention torch_sdpa" in kernels and kernels.endswith("computing in float32 on the CPU")
    assert memory.startswith("memory: 0 of 2 blocks stay on the GPU, 2 pass through it")
    assert stages.startswith("stages: sample ") and "decode" not in sampled
    assert "decoded whole frames" in decoded and ", decode " in decoded and memory in decoded


def test_a_report_through_nodes_of_comfyui(host, tiny_models) -> None:
    """KSampler goes on from our latent and passes on what it does not know; without it, it samples the same."""
    graph = {
        **base(tiny_models),
        "first": our_sampler(end_at_step=2, seed=32),
        "native": base(tiny_models)["native"],
        "second": native_sampler("first", start=2, noise_seed=32),
        "third": our_sampler("second", start_at_step=3, add_noise=False, seed=32),
        "report": node("LightX2VReport", latent=["third", 0]),
        "nothing": node("LightX2VReport", latent=["empty", 0]),
    }
    result = host.run(keep(graph, "second")).expect()
    assert result.text("report").count("model: ") == 2 and "stages: sample " in result.text("report")
    assert "this latent comes from no sampler of LightX2V" in result.text("nothing")
    assert torch.isfinite(result.kept("keep_second")["samples"]).all()
