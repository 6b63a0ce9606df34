"""The shipped checkpoints: real layouts, small files, and clips that show what was asked for."""

import pytest
import torch

from demo import report
from demo.shipped import BASE, MODELS
from demo.stages.export import TEXT_ENCODER, TOKENIZER, TRANSFORMER, VAE
from demo.world import render, sample_scene
from lightx2v.checkpoint import assign, read_header
from lightx2v.identify import identify
from lightx2v.latents import WAN21
from lightx2v.text.layout import from_original
from lightx2v.vae.wan import WanVAE, WanVAEConfig

FOLDER = BASE
MEGABYTE = 1_000_000


def test_files_are_small_and_half_precision():
    sizes = {name: (FOLDER / name).stat().st_size for name in (TRANSFORMER, TEXT_ENCODER, VAE, TOKENIZER)}
    assert sum(sizes.values()) < 31 * MEGABYTE, sizes
    for name in (TRANSFORMER, TEXT_ENCODER, VAE):
        assert {info.dtype for info in read_header(FOLDER / name).tensors.values()} == {torch.float16}


def test_everything_that_is_shipped_is_small():
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) < 51 * MEGABYTE


def test_the_transformer_is_recognised_as_wan():
    info = identify(FOLDER / TRANSFORMER)
    assert info.spec.name == "wan2.1_t2v"
    assert (info.config.hidden_size, info.config.num_layers, info.config.text_dim) == (256, 6, 4096)


def test_the_text_encoder_has_wans_names():
    names = read_header(FOLDER / TEXT_ENCODER).tensors
    assert names["token_embedding.weight"].shape[1] == 4096
    assert "blocks.1.pos_embedding.embedding.weight" in names and "blocks.0.ffn.gate.0.weight" in names
    assert all(from_original(name) != name for name in names)


@torch.no_grad()
def test_raw_latents_have_wans_statistics():
    header = read_header(FOLDER / VAE)
    with torch.device("meta"):
        vae = WanVAE(WanVAEConfig(base_channels=header.tensors["decoder.head.0.gamma"].shape[0]))
    assign(vae, header, dtype=torch.float32, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(4)
    # The channels follow the backdrop's brightness, so few clips would miss the mean by chance.
    clips = render(sample_scene(32, generator), generator).frames
    raw = torch.cat([vae.posterior(clip)[0] for clip in clips.split(1)])
    normal = WAN21.normalize(raw).transpose(0, 1).flatten(1)
    assert normal.mean(1).abs().max() < 0.5 and (normal.std(1) - 1).abs().max() < 0.35
    made = torch.cat([vae.reconstruct(latents) for latents in raw[:2].split(1)])
    psnr = 10 * torch.log10(4 / (made - clips[:2]).square().mean())
    assert psnr > 28


def test_clips_show_what_was_asked_for(capsys):
    """Three held-out pairs through the engine's own pipeline."""
    import json

    status = report.main(["--count", "3", "--json"])
    rates = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == 0 and rates["count"] == 3
    assert rates["colour"] == rates["shape"] == rates["direction"] == 1


def test_a_prompt_outside_the_grammar_is_refused(capsys):
    assert report.main(["--prompt", "a dragon breathes fire"]) == 2
    assert "exactly one shape" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "401"])
def test_the_number_of_pairs_is_limited(count, capsys):
    assert report.main(["--count", count]) == 2
    assert "1 to 400 exist" in capsys.readouterr().err
