"""What every Triton backend shares: where it runs, and one opaque op around its launch.

The op is what torch.compile and CUDA graphs see, and how training goes through the kernel.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightx2v_kernels.precision import FLOATS
from lightx2v_kernels.quantized import tensors
from lightx2v_kernels.registry import Backend


def triton_backend(op: str, module: str) -> Backend:
    """The function of that name in `module`, which alone imports triton."""
    return Backend(
        op,
        "triton",
        lambda: getattr(importlib.import_module(module), op),
        rank=100,
        package="triton",
        devices=frozenset({"cuda"}),
        min_sm=(8, 0),
        dtypes=FLOATS,
    )


def opaque(
    name: str, launch: Callable[..., Any], fake: Callable[..., Any], reference: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """The op lightx2v::<name>, whose schema is read from the annotations of `launch`.

    fake: the same arguments -> empty results. reference: differentiated on the saved inputs; None: no gradient.
    Plain eager calls go to `launch` itself: the dispatcher's way through Python takes as long as a small kernel.
    """
    launch = _there(launch)
    op = torch.library.custom_op(f"lightx2v::{name}", launch, mutates_args=())
    op.register_fake(fake)
    if reference is not None:
        op.register_autograd(functools.partial(_backward, reference), setup_context=_save)

    @functools.wraps(launch)
    def call(*args: Any) -> Any:
        return launch(*args) if _runs_now(args) else op(*args)

    return call


def _there(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Launched on the GPU of the first argument: Triton itself takes the current one."""

    @functools.wraps(launch)
    def run(*args: Any) -> Any:
        device = args[0].device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return launch(*args)
        with torch.cuda.device(device):
            return launch(*args)

    return run


def _runs_now(args: tuple[Any, ...]) -> bool:
    """Nobody records this call: no compiler, no autograd, no tensor subclass."""
    if torch.compiler.is_compiling():
        return False
    recorded = torch.is_grad_enabled()
    for arg in args:
        kind = type(arg)
        if kind in _PLAIN:
            if recorded and arg.requires_grad:
                return False
        elif kind not in _NO_TENSORS and isinstance(arg, Tensor):
            return False
    return True


_NO_TENSORS = (float, type(None), torch.dtype)
_PLAIN = (Tensor, torch.nn.Parameter)


def empty_like(x: Tensor, *_: Any) -> Tensor:
    """Contiguous, whatever the strides of x."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)))
    ctx.others = tuple(None if isinstance(a, Tensor) else (a,) for a in inputs)


def _backward(reference: Callable[..., Any], ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    saved = iter(ctx.saved_tensors)
    with torch.enable_grad():
        args = [next(saved).detach().requires_grad_() if other is None else other[0] for other in ctx.others]
        results = tensors(reference(*args))
    leaves = [a for a in args if isinstance(a, Tensor)]
    found = iter(torch.autograd.grad(results, leaves, gradients, allow_unused=True))
    return tuple(next(found) if isinstance(a, Tensor) else None for a in args)
