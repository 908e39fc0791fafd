"""One stretch of zeroed memory from which a cache takes all its storage."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

ALIGNMENT = 64
HUGE_PAGE = 2**21


class Arena:
    """Memory for tensors that live and die together.

    On the CPU it asks for huge pages. A packed page of one head is a few hundred bytes, so with ordinary pages nearly
    every one would need a new entry of the address cache; and what a single layer holds is often too small for one huge
    page. Memory that is never written costs nothing: the system provides it on the first write.

    Parameters
    ----------
    nbytes
        How much, with :func:`size` for each tensor.
    device
        Where.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._taken = 0
        if device.type == "cpu" and nbytes:
            memory = mmap.mmap(-1, -(-nbytes // HUGE_PAGE) * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)
            self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        else:
            self._bytes = torch.zeros(nbytes, dtype=torch.uint8, device=device)

    def take(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return a zeroed tensor that begins at a multiple of 64 bytes."""
        start, length = self._taken, math.prod(shape) * dtype.itemsize
        self._taken += size(*shape, dtype=dtype)
        return self._bytes[start : start + length].view(dtype).view(shape)


def size(*shape: int, dtype: torch.dtype) -> int:
    """Return the bytes that :meth:`Arena.take` uses up for a tensor."""
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
