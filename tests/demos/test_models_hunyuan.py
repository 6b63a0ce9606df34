"""The small HunyuanVideo-1.5, where there is one: real layouts, small files, and clips that show what was asked for."""

import json

import pytest
import torch

from demo import report
from demo.shipped import HUNYUAN
from demo.stages.export15 import TEXT_ENCODER, TRANSFORMER, VAE
from demo.stages.t2v15 import CONFIG
from demo.stages.vae15 import WIDTHS
from demo.world import render, sample_scene
from lightx2v.checkpoint import read_header
from lightx2v.identify import identify
from lightx2v.text import hunyuan15 as text15
from lightx2v.vae import hunyuan15 as vae15
from lightx2v.vae.hunyuan15 import config_from_header

MEGABYTE = 1_000_000
pytestmark = pytest.mark.skipif(
    not HUNYUAN.is_dir(), reason=f"no {HUNYUAN.name} in demo/models yet: docs/demo.md says how one is trained, on a GPU"
)


def test_files_are_small():
    assert sum(path.stat().st_size for path in HUNYUAN.rglob("*") if path.is_file()) < 7 * MEGABYTE
    dtypes = [{info.dtype for info in read_header(HUNYUAN / name).tensors.values()} for name in (TEXT_ENCODER, VAE)]
    assert dtypes == [{torch.float16}, {torch.float16, torch.float8_e4m3fn}]


def test_the_parts_are_recognised():
    info = identify(HUNYUAN / TRANSFORMER)
    assert info.spec.name == "hunyuan1.5" and info.config == CONFIG
    assert {each.packed.scheme for each in info.header.tensors.values() if each.packed} == {"gguf"}
    assert config_from_header(read_header(HUNYUAN / VAE)).widths == WIDTHS
    encoder = text15.load(HUNYUAN / TEXT_ENCODER, None)
    assert encoder.condition("a red circle").context.shape[2] == CONFIG.text_dim
    with pytest.raises(ValueError, match="byT5"):
        encoder.condition('a red circle says "OPEN"')


@torch.no_grad()
def test_the_autoencoder_keeps_what_is_drawn():
    vae = vae15.load(HUNYUAN / VAE, dtype=torch.float32, device="cpu")
    generator = torch.Generator().manual_seed(4)
    clips = render(sample_scene(16, generator), generator).frames
    raw = torch.cat([vae.posterior(clip)[0] for clip in clips.split(1)])
    normal = vae.space.normalize(raw).transpose(0, 1).flatten(1)
    assert normal.mean(1).abs().max() < 0.6 and (normal.std(1) - 1).abs().max() < 0.5
    made = torch.cat([vae.reconstruct(latents) for latents in raw[:4].split(1)])
    assert 10 * torch.log10(4 / (made - clips[:4]).square().mean()) > 26


def test_clips_show_what_was_asked_for(capsys):
    """Three held-out pairs through the engine's own pipeline."""
    status = report.main(["--variant", "hunyuan", "--count", "3", "--json"])
    rates = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == 0 and rates["count"] == 3
    assert rates["colour"] == rates["shape"] == rates["direction"] == 1
