"""Whether what is asked fits the model: task, images. Asked before any weight is read."""

import logging

from torch import Tensor

from lightx2v.checkpoint import CheckpointError
from lightx2v.hints import task_hint
from lightx2v.identify import CheckpointInfo

log = logging.getLogger(__name__)
START_FROM_IMAGE = ("i2v", "flf2v")
EITHER = ("t2v", "i2v")
# Where a spec has no task, one layout is the text-to-video model as well as the image-to-video one.
CAN_DO = {"t2v": ("t2v",), "i2v": START_FROM_IMAGE, "flf2v": START_FROM_IMAGE, "ti2v": EITHER, "": EITHER}


def check_task(info: CheckpointInfo, task: str) -> None:
    """Raise CheckpointError where a model is asked for a task ("t2v", "i2v", "flf2v") that it cannot do."""
    can = CAN_DO[info.spec.task]
    if task not in can:
        raise CheckpointError(
            f"{info.path}: this is {info.spec.title}, which does {' and '.join(can)}, not {task}: set task to "
            f"{' or '.join(can)}, or give the file of a {task} model"
        )


def check_images(info: CheckpointInfo, *, start: bool, end: bool) -> None:
    """Raise CheckpointError where a model needs an image that is not given, or could not see one that is; warn where
    only its name tells.

    start, end: whether an image of the first and of the last frame is given.
    """
    spec = info.spec
    told = None if spec.task else task_hint(info.path, info.header.metadata)
    if told in EITHER and (told == "i2v") != start:
        log.warning("%s: its name says %s, and an image is %s", info.path, told, "given" if start else "not given")
    if spec.task in START_FROM_IMAGE and not (start or end):
        raise CheckpointError(
            f"{info.path}: this is {spec.title}, which starts from an image, and none is given: connect Image To Video "
            "(LightX2V) or pass image_path, or use a text-to-video model"
        )
    if spec.task == "t2v" and (start or end):
        raise CheckpointError(
            f"{info.path}: this is {spec.title}, which makes videos from text alone and would not look at the image: "
            "use an image-to-video model, or leave the image out"
        )
    if spec.task in ("ti2v", "") and end:
        raise CheckpointError(
            f"{info.path}: this is {spec.title}, which can start from an image but not end on one: leave the last "
            "image out, or use a first-last-frame model"
        )


def check_given(task: str, *, start: bool, end: bool) -> None:
    """Raise ValueError unless the images are those of the task: none of "t2v", the first of "i2v", both of "flf2v"."""
    given = " and ".join(name for name, there in (("image_path", start), ("last_frame_path", end)) if there)
    if task == "t2v" and given:
        raise ValueError(f"{given} with task t2v, which looks at no image: set task to i2v or flf2v, or leave it out")
    if task in START_FROM_IMAGE and not start:
        raise ValueError(f"task {task} starts from an image: give image_path, or set task to t2v")
    if task == "flf2v" and not end:
        raise ValueError("task flf2v ends on an image: give last_frame_path, or set task to i2v")


def check_latents(info: CheckpointInfo, latents: Tensor) -> None:
    """Raise CheckpointError for latents (B, C, ...) of another space than the model's; zeros are of any."""
    channels, wanted = latents.shape[1], info.spec.latents.channels
    if channels != wanted and latents.any():
        vae = {16: "the Wan2.1 VAE (wan_2.1_vae.safetensors)", 48: "the Wan2.2 VAE (wan2.2_vae.safetensors)"}.get(
            wanted, "the HunyuanVideo-1.5 VAE (hunyuanvideo15_vae_fp16.safetensors)"
        )
        raise CheckpointError(
            f"{info.path}: this is {info.spec.title}, whose latents have {wanted} channels; the given ones have "
            f"{channels}: use {vae} where they are encoded and decoded, or the model that belongs to the other VAE"
        )
