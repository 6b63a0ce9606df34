"""Memory that ran out: told from other errors, tried once more with less, and said in words. And a GPU that is lost."""

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from lightx2v.models import ModelSpec
from lightx2v.offload.plan import GB, LESS, DoesNotFitError, Plan
from lightx2v.shapes import LatentShape, VideoShape, smaller, to_video

log = logging.getLogger(__name__)
Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")
# What libraries say that allocate beside PyTorch: cuBLAS, cuDNN, Triton and CUDA itself.
SAID = ("out of memory", "STATUS_ALLOC_FAILED")
# After these the process can do nothing more with its GPU (CUDA's documentation of cudaError: "the process must be
# terminated and relaunched"), or there is none.
LOST = (
    *("unspecified launch failure", "illegal memory access", "misaligned address", "illegal instruction"),
    *("device-side assert", "hardware stack error", "invalid program counter", "launch timed out"),
    *("uncorrectable ECC error", "unknown error", "no CUDA-capable device", "GPU is lost", "driver shutting down"),
)


class DeviceLostError(RuntimeError):
    """The GPU cannot be used by this process any longer; the message says so, and what to do."""


def ran_out(error: BaseException) -> bool:
    """Whether an error means that the device had no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in SAID)


def lost(error: BaseException) -> bool:
    """Whether an error means that the device is of no more use to this process."""
    told = isinstance(error, RuntimeError) and not isinstance(error, DeviceLostError)
    told = told and any(word in str(error) for word in ("CUDA", "HIP", "GPU"))
    return told and not ran_out(error) and any(word in str(error) for word in LOST)


def unless_lost(work: Callable[[], Result]) -> Result:
    """What `work` returns. Raises DeviceLostError where the device is lost, without the error that said so: that one
    holds every tensor of the frames that it passed through."""
    try:
        return work()
    except Exception as error:
        if not lost(error):
            raise
        said = _first_line(error)
    raise DeviceLostError(
        f"the GPU stopped working ({said}). Nothing more can be computed on it in this process: restart it (ComfyUI, "
        "or your script). If it happens again, run the same with attention 'torch_sdpa', and look for Xid in the "
        "system's log (dmesg), which names failing hardware and drivers"
    )


def says_if_lost(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The same function, under `unless_lost`."""

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return unless_lost(lambda: function(*args, **kwargs))

    return call


@dataclass(frozen=True)
class Shortage:
    """Memory ran out. said: the first line of the error; the error itself holds every tensor of the frames that it
    passed through."""

    said: str


def caught(work: Callable[[], Result]) -> Result | Shortage:
    """What `work` returns, or that memory ran out; every other error is raised, a lost device as `unless_lost` does."""
    try:
        return unless_lost(work)
    except Exception as error:
        if not ran_out(error):
            raise
        return Shortage(_first_line(error))


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def once_there_is_room(work: Callable[[], Result], make_room: Callable[[], None], doing: str) -> Result:
    """What `work` returns; where memory runs out, once more after `make_room`. doing: for messages.

    Raises DoesNotFitError where it runs out again.
    """
    made = caught(work)
    if isinstance(made, Shortage):
        log.warning("GPU memory ran out while %s: once more with all else in RAM", doing)
        make_room()
        free_unused()
        made = caught(work)
    if isinstance(made, Shortage):
        raise DoesNotFitError(
            f"GPU memory ran out twice while {doing} ({made.said}): make the video smaller, or close what else uses "
            "the GPU"
        )
    return made


@dataclass(frozen=True)
class Advice:
    """What fits instead of a request for latents of that shape (B, C, T, H, W)."""

    spec: ModelSpec
    shape: Sequence[int]

    def on(self, error: DoesNotFitError) -> DoesNotFitError:
        """The error, and a shorter and a smaller video that should fit."""
        latent, stride = LatentShape(*self.shape[2:]), self.spec.latents.stride
        sizes = [_said(video) for video in smaller(latent, error.share, stride, self.spec.patch_size)]
        asked = _said(to_video(latent, stride))
        fits = f"instead of {asked}, {' or '.join(sizes)} should fit" if sizes else f"no size does, nor {asked}"
        return DoesNotFitError(f"{error}; {fits}", error.share)


def once_more(
    work: Callable[[Plan | None], Result],
    plan_of: Callable[[], Plan | None],
    make_room: Callable[[], None],
    advice: Advice,
) -> Result:
    """What `work` returns; where memory runs out, once more with a tighter plan.

    work: is given None at first, then the plan that memory ran out with. plan_of: that plan, None where none was made.
    make_room: frees what can be freed; runs between the two.
    Raises DoesNotFitError where memory runs out again, or where nothing was planned that could be tightened.
    """
    made = caught(lambda: work(None))
    if not isinstance(made, Shortage):
        return made
    failed = plan_of()
    make_room()
    free_unused()
    if failed is None:
        raise DoesNotFitError(UNPLANNED)
    log.warning(
        "GPU memory ran out with %.1f GB planned: once more with less of the model on the GPU", failed.peak / GB
    )
    made = caught(lambda: work(failed))
    if not isinstance(made, Shortage):
        return made
    make_room()
    free_unused()
    last = plan_of() or failed
    again = DoesNotFitError(
        f"GPU memory ran out twice, the second time with {last.resident} of {last.resident + last.streamed} blocks on "
        f"the GPU and {last.peak / GB:.1f} GB planned ({made.said})",
        LESS,
    )
    raise advice.on(again)


UNPLANNED = (
    "GPU memory ran out, and the offload that was asked for keeps whole transformers on the GPU: use auto or block, "
    "which let blocks pass through it"
)


def free_unused() -> None:
    """Give memory back that PyTorch keeps for later. Only after memory ran out: it costs time."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _said(video: VideoShape) -> str:
    return f"{video.num_frames} frames of {video.width}x{video.height}"
