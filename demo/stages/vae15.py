"""Stage 1 for HunyuanVideo-1.5: its autoencoder, a latent cell for 16 x 16 pixels, as narrow as its shortcuts allow."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from demo.stages.lean import EDGE_FORMS, choose_forms, make_lean
from demo.stages.run import Run
from demo.stages.vae import Autoencoder, Phase, start_convolutions
from demo.world import FRAMES, HEIGHT, WIDTH
from lightx2v.vae.hunyuan15 import AttentionBlock, HunyuanVAE, HunyuanVAEConfig, ResidualBlock

WIDTHS = (8, 16, 16, 16, 64)  # published: 128, 256, 512, 1024, 1024; the last may not be less than twice the latents'
SIZES = ((8, 64, 9), (16, 32, 9), (64, 8, 5))
PHASES = (Phase((5, 32, 32), 48, 0.12), Phase((9, 64, 64), 24, 0.65), Phase((FRAMES, HEIGHT, WIDTH), 8, 1.0))


def _empty() -> HunyuanVAE:
    return HunyuanVAE(HunyuanVAEConfig(WIDTHS))


@torch.no_grad()
def _start(vae: HunyuanVAE, generator: torch.Generator) -> None:
    start_convolutions(vae, generator)
    for module in vae.modules():
        if isinstance(module, ResidualBlock):
            module.conv2.conv.weight.mul_(0.3)
        elif isinstance(module, AttentionBlock):
            nn.init.zeros_(module.proj_out.weight)
    vae.encoder.conv_out.conv.weight.mul_(0.3)
    # Start almost without posterior noise, or nothing is learnt.
    vae.encoder.conv_out.conv.bias[vae.config.latent_channels :] = -5.0


def is_matrix(name: str, weight: Tensor) -> bool:
    """Kernels wide enough to be orthogonalised."""
    wide = weight.ndim == 5 and min(weight.shape[0], weight[0].numel()) >= 16
    return wide and "gamma" not in name and name != "encoder.conv_in.conv.weight"


def speed_up(vae: HunyuanVAE, run: Run) -> None:
    """On a GPU, take the layers' fast forms (see demo.stages.lean)."""
    if run.device.type == "cuda":
        forms = choose_forms(SIZES, run.device, EDGE_FORMS)
        make_lean(vae, forms)
        run.log(f"convolution forms {forms}")


def _leave(vae: HunyuanVAE, mean: Tensor, std: Tensor) -> None:
    """Beside the convolutions at the latents are shortcuts without weights: nothing there can be rescaled."""


HUNYUAN15 = Autoencoder(_empty, _start, is_matrix, speed_up, _leave, pull=0.02, phases=PHASES, graph=True)
