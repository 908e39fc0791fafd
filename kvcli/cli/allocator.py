"""The C library's allocator, told to keep what it has."""

from __future__ import annotations

import ctypes
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_memory() -> None:
    """Let glibc reuse large blocks rather than hand them back: the kernel clears a page each time it gives it out.

    A window's logits or attention weights come and go hundreds of times; clearing their pages took a tenth of
    calibration. The process keeps its peak until it ends, so call this once the model is loaded, in commands that end.
    Other C libraries are left as they are.
    """
    with suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
