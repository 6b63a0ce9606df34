"""Main memory that was freed, given back to the system."""

import ctypes
import sys


def trim_heap() -> bool:
    """Give back whole pages of what this process has freed; whether this system can be asked to.

    glibc keeps freed pieces below its mmap threshold for later. The threshold grows up to 32 MB with the pieces that
    are freed (mallopt(3), M_MMAP_THRESHOLD), so a server ends up keeping most of what networks and videos left behind.
    malloc_trim(3) lets go of it in all threads' arenas, but for the free end of each arena other than the first. It
    takes milliseconds: after a stage, not after a step. Windows, macOS and musl have no such call: nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is None:
        return False
    trim(ctypes.c_size_t(0))
    return True
