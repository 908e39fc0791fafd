"""The tables against the fixed point that defines them and the errors Max published in 1960."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.optimize import fsolve
from scipy.stats import norm

from kvcli.errors import InputError
from kvcli.quant import grids
from kvcli.quant.format import KVFormat
from kvcli.quant.quantizer import dequantize, quantize

# Max, "Quantizing for minimum distortion", 1960, table I: mean squared error on a standard normal variable
PUBLISHED = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


def centroids(levels: np.ndarray) -> np.ndarray:
    """Return the mean of a standard normal variable in each level's cell."""
    borders = np.concatenate(([-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]))
    return -np.diff(norm.pdf(borders)) / np.diff(norm.cdf(borders))


def squared_error(levels: np.ndarray) -> float:
    """Return E[(x - nearest level)²] in closed form."""
    borders = np.concatenate(([-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]))
    mass, first = np.diff(norm.cdf(borders)), -np.diff(norm.pdf(borders))
    return float(1 - 2 * (levels * first).sum() + (levels**2 * mass).sum())


@pytest.fixture
def scratch_grids(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a test register tables that no other test sees."""
    monkeypatch.setattr(grids, "_TABLES", {name: dict(tables) for name, tables in grids._TABLES.items()})
    yield
    grids.levels.cache_clear()


def fixed_point(bits: int) -> np.ndarray:
    """Return the levels that are the means of their own cells."""
    quantiles = norm.ppf((np.arange(2**bits) + 0.5) / 2**bits)  # a start that knows nothing of the table
    return np.asarray(fsolve(lambda x: centroids(x) - x, quantiles, xtol=1e-12))


@pytest.mark.parametrize("bits", PUBLISHED)
def test_gaussian_levels_are_the_best_bytes_for_the_lloyd_max_fixed_point(bits: int) -> None:
    exact = fixed_point(bits)
    rounded = {d: np.round(exact * d) for d in range(1, 400) if round(exact[-1] * d) <= 127}
    best = min(rounded, key=lambda d: squared_error(rounded[d] / d))
    assert grids.steps("gaussian", bits) == best
    np.testing.assert_array_equal(grids.levels("gaussian", bits).numpy(), (rounded[best] / best).astype(np.float32))


@pytest.mark.parametrize("bits", PUBLISHED)
def test_bytes_cost_next_to_nothing(bits: int) -> None:
    best = squared_error(fixed_point(bits))
    assert best == pytest.approx(PUBLISHED[bits], rel=5e-4)
    assert squared_error(grids.levels("gaussian", bits).numpy().astype(np.float64)) <= best * 1.0014


@pytest.mark.parametrize(("bits", "published"), PUBLISHED.items())
def test_the_quantiser_reaches_the_published_error(bits: int, published: float) -> None:
    # one long group, so that its scale is the true one: any slip of levels, borders or gain shows here
    x = torch.randn(1, 2**18, generator=torch.Generator().manual_seed(0))
    fmt = KVFormat(bits, group=x.shape[1], grid="gaussian")
    error = (dequantize(quantize(x, fmt), fmt) - x).square().mean().item()
    assert error == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize("bits", PUBLISHED)
def test_levels_are_symmetric_and_rise(bits: int) -> None:
    levels = grids.levels("gaussian", bits)
    assert levels.shape == (2**bits,)
    assert levels.dtype == torch.float32
    assert torch.equal(levels, -levels.flip(0))
    assert (levels.diff() > 0).all()


@pytest.mark.parametrize(("name", "bits"), [("gaussian", 8), ("no such table", 4)])
def test_an_unknown_table_is_named(name: str, bits: int) -> None:
    with pytest.raises(InputError, match=f"no grid '{name}' of {bits} bits"):
        grids.levels(name, bits)


@pytest.mark.usefixtures("scratch_grids")
def test_a_registered_table_is_used() -> None:
    grids.register("mine", 2, (2, 5), 4)  # like every table, for a variable of variance 1
    assert grids.levels("mine", 2).tolist() == [-1.25, -0.5, 0.5, 1.25]
    fmt = KVFormat(2, group=4, grid="mine")
    x = torch.tensor([[-5.0, -2.0, 2.0, 5.0]])
    assert torch.equal(dequantize(quantize(x, fmt), fmt), x)


@pytest.mark.usefixtures("scratch_grids")
@pytest.mark.parametrize("positive", [(1,), (1, 2, 3), (2, 1), (0, 1), (-1, 1), (1, 1)])
def test_a_table_that_is_no_half_grid_is_refused(positive: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="positive levels in rising order"):
        grids.register("mine", 2, positive, 1)


@pytest.mark.usefixtures("scratch_grids")
@pytest.mark.parametrize(("positive", "denominator"), [((1, 128), 1), ((1, 2), 0), ((1, 2.5), 1)])
def test_a_table_that_is_no_bytes_is_refused(positive: tuple[int, ...], denominator: int) -> None:
    with pytest.raises(InputError, match="whole numbers of at most 127"):
        grids.register("mine", 2, positive, denominator)


@pytest.mark.usefixtures("scratch_grids")
def test_a_table_is_never_replaced_silently() -> None:
    # what is stored on disk under a name must decode the same for ever
    grids.register("mine", 1, (1,), 1)
    assert grids.levels("mine", 1).tolist() == [-1.0, 1.0]
    with pytest.raises(InputError, match="mine"):
        grids.register("mine", 1, (2,), 1)
    grids.register("mine", 1, (1,), 1)  # the same again is nothing new: a module may be imported twice
