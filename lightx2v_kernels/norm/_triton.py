"""The norms of whole rows, and all that may come before and after one in the same pass.

One program normalises a few rows of one sample, so that what is the same for every row (weights, shift and scale: fp32,
twice the size of a row each) is read once for all of them.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightx2v_kernels import tiles
from lightx2v_kernels.norm import reference
from lightx2v_kernels.opaque import empty_like, opaque
from lightx2v_kernels.quantize._triton import NONE, empty_quantized, kind, quantize_rows, store_bits, writable
from lightx2v_kernels.quantized import LARGEST, Quantized

SHARED, SPREAD, PER_TOKEN = range(3)  # how a table is read: see load_table


@triton.jit
def load_table(table, row, column, row_mask, column_mask, stride, HOW: tl.constexpr):
    """A table at its sample, in fp32: one row for all tokens, (1, D), or a row a token, (R, D).

    One row comes through shared memory, from its own layout into that of the tokens; spread, every row of the tile
    reads it again, from the cache.
    """
    mask = row_mask[:, None] & column_mask[None, :]
    if HOW == 0:
        values = tl.load(table + column, mask=column_mask, other=0.0, eviction_policy="evict_last")[None, :]
    elif HOW == 1:
        values = tl.load(table + row[:, None] * 0 + column[None, :], mask=mask, other=0.0, eviction_policy="evict_last")
    else:
        values = tl.load(
            table + row[:, None] * stride + column[None, :], mask=mask, other=0.0, eviction_policy="evict_first"
        )
    return values.to(tl.float32)


def table_reading(token_stride: int, rows: int) -> int:
    """How a program of that many rows reads a table."""
    return PER_TOKEN if token_stride else SPREAD if rows == 1 else SHARED


@triton.jit(do_not_specialize=["length"])
def _normalise(
    x,  # (B, L, D)
    y,  # (B, L, D) | None
    gate,  # (B, 1 | L, D) | None
    kept,  # (B, L, D): x + y * gate, if there is a y
    shift,  # (B, 1 | L, D) | None
    scale,  # (B, 1 | L, D) | None
    out,
    out_scale,  # (B, L) | None
    length,
    eps,
    x_sample,
    x_token,
    y_sample,
    y_token,
    gate_sample,
    gate_token,
    shift_sample,
    shift_token,
    scale_sample,
    scale_token,
    WIDTH: tl.constexpr,
    CENTRED: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    GATE: tl.constexpr,
    TABLES: tl.constexpr,
    LIMIT: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    per_sample = tl.cdiv(length, ROWS)
    sample = (tl.program_id(0) // per_sample).to(tl.int64)
    row = (tl.program_id(0) % per_sample).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    row_mask = row < length
    column_mask = column < WIDTH
    mask = row_mask[:, None] & column_mask[None, :]
    written = (sample * length + row)[:, None] * WIDTH + column[None, :]

    tokens = x + sample * x_sample + row[:, None] * x_token + column[None, :]
    value = tl.load(tokens, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if y is not None:
        branch = y + sample * y_sample + row[:, None] * y_token + column[None, :]
        added = tl.load(branch, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if gate is not None:
            gate += sample * gate_sample
            added *= load_table(gate, row, column, row_mask, column_mask, gate_token, GATE)
        rounded = (value + added).to(kept.dtype.element_ty)
        tl.store(kept + written, rounded, mask=mask)
        value = rounded.to(tl.float32)

    if CENTRED:
        value = tl.where(column_mask[None, :], value - (tl.sum(value, 1) / WIDTH)[:, None], 0.0)
    value *= tl.rsqrt(tl.sum(value * value, 1) / WIDTH + eps)[:, None]
    if scale is not None:
        scale += sample * scale_sample
        factor = load_table(scale, row, column, row_mask, column_mask, scale_token, TABLES)
        value *= 1.0 + factor if ONE_PLUS else factor
    if shift is not None:
        shift += sample * shift_sample
        value += load_table(shift, row, column, row_mask, column_mask, shift_token, TABLES)

    if KIND == 0:
        tl.store(out + written, value.to(out.dtype.element_ty), mask=mask)
    else:
        bits, scales = quantize_rows(value, LIMIT, KIND)
        store_bits(out + (sample * length + row)[:, None] * WIDTH, column, bits, mask)
        tl.store(out_scale + sample * length + row, scales, mask=row_mask)


@dataclass(frozen=True)
class Residual:
    """y (B, L, D) is added first, times gate (B, 1 | L, D); the sum goes into kept (B, L, D), contiguous."""

    y: Tensor
    gate: Tensor | None
    kept: Tensor


@dataclass(frozen=True)
class Norm:
    """(x - mean) / std, or without the mean; then * scale, or * (1 + scale), and + shift: (D,) or (B, 1 | L, D)."""

    eps: float
    scale: Tensor | None
    shift: Tensor | None = None
    centred: bool = True
    one_plus: bool = False


def normalise(x: Tensor, norm: Norm, out: tuple[Tensor, Tensor | None], residual: Residual | None = None) -> None:
    """One launch: x (..., D) into out: values (..., D) at their own dtype and, if that is of 8 bits, scale (..., 1)."""
    x = _rows(x)
    batch, length, width = x.shape
    if not x.numel():
        return
    scale, scale_strides = _table(norm.scale)
    shift, shift_strides = _table(norm.shift)
    y = None if residual is None else _rows(residual.y)
    kept = None if residual is None else residual.kept
    gate, gate_strides = _table(None if residual is None else residual.gate)
    values, scales = out
    how = NONE if scales is None else kind(values.dtype, values.device)
    tile = tiles.whole_rows(width)
    _normalise[(batch * tiles.count(length, tile.rows),)](
        x,
        y,
        gate,
        kept,
        shift,
        scale,
        writable(values, how),
        scales,
        length,
        norm.eps,
        *x.stride()[:2],
        *(x if y is None else y).stride()[:2],
        *gate_strides,
        *shift_strides,
        *scale_strides,
        WIDTH=width,
        CENTRED=norm.centred,
        ONE_PLUS=norm.one_plus,
        GATE=table_reading(gate_strides[1], tile.rows),
        TABLES=table_reading(scale_strides[1] or shift_strides[1], tile.rows),
        LIMIT=LARGEST.get(values.dtype, 0.0),
        KIND=how,
        ROWS=tile.rows,
        BLOCK=tiles.power_of_two(width),
        num_warps=tile.warps,
        maxnreg=tile.registers,
    )


def _rows(x: Tensor) -> Tensor:
    """x (..., D) as (B, L, D) with contiguous channels; copied only where strides cannot say it."""
    if x.ndim != 3:
        x = x.reshape(1, -1, x.shape[-1])
    return x if x.stride(2) == 1 else x.contiguous()


def _table(table: Tensor | None) -> tuple[Tensor | None, tuple[int, int]]:
    """A table with contiguous channels, and its strides from sample to sample and from token to token."""
    if table is None:
        return None, (0, 0)
    if table.stride(-1) != 1:
        table = table.contiguous()
    if table.ndim == 1:
        return table, (0, 0)
    sample, token, _ = table.stride()
    return table, (sample, 0 if table.shape[1] == 1 else token)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = empty_like(x)
    normalise(x, Norm(eps, weight, centred=False), (out, None))
    return out


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    out = empty_like(x)
    normalise(x, Norm(eps, weight, bias), (out, None))
    return out


def _layer_norm_quantize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    out = empty_quantized(x, dtype)
    normalise(x, Norm(eps, weight, bias), out)
    return out


rms_norm = opaque("rms_norm", _rms_norm, empty_like, reference.rms_norm)
layer_norm = opaque("layer_norm", _layer_norm, empty_like, reference.layer_norm)
_layer_norm_quantized = opaque(
    "layer_norm_quantize", _layer_norm_quantize, lambda x, weight, bias, eps, dtype: empty_quantized(x, dtype)
)


def layer_norm_quantize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Quantized:
    """x (..., D), weight and bias (D,) or None -> the normed tokens in 8 bits."""
    with torch.no_grad():
        return Quantized(*_layer_norm_quantized(x, weight, bias, eps, dtype))
