"""What a file is, decided from its header alone."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lightx2v.checkpoint import CheckpointError, Header, read_header
from lightx2v.hints import distilled_hint, expert_hint, task_hint
from lightx2v.kinds import PREFIXES, Kind, kind_of
from lightx2v.layout import Layout, plain_dtype, plain_name, read_layout
from lightx2v.models import ModelSpec, specs

DISTILLED = {"steps": "distilled to few steps", "cfg": "needs no guidance"}


@dataclass(frozen=True)
class CheckpointInfo:
    """A diffusion model's checkpoint: file, variant, network shape, how it is stored.

    header: under the model's own parameter names; packed weights know how they are restored.
    dtype: that most plain values are stored in; of a quantised file, of what is not quantised.
    format, scheme, detail, unused: see `Layout`.
    expert_hint: "high" or "low" noise, by the file's name; Wan2.2's experts are one layout.
    distilled: "steps" or "cfg", by the file's name or metadata.
    """

    path: Path
    header: Header
    spec: ModelSpec
    config: Any
    dtype: torch.dtype
    format: str = "original"
    scheme: str = ""
    detail: str = ""
    unused: Mapping[str, str] = field(default_factory=dict)
    expert_hint: str | None = None
    distilled: str | None = None

    @property
    def quantised(self) -> bool:
        return bool(self.detail)

    def describe(self) -> str:
        """One line for logs and `inspect`."""
        stored = Layout(self.header, self.format, self.scheme, self.detail, self.unused).describe()
        words = [f"{len(self.header.tensors)} tensors", stored, f"{self.header.nbytes / 1e6:,.1f} MB"]
        if self.expert_hint:
            words.append(f"{self.expert_hint}-noise expert by its name")
        if self.distilled:
            words.append(
                {"steps": "distilled to few steps", "cfg": "needs no guidance"}[self.distilled] + " by its name"
            )
        return f"{self.spec.title} ({', '.join(words)})"


@dataclass(frozen=True)
class FileInfo:
    """Any checkpoint file: a diffusion model that can be run, or something else in words.

    kind, family: see `Kind`. task: "t2v", "i2v", "flf2v", "ti2v", "sr" or None where nothing tells.
    model: the checkpoint, where it is a diffusion model that can be run.
    """

    path: Path
    kind: str
    family: str
    title: str
    task: str | None
    layout: Layout
    expert_hint: str | None
    distilled: str | None
    model: CheckpointInfo | None

    def describe(self) -> str:
        if self.model is not None:
            return self.model.describe()
        size, count = f"{self.layout.header.nbytes / 1e6:,.1f} MB", len(self.layout.header.tensors)
        return f"{self.title} ({count} tensors, {self.layout.scheme}, {size})"


def recognise(path: str | Path) -> FileInfo:
    """What any file is. Raises CheckpointError for damaged ones, unknown schemes, and files that nobody here knows."""
    header = read_header(path)
    kind = kind_of(header)
    if kind is not None and kind.name == "lora":
        plain = Layout(header, "original", plain_name(header), "", {})
        return _foreign(header, kind, plain, task_hint(header.path, header.metadata))
    layout = read_layout(header)
    if spec := _spec(layout.header):
        info = _model(layout, spec)
        task = spec.task or task_hint(header.path, header.metadata)
        return FileInfo(
            info.path, "transformer", spec.family, spec.title, task, layout, info.expert_hint, info.distilled, info
        )
    kind = kind_of(layout.header) or kind
    if kind is None:
        raise _unknown(header)
    return _foreign(header, kind, layout, _task(header, kind, layout))


def identify(path: str | Path) -> CheckpointInfo:
    """Which diffusion model a checkpoint holds, from headers only; raises CheckpointError saying what it is instead."""
    found = recognise(path)
    if found.model is None:
        raise CheckpointError(f"{found.path}: this file is {found.title}. Supported here: {_supported()}")
    return found.model


def other_kind(header: Header) -> str | None:
    """What a file that a loader cannot use is, in words and with what to do; None for one that nobody here knows."""
    kind = kind_of(header) or kind_of(header.without_prefix(*PREFIXES))
    return kind.describe() if kind else None


@contextmanager
def _sizes(header: Header) -> Iterator[None]:
    """While sizes are read from shapes: those that no network has become an error that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, ArithmeticError, LookupError) as error:
        raise CheckpointError(
            f"{header.path}: its tensors have the names of a model that is known, but not its shapes ({error}); "
            "download the file again"
        ) from error


def _spec(header: Header) -> ModelSpec | None:
    with _sizes(header):
        found = [spec for spec in specs() if spec.matches(header)]
    if len(found) > 1:
        names = ", ".join(spec.name for spec in found)
        raise CheckpointError(f"{header.path}: matches several models ({names}); this is a bug, please report it")
    return found[0] if found else None


def _model(layout: Layout, spec: ModelSpec) -> CheckpointInfo:
    header = layout.header
    return CheckpointInfo(
        header.path,
        header,
        spec,
        spec.config(header),
        plain_dtype(header),
        format=layout.format,
        scheme=layout.scheme,
        detail=layout.detail,
        unused=layout.unused,
        expert_hint=expert_hint(header.path),
        distilled=_distilled(header, spec.family),
    )


def _foreign(header: Header, kind: Kind, layout: Layout, task: str | None) -> FileInfo:
    path = header.path
    distilled = _distilled(layout.header, kind.family)
    return FileInfo(path, kind.name, kind.family, kind.describe(), task, layout, expert_hint(path), distilled, None)


def _distilled(header: Header, family: str) -> str | None:
    if "time_r_in.mlp.0.weight" in header.tensors:  # only few-step models take the step's end as well
        return "steps"
    # Tencent calls its few-step models "step_distilled", and "distilled" those that need no guidance.
    return distilled_hint(header.path, header.metadata, bare="cfg" if family == "hunyuan1.5" else "steps")


def _task(header: Header, kind: Kind, layout: Layout) -> str | None:
    if kind.name != "transformer":
        return None
    if (layout.header.shape("img_in.proj.weight") or ())[1:2] == (98,):
        return "sr"
    return task_hint(header.path, header.metadata)


def _unknown(header: Header) -> CheckpointError:
    kind = f"of a model that is not known ({len(header.tensors)} tensors)"
    return CheckpointError(f"{header.path}: this file is {kind}. Supported here: {_supported()}")


def _supported() -> str:
    return ", ".join(spec.title for spec in specs())
