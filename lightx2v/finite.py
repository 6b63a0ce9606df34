"""Whether values are numbers: neither NaN nor infinity."""

from torch import Tensor, nn


def finite(x: Tensor) -> bool:
    """Waits for the device. x may be of any floating type."""
    return bool(_wide(x).isfinite().all())


def how_many(x: Tensor) -> str:
    """How many values are none, in words: "3 of 1,024 values (bfloat16)"."""
    wrong = int((~_wide(x).isfinite()).sum())
    return f"{wrong:,} of {x.numel():,} values ({str(x.dtype).removeprefix('torch.')})"


def bad_weight(module: nn.Module) -> str | None:
    """The first of a module's tensors that holds NaN or infinity."""
    named = (*module.named_parameters(), *module.named_buffers())
    return next((name for name, value in named if value.is_floating_point() and not finite(value)), None)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.itemsize == 1 else x  # fp8 has no isfinite of its own
