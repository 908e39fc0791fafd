"""Maps applied to a head's vector before it is quantised, with exact inverses."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcli.errors import InputError


def hadamard(x: Tensor) -> Tensor:
    """Multiply the last axis by the orthonormal Hadamard matrix of Sylvester's construction.

    Head sizes that are not a power of two are rotated in blocks of the largest power of two that divides them. The
    map is symmetric and its own inverse. Butterflies run in a fixed order, smallest stride first, so that every
    backend rounds alike.

    Parameters
    ----------
    x
        [..., head_dim], any float dtype; computed in that dtype.
    """
    size = x.shape[-1]
    block = size & -size
    # channels first, so that every butterfly runs over long contiguous rows
    y = x.reshape(-1, size).t().contiguous().view(size // block, block, -1)
    stride = 1
    while stride < block:
        pairs = y.view(size // block, block // (2 * stride), 2, stride, -1)
        out = torch.empty_like(pairs)
        torch.add(pairs[:, :, 0], pairs[:, :, 1], out=out[:, :, 0])
        torch.sub(pairs[:, :, 0], pairs[:, :, 1], out=out[:, :, 1])
        y = out
        stride *= 2
    rotated: Tensor = y.view(size, -1) * float(block) ** -0.5
    return rotated.t().reshape(x.shape)


def apply(name: str, x: Tensor) -> Tensor:
    """Apply a transform by name to [..., head_dim]."""
    if name not in ("none", "hadamard"):
        raise InputError(f"there is no transform {name!r}.")
    return hadamard(x) if name == "hadamard" else x


def invert(name: str, x: Tensor) -> Tensor:
    """Undo :func:`apply`."""
    return apply(name, x)  # each is its own inverse
