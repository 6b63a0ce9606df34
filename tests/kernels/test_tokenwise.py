"""Every backend of the ops that work token by token (norms, modulation, RoPE) against the formula in fp64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from closeness import assert_backend
from lightx2v_kernels import registry

WIDTH, HEADS, HEAD_DIM, EPS = 256, 2, 128, 1e-6
OPS = ("rms_norm", "layer_norm", "modulate", "gated_residual", "rope", "linear_gelu")
PAIRS = [(op, name) for op in OPS for name in registry.names(op)]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return normed * (1 if weight is None else weight) + (0 if bias is None else bias)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return layer_norm(x, None, None, eps) * (1 + scale) + shift


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + y * gate


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One 2 x 2 rotation matrix a pair."""
    turn = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)  # (L, D/2, 2, 2)
    return torch.einsum("lpij,blhpj->blhpi", turn, x.unflatten(-1, (-1, 2))).flatten(-2)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = torch.einsum("blk,nk->bln", x, weight) + bias
    return y / 2 * (1 + (math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)).tanh())


TRUTHS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (rms_norm, layer_norm, modulate, gated_residual, rope, linear_gelu)
}


def check(backend: registry.Backend, args: tuple[Any, ...]) -> None:
    """Held to the formula in fp64, and to the error of rounding that once: all of these ops can do so well."""
    truth = TRUTHS[backend.op](*(a.double() if isinstance(a, Tensor) else a for a in args))
    assert_backend(backend, args, truth, truth.to(args[0].dtype))


def arguments(op: str, length: int, device: torch.device, dtype: torch.dtype, strided: bool) -> list[tuple[Any, ...]]:
    """Argument tuples of one op for a batch of two; strided: the tokens are the middle third of a fused projection."""

    def tokens(mean: float = 0.0) -> Tensor:
        fused = (mean + torch.randn(2, length, 3, WIDTH)).to(device, dtype)
        return fused[:, :, 1] if strided else fused[:, :, 1].contiguous()

    def table(tokens: int) -> tuple[Tensor, ...]:
        return (0.5 * torch.randn(2, tokens, 6, WIDTH)).to(device).unbind(2)  # fp32 slices of one tensor, as in a model

    if op == "rope":
        angles = 10 * torch.rand(length, HEAD_DIM // 2)
        return [(tokens().unflatten(-1, (HEADS, HEAD_DIM)), angles.cos().to(device), angles.sin().to(device))]
    if op == "gated_residual":
        return [(tokens(), tokens(), table(n)[0]) for n in (1, length)]
    if op == "modulate":
        return [(tokens(mean=1), *table(n)[:2], EPS) for n in (1, length)]
    if op == "linear_gelu":
        weight = torch.randn(176, WIDTH) * WIDTH**-0.5
        return [(tokens(), weight.to(device, dtype), torch.linspace(-4, 3, 176).to(device, dtype))]
    weight, bias = torch.randn(2, WIDTH).to(device, dtype)
    if op == "rms_norm":
        return [(tokens(), weight, EPS), (tokens(), weight.float(), EPS)]
    return [(tokens(mean=1), w, b, EPS) for w, b in ((weight, bias), (weight.float(), bias.float()), (None, None))]


def backend_or_skip(op: str, name: str, device: torch.device, dtype: torch.dtype) -> registry.Backend:
    backend = next(b for b in registry.registry(op).backends if b.name == name)
    if why := backend.why_not(device, dtype, HEAD_DIM):
        pytest.skip(f"{name}: {why}")
    return backend


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("length", [1, 33, 63, 1000])
@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_lengths(op: str, name: str, length: int, strided: bool, device: torch.device, dtype: torch.dtype) -> None:
    backend = backend_or_skip(op, name, device, dtype)
    for args in arguments(op, length, device, dtype, strided):
        check(backend, args)


@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_inputs_are_left_as_they_were(op: str, name: str, device: torch.device) -> None:
    backend = backend_or_skip(op, name, device, torch.float32)
    for args in arguments(op, 33, device, torch.float32, strided=False):
        before = [a.clone() if isinstance(a, Tensor) else a for a in args]
        backend.load()(*args)
        assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True) if isinstance(a, Tensor))


@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_statistics_are_fp32_where_fp16_squares_overflow(op: str, name: str, device: torch.device) -> None:
    """Tokens of +-300 are fine in fp16, their squares are not; a norm must not care."""
    if op in ("gated_residual", "rope"):
        pytest.skip("no statistics")
    backend = backend_or_skip(op, name, device, torch.float16)
    for args in arguments(op, 33, device, torch.float16, strided=False):
        args = (args[0] * 300, *args[1:])
        check(backend, args)


@pytest.mark.parametrize(("op", "name"), [pair for pair in PAIRS if pair[0] in ("rms_norm", "layer_norm", "modulate")])
def test_eps_is_added_to_the_mean_square(op: str, name: str, device: torch.device) -> None:
    """Tokens whose mean square is as small as eps: leaving eps out, or outside the root, changes the result by half."""
    backend = backend_or_skip(op, name, device, torch.float32)
    for args in arguments(op, 33, device, torch.float32, strided=False):
        args = ((args[0] - args[0].mean(-1, keepdim=True)) * EPS**0.5, *args[1:])
        check(backend, args)


def test_rope_turns_each_pair_by_its_own_angle() -> None:
    """A quarter turn sends (1, 0) to (0, 1); token 0 and the second pair stay."""
    x = torch.tensor([1.0, 0.0, 1.0, 0.0]).expand(1, 2, 1, 4)
    cos, sin = torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    wanted = torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 0]]).view(1, 2, 1, 4)
    for backend in registry.registry("rope").backends:
        assert torch.equal(backend.load()(x, cos, sin), wanted), backend.name
