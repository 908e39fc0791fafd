"""Where everything lies inside one page: the Python view of the packed layout.

The same layout is defined, with a picture, in ``kvcli/runtime/csrc/kv_layout.h``; a test holds the two together. A page
holds ``block_size`` tokens of one layer. It is head-major, so that a tensor-parallel rank owns a contiguous slice::

    page  = | head 0 | head 1 | … |
    head  = | K codes | K scales | K zeros | V codes | V scales | V zeros |, each padded to 16 bytes

Codes are token-major ([block_size, head_dim], densely packed, least significant bit first). Scales and zeros are
[block_size, head_dim / group] on the token axis and [block_size / group, head_dim] on the channel axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from kvcli.quant.format import KVFormat

ALIGNMENT = 16


@dataclass(frozen=True)
class PageLayout:
    """Byte offsets of one head's slice of a page.

    Attributes
    ----------
    k, v
        The formats of the keys and the values.
    head_dim, block_size
        Channels of a head, tokens of a page.
    """

    k: KVFormat
    v: KVFormat
    head_dim: int
    block_size: int

    def __post_init__(self) -> None:
        self.k.check(head_dim=self.head_dim, block_size=self.block_size)
        self.v.check(head_dim=self.head_dim, block_size=self.block_size)

    @cached_property
    def sections(self) -> dict[str, slice]:
        """Byte ranges of ``k_codes``, ``k_scales``, ``k_zeros``, ``v_codes``, ``v_scales`` and ``v_zeros``."""
        out: dict[str, slice] = {}
        at = 0
        for tensor, fmt in (("k", self.k), ("v", self.v)):
            for name, size in (
                ("codes", fmt.code_bytes(self.head_dim, self.block_size)),
                ("scales", fmt.scale_bytes(self.head_dim, self.block_size)),
                ("zeros", fmt.zero_bytes(self.head_dim, self.block_size)),
            ):
                out[f"{tensor}_{name}"] = slice(at, at + size)
                at += -(-size // ALIGNMENT) * ALIGNMENT
        return out

    @cached_property
    def head_bytes(self) -> int:
        """Bytes of one head's slice, padding included."""
        end: int = self.sections["v_zeros"].stop
        return -(-end // ALIGNMENT) * ALIGNMENT
