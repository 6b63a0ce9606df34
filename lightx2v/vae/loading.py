"""One door for the VAEs: what a file is, which latents it speaks, and its network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lightx2v.checkpoint import CheckpointError, read_header
from lightx2v.latents import LatentFormat
from lightx2v.vae import hunyuan15, tae, wan, wan22
from lightx2v.vae.layouts import PREFIXES, require_any_layout

VAE = wan.WanVAE | wan22.Wan22VAE | hunyuan15.HunyuanVAE | tae.TinyVAE
FullVAE = wan.WanVAE | wan22.Wan22VAE  # those that encode clips of which only the ends are given
Config = wan.WanVAEConfig | wan22.Wan22VAEConfig | hunyuan15.HunyuanVAEConfig | tae.TAEConfig


@dataclass(frozen=True)
class VAEInfo:
    """What a VAE's file says about itself."""

    path: Path
    config: Config

    @property
    def tiny(self) -> bool:
        """Whether it only approximates the model's own VAE."""
        return isinstance(self.config, tae.TAEConfig)

    @property
    def name(self) -> str:
        if isinstance(self.config, tae.TAEConfig):
            return f"tiny autoencoder {self.config.kind}"
        if isinstance(self.config, hunyuan15.HunyuanVAEConfig):
            return "HunyuanVideo-1.5 VAE"
        return "Wan2.2 VAE" if isinstance(self.config, wan22.Wan22VAEConfig) else "Wan2.1 VAE"

    @property
    def space(self) -> LatentFormat:
        """The latents that it encodes to and decodes from."""
        if isinstance(self.config, tae.TAEConfig):
            return tae.KINDS[self.config.kind].space
        if isinstance(self.config, hunyuan15.HunyuanVAEConfig):
            return hunyuan15.HunyuanVAE.space
        return (wan22.Wan22VAE if isinstance(self.config, wan22.Wan22VAEConfig) else wan.WanVAE).space

    def network(self) -> VAE:
        """The network with weights of its own making; on the meta device where that is the current one."""
        config = self.config
        if isinstance(config, tae.TAEConfig):
            return tae.TinyVAE(config)
        if isinstance(config, hunyuan15.HunyuanVAEConfig):
            return hunyuan15.HunyuanVAE(config)
        return wan22.Wan22VAE(config) if isinstance(config, wan22.Wan22VAEConfig) else wan.WanVAE(config)


def identify_vae(path: str | Path, space: LatentFormat | None = None) -> VAEInfo:
    """Recognise a VAE from its header, and a tiny autoencoder also from its name, without reading weights.

    space: the latents of the model that it is for, if there is one already.
    Raises CheckpointError, which says what the file is, for anything but a Wan2.1 VAE (LightVAE among them), a Wan2.2
    VAE, a HunyuanVideo-1.5 VAE or a tiny autoencoder of `tae.KINDS`, and for a VAE of other latents than `space`.
    """
    header = read_header(path).without_prefix(*PREFIXES)
    config: Config
    if tae.is_tiny(header):
        config = tae.config_from_header(header)
    elif hunyuan15.is_hunyuan15(header):
        config = hunyuan15.config_from_header(header)
    elif require_any_layout(header) == wan22.Wan22VAE.space:
        config = wan22.config_from_header(header)
    else:
        config = wan.config_from_header(header)
    info = VAEInfo(Path(path), config)
    if space is not None and info.space != space:
        raise CheckpointError(
            f"{path}: this is a {info.name}, with {info.space.channels} latent channels; the model has "
            f"{space.channels}: choose the VAE that belongs to the model"
        )
    return info


def load_vae(info: VAEInfo, *, dtype: torch.dtype, device: torch.device | str) -> VAE:
    """The network of an identified file, ready for `encode` and `decode` of lightx2v.vae.stream.

    Raises CheckpointError when the file is damaged.
    """
    if isinstance(info.config, tae.TAEConfig):
        return tae.load(info.path, dtype=dtype, device=device)
    if isinstance(info.config, hunyuan15.HunyuanVAEConfig):
        return hunyuan15.load(info.path, dtype=dtype, device=device)
    module = wan22 if isinstance(info.config, wan22.Wan22VAEConfig) else wan
    return module.load(info.path, dtype=dtype, device=device)
