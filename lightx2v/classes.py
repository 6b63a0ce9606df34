"""LightX2V's names of model classes: what each stands for, and whether checkpoints are of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightx2v.arguments import require
from lightx2v.checkpoint import CheckpointError
from lightx2v.experts import require_pair
from lightx2v.fitting import check_task
from lightx2v.folder import MissingPartError, ModelFolder
from lightx2v.identify import CheckpointInfo, identify
from lightx2v.models.hunyuan_video_15.encoders import find_transformer
from lightx2v.quantized import Quantize, quantised_transformers

HUNYUAN = "hunyuan1.5"


@dataclass(frozen=True)
class ModelClass:
    """What upstream's name of a model class stands for."""

    tasks: tuple[str, ...]
    family: str = "wan"
    experts: bool = False  # two transformers
    distilled: bool = False  # few steps, of a fixed list

    @property
    def scheduler(self) -> str:
        """The model's own; see `Sampling`."""
        return "distilled" if self.distilled else "euler" if self.family == HUNYUAN else "unipc"


CLASSES = {
    "wan2.1": ModelClass(("t2v", "i2v", "flf2v")),
    "wan2.1_distill": ModelClass(("t2v", "i2v", "flf2v"), distilled=True),
    "wan2.2": ModelClass(("t2v", "i2v")),
    "wan2.2_moe": ModelClass(("t2v", "i2v", "flf2v"), experts=True),
    "wan2.2_moe_distill": ModelClass(("t2v", "i2v", "flf2v"), experts=True, distilled=True),
    "hunyuan_video_1.5": ModelClass(("t2v", "i2v"), HUNYUAN),
    "hunyuan_video_1.5_distill": ModelClass(("t2v", "i2v"), HUNYUAN, distilled=True),
}


def model_class(name: str, tasks: Sequence[str]) -> ModelClass:
    """The class of that name; raises ValueError for one that is not known, and for a task that it cannot do."""
    require("model_cls", name, CLASSES)
    found = CLASSES[name]
    for task in tasks:
        require(f"task of {name}", task, found.tasks)
    return found


def check_class(infos: Sequence[CheckpointInfo], model_cls: str, tasks: Sequence[str]) -> None:
    """Raise CheckpointError or ValueError where checkpoints are not of the class, or cannot do one of the tasks."""
    for info in infos:
        if info.spec.family != CLASSES[model_cls].family:
            fitting = [name for name, kind in CLASSES.items() if kind.family == info.spec.family]
            raise ValueError(f"{info.path}: this is {info.spec.title}: model_cls is {' or '.join(fitting)}")
        for task in tasks:
            check_task(info, task)
        if info.spec.family != "wan":
            continue
        if (info.spec.task == "ti2v") != (model_cls == "wan2.2"):
            right = "'wan2.2'" if info.spec.task == "ti2v" else "'wan2.1' or 'wan2.2_moe'"
            raise ValueError(f"{info.path}: this is {info.spec.title}: model_cls is {right}, not {model_cls!r}")
    if len(infos) == 2:
        require_pair(*infos)


@dataclass(frozen=True)
class Pick:
    """Which checkpoints a pipeline uses. originals: argument of LightX2VPipeline -> file or folder, in place of the
    model folder's."""

    folder: ModelFolder
    model_cls: str
    kind: ModelClass
    tasks: tuple[str, ...]
    originals: Mapping[str, Path] = field(default_factory=dict)
    transformer_name: str | None = None  # of several of HunyuanVideo-1.5 in one folder
    quantize: Quantize = field(default_factory=Quantize)

    def find(self) -> tuple[tuple[CheckpointInfo, ...], CheckpointError | None]:
        """One transformer or two experts, from headers; or none, and the error that says which file is missing.

        Raises CheckpointError or ValueError for files that are damaged, or of another class.
        """
        fitting = (
            ("high_noise_original_ckpt", "low_noise_original_ckpt") if self.kind.experts else ("dit_original_ckpt",)
        )
        if astray := sorted(self.originals.keys() - set(fitting)):
            count = "two experts" if self.kind.experts else "one transformer"
            raise ValueError(
                f"{astray[0]}={str(self.originals[astray[0]])!r}: {self.model_cls} has {count}: give "
                f"{' and '.join(fitting)}, or choose another model_cls"
            )
        if self.transformer_name and self.kind.family != HUNYUAN:
            raise ValueError(
                f"transformer_model_name={self.transformer_name!r}: only HunyuanVideo-1.5 has several in one folder; "
                "leave it out"
            )
        try:
            infos = self._quantised() if self.quantize.dit else self._plain()
        except MissingPartError as error:  # a file that is named later may take its place
            return (), error
        check_class(infos, self.model_cls, self.tasks)
        return infos, None

    def usual(self, infos: Sequence[CheckpointInfo], asked: Mapping[str, object]) -> Mapping[str, Any]:
        """What create_generator takes where nothing is said, beside what it is asked; nothing without a model."""
        distilled = self.kind.distilled or any(info.distilled for info in infos)
        return infos[0].spec.usual(self.tasks[0], distilled, asked) if infos else {}

    def _quantised(self) -> tuple[CheckpointInfo, ...]:
        return quantised_transformers(self.folder, self.quantize, self._named, self._found, experts=self.kind.experts)

    def _plain(self) -> tuple[CheckpointInfo, ...]:
        arguments = ("high_noise_original_ckpt", "low_noise_original_ckpt")
        return tuple(
            self._named(argument) or self._found(argument)
            for argument in (arguments if self.kind.experts else ("dit_original_ckpt",))
        )

    def _named(self, argument: str) -> CheckpointInfo | None:
        return identify(self.originals[argument]) if argument in self.originals else None

    def _found(self, argument: str) -> CheckpointInfo:
        expert = {"high_noise_original_ckpt": "high", "low_noise_original_ckpt": "low"}.get(argument)
        return identify(self.folder.expert(expert) if expert else self._transformer())

    def _transformer(self) -> Path:
        if self.kind.family == HUNYUAN:
            return find_transformer(self.folder, self.tasks[0], self.transformer_name)
        return self.folder.transformer()
