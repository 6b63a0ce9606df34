"""Our attention in Triton, in its interpreter where there is no GPU (which multiplies fp32 and fp16, not bf16).

fp32 takes the path of bf16, sums under one fixed shift; fp16 that of a running maximum.
"""

from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from closeness import assert_close, assert_exact_enough, relative_error
from lightx2v_kernels import registry
from lightx2v_kernels.attention.reference import attention, attention_plain
from lightx2v_kernels.norm.reference import rms_norm
from lightx2v_kernels.rope.reference import rope

pytest.importorskip("triton", reason="triton is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
LENGTHS = [(1, 1), (33, 33), (63, 200), (200, 64), (5, 1000), (1000, 33)]  # queries, keys
MAX_ERROR = next(b for b in registry.registry("attention").backends if b.name == "triton_int8").max_error


@pytest.fixture(scope="module")
def kernel() -> ModuleType:
    from lightx2v_kernels.attention import _triton

    return _triton


@pytest.fixture(scope="module")
def rounding() -> ModuleType:
    from lightx2v_kernels.attention import _triton_quantize

    return _triton_quantize


@pytest.fixture(scope="module")
def ops() -> ModuleType:
    from lightx2v_kernels.attention import _triton_ops

    return _triton_ops


def normal(queries: int, keys: int, dtype: torch.dtype, head_dim: int = 64) -> tuple[Tensor, ...]:
    lengths, batch = (queries, keys, keys), 1 if max(queries, keys) == 1000 else 2
    return tuple(torch.randn(batch, n, 2, head_dim, device=DEVICE).to(dtype) for n in lengths)


def truth(*qkv: Tensor) -> Tensor:
    return attention(*(x.double() for x in qkv))


@pytest.mark.parametrize("dtype", [WIDE, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
@pytest.mark.parametrize("tma", [False, True])
def test_lengths(
    tma: bool, queries: int, keys: int, dtype: torch.dtype, kernel: ModuleType, rounding: ModuleType
) -> None:
    if tma:
        pytest.importorskip("triton.tools.tensor_descriptor", reason="this Triton has no tensor descriptors")
    q, k, v = normal(queries, keys, dtype)
    wanted, plain = truth(q, k, v), attention_plain(q, k, v)
    config = kernel.Config(128, 128, warps=4, tma=tma, ahead=tma)
    assert_close(f"tma={tma}", kernel.exact(q, k, v, config), wanted, plain)
    out = kernel.from_int8(rounding.quantize(q, k, config.block_n), v, config)
    assert out.dtype == dtype
    assert_exact_enough(out, wanted, MAX_ERROR)


def test_tiles_of_every_shape_agree(kernel: ModuleType) -> None:
    q, k, v = normal(100, 150, WIDE, 128)
    wanted, plain = truth(q, k, v), attention_plain(q, k, v)
    for block_m, block_n, ahead in ((16, 32, False), (32, 16, True), (128, 128, True), (64, 128, False)):
        config = kernel.Config(block_m, block_n, warps=4, stages=3, ahead=ahead)
        assert_close(str(config), kernel.exact(q, k, v, config), wanted, plain)


@pytest.mark.parametrize("tma", [False, True])
def test_strided_inputs(tma: bool, kernel: ModuleType, rounding: ModuleType) -> None:
    """Slices of fused projections, heads-first memory, rows that no tensor descriptor can step over."""
    if tma:
        pytest.importorskip("triton.tools.tensor_descriptor", reason="this Triton has no tensor descriptors")
    config = kernel.Config(32, 32, warps=4, tma=tma)
    for qkv in (
        torch.randn(2, 63, 3, 2, 64).to(DEVICE, WIDE).unbind(2),
        torch.randn(2, 63, 2, 3, 64).to(DEVICE, WIDE).unbind(3),
        torch.randn(3, 2, 2, 63, 64).to(DEVICE, WIDE).transpose(2, 3).unbind(0),
        torch.randn(3, 2, 63, 2, 65).to(DEVICE, WIDE)[..., :64].unbind(0),
        torch.randn(3, 1, 1, 2, 64).to(DEVICE, WIDE).expand(3, 2, 63, 2, 64).unbind(0),
    ):
        assert_close("exact", kernel.exact(*qkv, config), truth(*qkv), attention_plain(*qkv))
        q, k, v = qkv
        out = kernel.from_int8(rounding.quantize(q, k, config.block_n), v, config)
        assert_exact_enough(out, truth(*qkv), MAX_ERROR)


def test_scores_that_outgrow_the_first_keys(kernel: ModuleType, rounding: ModuleType) -> None:
    """Later scores larger by 400: the sums under the first shift overflow, and the tile is done again."""
    q = torch.full((1, 40, 1, 64), 5.0, device=DEVICE).to(WIDE)
    k = torch.linspace(-5, 5, 150, device=DEVICE)[None, :, None, None].expand(1, 150, 1, 64).to(WIDE)
    v = torch.randn(1, 150, 1, 64, device=DEVICE).to(WIDE)
    config = kernel.Config(32, 32, warps=4)
    wanted = truth(q, k, v)
    # A score of 400 in fp32 is off by 1e-5 before any softmax.
    assert_exact_enough(kernel.exact(q, k, v, config), wanted, 1e-5 if WIDE == torch.float32 else 0.01)
    # k is constant over the channels, so taking its mean off and rounding it to 8 bits moves scores of 400 by one.
    out = kernel.from_int8(rounding.quantize(q, k, config.block_n), v, config)
    assert torch.isfinite(out).all() and relative_error(out, wanted) < 0.5


def test_channels_far_from_zero_are_centred_before_rounding(kernel: ModuleType, rounding: ModuleType) -> None:
    q, k, v = normal(100, 300, WIDE)
    k += 30 * torch.randn(1, 1, 2, 64, device=DEVICE).to(WIDE)
    config, wanted = kernel.Config(64, 64, warps=4), truth(q, k, v)
    tokens = rounding.quantize(q, k, config.block_n)
    assert_exact_enough(kernel.from_int8(tokens, v, config), wanted, MAX_ERROR)
    values, scale = rounding._heads(k, torch.zeros(2, 2, 64, device=DEVICE), config.block_n)
    assert relative_error(kernel.from_int8(replace(tokens, k=values, k_scale=scale), v, config), wanted) > 0.1


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("dtype", [WIDE, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_nan_is_not_hidden(which: str, dtype: torch.dtype, kernel: ModuleType, rounding: ModuleType) -> None:
    tensors = dict(zip("qkv", normal(40, 150, dtype), strict=True))
    tensors[which][1, 37, 1, 5] = float("nan")
    wanted = truth(*tensors.values()).isnan()
    assert wanted.any() and not wanted.all()
    config = kernel.Config(32, 32, warps=4)
    q, k, v = tensors.values()
    assert torch.equal(kernel.exact(q, k, v, config).isnan(), wanted)
    out = kernel.from_int8(rounding.quantize(q, k, config.block_n), v, config)
    assert torch.equal(out.isnan(), wanted)


def test_tokens_of_zeros(kernel: ModuleType, rounding: ModuleType) -> None:
    q, k, v = normal(20, 40, WIDE)
    config = kernel.Config(32, 32, warps=4)
    out = kernel.from_int8(rounding.quantize(q * 0, k * 0, config.block_n), v, config)
    assert_close("mean of v", out, truth(q * 0, k * 0, v), attention_plain(q * 0, k * 0, v))


def test_rounding_is_to_nearest(rounding: ModuleType) -> None:
    """Within half a step of a token's (q) or a block's (k, less the same vector everywhere) largest value."""
    q, k, _ = normal(70, 70, WIDE)
    tokens = rounding.quantize(q, k, 32)
    wide = q.float().transpose(1, 2)
    assert torch.equal(tokens.q_scale, wide.abs().amax(-1) / 127)
    assert (tokens.q * tokens.q_scale[..., None] - wide).abs().le(0.5001 * tokens.q_scale[..., None]).all()
    steps = tokens.k_scale[..., :3].repeat_interleave(32, -1)[..., :70, None]
    off = k.float().transpose(1, 2) - tokens.k * steps
    assert (off - off.mean(2, keepdim=True)).abs().le(1.01 * steps).all()
    assert tokens.k.abs().amax() == 127


@pytest.mark.parametrize("per_head", [False, True], ids=["all-channels", "per-head"])
@pytest.mark.parametrize(("length", "heads", "head_dim"), [(1, 1, 64), (9, 10, 64), (63, 2, 128), (150, 2, 64)])
def test_rotary_attention(length: int, heads: int, head_dim: int, per_head: bool, ops: ModuleType) -> None:
    """From projections (the q and k of a fused one, so strided) to the result of norm, rope and attention in turn."""
    q, k, v = (3 * torch.randn(1 if length > 100 else 2, length, 3, heads * head_dim)).to(DEVICE, WIDE).unbind(2)
    k += 5 * torch.randn(heads * head_dim).to(DEVICE, WIDE)
    v = v.unflatten(-1, (heads, head_dim))
    norms = (1 + 0.2 * torch.randn(2, head_dim if per_head else heads * head_dim)).to(DEVICE, WIDE)
    angles = 10 * torch.rand(length, head_dim // 2, device=DEVICE)
    cos, sin = angles.cos(), angles.sin()

    def turned(x: Tensor, weight: Tensor) -> Tensor:
        x = rms_norm(x.double().unflatten(-1, (-1, len(weight))), weight.double(), 1e-6)
        return rope(x.flatten(-2).unflatten(-1, (heads, head_dim)), cos.double(), sin.double())

    wanted = attention(turned(q, norms[0]), turned(k, norms[1]), v.double())
    out = ops.rotary_attention_int8(q, k, v, norms[0], norms[1], cos, sin, 1e-6)
    assert out.dtype == WIDE
    assert_exact_enough(out, wanted, MAX_ERROR)


@pytest.mark.parametrize("name", ["attention", "attention_int8"])
def test_ops_compile_and_differentiate(name: str, ops: ModuleType) -> None:
    """One opaque op; its gradients are those of exact attention."""
    op = getattr(ops, name)
    leaves = [x.requires_grad_() for x in normal(33, 40, WIDE)]
    torch.library.opcheck(
        op, tuple(leaves), test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )
    got = torch.autograd.grad(op(*leaves).float().square().sum(), leaves)
    wanted = torch.autograd.grad(attention(*leaves).float().square().sum(), leaves)
    for mine, reference in zip(got, wanted, strict=True):
        assert_exact_enough(mine, reference, 1e-5 if name == "attention" and WIDE == torch.float32 else MAX_ERROR)


def test_backends_are_offered_and_the_lossy_one_says_so() -> None:
    offered = {b.name: b for b in registry.registry("attention").backends}
    assert offered["triton"].max_error is None and offered["triton_int8"].max_error == 0.02
    reason = offered["triton"].why_not(torch.device("cpu"), torch.bfloat16, 128)
    assert "needs a cuda device, got cpu" in reason


@pytest.mark.parametrize("rounded", [False, True], ids=["exact", "int8"])
def test_flagged_tiles_and_no_others_are_mended(rounded: bool, kernel: ModuleType, rounding: ModuleType) -> None:
    q, k, v = normal(150, 70, WIDE)
    flags = torch.zeros(2, 2, 3, dtype=torch.int32, device=DEVICE)  # tiles of 64 queries
    flags[0, 1, 2] = flags[1, 0, 0] = 1
    out = torch.full_like(q, 7.0)
    tokens = rounding.quantize(q, k, 32)
    if rounded:
        heads = tokens.q.transpose(1, 2), tokens.k.transpose(1, 2)
        kernel.mend(flags, 64, *heads, v, out, (tokens.q_scale, tokens.k_scale), tokens.block)
    else:
        kernel.mend(flags, 64, q, k, v, out)
    mended = flags.bool().repeat_interleave(64, -1)[..., :150].transpose(1, 2)
    assert (out[~mended] == 7).all()
    error = MAX_ERROR if rounded else 1e-5 if WIDE == torch.float32 else 0.01
    assert_exact_enough(out[mended], truth(q, k, v)[mended], error)
