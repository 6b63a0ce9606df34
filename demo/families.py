"""What `demo/train.py` can train: which network, text and files each stage is about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demo.stages import evaluate15, export, export15, pool, t2v, t2v15, vae, vae15
from demo.stages.colours import fit_colours, write_colours
from demo.stages.evaluate import Loaded, evaluate, load_folder
from demo.stages.pool import Ids, Pool
from demo.stages.run import Run

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Judged:
    """How many held-out pairs are judged, in how many steps, at which guidance scales."""

    count: int
    steps: int
    guidance: Sequence[float]


@dataclass(frozen=True)
class Family:
    """One family's stages. prepare: makes the tokenizer and begins with given files. load: what was exported, to judge.

    train: takes seconds, then the folder to start from; gives weights and progress.
    """

    autoencoder: vae.Autoencoder
    prepare: Callable[[Run, Path | None], None]
    to_ids: Callable[[Run], Ids]
    warm_up: Callable[[Run], None]
    train: Callable[[Run, Pool, float, Path | None], tuple[dict[str, Tensor], float]]
    export_vae: Callable[[Any, Path], None]
    export: Callable[[Run, Weights, Any, Path], None]
    load: Callable[[Path, torch.device, torch.dtype], Loaded]

    def judge(self, run: Run, label: str, judged: Judged) -> None:
        """Report what the judge says of the exported files; the reports' names begin with `label`."""
        loaded = self.load(run.out, run.device, torch.bfloat16 if run.device.type == "cuda" else torch.float32)
        for scale in judged.guidance:
            evaluate(run, loaded, f"{label}_cfg{scale:g}", count=judged.count, steps=judged.steps, cfg_scale=scale)


def _prepare_wan(run: Run, start: Path | None) -> None:
    if start and not (run.state / "vae.pt").exists():
        export.import_vae(start, run.state)
    pool.tokenizer_of(run)


def _train_wan(run: Run, clips: Pool, seconds: float, start: Path | None) -> tuple[dict[str, Tensor], float]:
    begin = export.import_t2v(start) if start else None
    return t2v.train_t2v(run, clips, len(pool.tokenizer_of(run)), seconds, begin)


def _export_wan(run: Run, weights: Weights, autoencoder: Any, folder: Path) -> None:
    export.export_t2v(run, weights, folder)
    write_colours(folder / export.TRANSFORMER, fit_colours(autoencoder, run.device))


def _prepare_hunyuan(run: Run, start: Path | None) -> None:
    if start and not (run.state / "vae.pt").exists():
        raise ValueError(f"--start {start}: only Wan's training can begin with exported files; leave it out")
    t2v15.tokenizer_of(run)


def _export_hunyuan(run: Run, weights: Weights, autoencoder: Any, folder: Path) -> None:
    export15.export_t2v(run, weights, folder)


FAMILIES: Mapping[str, Family] = {
    "wan": Family(
        autoencoder=vae.WAN,
        prepare=_prepare_wan,
        to_ids=pool.wan_ids,
        warm_up=lambda run: t2v.warm_up(run, len(pool.tokenizer_of(run))),
        train=_train_wan,
        export_vae=export.export_vae,
        export=_export_wan,
        load=load_folder,
    ),
    "hunyuan": Family(
        autoencoder=vae15.HUNYUAN15,
        prepare=_prepare_hunyuan,
        to_ids=lambda run: t2v15.chat_ids(t2v15.tokenizer_of(run)),
        warm_up=t2v15.warm_up,
        train=lambda run, clips, seconds, start: t2v15.train_t2v(run, clips, seconds),
        export_vae=export15.export_vae,
        export=_export_hunyuan,
        load=evaluate15.load_folder,
    ),
}
