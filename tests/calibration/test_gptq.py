"""GPTQ: what it minimises, and the cases where the best codes are known."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcli.calibration.gptq import gptq
from kvcli.calibration.precalibration import precalibrate, round_to_nearest
from kvcli.errors import InputError
from kvcli.quant.weight_format import WeightFormat

FMT = WeightFormat(3, 32)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Correlated inputs, as layers have them."""
    return random(tokens, width, seed=seed) @ (torch.eye(width) + random(width, width, seed=seed + 1) / width**0.5)


def nearest(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return FMT.encode(FMT.groups(weight), scale[..., None], zero[..., None]).flatten(1)


def error(weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, x: Tensor) -> float:
    stored = FMT.decode(FMT.groups(codes), scale[..., None], zero[..., None]).flatten(1)
    return float((x @ (weight - stored).t()).square().sum())


@given(st.integers(0, 99), st.sampled_from((64, 160, 288)))
@settings(deadline=None, max_examples=15)
def test_outputs_are_closer_than_with_the_nearest_codes(seed, width):
    weight, x = random(24, width, seed=seed), inputs(4 * width, width, seed)
    for choose in (round_to_nearest, precalibrate):
        grid = choose(weight, FMT)
        codes = gptq(weight, x.t().double() @ x.double(), FMT, *grid)
        assert error(weight, codes, *grid, x) < 0.9 * error(weight, nearest(weight, *grid), *grid, x)
        assert bool(((codes >= 0) & (codes <= FMT.levels) & (codes == codes.round())).all())


def test_without_correlation_codes_are_the_nearest():
    weight, grid = random(16, 96), round_to_nearest(random(16, 96), FMT)
    diagonal = torch.rand(96, generator=torch.Generator().manual_seed(1)).double() + 0.1
    assert torch.equal(gptq(weight, diagonal.diag(), FMT, *grid), nearest(weight, *grid))


def test_two_correlated_inputs_get_the_best_second_code_given_the_first():
    weight = torch.zeros(1, 32)
    weight[0, :2] = torch.tensor([0.37, -0.9])
    scale, zero = torch.full((1, 1), 0.25), torch.full((1, 1), 4.0)
    h = torch.eye(32).double()
    h[0, 1] = h[1, 0] = 0.9
    codes = gptq(weight, h, FMT, scale, zero)

    def loss(first: float, second: float) -> float:
        d = weight[0, :2].double() - (torch.tensor([first, second]).double() - 4) * 0.25
        return float(d @ h[:2, :2] @ d)

    best = min(range(8), key=lambda second: loss(float(codes[0, 0]), second))
    assert float(codes[0, 1]) == best != round(-0.9 / 0.25) + 4
    assert loss(*map(float, codes[0, :2])) <= 1.5 * min(loss(a, b) for a, b in itertools.product(range(8), repeat=2))


def test_the_size_of_the_moments_does_not_matter():
    weight, x = random(8, 64), inputs(200, 64)
    grid, h = round_to_nearest(weight, FMT), x.t().double() @ x.double()
    assert torch.equal(gptq(weight, h, FMT, *grid), gptq(weight, h * 1024, FMT, *grid))


def test_inputs_that_never_appear_are_rounded():
    weight, x = random(8, 64), inputs(200, 64)
    x[:, 5] = 0
    grid = round_to_nearest(weight, FMT)
    codes = gptq(weight, x.t().double() @ x.double(), FMT, *grid)
    assert torch.equal(codes[:, 5], nearest(weight, *grid)[:, 5])


@pytest.mark.parametrize("wrong", [torch.eye(63), torch.full((64, 64), torch.nan), torch.eye(64) * torch.inf])
def test_unusable_moments_are_refused(wrong):
    with pytest.raises(InputError, match="second moments"):
        gptq(random(8, 64), wrong, FMT, *round_to_nearest(random(8, 64), FMT))
