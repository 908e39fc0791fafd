"""Tables of quantisation levels.

``gaussian`` is the grid of least squared error for a standard normal variable (Max 1960, Lloyd 1982): each level is the
mean of its cell and each border the middle of two levels. After a Hadamard rotation the channels of a head are close to
normal, which is what makes it pay.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from kvcli.errors import InputError

#: Positive halves; the grids are symmetric. Recomputed from the fixed point in tests/quant/test_grids.py.
_POSITIVE: dict[str, dict[int, tuple[float, ...]]] = {
    "gaussian": {
        1: (0.7978845608,),
        2: (0.4527800398, 1.5104176087),
        3: (0.2450941789, 0.7560052489, 1.3439092613, 2.1519457917),
        4: (
            0.1283950363, 0.3880482962, 0.6567590579, 0.9423404556,
            1.2562312142, 1.6180464059, 2.0690172266, 2.7326368980,
        ),
    }
}  # fmt: skip


def register(name: str, bits: int, positive: tuple[float, ...]) -> None:
    """Add a symmetric table of ``2**bits`` levels under ``name``, given its positive half in rising order."""
    if len(positive) * 2 != 2**bits or list(positive) != sorted(positive) or positive[0] <= 0:
        raise InputError(f"grid {name!r} of {bits} bits needs {2**bits // 2} positive levels in rising order.")
    _POSITIVE.setdefault(name, {})[bits] = positive


@cache
def levels(name: str, bits: int) -> Tensor:
    """Return the 2**bits levels of a table in rising order, float32."""
    try:
        positive = _POSITIVE[name][bits]
    except KeyError:
        raise InputError(f"there is no grid {name!r} of {bits} bits.") from None
    return torch.tensor([-x for x in reversed(positive)] + list(positive), dtype=torch.float32)
