"""GPTQ (Frantar et al., 2022, arXiv:2210.17323): codes chosen column by column, each error handed on to the rest.

With H = Σ x xᵀ over the layer's inputs, rounding column i by δ costs δ² / [H⁻¹]_ii once the columns after it have moved
by -δ [H⁻¹]_{i,j>i} / [H⁻¹]_ii. The rows of the upper Cholesky factor U of H⁻¹ hold these quotients for what is left at
each step. Grids are fixed beforehand, so that any way to choose them goes with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcli.errors import InputError
from kvcli.quant.weight_format import WeightFormat

DAMPING = 0.01  # of H's mean diagonal
BLOCK = 128  # columns after which the errors are handed on to all columns further right


def gptq(weight: Tensor, moments: Tensor, fmt: WeightFormat, scale: Tensor, zero: Tensor) -> Tensor:
    """Return codes float32 [out, in] that keep the layer's outputs, rather than its weights.

    Parameters
    ----------
    weight
        [out, in], any float dtype.
    moments
        [in, in] float64: the sum over tokens of x xᵀ.
    fmt, scale, zero
        The grids, [out, groups].

    Raises
    ------
    InputError
        If the moments are not finite or do not fit the weight.
    """
    width = weight.shape[1]
    if moments.shape != (width, width) or not bool(torch.isfinite(moments).all()):
        raise InputError(f"the second moments of a layer of {width} inputs are not finite numbers of that shape.")
    work = weight.float().clone()
    factor = _factor(moments)
    codes = torch.empty_like(work)
    for first in range(0, width, BLOCK):
        last = min(first + BLOCK, width)
        errors = work.new_zeros(len(work), last - first)
        for i in range(first, last):
            s, z = scale[:, i // fmt.group], zero[:, i // fmt.group]
            codes[:, i] = fmt.encode(work[:, i], s, z)
            error = (work[:, i] - fmt.decode(codes[:, i], s, z)) / factor[i, i]
            work[:, i:last] -= error[:, None] * factor[i, i:last]
            errors[:, i - first] = error
        work[:, last:] -= errors @ factor[first:last, last:]
    return codes


def _factor(moments: Tensor) -> Tensor:
    """Return U with H⁻¹ = Uᵀ U, float32; inputs that never appear get a unit diagonal."""
    h = moments.double().clone()
    h.diagonal()[h.diagonal() == 0] = 1
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper.float()
