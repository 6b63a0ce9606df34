"""Stage 5 for HunyuanVideo-1.5: what `demo.stages.evaluate` judges, of the files that `demo.stages.export15` wrote.

The GGUF file itself is judged clip by clip with `python -m demo.judge --variant hunyuan`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from demo.stages.evaluate import Loaded
from demo.stages.export15 import EXACT, TEXT_ENCODER, VAE
from demo.stages.gguf import round_q4_0
from demo.stages.t2v15 import is_rounded
from lightx2v.checkpoint import read_header
from lightx2v.guidance import Conditioning, Velocity
from lightx2v.models.hunyuan_video_15 import conditioning
from lightx2v.models.hunyuan_video_15.spec import IN_CHANNELS, keep_float32, read_config
from lightx2v.models.hunyuan_video_15.transformer import HunyuanTransformer
from lightx2v.text import qwen
from lightx2v.vae import hunyuan15
from lightx2v_kernels import references


def text_to_video(transformer: nn.Module) -> Velocity:
    """A transformer that is on its device already, as a function of values; no frames are given."""

    def velocity(latents: Tensor, timestep: float, cond: Conditioning) -> Tensor:
        batch = len(latents)
        t = torch.full((batch,), timestep, device=latents.device)
        nothing = latents.new_zeros(batch, IN_CHANNELS - latents.shape[1], *latents.shape[2:])
        asked = {**conditioning.arguments(cond.expand(batch), 0.0), "image": nothing}
        return transformer(latents, t, **asked).float()

    return velocity


def load_folder(folder: Path, device: torch.device, dtype: torch.dtype) -> Loaded:
    """Load the files of `export15`, the transformer with weights as Q4_0 keeps them, to compute in `dtype`."""
    weights = {name: value.float() for name, value in load_file(folder / EXACT).items()}
    round_q4_0([value for name, value in weights.items() if is_rounded(name, value)])
    transformer = HunyuanTransformer(read_config(read_header(folder / EXACT)), references())
    transformer.load_state_dict(weights)
    for name, weight in transformer.named_parameters():
        weight.data = weight.data.to(device, torch.float32 if keep_float32(name) else dtype)
    encoder = qwen.load(folder / TEXT_ENCODER, device=device)
    vae = hunyuan15.load(folder / VAE, dtype=torch.float32, device=device)
    return Loaded(transformer.eval().requires_grad_(False), encoder, vae.requires_grad_(False), text_to_video)
