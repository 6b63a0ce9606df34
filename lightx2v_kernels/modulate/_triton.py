"""adaLN and the residuals in one pass each, on the kernel of the norms; the gated residual alone has its own."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightx2v_kernels import tiles
from lightx2v_kernels.modulate import reference
from lightx2v_kernels.norm._triton import Norm, Residual, _rows, _table, load_table, normalise, table_reading
from lightx2v_kernels.opaque import empty_like, opaque
from lightx2v_kernels.quantize._triton import empty_quantized
from lightx2v_kernels.quantized import Quantized

_COLUMNS = 1024


@triton.jit(do_not_specialize=["length"])
def _add(
    x,
    y,
    gate,
    out,
    length,
    x_sample,
    x_token,
    y_sample,
    y_token,
    gate_sample,
    gate_token,
    WIDTH: tl.constexpr,
    GATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    per_sample = tl.cdiv(length, ROWS)
    sample = (tl.program_id(0) // per_sample).to(tl.int64)
    row = (tl.program_id(0) % per_sample).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row_mask = row < length
    column_mask = column < WIDTH
    mask = row_mask[:, None] & column_mask[None, :]
    kept = x + sample * x_sample + row[:, None] * x_token + column[None, :]
    kept = tl.load(kept, mask=mask, eviction_policy="evict_first").to(tl.float32)
    added = y + sample * y_sample + row[:, None] * y_token + column[None, :]
    added = tl.load(added, mask=mask, eviction_policy="evict_first").to(tl.float32)
    factor = load_table(gate + sample * gate_sample, row, column, row_mask, column_mask, gate_token, GATE)
    written = out + (sample * length + row)[:, None] * WIDTH + column[None, :]
    tl.store(written, (kept + added * factor).to(out.dtype.element_ty), mask=mask)


def _gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    out = empty_like(x)
    x, y = _rows(x), _rows(y)
    table, (gate_sample, gate_token) = _table(gate)
    batch, length, width = x.shape
    tile = tiles.residual(width)
    if x.numel():
        _add[(batch * tiles.count(length, tile.rows), tiles.count(width, _COLUMNS))](
            x,
            y,
            table,
            out,
            length,
            *x.stride()[:2],
            *y.stride()[:2],
            gate_sample,
            gate_token,
            WIDTH=width,
            GATE=table_reading(gate_token, tile.rows),
            ROWS=tile.rows,
            BLOCK=_COLUMNS,
            num_warps=tile.warps,
            maxnreg=tile.registers,
        )
    return out


def _adaln(eps: float, shift: Tensor, scale: Tensor) -> Norm:
    return Norm(eps, scale, shift, one_plus=True)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    out = empty_like(x)
    normalise(x, _adaln(eps, shift, scale), (out, None))
    return out


def _modulate_quantize(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    out = empty_quantized(x, dtype)
    normalise(x, _adaln(eps, shift, scale), out)
    return out


def _residual_modulate(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    kept, out = empty_like(x), empty_like(x)
    normalise(x, _adaln(eps, shift, scale), (out, None), Residual(y, gate, kept))
    return kept, out


def _residual_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    kept, out = empty_like(x), empty_like(x)
    normalise(x, Norm(eps, weight, bias), (out, None), Residual(y, gate, kept))
    return kept, out


def _residual_modulate_quantize(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    kept, out = empty_like(x), empty_quantized(x, dtype)
    normalise(x, _adaln(eps, shift, scale), out, Residual(y, gate, kept))
    return kept, *out


def _residual_layer_norm_quantize(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    kept, out = empty_like(x), empty_quantized(x, dtype)
    normalise(x, Norm(eps, weight, bias), out, Residual(y, gate, kept))
    return kept, *out


def _two(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return empty_like(x), empty_like(x)


def _one_and_quantized(x: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
    return empty_like(x), *_only_quantized(x, *others)


def _only_quantized(x: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return empty_quantized(x, others[-1])  # type: ignore[arg-type]


modulate = opaque("modulate", _modulate, empty_like, reference.modulate)
gated_residual = opaque("gated_residual", _gated_residual, empty_like, reference.gated_residual)
residual_modulate = opaque("residual_modulate", _residual_modulate, _two, reference.residual_modulate)
residual_layer_norm = opaque("residual_layer_norm", _residual_layer_norm, _two, reference.residual_layer_norm)
_modulate_q = opaque("modulate_quantize", _modulate_quantize, _only_quantized)
_residual_modulate_q = opaque("residual_modulate_quantize", _residual_modulate_quantize, _one_and_quantized)
_residual_layer_norm_q = opaque("residual_layer_norm_quantize", _residual_layer_norm_quantize, _one_and_quantized)


@torch.no_grad()
def modulate_quantize(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Quantized:
    """As modulate, into 8 bits."""
    return Quantized(*_modulate_q(x, shift, scale, eps, dtype))


@torch.no_grad()
def residual_modulate_quantize(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Quantized]:
    """As residual_modulate, the modulated tokens into 8 bits."""
    kept, *quantized = _residual_modulate_q(x, y, gate, shift, scale, eps, dtype)
    return kept, Quantized(*quantized)


@torch.no_grad()
def residual_layer_norm_quantize(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Quantized]:
    """As residual_layer_norm, the normed tokens into 8 bits."""
    kept, *quantized = _residual_layer_norm_q(x, y, gate, weight, bias, eps, dtype)
    return kept, Quantized(*quantized)
