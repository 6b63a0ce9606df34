"""Which quantised files a pipeline uses, in what its layers multiply, and what each name of a scheme means for both."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightx2v.arguments import nearest
from lightx2v.checkpoint import CheckpointError
from lightx2v.config import Engine
from lightx2v.folder import EXPERTS, TRANSFORMER, ModelFolder
from lightx2v.identify import CheckpointInfo, identify
from lightx2v.models import Encoders
from lightx2v_kernels import UnsupportedBackendError
from lightx2v_kernels.machine import importable

log = logging.getLogger(__name__)
GGUF_TYPES = "Q8_0 Q6_K Q5_K_S Q5_K_M Q5_0 Q5_1 Q4_K_S Q4_K_M Q4_0 Q4_1 Q3_K_S Q3_K_M"
# LightX2V's names (lightx2v/models/networks/base_model.py), each a format and the library that multiplies in it.
SCHEMES = (
    *"fp8 fp8-sgl fp8-vllm fp8-triton fp8-torchao fp8-q8f fp8-pertensor".split(),
    *"int8 int8-sgl int8-vllm int8-triton int8-torchao int8-q8f".split(),
    *"nvfp4 nvfp4-triton nvfp4-torchao mxfp8 mxfp8-triton mxfp8-torchao".split(),
    *(f"gguf-{kind}" for kind in GGUF_TYPES.split()),
)
AS_STORED, RESTORED = "auto", "none"  # of quant_scheme, beside the names of LightX2V
# Format -> the part of a scheme's name behind it -> the backend of lightx2v_kernels.linear that it names.
KERNELS = {
    "fp8": {"sgl": "sgl", "vllm": "vllm", "triton": "triton", "torchao": "torch_scaled_mm", "pertensor": "auto"},
    "int8": {"sgl": "sgl", "vllm": "vllm", "triton": "triton", "torchao": "torch_int_mm"},
    "nvfp4": {"triton": "triton", "torchao": "torch_scaled_mm"},
    "mxfp8": {"triton": "triton", "torchao": "torch_scaled_mm"},
}
# LightX2V's files and examples name these two by habit: where the package is not installed, the format is what counts.
PACKAGES = {"sgl": "sgl_kernel", "vllm": "vllm"}
NOT_READ = (*"mxfp4 mxfp6-mxfp8 fp8-b128-deepgemm int4-g128-marlin".split(),)
VENDORS = ("musa", "hygon-dcu", "tmo", "npu", "intel-xpu", "iluvatar")


@dataclass(frozen=True)
class Quantize:
    """The options of `LightX2VPipeline.enable_quantize`. Paths: files or folders; None searches the model's folder."""

    dit: bool = False
    text: bool = False
    image: bool = False
    dit_ckpt: str | Path | None = None
    low_ckpt: str | Path | None = None
    high_ckpt: str | Path | None = None
    text_ckpt: str | Path | None = None
    image_ckpt: str | Path | None = None
    scheme: str = "fp8"
    text_scheme: str | None = None
    image_scheme: str | None = None

    def __post_init__(self) -> None:
        if self.dit and self.scheme in (AS_STORED, RESTORED):
            raise ValueError(f"quant_scheme={self.scheme!r} with dit_quantized=True: name a format, such as 'fp8'")
        for scheme in (self.scheme, self.text_scheme, self.image_scheme):
            if scheme not in (None, AS_STORED, RESTORED):
                format_of(scheme)

    def engine(self, engine: Engine, infos: Sequence[CheckpointInfo]) -> Engine:
        """The engine for these checkpoints. One that is not quantised yet will be, as it is read.

        Raises UnsupportedBackendError for a scheme that names a kernel which nobody here has.
        """
        if not self.dit:
            return replace(engine, quant=RESTORED if self.scheme == RESTORED else AS_STORED, linear="auto")
        stated = format_of(self.scheme)
        kinds = {info.scheme if info.quantised else stated for info in infos}
        quant = AS_STORED if all(info.quantised for info in infos) else stated
        return replace(engine, quant=quant, linear=_kernel(self.scheme, stated if stated in kinds else min(kinds)))


def _kernel(scheme: str, stored: str) -> str:
    """The backend that a scheme names for the format of a file; "auto" where it names none, or none that is installed
    (PACKAGES)."""
    stated, _, name = scheme.partition("-")
    known = KERNELS.get(stored)
    if not name or known is None or stated not in KERNELS:  # GGUF names a type of block
        return "auto"
    if name not in known:
        raise UnsupportedBackendError(
            f"quant_scheme={scheme!r}: the kernels of {name} are not known here; use {stored!r} for the best that is "
            f"installed, or {', '.join(f'{stored}-{other}' for other in known)}"
        )
    if name in PACKAGES and not importable(PACKAGES[name]):
        log.warning(
            "quant_scheme=%r: the package %s is not installed; the fastest %s kernel that is here takes its place",
            *(scheme, PACKAGES[name], stored),
        )
        return "auto"
    return known[name]


def format_of(scheme: str) -> str:
    """ "fp8", "int8", "nvfp4", "mxfp8" or "gguf" of one of LightX2V's scheme names; raises ValueError for any other."""
    if scheme in NOT_READ or scheme.endswith(VENDORS):
        raise ValueError(
            f"quant_scheme={scheme!r}: files of this scheme cannot be read here; use an fp8, int8, NVFP4, MXFP8 or "
            "GGUF file"
        )
    if scheme not in SCHEMES:
        raise ValueError(f"quant_scheme={scheme!r} is not known; known: {', '.join(SCHEMES)}{nearest(scheme, SCHEMES)}")
    return scheme.partition("-")[0]


Plain = Callable[[str], CheckpointInfo | None]


def quantised_transformers(
    folder: ModelFolder, wanted: Quantize, named: Plain, found: Plain, *, experts: bool
) -> tuple[CheckpointInfo, ...]:
    """The transformer, or the high- and the low-noise one: the quantised file that `wanted` names, the plain one that
    is named, a quantised one of the folder, or the folder's plain one; plain ones are to be quantised as they are read.

    named, found: the plain checkpoint of an argument ("dit_original_ckpt"), named by the user, or in the folder.
    Raises CheckpointError where a file is missing, or one that is named as quantised is not.
    """
    stated = format_of(wanted.scheme)
    if experts and wanted.dit_ckpt:
        raise ValueError(
            f"dit_quantized_ckpt={str(wanted.dit_ckpt)!r}: this model has two experts; give high_noise_quantized_ckpt "
            "and low_noise_quantized_ckpt"
        )
    if not experts and (wanted.high_ckpt or wanted.low_ckpt):
        raise ValueError(
            "high_noise_quantized_ckpt and low_noise_quantized_ckpt are of wan2.2_moe; give dit_quantized_ckpt"
        )
    parts: tuple[tuple[str, str | Path | None, str, tuple[str, ...]], ...]
    if experts:
        parts = (
            ("high-noise expert", wanted.high_ckpt, "high_noise_quantized_ckpt", EXPERTS["high"]),
            ("low-noise expert", wanted.low_ckpt, "low_noise_quantized_ckpt", EXPERTS["low"]),
        )
    else:
        more = (f"*{stated}*.safetensors", "*.gguf")
        parts = (("transformer", wanted.dit_ckpt, "dit_quantized_ckpt", (*TRANSFORMER, *more)),)
    infos = []
    for part, path, argument, patterns in parts:
        original = argument.replace("quantized", "original")
        info = _named(argument, path) if path else named(original)
        if info is None:
            info = _found(folder, patterns, stated) or (found(original) if stated in KERNELS else None)
        if info is None:
            raise CheckpointError(
                f"{folder.path}: no {stated} {part} here; looked for {', '.join(patterns)} there and in {stated}, "
                f"distill_{stated}; give {argument}"
            )
        if info.quantised:
            _compare("quant_scheme", wanted.scheme, info.path, info.scheme)
            log.info("%s: %s (%s)", info.path, info.scheme, info.detail)
        else:
            log.info("%s: %s, quantised to %s as it is read", info.path, info.scheme, stated)
        infos.append(info)
    return tuple(infos)


def _named(argument: str, path: str | Path) -> CheckpointInfo:
    info = identify(path)
    if not info.quantised:
        raise CheckpointError(
            f"{argument}={str(path)!r} is not quantised, it holds {info.scheme}: give a quantised file here, or this "
            f"one as {argument.replace('quantized', 'original')}"
        )
    return info


def _found(folder: ModelFolder, patterns: Sequence[str], stated: str) -> CheckpointInfo | None:
    places = [folder.path / name for name in ("", stated, f"distill_{stated}", "distill_models", "original")]
    for path in (path for place in places for pattern in patterns for path in sorted(place.glob(pattern))):
        try:
            info = identify(path)
        except CheckpointError:  # a file of something else, which is none of the candidates
            continue
        if info.quantised and info.scheme == stated:
            return info
    return None


def quantised_text_encoder(folder: ModelFolder, wanted: Quantize, encoders: Encoders) -> Path | None:
    """The quantised text encoder, or None for the folder's plain one."""
    if not wanted.text:
        return None
    scheme, patterns = wanted.text_scheme or wanted.scheme, encoders.quantised_text
    argument = "text_encoder_quantized_ckpt"
    return _encoder(folder, argument, wanted.text_ckpt, scheme, patterns, encoders.text_scheme)


def quantised_image_encoder(
    folder: ModelFolder, wanted: Quantize, models: Sequence[CheckpointInfo], encoders: Encoders
) -> Path | None:
    """The quantised image encoder, or None for the folder's plain one, and for models that look at no image through
    it."""
    if not wanted.image:
        return None
    if models and not models[0].spec.reads_clip:
        log.info("%s has no image encoder: image_encoder_quantized changes nothing", models[0].spec.title)
        return None
    scheme, patterns = wanted.image_scheme or wanted.scheme, encoders.quantised_image
    argument = "image_encoder_quantized_ckpt"
    return _encoder(folder, argument, wanted.image_ckpt, scheme, patterns, encoders.image_scheme)


def _encoder(
    folder: ModelFolder,
    argument: str,
    given: str | Path | None,
    scheme: str,
    patterns: Sequence[str],
    stored: Callable[[Path], str],
) -> Path:
    stated = format_of(scheme)
    names = [pattern.format(stated) for pattern in patterns]
    places = [folder.path / name for name in ("", stated, f"distill_{stated}", "original")]
    found = [Path(given)] if given else [path for at in places for name in names for path in sorted(at.glob(name))]
    if not found:
        raise CheckpointError(
            f"{folder.path}: looked for {', '.join(names)} there and in {stated}, distill_{stated}; give {argument}"
        )
    kind = stored(found[0])
    if not kind:
        raise CheckpointError(f"{argument}: {found[0]} is not quantised; leave {argument} and its switch out to use it")
    _compare("the encoder's quant_scheme", scheme, found[0], kind)
    return found[0]


def _compare(name: str, scheme: str, path: Path, kind: str) -> None:
    if format_of(scheme) != kind:
        log.warning("%s: %s is %r, the file is %s; the file decides", path, name, scheme, kind)
