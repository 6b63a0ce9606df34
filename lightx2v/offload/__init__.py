"""Running transformers that do not fit the device: what stays there, what passes through."""

from lightx2v.offload.stream import BlockStream

__all__ = ["BlockStream"]
