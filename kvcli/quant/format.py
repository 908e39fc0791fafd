"""How one tensor, the keys or the values of one layer, is stored."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from kvcli.errors import InputError
from kvcli.quant import grids

Axis = Literal["token", "channel"]
ScaleDtype = Literal["float16", "e5m3"]

EXACT_BITS = (16, 32)
CODE_BITS = (1, 2, 3, 4, 8)
SCALE_BYTES: dict[str, int] = {"float16": 2, "e5m3": 1}
ZERO_BYTES = 2  # a zero point is signed and need not be small: always float16


@dataclass(frozen=True)
class KVFormat:
    """Bits, axis, group, symmetry, grid and scale dtype of one stored tensor.

    Attributes
    ----------
    bits
        2, 3, 4 or 8 for codes (1 is left to plug-ins), 16 for the plan's 16-bit dtype, 32 for tests.
    axis
        ``token``: one scale per token over ``group`` consecutive channels of a head.
        ``channel``: one scale per channel over ``group`` consecutive tokens of a page.
    group
        Values that share a scale. Divides head_dim (token axis) or block_size (channel axis).
    symmetric
        Symmetric formats store a scale a group, asymmetric ones a scale and a float16 zero point (the group's minimum).
    grid
        ``uniform``, or the name of a table in :mod:`kvcli.quant.grids`; tables are symmetric.
    scale_dtype
        ``float16``, or ``e5m3``: a positive float16 cut to its 5 exponent and 3 leading mantissa bits.
    """

    bits: int
    axis: Axis = "token"
    group: int = 64
    symmetric: bool = True
    grid: str = "uniform"
    scale_dtype: ScaleDtype = "float16"

    def __post_init__(self) -> None:
        if self.bits not in CODE_BITS + EXACT_BITS:
            raise InputError(f"{self.bits} bits is not a storage format; use one of {CODE_BITS + EXACT_BITS}.")
        if self.axis not in ("token", "channel"):
            raise InputError(f"axis {self.axis!r} is neither 'token' nor 'channel'.")
        if self.scale_dtype not in SCALE_BYTES:
            raise InputError(f"scale dtype {self.scale_dtype!r} is not one of {tuple(SCALE_BYTES)}.")
        if self.group < 1:
            raise InputError(f"group {self.group} is not positive.")
        if self.grid != "uniform" and not self.symmetric:
            raise InputError(f"grid {self.grid!r} is a table, and tables are symmetric.")
        if self.is_exact:  # the other fields mean nothing, are not written, and must not tell two plans apart
            for field in fields(self)[1:]:
                object.__setattr__(self, field.name, field.default)

    @classmethod
    def exact(cls, bits: int = 16) -> KVFormat:
        """Return the format that stores values as they are, in 16 (or, for tests, 32) bits."""
        return cls(bits=bits)

    @classmethod
    def from_json(cls, obj: dict[str, Any]) -> KVFormat:
        """Rebuild a format from :meth:`to_json`."""
        return cls(**obj)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON."""
        return {"bits": self.bits} if self.is_exact else asdict(self)

    @property
    def is_exact(self) -> bool:
        """Whether values are stored as they are, without codes."""
        return self.bits in EXACT_BITS

    @property
    def is_token_wise(self) -> bool:
        """Whether a token can be written into its page alone, without its neighbours."""
        return self.is_exact or self.axis == "token"

    @property
    def shard(self) -> Literal["head"]:
        """The unit a tensor-parallel rank may own: groups never straddle heads."""
        return "head"

    def check(self, *, head_dim: int, block_size: int) -> None:
        """Raise :class:`InputError` unless the format fits a head of ``head_dim`` and a page of ``block_size``."""
        if self.is_exact:
            return
        if self.axis == "token" and head_dim % self.group:
            raise InputError(f"group {self.group} does not divide head_dim {head_dim}.")
        if self.axis == "channel" and block_size % self.group:
            raise InputError(f"group {self.group} does not divide block_size {block_size}.")
        if head_dim * self.bits % 8:
            raise InputError(f"a head of {head_dim} values of {self.bits} bits is not a whole number of bytes.")
        if self.grid != "uniform":
            grids.positive_levels(self.grid, self.bits)

    def code_bytes(self, head_dim: int, tokens: int) -> int:
        """Bytes of the codes of ``tokens`` tokens of one head."""
        return head_dim * tokens * self.bits // 8

    def num_groups(self, head_dim: int, tokens: int) -> int:
        """Return how many groups, and so scales, ``tokens`` tokens of one head have."""
        return 0 if self.is_exact else head_dim * tokens // self.group

    def scale_bytes(self, head_dim: int, tokens: int) -> int:
        """Bytes of the scales of ``tokens`` tokens of one head."""
        return self.num_groups(head_dim, tokens) * SCALE_BYTES[self.scale_dtype]

    def zero_bytes(self, head_dim: int, tokens: int) -> int:
        """Bytes of the zero points of ``tokens`` tokens of one head."""
        return 0 if self.symmetric else self.num_groups(head_dim, tokens) * ZERO_BYTES

    def __str__(self) -> str:
        if self.is_exact:
            return str(self.bits)
        parts = [f"{self.bits}", f"{self.axis}{self.group}"]
        parts += [] if self.symmetric else ["asym"]
        parts += [] if self.grid == "uniform" else [self.grid]
        parts += [] if self.scale_dtype == "float16" else [self.scale_dtype]
        return "-".join(parts)
