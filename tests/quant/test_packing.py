"""Packing against a bit stream written in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcli.quant.packing import pack, unpack

BITS = (1, 2, 3, 4, 8)


def bit_stream(codes: list[int], bits: int) -> bytes:
    """Code i on bits [i * bits, (i + 1) * bits) of one little-endian number: the definition, without tensors."""
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    return number.to_bytes(len(codes) * bits // 8, "little")


@st.composite
def code_rows(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    bits = draw(st.sampled_from(BITS))
    n = 8 * draw(st.integers(0, 5))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=n, max_size=n)
    return bits, draw(st.lists(row, min_size=1, max_size=3))


def as_codes(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.uint8)


@given(code_rows())
@settings(max_examples=150)
def test_bytes_are_those_of_the_bit_stream(case: tuple[int, list[list[int]]]) -> None:
    bits, rows = case
    packed = pack(as_codes(rows), bits)
    assert [bytes(row.tolist()) for row in packed] == [bit_stream(row, bits) for row in rows]


@given(code_rows())
@settings(max_examples=150)
def test_round_trip_is_exact(case: tuple[int, list[list[int]]]) -> None:
    bits, rows = case
    codes = as_codes(rows)
    back = unpack(pack(codes, bits), bits)
    assert back.dtype == torch.uint8
    assert back.shape == codes.shape
    assert torch.equal(back, codes)


@pytest.mark.parametrize("bits", BITS)
def test_every_code_survives_next_to_every_other(bits: int) -> None:
    # all pairs of values, so that a carry into a neighbour shows
    top = 2**bits
    codes = torch.cartesian_prod(torch.arange(top), torch.arange(top)).flatten().to(torch.uint8)
    codes = torch.cat((codes, codes.new_zeros(-len(codes) % 8)))
    assert torch.equal(unpack(pack(codes, bits), bits), codes)


@pytest.mark.parametrize("bits", BITS)
def test_packing_is_dense(bits: int) -> None:
    assert pack(torch.zeros(2, 3, 5, 64, dtype=torch.uint8), bits).shape == (2, 3, 5, 8 * bits)


@pytest.mark.parametrize("bits", BITS)
def test_layout_in_memory_does_not_matter(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (16, 24), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert torch.equal(pack(codes.t().contiguous().t(), bits), packed)
    strided = torch.stack((packed, torch.full_like(packed, 255)), -1)[..., 0]  # every other byte
    assert torch.equal(unpack(strided, bits), codes)


@pytest.mark.parametrize("bits", BITS)
def test_tokens_packed_together_are_tokens_packed_alone(bits: int) -> None:
    # what lets a token be written into its page alone
    codes = torch.randint(0, 2**bits, (6, 24), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    assert torch.equal(pack(codes.flatten(), bits), pack(codes, bits).flatten())
