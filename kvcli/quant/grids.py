"""Tables of quantisation levels.

``gaussian`` is the grid of least squared error for a standard normal variable (Max 1960, Lloyd 1982): each level is the
mean of its cell and each border the middle of two levels. After a Hadamard rotation the channels of a head are close to
normal, which is what makes it pay.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from kvcli.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

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
    """Add a symmetric table of ``2**bits`` levels for a variable of variance 1, given its positive half, rising."""
    if len(positive) * 2 != 2**bits or list(positive) != sorted(set(positive)) or positive[0] <= 0:
        raise InputError(f"grid {name!r} of {bits} bits needs {2**bits // 2} positive levels in rising order.")
    if _POSITIVE.setdefault(name, {}).setdefault(bits, positive) != positive:
        raise InputError(f"there is another grid {name!r} of {bits} bits already.")


def positive_levels(name: str, bits: int) -> tuple[float, ...]:
    """Return the positive half of a table in rising order; raise :class:`InputError` if there is none."""
    try:
        return _POSITIVE[name][bits]
    except KeyError:
        raise InputError(f"there is no grid {name!r} of {bits} bits.") from None


@cache
def levels(name: str, bits: int) -> Tensor:
    """Return the 2**bits levels of a table in rising order, float32."""
    import torch  # formats are checked where torch is not loaded

    positive = positive_levels(name, bits)
    return torch.tensor([-x for x in reversed(positive)] + list(positive), dtype=torch.float32)
