"""From settings to the cache of a request, and from a calibration to its files."""

from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch

from lightx2v.cache.calibration import Recorder
from lightx2v.cache.figures import Figures
from lightx2v.cache.lookup import Occasion, figures_for, roles, write_figures
from lightx2v.cache.walk import CacheReport, FeatureCache
from lightx2v.config import Cache, Request
from lightx2v.identify import CheckpointInfo
from lightx2v.shapes import LatentShape, num_tokens


def choose(
    cache: Cache,
    infos: Sequence[CheckpointInfo],
    on_report: Callable[[CacheReport], None] = lambda report: None,
    given: Figures | None = None,
) -> FeatureCache | None:
    """The cache for one model or a pair of experts; None for "none".

    given: figures to use instead of those that the checkpoint has. Raises ValueError for a checkpoint without figures.
    """
    if cache.method == "none":
        return None
    if given is None:
        return FeatureCache(cache, figures_for(cache, infos), on_report)
    if len(infos) > 1:
        raise ValueError("each of two experts has its own coefficients: leave them out here, and calibrate the pair")
    return FeatureCache(cache, (given,), on_report)


def save(recorder: Recorder, infos: Sequence[CheckpointInfo], request: Request) -> list[Path]:
    """Write what was measured next to each checkpoint; returns the files."""
    sampling, today = request.sampling, date.today().isoformat()
    asked = (sampling.cfg_scale, sampling.scheduler, request.width, request.height, request.num_frames)
    occasion = Occasion(today, recorder.requests, *asked)
    measured = [(role, recorder.figures(sampling.shift, "" if role == "alone" else role)) for role in roles(infos)]
    return [write_figures(info, *one, occasion) for info, one in zip(infos, measured, strict=True)]


def kept_bytes(info: CheckpointInfo, latent_shape: Sequence[int], dtype: torch.dtype) -> int:
    """What a cache keeps beside one forward pass over latents (B, C, T, H, W): the residuals of both branches, and the
    tokens that a pass began with."""
    tokens = latent_shape[0] * num_tokens(LatentShape(*latent_shape[2:]), info.spec.patch_size)
    return 3 * tokens * info.config.hidden_size * dtype.itemsize
