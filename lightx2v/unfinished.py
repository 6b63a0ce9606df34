"""Files that appear whole or not at all."""

import errno
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ENDING = ".part"  # no picker of models lists it, no player takes it for a video
TOKEN_BYTES = 4
STALE_SECONDS = 600  # whoever still writes would have written something since
FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))


@contextmanager
def unfinished(target: Path) -> Iterator[Path]:
    """A path beside `target` to write to, which gets its name at the end; after an error or a cancel it is removed.

    What a process left that was killed while it wrote the same target is removed too, once nothing was written to it
    for ten minutes. Raises OSError, naming the target, where the disk is full.
    """
    _sweep(target)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(TOKEN_BYTES)}{ENDING}")
    try:
        yield partial
        partial.replace(target)
    except OSError as error:
        if error.errno not in FULL:
            raise
        words = "the disk is full, or the file would be larger than allowed: make room, or write to another folder"
        raise OSError(error.errno, words, str(target)) from error
    finally:
        partial.unlink(missing_ok=True)


def _sweep(target: Path) -> None:
    length = len(f".{target.name}.{ENDING}") + 2 * TOKEN_BYTES
    for left in target.parent.glob(f".*{ENDING}"):
        if len(left.name) != length or not left.name.startswith(f".{target.name}."):
            continue
        with suppress(OSError):  # gone meanwhile, or somebody else's
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                left.unlink()
