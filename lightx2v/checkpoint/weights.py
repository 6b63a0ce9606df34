"""From a file's tensors to a module's weights."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightx2v.checkpoint.header import CheckpointError, Header
from lightx2v.checkpoint.reader import read_tensors

DtypeRule = torch.dtype | None | Callable[[str], torch.dtype | None]


def places(
    module: nn.Module, header: Header, rename: Callable[[str], str | None] = lambda name: name
) -> dict[str, str]:
    """Checkpoint name -> module name of every tensor that is used. Reads no weights.

    rename: checkpoint name -> module name, or None to leave a tensor of the file unused.
    Raises CheckpointError for tensors that are missing, unexpected or of another shape.
    """
    targets: dict[str, str] = {}
    for name in header.tensors:
        if (target := rename(name)) is None:
            continue
        if target in targets:
            raise CheckpointError(
                f"{header.path}: '{targets[target]}' and '{name}' are both the model's '{target}'; "
                "the file mixes two layouts: use one in a single layout"
            )
        targets[target] = name
    expected = module.state_dict()
    _check_names(header, set(expected), set(targets))
    for target, name in targets.items():
        _check_tensor(header, name, expected[target])
    return {name: target for target, name in targets.items()}


def assign(
    module: nn.Module,
    header: Header,
    *,
    rename: Callable[[str], str | None] = lambda name: name,
    dtype: DtypeRule = None,
    device: torch.device | str = "cpu",
    only: Callable[[str], bool] = lambda name: True,
    on_tensor: Callable[[], None] = lambda: None,
) -> None:
    """Give every parameter and persistent buffer of a meta-device module its weights.

    dtype: of floating-point weights; a function decides per module name. None keeps the file's, float32 for packed.
    only: module names that are read; the others stay without contents. on_tensor: before each; may raise to cancel.
    Raises as `places` does, before any weight is read.
    """
    origin = places(module, header, rename)
    names = [name for name, target in origin.items() if only(target)]
    for name, tensor in read_tensors(header, names, device, passing=True):
        on_tensor()
        target = origin[name]
        wanted = dtype(target) if callable(dtype) else dtype
        if not tensor.is_floating_point():
            wanted = None
        passing = header.tensors[name].packed is None  # what was unpacked is its own
        _put(module, target, tensor.to(device=device, dtype=wanted, copy=passing))


def _check_tensor(header: Header, name: str, expected: Tensor) -> None:
    info = header.tensors[name]
    if info.shape != tuple(expected.shape):
        raise CheckpointError(
            f"{header.path}: tensor '{name}' is {list(info.shape)}, "
            f"the model expects {list(expected.shape)}; this is a checkpoint of another model"
        )
    if expected.is_floating_point() and not info.dtype.is_floating_point and info.packed is None:
        raise CheckpointError(
            f"{header.path}: tensor '{name}' is {str(info.dtype).removeprefix('torch.')}, the model expects fractions; "
            "its scale is missing, or it is quantised in a way that is not known: use another version of the file"
        )


def _check_names(header: Header, expected: set[str], found: set[str]) -> None:
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing:
        raise CheckpointError(
            f"{header.path}: {len(missing)} of {len(expected)} tensors are missing, first '{missing[0]}'; "
            "the file is incomplete or of another model"
        )
    if extra:
        raise CheckpointError(
            f"{header.path}: {len(extra)} tensors have no place in the model, first '{extra[0]}'; "
            "the file is of another model or in a layout that is not supported yet"
        )


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor
