"""Maps applied to a head's vector before it is quantised, with exact inverses."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


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
    y = x.reshape(*x.shape[:-1], size // block, block)
    stride = 1
    while stride < block:
        pairs = y.unflatten(-1, (block // (2 * stride), 2, stride))
        a, b = pairs.unbind(-2)
        y = torch.stack((a + b, a - b), -2).flatten(-3)
        stride *= 2
    return (y * block**-0.5).reshape(x.shape)


@cache
def hadamard_matrix(size: int) -> Tensor:
    """Return the matrix that :func:`hadamard` multiplies by: [size, size] float32, symmetric and orthogonal."""
    return hadamard(torch.eye(size))


def apply(name: str, x: Tensor) -> Tensor:
    """Apply a transform by name to [..., head_dim]."""
    return hadamard(x) if name == "hadamard" else x


def invert(name: str, x: Tensor) -> Tensor:
    """Undo :func:`apply`."""
    return hadamard(x) if name == "hadamard" else x
