"""A stack of LoRAs onto a loaded transformer, off it again, and from one stack to the next."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lightx2v.config import one_of
from lightx2v.identify import CheckpointInfo
from lightx2v.lora.branch import attach, detach, set_strength
from lightx2v.lora.matching import Coverage
from lightx2v.lora.merging import Matched, Source, match_all, merge, mergeable, restore
from lightx2v.lora.stack import Lora

log = logging.getLogger(__name__)
HOW = ("auto", "merge", "branch")


@dataclass(frozen=True)
class Applied:
    """What was done to one transformer, and all that is needed to undo it."""

    matched: tuple[Matched, ...] = ()
    how: str = "merge"
    branched: frozenset[str] = frozenset()  # parameters whose change is in a branch
    originals: Mapping[str, Tensor | None] = field(default_factory=dict)  # of merged weights, see `merge`
    source: Source | None = None

    @property
    def loras(self) -> tuple[Lora, ...]:
        return tuple(each.lora for each in self.matched)

    @property
    def coverage(self) -> tuple[Coverage, ...]:
        """One for each LoRA of the stack."""
        return tuple(each.coverage for each in self.matched)

    def lines(self) -> list[str]:
        """One for each LoRA: tensors applied, rank, scale, strength."""
        return [each.coverage.line(each.lora.strength) for each in self.matched]


def check_loras(loras: Sequence[Lora], info: CheckpointInfo) -> tuple[Coverage, ...]:
    """Match a stack with a checkpoint by headers alone: raises what `apply_loras` would, before weights are read."""
    shapes = {name: tensor.shape for name, tensor in info.header.tensors.items()}
    return tuple(each.coverage for each in match_all(loras, shapes))


def apply_loras(
    transformer: nn.Module,
    info: CheckpointInfo | None,
    loras: Sequence[Lora],
    how: str = "auto",
    *,
    device: torch.device | None = None,
) -> Applied:
    """Put a stack onto a transformer whose weights are loaded; logs one line for each LoRA.

    info: the checkpoint that the weights came from; merged ones are read from it again when they are wanted back.
    Without it (None), and for weights that the file stores in another form, copies are kept in RAM.
    how: "merge" adds to the weights; "branch" computes beside them; "auto" merges where every weight that a LoRA
    changes is a float of 16 bits or more in memory. Norms, modulation and convolutions are merged in any case.
    device: where to add up merged weights, e.g. a GPU for weights that rest on the CPU.
    Raises CheckpointError for a bad file or one of another model, ValueError where how="merge" cannot be done; the
    transformer is then as it was.
    """
    one_of("how", how, HOW)
    matched = match_all(loras, transformer)
    how = _resolve(how, transformer, matched)
    return _apply(transformer, matched, how, Source(info.header) if info else None, device)


def _apply(
    transformer: nn.Module, matched: tuple[Matched, ...], how: str, source: Source | None, device: torch.device | None
) -> Applied:
    branched = attach(transformer, matched) if how == "branch" else set[str]()
    try:
        originals = merge(transformer, matched, only=lambda name: name not in branched, source=source, device=device)
    except BaseException:
        detach(transformer)
        raise
    for each in matched:
        each.coverage.report(each.lora.strength)
    return Applied(matched, how, frozenset(branched), originals, source)


def remove_loras(transformer: nn.Module, applied: Applied) -> None:
    """Undo `apply_loras`: the weights are bit for bit what they were."""
    restore(transformer, applied.originals, applied.source)
    if applied.how == "branch":
        detach(transformer)


def change_loras(
    transformer: nn.Module, applied: Applied, loras: Sequence[Lora], *, device: torch.device | None = None
) -> Applied:
    """From one stack to another, the same way as before.

    Branches whose files stay and only whose strengths change are not read again. A stack of bad files raises what
    `apply_loras` raises while the old one is still on.
    """
    if applied.how == "branch" and [lora.path for lora in loras] == [lora.path for lora in applied.loras]:
        return _change_strengths(transformer, applied, loras, device)
    matched = match_all(loras, transformer)
    remove_loras(transformer, applied)
    how = applied.how if applied.matched else _resolve("auto", transformer, matched)
    return _apply(transformer, matched, how, applied.source, device)


def _change_strengths(
    transformer: nn.Module, applied: Applied, loras: Sequence[Lora], device: torch.device | None
) -> Applied:
    matched = tuple(replace(each, lora=lora) for each, lora in zip(applied.matched, loras, strict=True))
    restore(transformer, applied.originals, applied.source)
    for index, lora in enumerate(loras):
        set_strength(transformer, index, lora.strength)
    branched = applied.branched
    originals = merge(
        transformer, matched, only=lambda name: name not in branched, source=applied.source, device=device
    )
    return replace(applied, matched=matched, originals=originals)


def _resolve(how: str, transformer: nn.Module, matched: Sequence[Matched]) -> str:
    if how != "auto":
        return how
    parameters = dict(transformer.named_parameters())
    changed = {patch.parameter for each in matched for patch in each.coverage.patches}
    plain = all(name in parameters and mergeable(parameters[name]) for name in changed)
    return "merge" if plain else "branch"
