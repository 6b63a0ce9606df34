"""LoRAs added into the weights themselves: no cost per step, one rounding, and the way back.

weight' = round(weight + sum of strength * scale * up @ down), the sum in float32 (arXiv:2106.09685, section 4.1). The
rounding cannot be undone by subtracting, so what is replaced is kept as a copy, or read again from its file.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightx2v.checkpoint import Header, read_tensors
from lightx2v.lora.dialects import LoraFile, read_lora
from lightx2v.lora.matching import Coverage, Patch, Shape, match
from lightx2v.lora.stack import Lora


@dataclass(frozen=True)
class Source:
    """The checkpoint that a model's weights came from, to read single ones of them again.

    Rather than copies: 1 GB of merged bf16 weights came back in 0.31 s from the page cache and in 0.12 s from copies,
    which cost another 1 GB of RAM (2 cores, one file).
    """

    header: Header  # names as the model has them

    def gives(self, name: str, parameter: Tensor) -> bool:
        """Whether the file has this parameter, as floats or packed, so that reading it again gives the same bits.

        Unpacking is exact here: products and sums of single elements round alike on every device.
        """
        info = self.header.tensors.get(name)
        if info is None or info.shape != tuple(parameter.shape):
            return False
        return info.packed is not None or (info.dtype.is_floating_point and info.dtype.itemsize >= 2)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor as stored); raises CheckpointError where a file is not the one that was loaded."""
        return read_tensors(self.header, names)


@dataclass(frozen=True)
class Matched:
    """One LoRA of a stack beside what its file holds and where that goes in one model."""

    lora: Lora
    file: LoraFile
    coverage: Coverage

    def read(self, patch: Patch) -> Mapping[str, Tensor]:
        """The tensors of one change."""
        return dict(read_tensors(self.file.header, patch.tensors))


def match_all(loras: Sequence[Lora], model: nn.Module | Mapping[str, Shape]) -> tuple[Matched, ...]:
    """Read the headers of a stack and find every layer; raises CheckpointError before any weight is read."""
    found = []
    for lora in loras:
        file = read_lora(lora.path)
        found.append(Matched(lora, file, match(file, model)))
    return tuple(found)


def add(total: Tensor, patch: Patch, tensors: Mapping[str, Tensor], strength: float) -> None:
    """total += strength * what the patch adds, in place; total: contiguous float32 of the parameter's shape."""
    first, *rest = (tensors[key].to(total.device, torch.float32) for key in patch.tensors)
    if patch.rows:
        first = first[patch.rows[0] : patch.rows[1]]
    factor = strength * patch.scale
    if rest:
        total.view(total.shape[0], -1).addmm_(first.flatten(1), rest[0].flatten(1), alpha=factor)
    else:
        total.add_(first.reshape(total.shape), alpha=factor)


def merge(
    module: nn.Module,
    matched: Sequence[Matched],
    *,
    only: Callable[[str], bool] = lambda name: True,
    source: Source | None = None,
    device: torch.device | None = None,
) -> dict[str, Tensor | None]:
    """Add every LoRA to the float parameters it changes, in place; all of a parameter's changes are rounded once.

    only: names of parameters to touch. device: where to add up (None: where the weights are); they stay where they are.
    Returns what was there before by name, for `restore`: a copy on the CPU, or None where `source` can give it again.
    A failure on the way puts everything back.
    """
    patches: dict[str, list[tuple[Patch, int]]] = {}
    for index, each in enumerate(matched):
        for patch in each.coverage.patches:
            if each.lora.strength != 0 and only(patch.parameter):
                patches.setdefault(patch.parameter, []).append((patch, index))
    parameters = dict(module.named_parameters())
    _require_float(parameters, patches)
    originals: dict[str, Tensor | None] = {}
    try:
        for name, found in patches.items():
            parameter = parameters[name].detach()
            known = source is not None and source.gives(name, parameter)
            originals[name] = None if known else parameter.to("cpu", copy=True)
            # First moved, then widened: half as many bytes cross over, and the GPU widens them.
            total = parameter.to(device or parameter.device).to(torch.float32, copy=True).contiguous()
            for patch, index in found:
                add(total, patch, matched[index].read(patch), matched[index].lora.strength)
            parameter.copy_(total)
    except BaseException:
        restore(module, originals, source)
        raise
    return originals


def restore(module: nn.Module, originals: Mapping[str, Tensor | None], source: Source | None = None) -> None:
    """Put back, bit for bit, what `merge` replaced."""
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    absent = [name for name, tensor in originals.items() if tensor is None]
    if absent and source is None:
        raise ValueError(f"no copy of {len(absent)} merged weights, first '{absent[0]}': give the checkpoint to read")
    if absent and source is not None:
        for name, stored in source.read(absent):
            parameters[name].copy_(stored)
    for name, kept in originals.items():
        if kept is not None:
            parameters[name].copy_(kept)


def _require_float(parameters: Mapping[str, Tensor], names: Iterable[str]) -> None:
    for name in names:
        if name not in parameters or not mergeable(parameters[name]):
            kind = parameters[name].dtype if name in parameters else "quantised"
            raise ValueError(
                f"'{name}' is {kind}: a LoRA can be merged only into float32, bfloat16 or float16 weights in memory; "
                "use how='branch' or how='auto'"
            )


def mergeable(tensor: Tensor) -> bool:
    """Whether a weight can take a merged LoRA: plain floats of 16 bits or more, present in memory."""
    return tensor.is_floating_point() and tensor.dtype.itemsize >= 2 and not tensor.is_meta
