"""What the pipeline's methods answer to names that they do not have: LightX2V's others, and slips of the pen."""

import difflib
import functools
import inspect
import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from lightx2v.config import Cache
from lightx2v.lora import Lora

log = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")


class ReadsFiles(Protocol):
    """What `filled` needs of an object."""

    def _read_file(self, path: str | Path | None, given: Mapping[str, object]) -> Mapping[str, Any]: ...


S = TypeVar("S", bound=ReadsFiles)
CACHE_METHODS = {"none": "none", "nocaching": "none", "tea": "teacache", "mag": "magcache"}
EXPERT_NAMES = {"high_noise_model": "high", "low_noise_model": "low"}
NO_IMAGE_EDIT = "this version makes videos from text and images, not from other videos"
# Method -> argument of LightX2V's that it does not take -> why. An empty value of one is taken for none.
REFUSED: Mapping[str, Mapping[str, str]] = {
    "__init__": {"sf_model_path": "self-forcing models cannot be run"},
    "enable_quantize": {"skip_fp8_block_index": "every block of a quantised file is used as it is in the file"},
    "generate": {
        "audio_path": "no model that listens to audio can be run",
        **dict.fromkeys(("video_path", "src_video", "src_mask", "src_ref_images", "action_path"), NO_IMAGE_EDIT),
        **dict.fromkeys(
            ("image_strength", "i2i_denoise_strength", "image_frame_idx"), "a given image is always kept whole"
        ),
        "sr_ratio": "videos are not enlarged",
        "prompt_ref": "prompts are taken as they are",
    },
}
# Method -> argument of LightX2V's that changes nothing, with a warning -> what decides instead.
UNUSED: Mapping[str, Mapping[str, str]] = {
    "create_generator": {
        "aspect_ratio": "height and width decide the size",
        **dict.fromkeys(
            ("rope_type", "double_precision_rope", "norm_modulate_backend"), "kernels are chosen by themselves"
        ),
        "audio_fps": "no model that listens to audio can be run",
        "distilled_sigma_values": "denoising_step_list decides the steps of a distilled model",
    },
}


def nearest(name: str, known: Collection[str]) -> str:
    """ "; did you mean 'steps'?", or nothing where no known name is like it."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def checked(method: Callable[P, R]) -> Callable[P, R]:
    """A decorator: names that the method lacks raise TypeError with the nearest that it has.

    Those of REFUSED raise NotImplementedError unless they are empty; those of UNUSED are accepted, with a warning.
    """
    parameters = inspect.signature(method).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    known = [name for name in parameters if name != "self"]
    refused, unused = REFUSED.get(method.__name__, {}), UNUSED.get(method.__name__, {})

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in [] if open_ended else [name for name in kwargs if name not in parameters]:
            value: Any = kwargs.pop(name)
            if name in unused:
                log.warning("%s=%r changes nothing: %s", name, value, unused[name])
            elif name not in refused:
                raise TypeError(
                    f"{method.__name__}() has no argument {name!r}; it has {', '.join(known)}{nearest(name, known)}"
                )
            elif not _empty(value):
                raise NotImplementedError(f"{name}={value!r}: {refused[name]}; leave {name} out")
        return method(*args, **kwargs)

    return call


def filled(method: Callable[Concatenate[S, P], None]) -> Callable[Concatenate[S, P], None]:
    """A decorator: what the object's `_read_file` finds in config_json, or by itself, takes the place of defaults.

    Arguments that are given win over it, be they the same as a default or not.
    """
    signature = inspect.signature(method)

    @functools.wraps(method)
    def call(self: S, *args: P.args, **kwargs: P.kwargs) -> None:
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        path = given.pop("config_json", None)
        del given["self"]
        method(self, **{**self._read_file(path, given), **given})  # type: ignore[call-arg]

    return call


def _empty(value: object) -> bool:
    return value is None or value is False or (isinstance(value, str | list | tuple | dict) and not value)


def require(name: str, value: str, known: Collection[str]) -> None:
    """Raise ValueError with the nearest choice unless value is a known one."""
    if value not in known:
        raise ValueError(f"{name}={value!r} is not supported yet; known: {', '.join(known)}{nearest(value, known)}")


def cache_of(
    method: str,
    thresholds: Mapping[str, float],
    use_ret_steps: bool,
    max_skips: int,
    retention_ratio: float,
    figures: str | Path,
) -> Cache:
    """Arguments of enable_cache as settings; raises ValueError for a method that is not there."""
    require("cache_method", method.lower(), tuple(CACHE_METHODS))
    name = CACHE_METHODS[method.lower()]
    return Cache(name, thresholds.get(name), use_ret_steps, max_skips, retention_ratio, str(figures))


def lora_of(config: Mapping[str, object]) -> Lora:
    """One entry of enable_lora's lora_configs; raises ValueError where it is none."""
    unknown = set(config) - {"path", "strength", "name"}
    name = config.get("name")
    if "path" not in config or unknown or (name is not None and name not in EXPERT_NAMES):
        raise ValueError(
            f"LoRA {dict(config)!r}: expected path, and perhaps strength and name ({' or '.join(EXPERT_NAMES)})"
        )
    expert = "both" if name is None else EXPERT_NAMES[str(name)]
    return Lora(Path(str(config["path"])), config.get("strength", 1.0), expert)  # type: ignore[arg-type]
