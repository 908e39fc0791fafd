"""Weights in few bits: the grid, and AutoGPTQ's layout against a plain reading of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcli.errors import InputError
from kvcli.quant.weight_format import BITS, WeightFormat


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parts(fmt: WeightFormat, out: int, groups: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, fmt.levels + 1, (out, groups * fmt.group), generator=g)
    scale = (torch.rand(out, groups, generator=g) + 0.5).half().float()
    return codes, scale, torch.randint(1, fmt.levels + 1, (out, groups), generator=g).float()


def bit(words: Tensor, at: int) -> int:
    return int(words[at // 32]) >> (at % 32) & 1


@given(st.sampled_from(BITS), st.sampled_from((32, 64, 128)), st.integers(1, 3), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_codes_scales_and_zeros_survive_the_layout(bits, group, groups, seed):
    fmt = WeightFormat(bits, group)
    codes, scale, zero = parts(fmt, 64, groups, seed)
    stored = fmt.pack(codes, scale, zero)
    again = fmt.unpack(stored)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(again, (codes, scale, zero), strict=True))
    assert fmt.stored_bytes((64, groups * group)) == sum(x.nbytes for x in stored.values())
    wide = torch.repeat_interleave
    assert torch.equal(fmt.dequantize(stored), (codes - wide(zero, group, 1)) * wide(scale, group, 1))


@pytest.mark.parametrize("bits", BITS)
def test_the_layout_is_a_bit_stream_down_each_output_and_zeros_are_less_one(bits):
    fmt = WeightFormat(bits, 32)
    codes, scale, zero = parts(fmt, 32, 2)
    stored = fmt.pack(codes, scale, zero)
    assert stored["qweight"].shape == (64 * bits // 32, 32)
    assert stored["qzeros"].shape == (2, 32 * bits // 32)
    assert stored["scales"].shape == (2, 32)
    assert stored["g_idx"].tolist() == [0] * 32 + [1] * 32
    for out, column in ((0, 0), (3, 10), (31, 21), (7, 63), (30, 33)):  # 10 and 21 straddle words of 3-bit codes
        read = sum(bit(stored["qweight"][:, out], column * bits + b) << b for b in range(bits))
        assert read == int(codes[out, column])
        group = column // 32
        assert sum(bit(stored["qzeros"][group], out * bits + b) << b for b in range(bits)) == int(zero[out, group]) - 1


@given(st.sampled_from(BITS), st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_symmetric_grids_have_the_middle_for_zero(bits, seed):
    fmt = WeightFormat(bits, 32, symmetric=True)
    weight = torch.randn(4, 3, 32, generator=torch.Generator().manual_seed(seed))
    scale, zero = fmt.grid(*weight.aminmax(dim=-1, keepdim=True))
    assert (zero == 2 ** (bits - 1)).all()
    rounded = fmt.decode(fmt.encode(weight, scale, zero), scale, zero)
    assert ((rounded - weight).abs() <= scale * 0.57).all()  # half a step, and what float16 takes off 128 of them
    assert torch.equal(fmt.encode(torch.zeros_like(weight), scale, zero), zero.expand_as(weight))


def test_g_idx_may_name_groups_in_any_order():
    fmt = WeightFormat(4, 32)
    codes, scale, zero = parts(fmt, 8, 2)
    stored = fmt.pack(codes, scale, zero)
    order = torch.randint(0, 2, (64,), generator=torch.Generator().manual_seed(1))
    found = fmt.dequantize({**stored, "g_idx": order.int()})
    assert torch.equal(found, (codes - zero[:, order]) * scale[:, order])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shift", [-10.0, 0.0, 10.0])
def test_the_grid_holds_the_extremes_and_zero(bits, shift):
    fmt = WeightFormat(bits, 64)
    groups = fmt.groups(random(5, 128) + shift)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale, zero = fmt.grid(low, high)
    back = fmt.decode(fmt.encode(groups, scale, zero), scale, zero)
    assert bool(((back - groups).abs() <= 1.6 * scale).all())  # half a step, and what rounding the zero point moves
    assert bool((fmt.decode(zero, scale, zero) == 0).all())
    assert bool(((zero >= 1) & (zero <= fmt.levels)).all())
    assert torch.equal(scale, scale.half().float())


def test_more_bits_are_closer():
    weight, errors = random(32, 128), []
    for bits in BITS:
        fmt = WeightFormat(bits, 32)
        groups = fmt.groups(weight)
        scale, zero = fmt.grid(*groups.aminmax(dim=-1, keepdim=True))
        errors.append(float((fmt.decode(fmt.encode(groups, scale, zero), scale, zero) - groups).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 20


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (5, 32), (4, 0), (4, 12)])
def test_unknown_formats_are_refused(bits, group):
    with pytest.raises(InputError):
        WeightFormat(bits, group)


def test_shapes_that_do_not_divide_are_named():
    with pytest.raises(InputError, match=r"k_proj: 96 inputs do not divide into groups of 64"):
        WeightFormat(4, 64).check((64, 96), "k_proj")
    with pytest.raises(InputError, match="words"):
        WeightFormat(3, 32).check((33, 32))


def test_damaged_layers_are_refused():
    fmt = WeightFormat(4, 32)
    stored = fmt.pack(*parts(fmt, 8, 2))
    with pytest.raises(InputError, match="no qzeros"):
        fmt.dequantize({k: v for k, v in stored.items() if k != "qzeros"})
    with pytest.raises(InputError, match="do not fit"):
        fmt.dequantize({**stored, "scales": stored["scales"][:1]})
    with pytest.raises(InputError, match="g_idx"):
        fmt.dequantize({**stored, "g_idx": stored["g_idx"] + 1})
