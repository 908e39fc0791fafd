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
        self._taken, self._device = 0, device
        self._memory: mmap.mmap | None = None
        if device.type == "cpu" and nbytes:
            length = -(-nbytes // HUGE_PAGE) * HUGE_PAGE
            self._memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                self._memory.madvise(mmap.MADV_HUGEPAGE)

    def take(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return a zeroed tensor that begins at a multiple of 64 bytes, with a storage of its own for compilers."""
        start, count = self._taken, math.prod(shape)
        self._taken += size(*shape, dtype=dtype)
        if self._memory is None or not count:
            return torch.zeros(shape, dtype=dtype, device=self._device)
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=start).view(shape)


def size(*shape: int, dtype: torch.dtype) -> int:
    """Return the bytes that :meth:`Arena.take` uses up for a tensor."""
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
