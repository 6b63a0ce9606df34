"""PyTorch's own files (.pth, .pt, .ckpt) of plain tensors; code in them is never run."""

from pathlib import Path

import torch
from torch import Tensor

from lightx2v.checkpoint.header import CheckpointError, Header, Stamp, TensorInfo

SUFFIXES = (".pth", ".pt", ".ckpt")
WRAPPERS = ("state_dict", "model")  # keys under which trainers put the weights


def open_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, their storages mapped and not read."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises pickle, zip and runtime errors alike; all mean the same to the user
        raise CheckpointError(
            f"{path}: cannot be read as a PyTorch file of plain tensors ({type(error).__name__}); "
            "it is damaged or holds code: use the .safetensors version"
        ) from error
    for key in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: holds something other than a dictionary of tensors")
    return state


def pickle_header(path: Path) -> Header:
    stamp = Stamp.of(path.stat())
    tensors = {str(name): TensorInfo(t.dtype, tuple(t.shape), path) for name, t in open_pickle(path).items()}
    return Header(path, tensors, {}, "pickle", {path: stamp})
