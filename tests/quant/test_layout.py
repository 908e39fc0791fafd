"""Where sections lie in a page: disjoint, in order, aligned, and no byte wasted but the padding."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcli.errors import InputError
from kvcli.plan import BLOCK_SIZES, LayerPlan
from kvcli.quant.format import SCALE_BYTES, KVFormat
from kvcli.quant.layout import PageLayout

ORDER = ["k_codes", "k_scales", "k_zeros", "v_codes", "v_scales", "v_zeros"]


@st.composite
def formats(draw: st.DrawFn, head_dim: int, block_size: int) -> KVFormat:
    axis = draw(st.sampled_from(("token", "channel")))
    length = head_dim if axis == "token" else block_size
    group = draw(st.sampled_from([g for g in range(1, length + 1) if length % g == 0]))
    return KVFormat(
        draw(st.sampled_from((1, 2, 3, 4, 8, 16, 32))),
        axis,
        group,
        draw(st.booleans()),
        scale_dtype=draw(st.sampled_from(("float16", "e5m3"))),
    )


@st.composite
def layouts(draw: st.DrawFn) -> PageLayout:
    head_dim, block_size = draw(st.sampled_from((8, 24, 64, 80, 128))), draw(st.sampled_from(BLOCK_SIZES))
    k, v = draw(formats(head_dim, block_size)), draw(formats(head_dim, block_size))
    return PageLayout(k, v, head_dim, block_size)


@given(layouts())
def test_sections_follow_each_other_at_the_next_multiple_of_16_bytes(layout: PageLayout) -> None:
    assert list(layout.sections) == ORDER
    assert layout.sections["k_codes"].start == 0
    assert all(b.start % 16 == 0 and 0 <= b.start - a.stop < 16 for a, b in pairwise(layout.sections.values()))


@given(layouts())
def test_sections_are_as_long_as_their_contents(layout: PageLayout) -> None:
    values = layout.head_dim * layout.block_size
    for name, fmt in (("k", layout.k), ("v", layout.v)):
        size = {x: s.stop - s.start for x, s in layout.sections.items()}
        groups = 0 if fmt.bits > 8 else values // fmt.group
        assert size[f"{name}_codes"] * 8 == values * fmt.bits
        assert size[f"{name}_scales"] == groups * SCALE_BYTES[fmt.scale_dtype]
        assert size[f"{name}_zeros"] == (0 if fmt.symmetric else groups * 2)


@given(layouts())
def test_a_head_is_padded_to_16_bytes_and_no_further(layout: PageLayout) -> None:
    padding = layout.head_bytes - layout.sections["v_zeros"].stop
    assert layout.head_bytes % 16 == 0
    assert 0 <= padding < 16


@given(layouts())
def test_numbers_of_two_bytes_lie_at_even_offsets(layout: PageLayout) -> None:
    # a kernel reads them as they lie
    for name, fmt in (("k", layout.k), ("v", layout.v)):
        if fmt.bits > 8:
            assert layout.sections[f"{name}_codes"].start % (fmt.bits // 8) == 0
        elif fmt.scale_dtype == "float16":
            assert layout.sections[f"{name}_scales"].start % 2 == 0
        assert layout.sections[f"{name}_zeros"].start % 2 == 0


def test_offsets_by_hand() -> None:
    # 16 tokens of 64: K 4 bits in channel groups of 16 with zeros, V 3 bits with one-byte scales
    layout = PageLayout(KVFormat(4, "channel", 16, symmetric=False), KVFormat(3, scale_dtype="e5m3"), 64, 16)
    starts = {name: section.start for name, section in layout.sections.items()}
    assert starts == {
        "k_codes": 0,
        "k_scales": 512,  # 16 * 64 / 2
        "k_zeros": 640,  # one group of 16 tokens, 64 channels, 2 bytes
        "v_codes": 768,
        "v_scales": 1152,  # 16 * 64 * 3 / 8 = 384
        "v_zeros": 1168,  # 16 tokens, 1 byte
    }
    assert layout.head_bytes == 1168


def test_padding_by_hand() -> None:
    # 16 tokens of 8 in 1 bit are 16 bytes, their channel scales 8: padded to 16
    one = KVFormat(1, "channel", 16, scale_dtype="e5m3")
    assert PageLayout(one, one, 8, 16).head_bytes == 64
    assert PageLayout(one, KVFormat(16), 8, 16).head_bytes == 288  # 16 + 16 + 256


def test_a_page_is_its_heads() -> None:
    layer = LayerPlan(3, 64, KVFormat(4), KVFormat(2))
    assert layer.page_bytes(16) == 3 * layer.layout(16).head_bytes == 3 * (512 + 32 + 256 + 32)


def test_a_format_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="does not divide block_size"):
        PageLayout(KVFormat(4), KVFormat(4, "channel", 32), 64, 16)
