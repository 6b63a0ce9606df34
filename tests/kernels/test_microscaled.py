"""NVFP4 and MXFP8: bytes by hand, the nearest of all codes, and the kernels against PyTorch's restoring."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from closeness import assert_backend, assert_close
from lightx2v_kernels import microscaled, registry
from lightx2v_kernels.microscaled import quantise_mxfp8, quantise_nvfp4, tiled, unit_of, untiled

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.device("cpu" if INTERPRETED else "cuda")
PAIRS = [(op, name) for op in ("nvfp4_linear", "mxfp8_linear") for name in registry.names(op)]


def weight_of(rows: int, size: int) -> Tensor:
    """Rows of sizes that differ, one of zeros, one block of zeros."""
    weight = torch.randn(rows, size) * (0.01 + torch.rand(rows, 1))
    weight[1], weight[0, :32] = 0, 0
    return weight


def arguments(
    op: str, tokens: int, rows: int, size: int, dtype: torch.dtype, device: torch.device, biased: bool
) -> tuple[tuple[Any, ...], Tensor]:
    """Arguments of an op, and its weight as its bytes give it."""
    x = torch.randn(tokens, size).to(device, dtype)
    weight = weight_of(rows, size)
    bias = torch.randn(rows).to(device, dtype) if biased else None
    if op == "nvfp4_linear":
        unit = unit_of(weight.abs().amax())
        codes, scales = quantise_nvfp4(weight, unit, biased)
        restored = microscaled.restore_nvfp4(codes, tiled(scales), unit, biased)
        return (x, codes.to(device), tiled(scales).to(device), unit.to(device), biased, bias), restored
    values, scales = quantise_mxfp8(weight)
    restored = microscaled.restore_mxfp8(values, tiled(scales))
    return (x, values.to(device), tiled(scales).to(device), bias), restored


def truth(args: tuple[Any, ...], weight: Tensor) -> Tensor:
    x, bias = args[0].double().cpu(), args[-1]
    return x @ weight.double().T + (0 if bias is None else bias.double().cpu())


@pytest.mark.parametrize(("op", "name"), PAIRS, ids=[f"{op}-{name}" for op, name in PAIRS])
def test_products(op: str, name: str, device: torch.device, dtype: torch.dtype) -> None:
    backend = next(b for b in registry.registry(op).backends if b.name == name)
    if why := backend.why_not(device, dtype, 128):
        pytest.skip(f"{name}: {why}")
    for length, biased in ((1, True), (33, False), (63, True), (1000, True)):
        args, weight = arguments(op, length, 80, 224, dtype, device, biased)
        plain = torch.nn.functional.linear(
            args[0].cpu(), weight.to(dtype), None if args[-1] is None else args[-1].cpu()
        )
        assert_backend(backend, args, truth(args, weight).to(device), plain.to(device))


@pytest.mark.parametrize("high_first", [True, False])
@pytest.mark.parametrize("shape", [(1, 32), (33, 64), (130, 1056)])
def test_triton_restores_what_pytorch_restores(shape: tuple[int, int], high_first: bool) -> None:
    """Every byte, so that every code and every finite scale is among them."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from lightx2v_kernels.linear import _triton_microscaled as ours

    (rows, size), blocks = shape, shape[1] // 16
    codes = torch.randint(0, 256, (rows, size // 2), dtype=torch.uint8)
    scales = tiled(torch.randint(0, 127, (rows, blocks), dtype=torch.uint8))
    unit = torch.tensor([0.37])
    wanted = microscaled.restore_nvfp4(codes, scales, unit, high_first)
    found = ours.restored_nvfp4(codes.to(GPU), scales.to(GPU), unit.to(GPU), high_first, torch.float32)
    assert torch.equal(found.cpu(), wanted)
    values = torch.randint(0, 256, (rows, size), dtype=torch.uint8)
    values[values & 127 == 127] = 0
    scales = tiled(torch.randint(16, 240, (rows, size // 32), dtype=torch.uint8))
    found = ours.restored_mxfp8(values.to(GPU), scales.to(GPU), torch.float32)
    assert torch.equal(found.cpu(), microscaled.restore_mxfp8(values, scales))


@pytest.mark.parametrize("op", ["nvfp4_linear", "mxfp8_linear"])
@pytest.mark.parametrize("length", [1, 33, 63, 1000])
def test_triton(op: str, length: int) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from lightx2v_kernels.linear import _triton_microscaled as ours

    args, weight = arguments(op, length, 80, 224, torch.bfloat16, GPU, length != 33)
    bias = None if args[-1] is None else args[-1].cpu()
    plain = torch.nn.functional.linear(args[0].cpu(), weight.bfloat16(), bias)
    out = getattr(ours, op)(*args)
    assert_close(op, out.cpu(), truth(args, weight), plain)
    apart = torch.stack([args[0], args[0]], 1)[:, 0]
    assert torch.equal(getattr(ours, op)(apart, *args[1:]), out)
    assert getattr(ours, op)(args[0].view(1, length, 224), *args[1:]).shape == (1, length, 80)


def test_scales_lie_in_tiles_as_cublas_says() -> None:
    """By the formula of its documentation, one by one; rows and blocks past the end are zeros."""
    rows, blocks = 200, 10
    scales = torch.randint(1, 256, (rows, blocks), dtype=torch.uint8)
    found = tiled(scales)
    assert found.shape == (256, 12)
    flat, left = found.flatten().clone(), found.flatten().clone()
    for row in range(rows):
        for block in range(blocks):
            at = (row // 128 * 3 + block // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4
            assert flat[at] == scales[row, block]
            left[at] = 0
    assert not left.any()
    assert torch.equal(untiled(found, rows, blocks), scales)


def test_nvfp4_bytes_by_hand() -> None:
    """0x21 is 0.5 and 1, or 1 and 0.5; a scale of 0x38 is 1, of 0x40 is 2, of 0x01 is 2^-9; 0xF is -6."""
    codes = torch.zeros(2, 16, dtype=torch.uint8)
    codes[0, 0], codes[0, 8], codes[1, 15] = 0x21, 0x7F, 0xC3
    scales = tiled(torch.tensor([[0x38, 0x40], [0x00, 0x01]], dtype=torch.uint8))
    low = microscaled.restore_nvfp4(codes, scales, torch.tensor([0.5]), False)
    high = microscaled.restore_nvfp4(codes, scales, torch.tensor([0.5]), True)
    assert low[0, :2].tolist() == [0.25, 0.5] and high[0, :2].tolist() == [0.5, 0.25]
    assert low[0, 16:18].tolist() == [-6.0, 6.0] and high[0, 16:18].tolist() == [6.0, -6.0]
    assert low[1, 30:].tolist() == [1.5 * 2**-10, -2.0 * 2**-10]
    assert low.count_nonzero() == high.count_nonzero() == 6


def test_mxfp8_bytes_by_hand() -> None:
    """0x38 is 1, 0x7E is 448, 0x81 is -2^-9; exponents 127 and 120 are 1 and 2^-7."""
    values = torch.zeros(1, 64, dtype=torch.uint8)
    values[0, 0], values[0, 31], values[0, 32] = 0x38, 0x7E, 0x81
    found = microscaled.restore_mxfp8(values, tiled(torch.tensor([[127, 120]], dtype=torch.uint8)))
    assert found[0, 0] == 1 and found[0, 31] == 448 and found[0, 32] == -(2**-16)
    assert found.count_nonzero() == 3
    assert microscaled.from_e8m0(torch.tensor([0, 254, 255], dtype=torch.uint8))[:2].tolist() == [2**-127, 2.0**127]
    assert microscaled.from_e8m0(torch.tensor([255], dtype=torch.uint8)).isnan().all()


def test_nvfp4_takes_the_nearest_of_all_codes() -> None:
    """Among sixteen, for every value; midpoints go to the code that is even."""
    weight = weight_of(70, 96)
    unit = unit_of(weight.abs().amax())
    codes, scales = quantise_nvfp4(weight, unit, False)
    found = microscaled.restore_nvfp4(codes, tiled(scales), unit, False)
    exact = (scales.view(torch.float8_e4m3fn).float() * unit).repeat_interleave(16, 1)
    table = torch.tensor([*microscaled.E2M1, *(-value for value in microscaled.E2M1)])
    distance = (weight[..., None].double() - table.double() * exact[..., None].double()).abs()
    assert ((found.double() - weight.double()).abs() <= distance.amin(-1) + 1e-6 * exact).all()
    row = torch.tensor([[6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -5.0, 7.0, 0, 0, 0, 0]]).repeat(1, 2)
    row[:, 11] = row[:, 27] = 0
    codes, scales = quantise_nvfp4(row, torch.ones(1), True)
    assert scales.tolist() == [[0x38, 0x38]]
    assert codes[0, :6].tolist() == [0x70, 0x22, 0x44, 0x66, 0x8A, 0xE0]


def test_mxfp8_takes_the_least_power_of_two_that_holds_a_block() -> None:
    weight = weight_of(40, 96)
    weight[2, :32] = 448 * 2.0**-5 * torch.linspace(-1, 1, 32)  # exactly a power of two
    weight[3, :32] = 1e-38  # below the least scale
    values, scales = quantise_mxfp8(weight)
    found = microscaled.restore_mxfp8(values, tiled(scales))
    largest = weight.view(40, 3, 32).abs().amax(2).double()
    exact = microscaled.from_e8m0(scales).double()
    fits = (largest <= 448 * exact) & ((largest > 224 * exact) | (scales == 0))
    assert fits[largest > 0].all() and scales[2, 0] == 122 and not scales[1].any()
    step = weight.abs().clamp(min=exact.repeat_interleave(32, 1).float() * 2**-6) * 2**-4
    assert ((found - weight).abs() <= step * (1 + 1e-6)).all()


def test_relative_errors_of_a_layer() -> None:
    """As docs/quantization.md says: 9.5 % and 2.6 %."""
    weight = torch.randn(256, 512)
    unit = unit_of(weight.abs().amax())
    codes, scales = quantise_nvfp4(weight, unit, True)
    four = microscaled.restore_nvfp4(codes, tiled(scales), unit, True)
    values, scales = quantise_mxfp8(weight)
    eight = microscaled.restore_mxfp8(values, tiled(scales))
    assert 0.08 < float((four - weight).norm() / weight.norm()) < 0.105
    assert 0.02 < float((eight - weight).norm() / weight.norm()) < 0.03


def test_zeros_stay_zeros() -> None:
    zeros = torch.zeros(16, 32)
    codes, scales = quantise_nvfp4(zeros, unit_of(zeros.abs().amax()), True)
    assert not codes.any() and not scales.any()
    assert not microscaled.restore_mxfp8(*quantise_mxfp8(zeros)[:1], tiled(quantise_mxfp8(zeros)[1])).any()


@pytest.mark.parametrize("shape", [(1, 32), (33, 64), (130, 544)])
def test_triton_rounds_tokens_as_pytorch_does(shape: tuple[int, int]) -> None:
    """To the bit in the interpreter; a GPU's division may take the other of two neighbours."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from lightx2v_kernels.linear import _triton_microscale as ours

    x = torch.randn(shape) * (0.01 + torch.rand(shape[0], 1))
    x[-1], x[0, :16] = 0, 0
    x = x if shape[0] == 33 else x.bfloat16()
    unit = unit_of(x.abs().amax().float())
    most = 0 if INTERPRETED else x.numel() // 500
    for high_first in (True, False):
        codes, scales = ours.nvfp4_tokens(x.to(GPU), unit.to(GPU), high_first)
        wanted, by_block = quantise_nvfp4(x, unit, high_first)
        assert (codes.cpu() != wanted).sum() <= most and (scales.cpu() != tiled(by_block)).sum() <= most
    values, scales = ours.mxfp8_tokens(x.to(GPU))
    wanted, by_block = quantise_mxfp8(x)
    assert (values.cpu() != wanted).sum() <= most and (scales.cpu() != tiled(by_block)).sum() <= most
    x[0, 3] = torch.nan
    found = microscaled.restore_mxfp8(*(each.cpu() for each in ours.mxfp8_tokens(x.to(GPU))))
    assert found.isnan().sum() == 1 and found[0, 3].isnan()


def test_fakes_have_the_shape_and_type_of_the_result() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from torch._subclasses.fake_tensor import FakeTensorMode

    from lightx2v_kernels.linear import _triton_microscaled as ours

    with FakeTensorMode():
        x, scales = torch.empty(3, 5, 64, dtype=torch.float16), torch.empty(128, 4, dtype=torch.uint8)
        codes = torch.empty(48, 32, dtype=torch.uint8)
        out = torch.ops.lightx2v.nvfp4_linear(x, codes, scales, torch.empty(1), True, None)
        assert out.shape == (3, 5, 48) and out.dtype == torch.float16
        out = torch.ops.lightx2v.mxfp8_linear(x, torch.empty(48, 64, dtype=torch.uint8), scales, None)
        assert out.shape == (3, 5, 48) and out.dtype == torch.float16
    assert ours.nvfp4_linear is not None


def emulated(first: Tensor, second: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """What `torch._scaled_mm` computes with block scales in tiles, by restoring; checks what CUDA would."""
    assert first.is_contiguous() and second.t().is_contiguous()
    if scale_a.dtype == torch.float8_e4m3fn:
        assert first.dtype == second.dtype == torch.float4_e2m1fn_x2
        one = torch.ones(1)
        sides = [
            microscaled.restore_nvfp4(each.view(torch.uint8), scale.view(torch.uint8), one, False)
            for each, scale in ((first, scale_a), (second.t(), scale_b))
        ]
    else:
        assert scale_a.dtype == scale_b.dtype == torch.float8_e8m0fnu
        sides = [
            microscaled.restore_mxfp8(each.view(torch.uint8), scale.view(torch.uint8))
            for each, scale in ((first, scale_a), (second.t(), scale_b))
        ]
    blocks = 16 if scale_a.dtype == torch.float8_e4m3fn else 32
    for side, scale in zip(sides, (scale_a, scale_b), strict=True):
        height, width = microscaled.scale_shape(len(side), side.shape[1] // blocks)
        assert scale.numel() == height * width
    return (sides[0] @ sides[1].T).to(out_dtype)


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this PyTorch has no float4_e2m1fn_x2")
@pytest.mark.parametrize("op", ["nvfp4_linear", "mxfp8_linear"])
@pytest.mark.parametrize("way", ["in_steps", "in_one_pass"])
def test_block_scaled_products_with_the_product_emulated(op: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of Blackwell's path but the one call that no other GPU has: within what rounding tokens explains.

    The values of a byte change places on both sides at once, which leaves their sum.
    """
    from lightx2v_kernels.linear import torch_scaled_mm

    monkeypatch.setattr(torch, "_scaled_mm", emulated)
    monkeypatch.setattr(torch_scaled_mm, "CHUNK", 128)
    if way == "in_one_pass":
        pytest.importorskip("triton", reason="Triton is not installed")
        if not INTERPRETED:
            pytest.skip("the tokens are on the CPU, for the product is emulated there")
    rounding = getattr(torch_scaled_mm, way)()
    backend = next(b for b in torch_scaled_mm.BACKENDS if b.op == op)
    for length, biased in ((1, True), (33, False), (300, True)):
        args, weight = arguments(op, length, 80, 224, torch.bfloat16, torch.device("cpu"), biased)
        out, wanted = getattr(torch_scaled_mm, op)(*args, rounding=rounding), truth(args, weight)
        found = float((out - wanted).norm() / wanted.norm())
        assert backend.max_error is not None and backend.max_error / 3 < found < backend.max_error


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this PyTorch has no float4_e2m1fn_x2")
@pytest.mark.parametrize("op", ["nvfp4_linear", "mxfp8_linear"])
def test_pytorch_takes_the_arguments_of_a_block_scaled_product(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own checks of types, strides and sizes for CUDA, without one; one row of tiles too few is refused."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    from lightx2v_kernels.linear import torch_scaled_mm

    given: list[tuple[Tensor, ...]] = []

    def take(first: Tensor, second: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
        given.append((first, second, scale_a, scale_b))
        return torch.zeros(len(first), second.shape[1], dtype=out_dtype)

    args, _ = arguments(op, 200, 272, 160, torch.bfloat16, torch.device("cpu"), True)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "_scaled_mm", take)
        linear = getattr(torch_scaled_mm, op)
        assert torch.equal(linear(*args, rounding=torch_scaled_mm.in_steps()), args[-1].expand(200, 272))
    ((first, second, scale_a, scale_b),) = given
    mode = FakeTensorMode()

    def on_cuda(tensor: Tensor) -> Tensor:
        return FakeTensor(mode, tensor.to("meta"), torch.device("cuda"))

    sides, few = (on_cuda(first), on_cuda(second)), on_cuda(scale_a[512:])
    scales = on_cuda(scale_a), on_cuda(scale_b)
    with mode:
        out = torch._scaled_mm(*sides, *scales, out_dtype=torch.bfloat16)
        assert out.shape == (200, 272) and out.dtype == torch.bfloat16
        with pytest.raises((RuntimeError, ValueError), match=r"scale"):
            torch._scaled_mm(*sides, few, scales[1], out_dtype=torch.bfloat16)
