"""Scale dtypes against a nearest value found by looking at all of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvcli.quant.format import ScaleDtype
from kvcli.quant.scales import decode_scales, encode_scales

DTYPES: tuple[ScaleDtype, ...] = ("float16", "e5m3")
FINITE_CODES = 0b11111_000  # from here on the exponent is all ones


def e5m3_value(code: int) -> float:
    """Five exponent bits with float16's bias of 15, three mantissa bits, no sign."""
    exponent, mantissa = code >> 3, code & 7
    if exponent == 0:
        return math.ldexp(mantissa, -17)
    if exponent == 31:
        return math.inf if mantissa == 0 else math.nan
    return math.ldexp(8 + mantissa, exponent - 18)


E5M3 = np.array([e5m3_value(c) for c in range(256)])


def nearest_e5m3(x: np.ndarray) -> np.ndarray:
    """Return the code of the nearest finite value, the even code of two that are as near; never 0 for x > 0."""
    distance = np.abs(x[:, None] - E5M3[None, :FINITE_CODES])
    best = distance.min(axis=1, keepdims=True)
    is_best = distance == best
    even = is_best & (np.arange(FINITE_CODES) % 2 == 0)
    code = np.where(even.any(axis=1), even.argmax(axis=1), is_best.argmax(axis=1))
    return np.where((x > 0) & (code == 0), 1, code)


def all_float16() -> Tensor:
    """Every finite float16 that is not negative."""
    return torch.arange(0, 0x7C00, dtype=torch.int16).view(torch.float16).to(torch.float32)


def test_e5m3_decodes_all_256_codes_by_its_definition() -> None:
    decoded = decode_scales(torch.arange(256, dtype=torch.uint8), "e5m3").numpy()
    np.testing.assert_array_equal(decoded, E5M3)


def test_e5m3_takes_every_float16_to_the_nearest_value() -> None:
    # 31744 values against 248 codes: nothing left to chance
    x = all_float16()
    np.testing.assert_array_equal(encode_scales(x, "e5m3").numpy(), nearest_e5m3(x.numpy().astype(np.float64)))


@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=50))
def test_e5m3_of_a_float32_goes_through_float16(values: list[float]) -> None:
    # the definition every backend follows: float16 first, then its upper eight bits. Twice rounded is not always
    # nearest, but never further than half a step and half a step of float16.
    x = torch.tensor(values, dtype=torch.float32).clamp(max=61440)
    code = encode_scales(x, "e5m3")
    through = np.maximum(nearest_e5m3(x.to(torch.float16).numpy().astype(np.float64)), x.numpy() > 0)
    np.testing.assert_array_equal(code.numpy(), through)
    decoded = decode_scales(code, "e5m3")
    step = torch.maximum(x / 8, torch.tensor(2.0**-17))
    assert ((decoded - x).abs() <= torch.where(x > 2.0**-18, step * (0.5 + 2**-8), torch.tensor(2.0**-17))).all()


def test_e5m3_is_exact_on_its_own_values() -> None:
    codes = torch.arange(FINITE_CODES, dtype=torch.uint8)
    assert torch.equal(encode_scales(decode_scales(codes, "e5m3"), "e5m3"), codes)


@given(st.lists(st.floats(0, 65504, width=32), min_size=1, max_size=50))
def test_float16_is_ieee_rounding_except_that_nothing_positive_becomes_zero(values: list[float]) -> None:
    x = np.array(values, dtype=np.float32)
    expected = np.where((x > 0) & (x < 2.0**-24), np.float16(2.0**-24), x.astype(np.float16))
    stored = encode_scales(torch.from_numpy(x), "float16")
    assert stored.dtype == torch.float16
    np.testing.assert_array_equal(stored.numpy(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@given(values=st.lists(st.floats(0, allow_nan=False, allow_infinity=True, width=32), min_size=2, max_size=50))
def test_a_larger_scale_is_never_stored_smaller(dtype: ScaleDtype, values: list[float]) -> None:
    decoded = decode_scales(encode_scales(torch.tensor(sorted(values)), dtype), dtype)
    assert (decoded.diff() >= 0).all()


@pytest.mark.parametrize(("dtype", "largest"), [("float16", 65504.0), ("e5m3", 61440.0)])
def test_scales_saturate_at_the_largest_finite_value(dtype: ScaleDtype, largest: float) -> None:
    x = torch.tensor([largest, largest * 1.01, 65519.0, 65520.0, 1e30, math.inf])
    assert decode_scales(encode_scales(x, dtype), dtype).tolist() == [largest] * len(x)


@pytest.mark.parametrize(("dtype", "smallest"), [("float16", 2.0**-24), ("e5m3", 2.0**-17)])
def test_a_positive_scale_is_never_stored_as_zero(dtype: ScaleDtype, smallest: float) -> None:
    x = torch.tensor([1e-45, 1e-38, 1e-12, smallest / 2, smallest])
    assert decode_scales(encode_scales(x, dtype), dtype).tolist() == [smallest] * len(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_stays_zero_and_not_a_number_stays_so(dtype: ScaleDtype) -> None:
    zero, nan = decode_scales(encode_scales(torch.tensor([0.0, math.nan]), dtype), dtype).tolist()
    assert zero == 0
    assert math.isnan(nan)


@pytest.mark.parametrize(("dtype", "stored"), [("float16", torch.float16), ("e5m3", torch.uint8)])
def test_shape_is_kept_and_storage_is_small(dtype: ScaleDtype, stored: torch.dtype) -> None:
    x = torch.rand(2, 3, 4)
    assert encode_scales(x, dtype).dtype == stored
    assert encode_scales(x, dtype).shape == x.shape
    assert decode_scales(encode_scales(x, dtype), dtype).dtype == torch.float32
