"""How the encoder's weights rest between two calls, and how they become float32 while a block runs."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from lightx2v.checkpoint import Header, TensorInfo
from lightx2v.quant.scale import unpack

RESTING = ("fp8", "int8")  # numbers times a scale
SCALE = "_scale"  # the scale of a packed `weight` is the buffer `weight_scale` beside it
Rename = Callable[[str], str | None]
# Called before each block with (index, number of blocks); raise from it to cancel.
OnBlock = Callable[[int, int], None]


class Widened(nn.Module):
    """A block whose weights rest in their own dtype, packed or not, and are float32 only while it runs.

    In float16 the residual stream of a T5 can overflow (transformers keeps `wo` in float32, Wan clamps), and bfloat16
    arithmetic moves the output by about 1 %. In float32 every kind of file encodes alike, as in ComfyUI.
    The price is one block's float32 weights at a time: 0.77 GB for umT5-xxl.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def __getattr__(self, name: str) -> Any:
        """What a model asks of its blocks beside running them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: object, **kwargs: object) -> object:
        scales = dict(self.block.named_buffers())
        weights = {}
        for name, weight in self.block.named_parameters():
            scale = scales.get(name + SCALE)
            weights[name] = weight.float() if scale is None else unpack({"weight": weight, "scale": scale})
        return functional_call(self.block, weights, args, kwargs)


def stay_packed(model: nn.Module, header: Header, rename: Rename) -> tuple[Header, Rename]:
    """Make room in a meta-device model for 8-bit weights as they are stored, and say what fills it.

    Returns the header whose linear layers are their stored numbers and scales, and its names' way into the model.
    Other packed tensors (embeddings, norms, GGML's blocks, NVFP4, MXFP8) are left to be restored.
    """
    layers = {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    tensors: dict[str, TensorInfo] = {}
    targets: dict[str, str | None] = {}
    for name, info in header.tensors.items():
        tensors[name], targets[name] = info, rename(name)
        layer = layers.get(targets[name] or "")
        if info.packed is None or info.packed.scheme not in RESTING or layer is None:
            continue
        tensors[name] = info.packed.parts["weight"]
        layer.weight = nn.Parameter(_room(tensors[name]), requires_grad=False)
        if scale := info.packed.parts.get("scale"):
            tensors[name + SCALE], targets[name + SCALE] = scale, f"{targets[name]}{SCALE}"
            layer.register_buffer("weight" + SCALE, _room(scale))
    return replace(header, tensors=tensors), targets.__getitem__


def _room(info: TensorInfo) -> torch.Tensor:
    return torch.empty(info.shape, dtype=info.dtype, device="meta")


def before_blocks(blocks: Iterable[nn.Module], on_block: Callable[[int, int], None] | None, hooks: ExitStack) -> None:
    """Call on_block with (index, number of blocks) before each block runs, until `hooks` is closed."""

    if on_block is None:
        return
    listed = list(blocks)
    for index, block in enumerate(listed):
        call = partial(_called, on_block, index, len(listed))
        hooks.callback(block.register_forward_pre_hook(call).remove)


def _called(on_block: Callable[[int, int], None], index: int, total: int, block: nn.Module, args: object) -> None:
    on_block(index, total)
