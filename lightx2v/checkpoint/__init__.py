"""Checkpoint files: reading headers without weights, and streaming weights into a model built on the meta device.

A *header* is what a file says about itself: tensor names, shapes, dtypes and free-form metadata. Everything that can
be known about a checkpoint is decided from it, so that a wrong, truncated or incomplete file is refused in
milliseconds and before any weight is read.
"""

from lightx2v.checkpoint.header import DTYPES, CheckpointError, Header, Packed, TensorInfo, block_numbers
from lightx2v.checkpoint.reader import read_bytes, read_header, read_into, read_tensors
from lightx2v.checkpoint.weights import DtypeRule, assign, places

__all__ = [
    "DTYPES",
    "CheckpointError",
    "DtypeRule",
    "Header",
    "Packed",
    "TensorInfo",
    "assign",
    "block_numbers",
    "places",
    "read_bytes",
    "read_header",
    "read_into",
    "read_tensors",
]
