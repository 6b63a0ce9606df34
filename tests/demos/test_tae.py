"""The small tiny autoencoder: near the full decode, told by its name, and made again by its stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from demo.stages.tae import MODEL, OUT, compare, main
from lightx2v.latents import WAN21
from lightx2v.vae.loading import identify_vae, load_vae
from lightx2v.vae.stream import decode


def test_the_shipped_one_is_near_the_full_decode() -> None:
    info = identify_vae(OUT, WAN21)
    assert info.tiny and OUT.stat().st_size <= 300_000
    vae = load_vae(identify_vae(MODEL / "Wan2.1_VAE.safetensors"), dtype=torch.float32, device="cpu")
    tae = load_vae(info, dtype=torch.float32, device="cpu")
    found = compare(vae, tae, 6, seed=91)
    assert found["psnr_db"] > 25
    full, tiny = found["full"], found["tiny"]
    assert isinstance(full, dict) and isinstance(tiny, dict)
    assert all(tiny[name] == full[name] == 1 for name in ("colour", "shape", "direction", "motion"))
    raw = torch.randn(1, 16, 2, 8, 8)
    assert (decode(tae, WAN21.denormalize(raw)) - decode(tae, raw)).abs().mean() > 0.1, (
        "the latents' space should matter"
    )


def test_the_stage_in_miniature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "taew2_1_new.safetensors"
    assert main(["--dry", "--out", str(path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["clips"] == 1 and report["bytes"] == path.stat().st_size == OUT.stat().st_size
    assert identify_vae(path).config == identify_vae(OUT).config
