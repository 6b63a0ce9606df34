"""Packed linear layers: every backend against the formula, the Triton ones in Triton's interpreter where no GPU is."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from closeness import assert_backend, assert_close
from lightx2v_kernels import registry
from lightx2v_kernels.ggml import TYPES, quantise_q8_0, restore
from lightx2v_kernels.linear import gguf_examples
from lightx2v_kernels.quantized import LARGEST

pytest.importorskip("triton", reason="Triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.device("cpu" if INTERPRETED else "cuda")
OPS = {torch.int8: "int8_linear", torch.float8_e4m3fn: "fp8_linear"}
PAIRS = [(packed, name) for packed, op in OPS.items() for name in registry.names(op)]


def in_8_bits(rows: int, size: int, packed: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values over the whole range of the type, and scales that differ."""
    values = (2 * torch.rand(rows, size) - 1) * LARGEST[packed]
    return (values.round() if packed == torch.int8 else values).to(packed), 0.001 + 0.01 * torch.rand(rows)


def arguments(
    packed: torch.dtype, tokens: int, rows: int, size: int, dtype: torch.dtype, device: torch.device, biased: bool
) -> tuple[Any, ...]:
    values, scale = in_8_bits(tokens, size, packed)
    weight, weight_scale = in_8_bits(rows, size, packed)
    bias = torch.randn(rows).to(device, dtype) if biased else None
    moved = [tensor.to(device) for tensor in (values, scale[:, None], weight, weight_scale)]
    return (*moved, bias, dtype)


def truth(args: tuple[Any, ...]) -> Tensor:
    values, scale, weight, weight_scale, bias, _ = args
    y = torch.einsum("mk,nk->mn", values.double(), weight.double()) * scale.double() * weight_scale.double()
    return y if bias is None else y + bias.double()


def once_rounded(args: tuple[Any, ...]) -> Tensor:
    """What cannot be done better in the dtype of the result."""
    return truth(args).to(args[-1])


@pytest.mark.parametrize(("packed", "name"), PAIRS, ids=[f"{OPS[packed]}-{name}" for packed, name in PAIRS])
def test_products(packed: torch.dtype, name: str, device: torch.device, dtype: torch.dtype) -> None:
    backend = next(b for b in registry.registry(OPS[packed]).backends if b.name == name)
    if why := backend.why_not(device, dtype, 128):
        pytest.skip(f"{name}: {why}")
    for length, biased in ((1, True), (33, False), (63, True), (1000, True)):
        args = arguments(packed, length, 80, 208, dtype, device, biased)
        assert_backend(backend, args, truth(args), once_rounded(args))


@pytest.mark.parametrize("length", [1, 33, 63, 1000])
@pytest.mark.parametrize("packed", OPS, ids=["int8", "fp8"])
def test_triton(packed: torch.dtype, length: int) -> None:
    """208 values are no whole number of any tile's steps, 80 rows of no tile's width."""
    from lightx2v_kernels.linear import _triton

    runs = [_triton.int8_linear] if packed == torch.int8 else [_triton.fp8_linear, _triton.fp8_linear_exact]
    dtype, biased = (torch.float16, False) if length == 33 else (torch.bfloat16, True)
    args = arguments(packed, length, 80, 208, dtype, GPU, biased)
    for run in runs:
        assert_close(f"{packed}", run(*args), truth(args), once_rounded(args))


def test_hopper_is_given_its_own_tilings() -> None:
    """The copy engine and one program a multiprocessor for many tokens, whatever is asked on other GPUs."""
    from lightx2v_kernels.linear._triton import FEW, NARROW, PROMOTED, tiling_for

    for tokens, integer, size, wanted in (
        (32760, True, 5120, (True, True)),
        (32760, False, 5120, (True, True)),
        (32760, False, 13824, (True, False)),
    ):
        found = tiling_for(tokens, 5120, size, integer=integer, exact=False, hopper=True)
        assert (found.tma, found.persistent) == wanted and not found.promote
        assert not tiling_for(tokens, 5120, size, integer=integer, exact=False, hopper=False).tma
    assert tiling_for(32760, 64, 64, integer=False, exact=True, hopper=True) is PROMOTED
    for hopper in (True, False):
        assert tiling_for(512, 64, 64, integer=True, exact=True, hopper=hopper) is NARROW
        assert tiling_for(1, 64, 64, integer=False, exact=False, hopper=hopper) is FEW


@pytest.mark.parametrize("packed", OPS, ids=["int8", "fp8"])
@pytest.mark.parametrize("tma", [False, True], ids=["addresses", "tma"])
def test_triton_tilings(packed: torch.dtype, tma: bool) -> None:
    """Several tiles each way, the last ones cut; groups of tiles that do not divide; programs that walk several."""
    if tma:
        pytest.importorskip("triton.tools.tensor_descriptor", reason="this Triton has no tensor descriptors")
    from lightx2v_kernels.linear._triton import Tiling, product

    args = arguments(packed, 150, 112, 192, torch.bfloat16, GPU, True)
    values, scale, weight, weight_scale, bias, dtype = args
    for group, persistent, size in ((1, False, 64), (3, tma, 128)):
        tiling = Tiling(32, 32, size, group_m=group, warps=4, stages=2, tma=tma, persistent=persistent, promote=32)
        out = product(values, scale.flatten(), weight, weight_scale, bias, dtype, tiling)
        assert_close(f"{tiling}", out, truth(args), once_rounded(args))


def test_triton_takes_tokens_of_any_shape_and_layout() -> None:
    from lightx2v_kernels.linear._triton import int8_linear

    args = arguments(torch.int8, 42, 48, 64, torch.float32, GPU, True)
    values, scale, *rest = args
    wanted = int8_linear(*args)
    assert torch.equal(int8_linear(values.view(2, 3, 7, 64), scale.view(2, 3, 7, 1), *rest), wanted.view(2, 3, 7, 48))
    apart = torch.stack([values, values], 1)[:, 0]
    assert not apart.is_contiguous() and torch.equal(int8_linear(apart, scale, *rest), wanted)


def test_a_token_of_zeros_gives_the_bias() -> None:
    from lightx2v_kernels.linear._triton import int8_linear

    values, scale, weight, weight_scale, bias, dtype = arguments(torch.int8, 4, 32, 64, torch.float32, GPU, True)
    values[1], scale[1] = 0, 0
    for run in (int8_linear, registry.registry("int8_linear").op.reference):
        assert torch.equal(run(values, scale, weight, weight_scale, bias, dtype)[1], bias)


@pytest.mark.parametrize("args", gguf_examples(GPU, torch.float16, 128), ids=lambda args: f"{args[2]}-{args[3][0]}")
def test_gguf_triton(args: tuple[Any, ...]) -> None:
    """What PyTorch restores, to the rounding of a fused multiply-add, and the product."""
    from lightx2v_kernels.linear import _triton_gguf as ours

    x, blocks, encoding, shape, bias = args
    weight = restore(blocks, encoding, shape)
    assert_close(encoding, ours.restored(blocks, encoding, shape, torch.float32), weight, weight)
    wide = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert_close(encoding, ours.gguf_linear(*args), wide, torch.nn.functional.linear(x, weight.half(), bias))


def test_gguf_types_have_examples_and_kernels() -> None:
    from lightx2v_kernels.linear import _triton_gguf

    assert {args[2] for args in gguf_examples(GPU, torch.float16, 128)} == set(TYPES)
    assert {"Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K"} <= set(_triton_gguf.KINDS) <= set(TYPES)


def test_q8_0_blocks_are_what_ggml_reads() -> None:
    """Half a step of 1/127 of the largest value, and the rounding of the scale to float16."""
    weight = torch.randn(6, 64)
    weight[2] = 0
    found = restore(quantise_q8_0(weight), "Q8_0", (6, 64))
    step = weight.view(6, 2, 32).abs().amax(2, keepdim=True) / 127
    assert ((found - weight).view(6, 2, 32).abs() <= step * (0.5 + 127 * 2**-11)).all()


def test_fakes_have_the_shape_and_type_of_the_result() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from lightx2v_kernels.linear import _triton, _triton_gguf

    with FakeTensorMode():
        values, weight = torch.empty(2, 5, 64, dtype=torch.int8), torch.empty(48, 64, dtype=torch.int8)
        out = _triton.int8_linear(values, torch.empty(2, 5, 1), weight, torch.empty(48), None, torch.bfloat16)
        assert out.shape == (2, 5, 48) and out.dtype == torch.bfloat16
        x, blocks = torch.empty(3, 64, dtype=torch.float16), torch.empty(68 * 48, dtype=torch.uint8)
        out = _triton_gguf.gguf_linear(x, blocks, "Q8_0", (48, 64), None)
        assert out.shape == (3, 48) and out.dtype == torch.float16
