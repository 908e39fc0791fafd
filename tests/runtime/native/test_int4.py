"""Linear layers in 4 bits: every instruction set gives the same bits, and those are the product asked for."""

from __future__ import annotations

from ctypes import byref

import pytest
import torch
from cpu_store import available, cpu_library
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcli.runtime import kvrt
from kvcli.runtime.linear import GROUP, Grid, pack, quantise
from kvcli.runtime.stored_codes import NF4

pytestmark = pytest.mark.usefixtures("variant_is_put_back")
VARIANTS = available()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def multiply(
    x: Tensor, packed: Tensor, outputs: int, *, bias: Tensor | None = None, out: torch.dtype = torch.float32,
    threads: int = 1, group: int = GROUP, grid: Grid = Grid.ZERO_WEIGHT, bits: int = 16,
) -> Tensor:  # fmt: skip
    y = torch.full((len(x), outputs), torch.nan, dtype=out)
    cpu_library().call(
        "int4_matmul", y.data_ptr(), x.data_ptr(), packed.data_ptr(), kvrt.pointer(bias), len(x), outputs, x.shape[1],
        group, grid, kvrt.DTYPES[x.dtype], kvrt.DTYPES[out], bits, byref(kvrt.Exec(threads, 0)),
    )  # fmt: skip
    return y


def stored(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    scale, zero = (x.double().repeat_interleave(GROUP, 1) for x in (scale, zero))
    return codes.double() * scale + zero


BITS = st.sampled_from((8, 16))
LEVELS = {8: 127, 16: 16256}  # of a group's largest activation


@settings(deadline=None, max_examples=100)
@given(
    st.integers(1, 17), st.integers(1, 70), st.integers(1, 5), st.sampled_from(list(kvrt.DTYPES)), st.booleans(),
    st.integers(0, 99), st.sampled_from((1, 30.0, 1e-3)), BITS,
)  # fmt: skip
def test_all_variants_give_the_same_product(rows, outputs, groups, dtype, biased, seed, outlier, bits):
    x = random(rows, groups * GROUP, seed=seed)
    x[:, seed % x.shape[1]] *= outlier
    x = x.to(dtype)
    parts = quantise(random(outputs, x.shape[1], seed=seed + 1))
    weight, bias = stored(*parts), random(outputs, seed=seed + 2).to(dtype) if biased else None
    found = []
    for name in VARIANTS:
        cpu_library().use(name)
        found.append(multiply(x, pack(*parts), outputs, bias=bias, bits=bits))
        assert torch.equal(found[0], found[-1]), name
    # a group's activations are off by at most half a step of its largest, and sums are float32
    largest = x.double().abs().unflatten(1, (-1, GROUP)).amax(-1).repeat_interleave(GROUP, 1)
    off = largest @ weight.abs().t() / LEVELS[bits] / 2 + (x.double().abs() @ weight.abs().t()) * 2e-6
    exact = x.double() @ weight.t() + (0 if bias is None else bias.double())
    assert bool(((found[0] - exact).abs() <= off + exact.abs() * 1e-6 + 1e-6).all())


@pytest.mark.parametrize("bits", LEVELS)
def test_no_row_depends_on_another_or_on_the_threads(bits, variant):
    x, parts = random(27, 128), quantise(random(4000, 128, seed=1))
    whole = multiply(x, pack(*parts), 4000, bits=bits)
    assert torch.equal(multiply(x, pack(*parts), 4000, threads=2, bits=bits), whole)
    for rows in (slice(0, 1), slice(3, 5), slice(4, 11), slice(5, 20)):
        assert torch.equal(multiply(x[rows].contiguous(), pack(*parts), 4000, bits=bits), whole[rows])


@pytest.mark.parametrize("bits", LEVELS)
def test_zeros_give_the_bias_and_what_is_not_finite_stays_so(bits, variant):
    x, parts, bias = random(4, 64), quantise(random(20, 64, seed=1)), random(20, seed=2)
    x[0] = 0
    x[1, 40], x[2, 3] = torch.inf, torch.nan
    out = multiply(x, pack(*parts), 20, bias=bias, bits=bits)
    assert torch.equal(out[0], bias)
    assert out[1:3].isnan().all()
    assert out[3].isfinite().all()


@pytest.mark.parametrize("out", list(kvrt.DTYPES))
def test_results_are_rounded_to_the_dtype_asked_for(out, variant):
    x, parts = random(2, 64).bfloat16(), quantise(random(33, 64, seed=1))
    assert torch.equal(multiply(x, pack(*parts), 33, out=out), multiply(x, pack(*parts), 33).to(out))


def on_grid(grid: Grid, group: int, outputs: int, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random codes, scales and zeros, and the weights that they are, float64."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (outputs, width), generator=g)
    scale = (torch.rand(outputs, width // group, generator=g) + 0.1).half()
    zero = torch.randint(0, 17, scale.shape, generator=g).half()
    wide, offset = (x.double().repeat_interleave(group, 1) for x in (scale, zero))
    weight = torch.tensor(NF4, dtype=torch.float64)[codes] * wide if grid == Grid.NF4 else (codes - offset) * wide
    return codes, scale, zero, weight


@given(
    st.integers(1, 17), st.integers(1, 40), st.integers(1, 3), st.sampled_from((8, 64, 192, 1024)),
    st.sampled_from((Grid.ZERO_CODE, Grid.NF4)), st.integers(0, 99), BITS,
)  # fmt: skip
@settings(max_examples=60)
def test_codes_of_checkpoints_are_multiplied_as_they_are(rows, outputs, groups, group, grid, seed, bits):
    codes, scale, zero, weight = on_grid(grid, group, outputs, groups * group, seed)
    x, found = random(rows, groups * group, seed=seed), []
    for name in VARIANTS:
        cpu_library().use(name)
        found.append(multiply(x, pack(codes, scale, zero, group), outputs, group=group, grid=grid, bits=bits))
        assert torch.equal(found[0], found[-1]), name
    largest = x.double().abs().unflatten(1, (-1, group)).amax(-1).repeat_interleave(group, 1)
    whole = (codes + 16 if grid == Grid.ZERO_CODE else torch.ones_like(codes)) * scale.double().repeat_interleave(
        group, 1
    )
    off = largest @ weight.abs().t() / LEVELS[bits] / 2 + x.double().abs() @ whole.t() * (
        2e-6 if grid == Grid.ZERO_CODE else 1e-4
    )
    assert bool(((found[0] - x.double() @ weight.t()).abs() <= off + 1e-6).all())


@pytest.mark.parametrize("grid", [Grid.ZERO_CODE, Grid.NF4])
def test_codes_of_checkpoints_are_written_out_to_bf16(grid, variant):
    codes, scale, zero, weight = on_grid(grid, 48, 32, 96, 1)
    out, packed = torch.full((96, 32), torch.nan, dtype=torch.bfloat16), pack(codes, scale, zero, 48)
    cpu_library().call("int4_expand", out.data_ptr(), packed.data_ptr(), 0, 32, 96, 48, grid, None)
    assert torch.equal(out.t(), weight.float().bfloat16())


@pytest.mark.parametrize("first", [0, 16, 32])
def test_weights_are_written_out_side_by_side(first, variant):
    parts = quantise(random(48, 96))
    out = torch.full((96, 48 - first), torch.nan, dtype=torch.bfloat16)
    packed = pack(*parts)
    cpu_library().call("int4_expand", out.data_ptr(), packed.data_ptr(), first, 48 - first, 96, GROUP, 0, None)
    codes, scale, zero = (x.float() for x in parts)
    scale, zero = (x.repeat_interleave(GROUP, 1) for x in (scale, zero))
    assert torch.equal(out.t(), (codes * scale + zero).bfloat16()[first:])


@pytest.mark.parametrize(
    "wrong",
    [{"rows": -1}, {"out_features": 0}, {"in_features": 40}, {"group": 12}, {"group": 0}, {"grid": 3}, {"grid": -1},
     {"dtype": 7}, {"bits": 4}],
)  # fmt: skip
def test_contradictions_are_refused(wrong):
    x = torch.zeros(1, 64)
    args = {
        "rows": 1,
        "out_features": 16,
        "in_features": 64,
        "group": 32,
        "grid": 0,
        "dtype": 0,
        "out_dtype": 0,
        "bits": 16,
        **wrong,
    }
    call = cpu_library().function("int4_matmul")
    assert call(x.data_ptr(), x.data_ptr(), x.data_ptr(), None, *args.values(), None) == 1
    assert call(x.data_ptr(), x.data_ptr(), None, None, 1, 16, 64, 32, 0, 0, 0, 16, None) == 1


def test_padding_and_layout_of_a_tile():
    codes = torch.randint(0, 16, (17, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    scale, zero = random(17, 2).half(), random(17, 2, seed=1).half()
    packed = pack(codes, scale, zero)
    assert packed.shape == (2, 2, 64 + 8 * GROUP)
    for output, column in ((0, 0), (5, 9), (16, 63), (3, 38)):
        tile, group, within = output // 16, column // GROUP, column % GROUP
        byte = packed[tile, group, 64 + within // 8 * 64 + output % 16 * 4 + within % 4]
        assert int(byte) >> (4 * (within % 8 // 4)) & 15 == int(codes[output, column])
        halves = packed[tile, group, :64].clone().view(torch.float16)
        assert (halves[output % 16], halves[16 + output % 16]) == (scale[output, group], zero[output, group])
    assert not packed[1, :, 64:].view(2, -1, 16, 4)[:, :, 1:].any()
