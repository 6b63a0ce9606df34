"""Stage 1 for HunyuanVideo-1.5: its autoencoder, a latent cell for 16 x 16 pixels.

Nine blocks at the latents may not be narrower than twice the latents' channels, which leaves little room for the other
levels. So kernels rest in 8 bits, and learn so: after each step they are rounded to what the file holds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from demo.stages.fp8 import FP8
from demo.stages.lean import EDGE_FORMS, choose_forms, make_lean
from demo.stages.run import Run
from demo.stages.vae import Autoencoder, Phase, start_convolutions
from demo.world import FRAMES, HEIGHT, WIDTH
from lightx2v.vae.hunyuan15 import AttentionBlock, HunyuanVAE, HunyuanVAEConfig, ResidualBlock

WIDTHS = (16, 32, 32, 64, 64)  # published: 128, 256, 512, 1024, 1024; the last may not be less than twice the latents'
SIZES = ((16, 64, 9), (32, 32, 9), (64, 16, 5))
# Small batches: at half these widths a step of an H100 took 46 ms for 24 windows of the second phase, 90 for 8 clips.
PHASES = (Phase((5, 32, 32), 32, 0.1), Phase((9, 64, 64), 12, 0.75), Phase((FRAMES, HEIGHT, WIDTH), 4, 1.0))


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


def is_rounded(name: str, weight: Tensor) -> bool:
    """Whether a weight is float8_e4m3fn in the file: kernels of 3x3x3, but for those that read and make pixels."""
    return weight.ndim == 5 and weight.shape[-1] == 3 and not name.startswith(("encoder.conv_in", "decoder.conv_out"))


@torch.no_grad()
def round_kernels(vae: HunyuanVAE) -> None:
    """Keep of the kernels what float8_e4m3fn does, without scales. Never waits for the device."""
    for name, weight in vae.named_parameters():
        if is_rounded(name, weight):
            weight.copy_(weight.to(FP8))


def speed_up(vae: HunyuanVAE, run: Run) -> None:
    """On a GPU, take the layers' fast forms (see demo.stages.lean)."""
    if run.device.type == "cuda":
        forms = choose_forms(SIZES, run.device, EDGE_FORMS)
        make_lean(vae, forms)
        run.log(f"convolution forms {forms}")


def _leave(vae: HunyuanVAE, mean: Tensor, std: Tensor) -> None:
    """Beside the convolutions at the latents are shortcuts without weights: nothing there can be rescaled."""


HUNYUAN15 = Autoencoder(
    _empty, _start, is_matrix, speed_up, _leave, pull=0.02, phases=PHASES, graph=True, round=round_kernels
)
