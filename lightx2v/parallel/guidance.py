"""Guidance whose two passes are computed at the same time, each by one half of the processes."""

from dataclasses import dataclass

from torch import Tensor

from lightx2v.blocks import Branch
from lightx2v.guidance import CFG
from lightx2v.parallel.mesh import Mesh
from lightx2v.parallel.wire import from_all
from lightx2v.sampling import Denoiser, Step


def own_branch(mesh: Mesh | None, scale: float) -> Branch | None:
    """The pass of guidance that this process computes; None where it computes all there are."""
    if mesh is None or mesh.cfg.size == 1 or scale == 1:
        return None
    return "cond" if mesh.cfg.place == 0 else "uncond"


def split(cfg: CFG, mesh: Mesh | None) -> Denoiser:
    """The same guidance, its passes shared out where there are two and a mesh for them."""
    branch = own_branch(mesh, cfg.scale)
    return cfg if branch is None or mesh is None else _Split(cfg, branch, mesh)


@dataclass(frozen=True)
class _Split:
    whole: CFG
    branch: Branch
    mesh: Mesh

    def __call__(self, latents: Tensor, step: Step) -> Tensor:
        cfg = self.whole
        asked = cfg.cond if self.branch == "cond" else cfg.uncond
        assert asked is not None  # CFG holds it where the scale is not 1
        cond, uncond = from_all(cfg.passes(step, self.branch)(latents, step.timestep, asked), self.mesh.cfg)
        return latents - step.sigma * (uncond + cfg.scale * (cond - uncond))
