"""Running transformers that do not fit the device: what stays there, what passes through."""

from lightx2v.offload.home import Home
from lightx2v.offload.placing import Asked, Placing, budgeted, offloaded, planned, rows_of
from lightx2v.offload.plan import DoesNotFitError, Plan
from lightx2v.offload.stream import BlockStream

__all__ = [
    "Asked",
    "BlockStream",
    "DoesNotFitError",
    "Home",
    "Placing",
    "Plan",
    "budgeted",
    "offloaded",
    "planned",
    "rows_of",
]
