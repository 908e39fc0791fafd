"""Quantisers against their definitions, computed again in float64 one level at a time."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcli.quant import grids
from kvcli.quant.format import Axis, KVFormat, ScaleDtype
from kvcli.quant.quantizer import Quantized, dequantize, from_bytes, nearest_root, quantize, to_bytes
from kvcli.quant.scales import decode_scales

TOKENS, DIM, GROUP = 32, 24, 8
AXES: tuple[Axis, ...] = ("token", "channel")
SCALES: tuple[ScaleDtype, ...] = ("float16", "e5m3")


def widths(axis: Axis, symmetric: bool, grid: str, scale: ScaleDtype) -> list[KVFormat]:
    """All widths of one kind of format, fewest bits first."""
    bits = (1, 2, 3, 4, 8) if grid == "uniform" else (1, 2, 3, 4)
    return [KVFormat(b, axis, GROUP, symmetric, grid, scale) for b in bits]


SYMMETRIC = [widths(axis, True, "uniform", scale) for axis in AXES for scale in SCALES]
ASYMMETRIC = [widths(axis, False, "uniform", scale) for axis in AXES for scale in SCALES]
TABLES = [widths(axis, True, "gaussian", scale) for axis in AXES for scale in SCALES]


def kinds(*of: list[list[KVFormat]], scale: ScaleDtype | None = None) -> pytest.MarkDecorator:
    """Parametrise ``formats``: a list of all widths of one kind."""
    chosen = [x for kind in of for x in kind if scale in (None, x[0].scale_dtype)]
    return pytest.mark.parametrize("formats", chosen, ids=lambda x: str(x[0]).removeprefix("1-"))


every_kind = kinds(SYMMETRIC, ASYMMETRIC, TABLES)


def sample(*shape: int, seed: int = 0) -> Tensor:
    """Gaussian values with an offset and an outlier, as keys have them."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[..., 0] *= 8
    return x + 0.5


def groups(x: Tensor, fmt: KVFormat) -> Tensor:
    """View [tokens, dim] as [groups, group], groups in the order of their scales."""
    if fmt.axis == "token":
        return x.reshape(-1, fmt.group)
    return x.reshape(-1, fmt.group, x.shape[-1]).transpose(-1, -2).reshape(-1, fmt.group)


def levels(q: Quantized, fmt: KVFormat) -> np.ndarray:
    """Return every value each group can decode to, [groups, 2**bits] float64, from the definition of the format."""
    scale = decode_scales(q.scales, fmt.scale_dtype).double().reshape(-1, 1).numpy()
    codes = np.arange(2**fmt.bits)[None]
    if fmt.grid != "uniform":
        return scale * grids.levels(fmt.grid, fmt.bits).double().numpy()[codes]
    if fmt.symmetric:
        return scale * (codes - (2**fmt.bits - 1) / 2)
    assert q.zeros is not None
    return scale * codes + q.zeros.double().reshape(-1, 1).numpy()


def steps(q: Quantized, fmt: KVFormat) -> np.ndarray:
    return decode_scales(q.scales, fmt.scale_dtype).double().reshape(-1, 1).numpy()


# --- definitions ----------------------------------------------------------------------------------------------------


@every_kind
def test_codes_are_the_nearest_levels_of_the_stored_scale(formats: list[KVFormat]) -> None:
    # looked up by brute force: chosen after the scale was rounded, not before
    for fmt in formats:
        x = sample(TOKENS, DIM)
        q = quantize(x, fmt)
        table, values = levels(q, fmt), groups(x, fmt).double().numpy()
        chosen = np.take_along_axis(table, groups(q.codes, fmt).long().numpy(), axis=1)
        nearest = np.abs(values[:, :, None] - table[:, None, :]).min(axis=-1)
        np.testing.assert_allclose(np.abs(values - chosen), nearest, atol=1e-5)  # a tie may fall either way


@every_kind
def test_decoding_looks_levels_up(formats: list[KVFormat]) -> None:
    for fmt in formats:
        q = quantize(sample(TOKENS, DIM), fmt)
        looked_up = np.take_along_axis(levels(q, fmt), groups(q.codes, fmt).long().numpy(), axis=1)
        np.testing.assert_allclose(groups(dequantize(q, fmt), fmt).numpy(), looked_up, rtol=1e-6, atol=1e-6)


@kinds(SYMMETRIC, scale="float16")
def test_symmetric_scale_spreads_the_levels_over_the_largest_value(formats: list[KVFormat]) -> None:
    for fmt in formats:
        x = sample(TOKENS, DIM)
        largest = groups(x, fmt).abs().amax(1)
        torch.testing.assert_close(
            quantize(x, fmt).scales.reshape(-1), (largest * 2 / (2**fmt.bits - 1)).half(), rtol=1e-3, atol=0
        )


@kinds(ASYMMETRIC, scale="float16")
def test_asymmetric_zero_is_the_minimum_and_the_scale_reaches_the_maximum(formats: list[KVFormat]) -> None:
    for fmt in formats:
        x = sample(TOKENS, DIM)
        q = quantize(x, fmt)
        low, high = groups(x, fmt).amin(1), groups(x, fmt).amax(1)
        assert q.zeros is not None
        assert torch.equal(q.zeros.reshape(-1), low.half())
        torch.testing.assert_close(
            q.scales.reshape(-1), ((high - low.half()) / (2**fmt.bits - 1)).half(), rtol=1e-3, atol=0
        )


@kinds(TABLES, scale="float16")
def test_table_scale_is_the_least_squares_gain(formats: list[KVFormat]) -> None:
    for fmt in formats:
        x = sample(TOKENS, DIM)
        table = grids.levels("gaussian", fmt.bits).double()
        values = groups(x, fmt).double()
        deviation = values.square().mean(1, keepdim=True).sqrt()
        points = table[(values[..., None] / deviation[..., None] - table).abs().argmin(-1)]
        expected = (values * points).sum(1) / points.square().sum(1)
        torch.testing.assert_close(quantize(x, fmt).scales.reshape(-1).double(), expected, rtol=1e-3, atol=0)


# --- errors ---------------------------------------------------------------------------------------------------------


@kinds(SYMMETRIC, ASYMMETRIC)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-3, 3), offset=st.floats(-2, 2))
@settings(max_examples=10)
def test_uniform_error_is_half_a_step_and_what_rounding_the_scale_costs(
    formats: list[KVFormat], seed: int, exponent: int, offset: float
) -> None:
    for fmt in formats:
        x = (torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(seed)) + offset) * 10.0**exponent
        q = quantize(x, fmt)
        values = groups(x, fmt).double()
        error = (groups(dequantize(q, fmt), fmt).double() - values).abs().numpy()
        relative = {"float16": 2.0**-11, "e5m3": 2.0**-4 + 2.0**-11}[fmt.scale_dtype]
        smallest = {"float16": 2.0**-24, "e5m3": 2.0**-17}[fmt.scale_dtype]
        top = 2**fmt.bits - 1
        reach = (values.abs().amax(1) if fmt.symmetric else values.amax(1) - values.amin(1)).numpy()
        if fmt.bits == 8:  # finer than three mantissa bits: such scales are rounded up, so that nothing is cut off
            relative = 2.0**-11
        bound = 0.5 * steps(q, fmt)[:, 0] + reach * relative + top * smallest
        if not fmt.symmetric:  # the zero point is a float16 too
            bound += values.abs().amax(1).numpy() * 2.0**-11 + 2.0**-24
        assert (error.max(axis=1) <= bound).all()


@every_kind
def test_more_bits_err_less(formats: list[KVFormat]) -> None:
    x = sample(64, 64)
    errors = [(dequantize(quantize(x, fmt), fmt) - x).square().mean().item() for fmt in formats]
    assert all(finer < coarser / 2 for coarser, finer in itertools.pairwise(errors)), errors


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_small_scales_cost_little(bits: int, symmetric: bool) -> None:
    # three mantissa bits, chosen before the codes, may not cost a quarter of the error, at any width
    x = torch.randn(1024, 64, generator=torch.Generator().manual_seed(0))
    error = {}
    for scale in ("float16", "e5m3"):
        fmt = KVFormat(bits, symmetric=symmetric, scale_dtype=scale)
        error[scale] = (dequantize(quantize(x, fmt), fmt) - x).square().mean().item()
    assert error["e5m3"] < 1.25 * error["float16"]


# --- odd groups -----------------------------------------------------------------------------------------------------


@every_kind
def test_zeros_stay_zero(formats: list[KVFormat]) -> None:
    for fmt in formats:
        assert torch.equal(dequantize(quantize(torch.zeros(TOKENS, DIM), fmt), fmt), torch.zeros(TOKENS, DIM))


@every_kind
@pytest.mark.parametrize("constant", [3.0, -3.0, 0.007])
def test_a_constant_group_comes_back_as_well_as_its_scale_is_stored(formats: list[KVFormat], constant: float) -> None:
    for fmt in formats:
        y = dequantize(quantize(torch.full((TOKENS, DIM), constant), fmt), fmt)
        tolerance = 2.0**-10 if fmt.scale_dtype == "float16" or not fmt.symmetric else 2.0**-3
        torch.testing.assert_close(y, torch.full_like(y, constant), rtol=tolerance, atol=2.0**-18)
        assert y.unique().numel() == 1


@every_kind
@pytest.mark.parametrize("size", [1e6, 1e18])
def test_values_out_of_range_stay_large_and_finite(formats: list[KVFormat], size: float) -> None:
    # beyond 1e19 the squares behind a table's deviation overflow; no model has such keys
    for fmt in formats:
        clean = sample(TOKENS, DIM)
        x = clean.clone()
        x[:8, :8] = size  # whole groups on either axis
        y = dequantize(quantize(x, fmt), fmt)
        assert y.isfinite().all()
        assert (y[:8, :8] > 3e4).all()  # 1 bit reaches half a scale
        assert torch.equal(y[8:, 8:], dequantize(quantize(clean, fmt), fmt)[8:, 8:])  # other groups do not notice


@every_kind
@pytest.mark.parametrize("size", [1e-9, 1e-30, 1e-45])
def test_tiny_values_stay_tiny(formats: list[KVFormat], size: float) -> None:
    for fmt in formats:
        y = dequantize(quantize(torch.full((TOKENS, DIM), size), fmt), fmt)
        assert y.isfinite().all()
        assert (y.abs() <= 2.0**-17 * 2**fmt.bits).all()


@every_kind
def test_not_a_number_spoils_its_own_group_and_no_other(formats: list[KVFormat]) -> None:
    # it is neither hidden nor spread: the scale, or the zero point, of its group becomes NaN
    for fmt in formats:
        clean = sample(TOKENS, DIM)
        x = clean.clone()
        x[3, 5] = math.nan
        spoilt = groups(x, fmt).isnan().any(1)
        y = dequantize(quantize(x, fmt), fmt)
        assert groups(y, fmt)[spoilt].isnan().all()
        assert torch.equal(groups(y, fmt)[~spoilt], groups(dequantize(quantize(clean, fmt), fmt), fmt)[~spoilt])


@every_kind
def test_infinity_saturates_like_any_value_out_of_range(formats: list[KVFormat]) -> None:
    # 16-bit compute gives it when it overflows; the group keeps its sign and nothing else of worth
    for fmt in formats:
        x = sample(TOKENS, DIM)
        x[3, 5] = math.inf
        y = dequantize(quantize(x, fmt), fmt)
        assert y.isfinite().all()
        assert y[3, 5] > 1000


# --- invariances ----------------------------------------------------------------------------------------------------


@every_kind
def test_decoded_values_are_a_fixed_point_of_their_own_scales(formats: list[KVFormat]) -> None:
    for fmt in formats:
        q = quantize(sample(TOKENS, DIM), fmt)
        table = levels(q, fmt)
        decoded = groups(dequantize(q, fmt), fmt).double().numpy()
        again = np.abs(decoded[:, :, None] - table[:, None, :]).argmin(axis=-1)
        np.testing.assert_array_equal(again, groups(q.codes, fmt).numpy())


@kinds(SYMMETRIC, scale="float16")
def test_quantising_what_was_decoded_changes_nothing(formats: list[KVFormat]) -> None:
    # the largest value decodes to the outermost level, from which the same scale follows
    for fmt in formats:
        q = quantize(sample(TOKENS, DIM), fmt)
        again = quantize(dequantize(q, fmt), fmt)
        assert torch.equal(again.codes, q.codes)
        assert torch.equal(again.scales, q.scales)


@every_kind
def test_axes_are_each_others_transpose(formats: list[KVFormat]) -> None:
    for fmt in formats:
        other = KVFormat(
            fmt.bits, "channel" if fmt.axis == "token" else "token", GROUP, fmt.symmetric, fmt.grid, fmt.scale_dtype
        )
        x = sample(TOKENS, DIM)
        q, p = quantize(x, fmt), quantize(x.t(), other)
        assert torch.equal(q.codes, p.codes.t())
        torch.testing.assert_close(q.scales.float(), p.scales.t().float(), rtol=1e-3, atol=0)  # sums may run otherwise
        if q.zeros is not None and p.zeros is not None:
            assert torch.equal(q.zeros, p.zeros.t())


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_everything_is_computed_in_float32(formats: list[KVFormat], dtype: torch.dtype) -> None:
    for fmt in formats:
        x = sample(TOKENS, DIM).to(dtype)
        q, p = quantize(x, fmt), quantize(x.float(), fmt)
        assert torch.equal(q.codes, p.codes)
        assert torch.equal(q.scales, p.scales)
        assert dequantize(q, fmt).dtype == torch.float32


@every_kind
def test_codes_do_not_depend_on_the_batch(formats: list[KVFormat]) -> None:
    # bit for bit, down to one group at a time: prefill and decoding must store the same page
    for fmt in formats:
        x = sample(2, 3, TOKENS, DIM)
        whole = to_bytes(x, fmt, torch.float16)
        tokens = 1 if fmt.axis == "token" else GROUP
        for a, b in np.ndindex(2, 3):
            parts = [to_bytes(x[a, b, t : t + tokens], fmt, torch.float16) for t in range(0, TOKENS, tokens)]
            for section, pieces in zip(whole, zip(*parts, strict=True), strict=True):
                assert torch.equal(torch.cat(pieces), section[a, b])


# --- bytes ----------------------------------------------------------------------------------------------------------


@every_kind
def test_bytes_round_trip_and_are_as_many_as_the_format_says(formats: list[KVFormat]) -> None:
    for fmt in formats:
        x = sample(2, TOKENS, DIM)
        sections = to_bytes(x, fmt, torch.float16)
        assert [s.dtype for s in sections] == [torch.uint8] * 3
        assert [tuple(s.shape) for s in sections] == [
            (2, fmt.code_bytes(DIM, TOKENS)),
            (2, fmt.scale_bytes(DIM, TOKENS)),
            (2, fmt.zero_bytes(DIM, TOKENS)),
        ]
        assert torch.equal(from_bytes(*sections, fmt, torch.float16, DIM), dequantize(quantize(x, fmt), fmt))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_exact_bytes_are_the_values_themselves(dtype: torch.dtype) -> None:
    fmt = KVFormat(32 if dtype == torch.float32 else 16)
    x = sample(2, TOKENS, DIM).to(dtype)
    x[0, 0, :3] = torch.tensor([math.inf, -0.0, math.nan])
    sections = to_bytes(x, fmt, torch.bfloat16 if dtype == torch.float32 else dtype)
    assert [s.shape[-1] for s in sections] == [fmt.code_bytes(DIM, TOKENS), 0, 0]
    back = from_bytes(*sections, fmt, dtype, DIM)
    assert back.dtype == dtype
    assert torch.equal(back.view(torch.uint8), x.view(torch.uint8))


@every_kind
def test_decoding_reads_sections_where_they_lie(formats: list[KVFormat]) -> None:
    # a page is one buffer, and its sections are views into it
    for fmt in formats:
        x = sample(TOKENS, DIM)
        sections = to_bytes(x, fmt, torch.float16)
        page = torch.cat((torch.zeros(16, dtype=torch.uint8), *sections))
        at, views = 16, []
        for section in sections:
            views.append(page[at : at + len(section)])
            at += len(section)
        decoded = from_bytes(views[0], views[1], views[2], fmt, torch.float16, DIM)
        assert torch.equal(decoded, dequantize(quantize(x, fmt), fmt))


def test_roots_are_the_nearest_floats() -> None:
    # torch.sqrt, where it asks a library of vector functions, is off by one place for one number in six
    x = torch.rand(1 << 18, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-30, 1e-6, 10, 1e30])[:, None]
    x[:, 0] = 0
    assert torch.equal(nearest_root(x), torch.from_numpy(np.sqrt(x.numpy())))
