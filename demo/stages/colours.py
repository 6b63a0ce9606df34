"""How the trained latents look: a linear map to colours for previews, carried in the transformer file's metadata."""

from __future__ import annotations

import os
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from demo.grammar import sample_attributes
from demo.world import render, scene_of
from lightx2v.latents import WAN21
from lightx2v.preview import Colours
from lightx2v.vae.wan import WanVAE

CLIPS = 48


@torch.no_grad()
def fit_colours(vae: WanVAE, device: torch.device, seed: int = 0) -> Colours:
    """Least squares from normalised latents to the mean colour of the pixels under each latent cell."""
    rng = random.Random(seed)
    attributes = [sample_attributes(rng) for _ in range(CLIPS)]
    frames = render(scene_of(attributes, device), torch.Generator(device).manual_seed(seed)).frames
    latents = torch.cat([WAN21.normalize(vae.posterior(part)[0]) for part in frames.split(8)])
    cells = F.avg_pool3d(frames, (1, 8, 8))  # (B, 3, F, h, w)
    later = F.avg_pool3d(cells[:, :, 1:], (4, 1, 1))
    seen = torch.cat([cells[:, :, :1], later], dim=2).movedim(1, -1).reshape(-1, 3)
    rows = latents.movedim(1, -1).reshape(-1, WAN21.channels)
    rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
    solution = torch.linalg.lstsq(rows.double().cpu(), seen.double().cpu()).solution
    *factors, bias = [[round(value, 4) for value in row] for row in solution.tolist()]
    return Colours(factors, bias)


def write_colours(transformer: Path, colours: Colours) -> None:
    """Put the colours into the metadata of a transformer file; it is replaced whole."""
    fresh = transformer.with_suffix(".tmp")
    save_file(load_file(transformer), fresh, metadata={"format": "pt", **colours.to_metadata()})
    os.replace(fresh, transformer)
