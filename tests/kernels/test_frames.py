"""The convolutions of the VAEs and what makes their input ready, and the VAEs on top of them.

Without a GPU the Triton kernels run in Triton's interpreter. It cannot multiply bfloat16 matrices (create_dot of its
interpreter.py multiplies the bits), so there the types are float32 and float16.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where triton.jit decorates, in the imports of `load`

from closeness import assert_close, relative_error
from lightx2v.vae import fused, hunyuan15, layers, tae
from lightx2v.vae.loading import VAE
from lightx2v.vae.stream import decode, encode
from lightx2v_kernels import registry
from lightx2v_kernels.conv2d_relu.reference import conv2d_relu
from lightx2v_kernels.conv3d.reference import conv3d
from lightx2v_kernels.conv_input.reference import conv_input
from lightx2v_kernels.doubled_conv.reference import doubled_conv
from tiny_vae import tiny_tae, tiny_vae, tiny_vae15, tiny_vae22

OPS = fused.OPS
PLACE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.bfloat16, torch.float16) if torch.cuda.is_available() else (torch.float32, torch.float16)


def found(op: str, name: str = "triton") -> registry.Backend:
    return next(b for b in registry.registry(op).backends if b.name == name)


def rows(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(PLACE, dtype).contiguous(memory_format=torch.channels_last_3d)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def check(op: str, *args: Any) -> None:
    with torch.no_grad():
        contract = registry.registry(op).op
        truth = contract.reference(*(a.double() if isinstance(a, Tensor) else a for a in args))
        plain = (contract.plain or contract.reference)(*args)
        assert_close(op, found(op).load()(*args), truth, plain)


OWN = [(op, each.name) for op in OPS for each in registry.registry(op).backends if each.name != "triton"]


@pytest.mark.parametrize(("op", "name"), OWN)
def test_pytorch_s_own(op: str, name: str, device: torch.device, dtype: torch.dtype) -> None:
    if why := found(op, name).why_not(device, dtype, 128):
        pytest.skip(f"{name}: {why}")
    assert registry.self_test(registry.registry(op).op, found(op, name), device, dtype, 128) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_triton_on_the_examples(op: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    assert registry.self_test(registry.registry(op).op, found(op), PLACE, dtype, 96) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 33, 63, 1000])
def test_lines_of_any_length(width: int, dtype: torch.dtype) -> None:
    """Also of every third pixel of a wider frame, and of one channel block that is not a power of two."""
    pytest.importorskip("triton")
    x = rows(1, 24, 1, 2, width * 3, dtype=dtype)[..., ::3]
    gamma = 1 + 0.3 * torch.randn(24).to(PLACE, dtype)
    check("conv_input", x, gamma, (1, 1), False, 1)
    check("conv_input", x, None, (1, 1), True, 2)
    padded = rows(1, 16, 1, 3, width + 2, dtype=dtype)
    weight = rows(24, 16, 3, 3, 3, dtype=dtype) * 0.05
    past, residual = rows(1, 16, 2, 3, width + 2, dtype=dtype), rows(1, 24, 1, 1, width, dtype=dtype)
    bias = torch.randn(24).to(PLACE, dtype)
    check("conv3d", padded, past, weight, bias, residual)
    check("doubled_conv", padded, weight[:, :, 0], bias)


@pytest.mark.parametrize(
    ("channels", "out"), [(16, 384), (96, 96), (192, 96), (48, 48), (160, 160), (96, 12), (24, 24), (3, 96), (12, 32)]
)
def test_widths_of_the_vaes(channels: int, out: int) -> None:
    """Runs of channels that do not fill the last step, and channels that are no multiple of 8 (pixels)."""
    pytest.importorskip("triton")
    dtype = DTYPES[0]
    weight = rows(out, channels, 1, 3, 3, dtype=dtype) * (9 * channels) ** -0.5
    x, bias = rows(2, channels, 2, 5, 8, dtype=dtype), torch.randn(out).to(PLACE, dtype)
    check("conv3d", x, None, weight, bias, rows(2, out, 2, 3, 6, dtype=dtype))
    check("conv3d", x.contiguous(), None, weight.contiguous(), bias, None)


def test_gradients_and_shapes_of_the_opaque_ops() -> None:
    pytest.importorskip("triton")
    from lightx2v_kernels.conv3d import _triton as convolution
    from lightx2v_kernels.conv_input import _triton as preparation
    from lightx2v_kernels.doubled_conv import _triton as doubling

    x, gamma = torch.randn(1, 16, 1, 2, 2).to(PLACE).requires_grad_(), torch.randn(16).to(PLACE).requires_grad_()
    weight, bias = torch.randn(16, 16, 1, 3, 3).to(PLACE).requires_grad_(), torch.randn(16).to(PLACE).requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(preparation._opaque, (x, gamma, [1, 1], False, 1), test_utils=tests)
    padded, tiles = x.new_ones(1, 16, 1, 4, 4), [16, 16, 0, 16, 2, 4, 1, 0]
    torch.library.opcheck(convolution._opaque, (padded, None, weight, bias, x, True, tiles), test_utils=tests)
    torch.library.opcheck(doubling._opaque, (x, weight[:, :, 0], bias, True), test_utils=tests)
    leaves = (x, gamma, weight, bias)

    def run(prepare: Any, convolve: Any, double: Any) -> tuple[Tensor, ...]:
        y = convolve(prepare(x, gamma, (1, 1), False, 1), None, weight, bias, x, True)
        y = double(y, weight[:, :, 0], bias, True)
        return torch.autograd.grad(y.square().sum(), leaves)

    ours, theirs = run(*(found(op).load() for op in OPS[:3])), run(conv_input, conv3d, doubled_conv)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(ours, theirs, strict=True))


def use(kernels: fused.FrameKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (layers, hunyuan15, tae):
        monkeypatch.setattr(module, "frame_kernels", lambda x, weight: kernels)


@pytest.mark.parametrize(("make", "chunk"), [(tiny_vae, 1), (tiny_vae22, 3), (tiny_vae15, 2), (tiny_tae, 3)])
def test_the_fused_way_is_the_plain_way(make: Any, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, on the references: whatever differs is not rounding."""
    widths = {tiny_vae15: (8, 8, 16, 32, 64), tiny_tae: ("taew2_1", (24, 16, 8, 8))}
    vae: VAE = (make(*widths[make]) if make is tiny_tae else make(widths[make]) if make in widths else make()).double()
    _, rows_, columns = vae.space.stride
    raw = torch.randn(2, vae.space.channels, 4, 2, 3, dtype=torch.float64)
    frames = torch.rand(2, 3, 13, 2 * rows_, 3 * columns, dtype=torch.float64) * 2 - 1

    def run() -> tuple[Tensor, Tensor]:
        out = torch.empty_like(frames)
        return decode(vae, raw, chunk=chunk, clamp=False, out=out), encode(vae, frames, chunk=4 * chunk)

    plain = run()
    calls: list[str] = []

    def prepare(*args: Any) -> Tensor:
        calls.append("conv_input")
        return conv_input(*args)

    use(fused.FrameKernels(prepare, conv3d, doubled_conv, conv2d_relu), monkeypatch)
    decoded, encoded = run()
    assert len(calls) > 30
    assert relative_error(decoded, plain[0]) < 1e-12 and relative_error(encoded, plain[1]) < 1e-7


def test_a_vae_on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    vae = tiny_vae(16).to(PLACE, DTYPES[0])
    raw = torch.randn(1, 16, 2, 1, 1)
    wide = decode(tiny_vae(16).double(), raw, clamp=False)
    plain = decode(tiny_vae(16).to(DTYPES[0]), raw, clamp=False)
    use(fused.FrameKernels(*(found(op).load() for op in OPS)), monkeypatch)
    assert_close("decode", decode(vae, raw, clamp=False).cpu(), wide, plain)


def test_pytorch_s_layers_run_on_a_cpu_and_in_training() -> None:
    x = torch.randn(2)
    with torch.no_grad():
        assert fused.frame_kernels(x.half(), x.half()) is None
    assert fused.frame_kernels(x.half().to("meta"), x.half()) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("make", [tiny_vae, tiny_vae22, tiny_vae15])
def test_half_precision_on_a_gpu(make: Any) -> None:
    raw = torch.randn(1, make().space.channels, 3, 4, 6)
    wide = decode(make().double(), raw, clamp=False)
    plain = decode(make().bfloat16(), raw, clamp=False)
    assert_close("decode", decode(make().to("cuda", torch.bfloat16), raw, clamp=False).cpu(), wide, plain)
