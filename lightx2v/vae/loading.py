"""One door for the VAEs: what a file is, which latents it speaks, and its network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lightx2v.checkpoint import CheckpointError, read_header
from lightx2v.latents import LatentFormat
from lightx2v.vae import wan, wan22
from lightx2v.vae.layouts import PREFIXES, require_any_layout

VAE = wan.WanVAE | wan22.Wan22VAE


@dataclass(frozen=True)
class VAEInfo:
    """What a VAE's file says about itself."""

    path: Path
    config: wan.WanVAEConfig | wan22.Wan22VAEConfig

    @property
    def name(self) -> str:
        return "Wan2.2 VAE" if isinstance(self.config, wan22.Wan22VAEConfig) else "Wan2.1 VAE"

    @property
    def space(self) -> LatentFormat:
        """The latents that it encodes to and decodes from."""
        return (wan22.Wan22VAE if isinstance(self.config, wan22.Wan22VAEConfig) else wan.WanVAE).space

    def network(self) -> VAE:
        """The network with weights of its own making; on the meta device where that is the current one."""
        config = self.config
        return wan22.Wan22VAE(config) if isinstance(config, wan22.Wan22VAEConfig) else wan.WanVAE(config)


def identify_vae(path: str | Path, space: LatentFormat | None = None) -> VAEInfo:
    """Recognise a VAE from its header, without reading weights.

    space: the latents of the model that it is for, if there is one already.
    Raises CheckpointError, which says what the file is, for anything but a Wan2.1 VAE (LightVAE among them) or a Wan2.2
    VAE, and for a VAE of other latents than `space`.
    """
    header = read_header(path).without_prefix(*PREFIXES)
    module = wan22 if require_any_layout(header) == wan22.Wan22VAE.space else wan
    info = VAEInfo(Path(path), module.config_from_header(header))
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
    module = wan22 if isinstance(info.config, wan22.Wan22VAEConfig) else wan
    return module.load(info.path, dtype=dtype, device=device)
