"""The Triton kernels of the tokenwise ops: on a GPU as they run, without one in Triton's interpreter."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from closeness import assert_close
from lightx2v_kernels import TOKENWISE, registry
from lightx2v_kernels.quantized import LARGEST, Quantized, tensors

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPS = [op for op in TOKENWISE if "triton" in registry.names(op)]
QUANTISING = [op for op in OPS if op.endswith("quantize")]
EPS = 1e-6


def backend(op: str) -> registry.Backend:
    found = next(b for b in registry.registry(op).backends if b.name == "triton")
    return found if DEVICE.type == "cuda" else replace(found, devices=None, min_sm=None)


def check(op: str, args: tuple[Any, ...]) -> None:
    """Held to the op in fp64 before any rounding, by the rule of the self-test."""
    definition = registry.registry(op).op
    wide = tuple(a.double() if isinstance(a, Tensor) else a for a in args)
    out = tensors(backend(op).load()(*args))
    truth = tensors((definition.truth or definition.reference)(*wide))
    for i, (got, wanted, usual) in enumerate(zip(out, truth, tensors(definition.reference(*args)), strict=True)):
        assert_close(f"{op}, result {i}", got, wanted, usual)


def arguments(op: str, length: int, width: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """A batch of two, the tokens a slice of a wider projection, tables a sample and of one tensor."""
    x, y = (1 + torch.randn(2, length, 2, width)).to(DEVICE, dtype).unbind(2)
    shift, scale, gate = (0.5 * torch.randn(2, 1, 3, width, device=DEVICE)).unbind(2)
    weight, bias = torch.randn(2, width).to(DEVICE, dtype)
    angles = 10 * torch.rand(length, 64)
    given: dict[str, tuple[Any, ...]] = {
        "rms_norm": (x, weight, EPS),
        "layer_norm": (x, weight, bias, EPS),
        "modulate": (x, shift, scale, EPS),
        "gated_residual": (x, y, gate),
        "norm_rope": (x, weight, angles.cos().to(DEVICE), angles.sin().to(DEVICE), EPS),
        "residual_modulate": (x, y, None, shift, scale, EPS),
        "residual_layer_norm": (x, y, gate, weight, bias, EPS),
        "quantize": (x, torch.int8),
        "gelu_quantize": (x, torch.float8_e4m3fn),
        "layer_norm_quantize": (x, weight, bias, EPS, torch.float8_e4m3fn),
        "modulate_quantize": (x, shift, scale, EPS, torch.int8),
        "residual_modulate_quantize": (x, y, None, shift, scale, EPS, torch.float8_e4m3fn),
        "residual_layer_norm_quantize": (x, y, gate, weight, bias, EPS, torch.int8),
    }
    return given[op]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_its_self_test_passes(op: str, dtype: torch.dtype) -> None:
    for head_dim in (64, 128):
        assert registry.self_test(registry.registry(op).op, backend(op), DEVICE, dtype, head_dim) is None


@pytest.mark.parametrize(("length", "width"), [(1, 256), (63, 256), (1000, 256), (33, 1536), (3, 5120), (3, 13824)])
@pytest.mark.parametrize("op", OPS)
def test_lengths_and_widths(op: str, length: int, width: int) -> None:
    check(op, arguments(op, length, width, torch.bfloat16))


@pytest.mark.parametrize("op", OPS)
def test_no_tokens(op: str) -> None:
    for got, wanted in zip(*(tensors(f(*arguments(op, 0, 256, torch.bfloat16))) for f in both(op)), strict=True):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype


def both(op: str) -> tuple[Any, Any]:
    return backend(op).load(), registry.registry(op).op.reference


@pytest.mark.parametrize("op", OPS)
def test_channels_may_be_strided_and_inputs_stay(op: str) -> None:
    args = arguments(op, 33, 256, torch.bfloat16)
    strided = (args[0].mT.contiguous().mT, *args[1:])
    before = [a.clone() if isinstance(a, Tensor) else a for a in strided]
    check(op, strided)
    assert all(torch.equal(a, b) for a, b in zip(strided, before, strict=True) if isinstance(a, Tensor))


@pytest.mark.parametrize("op", ["modulate", "residual_modulate", "gated_residual", "modulate_quantize"])
def test_tables_may_be_expanded_and_of_mixed_kinds(op: str) -> None:
    """A table a token whose rows all lie on one, and a gate a token beside shift and scale a sample."""
    args = list(arguments(op, 33, 256, torch.bfloat16))
    place = 2 if op in ("gated_residual", "residual_modulate") else 1
    if args[place] is None:
        args[place] = torch.randn(2, 33, 256, device=DEVICE)
    else:
        args[place] = args[place].expand(2, 33, 256)
    check(op, tuple(args))


@pytest.mark.parametrize("heads", [1, 12, 40])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("per_head", [False, True], ids=["all-channels", "per-head"])
def test_norm_rope_of_any_heads(heads: int, head_dim: int, per_head: bool) -> None:
    x = torch.randn(2, 5, heads * head_dim).to(DEVICE, torch.bfloat16)
    weight = (1 + 0.2 * torch.randn(head_dim if per_head else heads * head_dim)).to(DEVICE, torch.bfloat16)
    angles = 10 * torch.rand(5, head_dim // 2, device=DEVICE)
    check("norm_rope", (x, weight, angles.cos(), angles.sin(), EPS))


@pytest.mark.parametrize("op", [op for op in OPS if "norm" in op or "modulate" in op])
def test_eps_is_added_to_the_mean_square(op: str) -> None:
    """Tokens whose mean square is as small as eps: leaving eps out, or outside the root, changes the result by half."""
    x, *others = arguments(op, 33, 256, torch.float32)
    if op.startswith("residual"):
        others[0] = others[0] * 0
    check(op, ((x - x.mean(-1, keepdim=True)) * EPS**0.5, *others))


@pytest.mark.parametrize("kind", LARGEST, ids=str)
@pytest.mark.parametrize("op", QUANTISING)
def test_values_are_those_of_the_reference_but_for_ties(op: str, kind: torch.dtype) -> None:
    """Other orders of sums, and products fused with sums, move a value by an ulp of fp32: one in 10,000 may then round
    to its neighbour.

    In float16: the interpreter cuts bfloat16 off instead of rounding it.
    """
    args = (*arguments(op, 33, 1536, torch.float16)[:-1], kind)
    got, wanted = (r if isinstance(r, Quantized) else r[-1] for r in (f(*args) for f in both(op)))
    torch.testing.assert_close(got.scale, wanted.scale, rtol=1e-5, atol=0)
    other = got.values.view(torch.uint8) != wanted.values.view(torch.uint8)
    assert other.float().mean() < 1e-4
    step = wanted.values.float().abs() / 8 + 1  # fp8: 3 bits of mantissa; int8: 1, and less than this
    assert ((got.values.float() - wanted.values.float()).abs() <= step).all()


def test_every_bfloat16_below_448_becomes_the_nearest_fp8() -> None:
    """In one row whose scale is 1: halfway cases, subnormal values and both zeros among them."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.abs() <= 448].to(DEVICE)
    got = backend("quantize").load()(every, torch.float8_e4m3fn)
    assert got.scale.item() == 1
    assert torch.equal(got.values.view(torch.uint8), every.float().to(torch.float8_e4m3fn).view(torch.uint8))


def test_int8_rounds_halves_to_even_and_leaves_out_minus_128() -> None:
    row = torch.tensor([[127.0, -127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 0.0]], device=DEVICE)
    got = backend("quantize").load()(row, torch.int8)
    assert got.values.tolist() == [[127, -127, 0, 2, 2, 0, -2, -2, 126, 0]] and got.scale.item() == 1


@pytest.mark.parametrize("kind", LARGEST, ids=str)
@pytest.mark.parametrize("op", ["quantize", "modulate_quantize", "residual_layer_norm_quantize"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_value_that_is_not_finite_shows_in_the_scale_of_its_token_alone(op: str, kind: torch.dtype) -> None:
    args = (*arguments(op, 5, 256, torch.bfloat16)[:-1], kind)
    args[0][0, 1, 7], args[0][1, 3, 250] = float("nan"), float("inf")
    result = backend(op).load()(*args)
    quantised = result if isinstance(result, Quantized) else result[-1]
    bad = torch.zeros(2, 5, 1, dtype=torch.bool, device=DEVICE)
    bad[0, 1] = bad[1, 3] = True
    assert torch.equal(~torch.isfinite(quantised.scale), bad)
    assert torch.isfinite(quantised.dense(torch.float32)[~bad.squeeze(-1)]).all()


@pytest.mark.parametrize("kind", LARGEST, ids=str)
@pytest.mark.parametrize("name", registry.names("quantize"))
def test_zero_tiny_and_huge_tokens(name: str, kind: torch.dtype) -> None:
    found = backend("quantize") if name == "triton" else registry.registry("quantize").backends[-1]
    x = torch.randn(4, 300, device=DEVICE)
    x *= torch.tensor([[0.0], [1e-35], [1e36], [1e-20]], device=DEVICE)
    quantised = found.load()(x, kind)
    assert (quantised.values[:2].float() == 0).all() and quantised.scale[0] == 0
    got = quantised.dense(torch.float32)
    for row in (2, 3):
        assert_close("row", got[row] / x[row].abs().max(), (x[row] / x[row].abs().max()).double(), x[row] * 1.02)


@pytest.mark.parametrize("op", [op for op in OPS if op not in QUANTISING])
def test_gradients_and_compiled_graphs(op: str) -> None:
    """Through the opaque op: those of the reference, in eager mode and as one graph."""
    ours, reference = both(op)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    args = arguments(op, 3, 256, torch.float32)
    wanted = gradients(reference, args)
    for fn in (ours, compiled):
        for got, right in zip(gradients(fn, args), wanted, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


def gradients(fn: Any, args: tuple[Any, ...]) -> list[Tensor]:
    leaves = [a.detach().clone().requires_grad_() if isinstance(a, Tensor) else a for a in args]
    loss = sum((out * (1 + torch.arange(out.shape[-1], device=DEVICE) % 3)).sum() for out in tensors(fn(*leaves)))
    return list(torch.autograd.grad(loss, [a for a in leaves if isinstance(a, Tensor)]))


@pytest.mark.parametrize("op", QUANTISING)
def test_quantising_compiles_to_one_graph(op: str) -> None:
    args = arguments(op, 3, 256, torch.float32)
    compiled = torch.compile(backend(op).load(), backend="aot_eager", fullgraph=True)
    for got, wanted in zip(tensors(compiled(*args)), tensors(backend(op).load()(*args)), strict=True):
        assert torch.equal(got, wanted)


def test_other_types_are_refused() -> None:
    for load in (b.load() for b in (backend("quantize"), registry.registry("quantize").backends[-1])):
        with pytest.raises(ValueError, match=r"quantised to torch.int8 or torch.float8_e4m3fn, got torch.uint8"):
            load(torch.ones(2, 4, device=DEVICE), torch.uint8)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="PyTorch sees no CUDA device")
@pytest.mark.parametrize("op", OPS)
def test_addresses_beyond_two_to_the_31(op: str) -> None:
    """The last token of over 2^31 values comes out as the same token does alone."""
    if op == "gelu_quantize" or torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("the kernel of quantize, or under 40 GiB of memory")
    length, width = 2**31 // 5120 + 2, 5120
    last = [a[:1] if isinstance(a, Tensor) and a.ndim == 3 else a for a in arguments(op, 1, width, torch.bfloat16)]
    if op == "norm_rope":
        last[2:4] = [torch.ones(1, 64, device=DEVICE), torch.zeros(1, 64, device=DEVICE)]
    wanted = tensors(backend(op).load()(*last))
    tokens = 2 if op == "gated_residual" or op.startswith("residual") else 1
    full = list(last)
    for i in range(tokens):
        full[i] = torch.zeros(1, length, width, device=DEVICE, dtype=torch.bfloat16)
        full[i][:, -1:] = last[i]
    if op == "norm_rope":
        full[2:4] = [table.expand(length, 64).contiguous() for table in last[2:4]]
    result = backend(op).load()(*full)
    for part, right in zip(result if isinstance(result, tuple) else (result,), wanted, strict=True):
        if isinstance(part, Quantized):
            part = Quantized(part.values[:, -1:], part.scale[:, -1:]).dense(torch.float32)
        assert torch.equal(part[:, -1:], right)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="PyTorch sees fewer than two CUDA devices")
@pytest.mark.parametrize("op", OPS)
def test_another_gpu_than_the_current_one(op: str) -> None:
    args = [a.to("cuda:1") if isinstance(a, Tensor) else a for a in arguments(op, 33, 256, torch.bfloat16)]
    check(op, tuple(args))
