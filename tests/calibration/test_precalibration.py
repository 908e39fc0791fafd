"""Pre-calibration: the divergence against its definition, and grids that never make it worse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcli.calibration.precalibration import (
    KAPPA,
    KEPT,
    SHRINK,
    candidates,
    divergence,
    log_density,
    precalibrate,
    round_to_nearest,
)
from kvcli.quant.weight_format import WeightFormat

FORMATS = [WeightFormat(3, 64), WeightFormat(4, 32), WeightFormat(8, 128)]


def heavy(out: int, width: int, seed: int = 0) -> Tensor:
    """Weights with tails, as models have them."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(out, width, generator=g) * torch.rand(out, width, generator=g).clamp(min=0.02).pow(-0.5) / 10


def density_by_hand(group: Tensor, stored: Tensor, h: float) -> Tensor:
    off = (group.double()[:, None] - stored.double()[None]) / h
    return torch.exp(-0.5 * off.square()).mean(-1).log()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_the_density_is_that_of_the_definition(fmt):
    groups = fmt.groups(heavy(3, 256))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale, zero = fmt.grid(low * 0.8, high * 0.9)  # some weights are cut off
    width = KAPPA * fmt.grid(low, high)[0]
    found = log_density(groups, fmt, scale, zero, width)
    stored = fmt.decode(fmt.encode(groups, scale, zero), scale, zero)
    for i in range(3):
        for j in range(groups.shape[1]):
            expected = density_by_hand(groups[i, j], stored[i, j], float(width[i, j]))
            near = expected > -60  # what float32's exp still holds
            torch.testing.assert_close(found[i, j].double()[near], expected[near], atol=2e-3, rtol=1e-3)


@given(st.sampled_from(FORMATS), st.integers(0, 999), st.sampled_from((1.0, 1e-2, 30.0)))
@settings(deadline=None, max_examples=25)
def test_the_divergence_never_exceeds_that_of_round_to_nearest(fmt, seed, size):
    weight = heavy(4, 256, seed) * size
    found = divergence(weight, fmt, *precalibrate(weight, fmt))
    assert found.after <= found.before + 1e-5
    assert found.after >= -1e-5  # no distribution is nearer to the weights' own than itself, at their own places


def test_the_choice_is_the_best_candidate():
    fmt, weight = WeightFormat(3, 64), heavy(2, 128, 5)
    scale, zero = precalibrate(weight, fmt)
    groups = fmt.groups(weight)
    width = KAPPA * fmt.grid(*groups.aminmax(dim=-1, keepdim=True))[0]
    losses, grids = [], []
    for low, high in candidates(groups):
        s, z = fmt.grid(low, high)
        stored = fmt.decode(fmt.encode(groups, s, z), s, z)
        losses.append(torch.tensor([
            [-float(density_by_hand(groups[i, j], stored[i, j], float(width[i, j])).mean()) for j in range(2)]
            for i in range(2)
        ]))  # fmt: skip
        grids.append((s[..., 0], z[..., 0]))
    best = torch.stack(losses).argmin(0)
    for i in range(2):
        for j in range(2):
            assert (scale[i, j], zero[i, j]) == tuple(x[i, j] for x in grids[int(best[i, j])])
    assert len(losses) == len({round(x * 64) for x in KEPT}) * len(SHRINK)
    assert bool((best > 0).any())  # not round-to-nearest everywhere


def test_outliers_are_those_above_the_root_of_lambda():
    weight = torch.cat((torch.linspace(-1, 1, 31), torch.tensor([40.0])))[None]
    spans = [float((high - low).amax()) for low, high in candidates(WeightFormat(4, 32).groups(weight))]
    assert spans[0] == pytest.approx(41)
    assert min(spans) <= 2  # without the outlier


@pytest.mark.parametrize("fmt", FORMATS[:2], ids=str)
def test_scaling_the_weights_scales_the_grid(fmt):
    weight = heavy(4, 128)
    (scale, zero), (scaled, same) = precalibrate(weight, fmt), precalibrate(weight * 4, fmt)
    assert torch.equal(scaled, scale * 4)
    assert torch.equal(same, zero)


def test_groups_do_not_depend_on_each_other_or_on_how_they_are_cut(monkeypatch):
    fmt, weight = WeightFormat(4, 32), heavy(9, 96)
    whole = precalibrate(weight, fmt)
    monkeypatch.setattr("kvcli.calibration.precalibration.CHUNK", 96 * 2)
    assert all(torch.equal(a, b) for a, b in zip(precalibrate(weight, fmt), whole, strict=True))
    alone = precalibrate(weight[3:4, 32:64], fmt)
    assert all(torch.equal(a[0, 0], b[3, 1]) for a, b in zip(alone, whole, strict=True))


def test_tails_are_cut_in_few_bits_and_kept_in_many():
    weight = heavy(64, 256, 3)
    shares = []
    for bits in (3, 8):
        fmt = WeightFormat(bits, 128)
        plain, chosen = round_to_nearest(weight, fmt)[0], precalibrate(weight, fmt)[0]
        shares.append(float((chosen < plain).float().mean()))
    assert shares[0] > shares[1]
    assert shares[0] > 0.5
