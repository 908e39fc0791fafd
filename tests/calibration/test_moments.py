"""Sums over tokens, and what is solved from them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvcli.calibration.moments import RIDGES, Moments, ridge_regression
from kvcli.errors import InputError

NAMES = ["0.k", "0.v", "1.k"]
PAIRS = [(a, b) for i, a in enumerate(NAMES) for b in NAMES[i:]]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def text(tokens: int, seed: int, noise: float = 0.1) -> dict[str, Tensor]:
    """Return tensors with means, the last a linear function of the others and some noise."""
    x = random(tokens, 12, seed=seed) @ random(12, 12, seed=99) + 3
    y = x @ random(12, 5, seed=98) - 2 + noise * random(tokens, 5, seed=seed + 1000)
    return {"0.k": x[:, :8], "0.v": x[:, 8:], "1.k": y}


def moments(*texts: dict[str, Tensor]) -> Moments:
    found = Moments()
    for x in texts:
        found.add(x, PAIRS)
    return found


@given(st.lists(st.integers(1, 30), min_size=2, max_size=5))
def test_streamed_moments_are_those_of_the_whole_text(sizes: list[int]) -> None:
    parts = [text(n, i) for i, n in enumerate(sizes)]
    whole = {name: torch.cat([x[name] for x in parts]) for name in NAMES}
    for found in (moments(*parts), sum((moments(x) for x in parts), Moments())):
        assert found.count == sum(sizes)
        z = torch.cat([whole[n] for n in ("1.k", "0.k")], 1)
        z = z - z.mean(0)
        expected = z.t() @ z / len(z)
        assert torch.allclose(found.covariance(["1.k", "0.k"], ["1.k", "0.k"]), expected, atol=1e-9)
        assert torch.allclose(found.mean(["0.v", "1.k"]), torch.cat((whole["0.v"], whole["1.k"]), 1).mean(0))


def test_moments_survive_the_disk_in_float32() -> None:
    found = moments(text(200, 0))
    again = Moments.from_tensors(found.to_tensors())
    assert again.count == 200
    assert torch.allclose(again.covariance(NAMES, NAMES), found.covariance(NAMES, NAMES), rtol=1e-5, atol=1e-5)
    assert torch.allclose(again.mean(NAMES), found.mean(NAMES), rtol=1e-6)


@pytest.mark.parametrize("name", ["count", "mean 0.k"])
def test_moments_that_do_not_fit_together_are_refused(name: str) -> None:
    tensors = moments(text(20, 0)).to_tensors()
    del tensors[name]
    with pytest.raises(InputError, match="do not fit together"):
        Moments.from_tensors(tensors)


def test_a_linear_function_is_found() -> None:
    found = ridge_regression(moments(text(500, 0, 0)), moments(text(100, 1, 0)), ["0.k", "0.v"], "1.k")
    x = text(50, 2, 0)
    assert torch.allclose(torch.cat((x["0.k"], x["0.v"]), 1) @ found.weight.t() + found.bias, x["1.k"], atol=0.05)
    assert found.left < 1e-4


def left_on(found: tuple[Tensor, Tensor], x: dict[str, Tensor], noise: float = 0.0) -> float:
    inputs = torch.cat((x["0.k"], x["0.v"]), 1)
    wrong = (inputs + noise * random(*inputs.shape, seed=5)) @ found[0].t() + found[1] - x["1.k"]
    return float(wrong.square().sum() / (x["1.k"] - x["1.k"].mean(0)).square().sum())


def test_a_ridge_is_chosen_where_text_is_scarce_and_noisy() -> None:
    train, held, judge = moments(text(16, 0, 8.0)), moments(text(16, 1, 8.0)), text(4000, 2, 0.0)
    chosen = ridge_regression(train, held, ["0.k", "0.v"], "1.k")
    least = ridge_regression(train, held, ["0.k", "0.v"], "1.k", ridge=1e-5)
    assert chosen.ridge > 1e-4
    assert left_on((chosen.weight, chosen.bias), judge) < left_on((least.weight, least.bias), judge)


@pytest.mark.parametrize("noise", [0.01, 0.5, 2.0, 8.0, 40.0])
@pytest.mark.parametrize("tokens", [14, 30, 300])
def test_the_ridge_is_the_best_of_all_on_held_out_text(tokens: int, noise: float) -> None:
    train, held = text(tokens, 0, noise), text(tokens, 1, noise)
    chosen = ridge_regression(moments(train), moments(held), ["0.k", "0.v"], "1.k")
    x = torch.cat((train["0.k"], train["0.v"]), 1)
    mean, target = x.mean(0), train["1.k"].mean(0)
    covariance = (x - mean).t() @ (x - mean) / tokens
    found = {}
    for ridge in RIDGES:
        shrunk = covariance + ridge * covariance.diagonal().mean() * torch.eye(12, dtype=torch.float64)
        weight = torch.linalg.solve(shrunk, (x - mean).t() @ (train["1.k"] - target) / tokens).t()
        found[ridge] = left_on((weight, target - weight @ mean), held)
    assert chosen.ridge == min(found, key=found.__getitem__)
    assert chosen.left == pytest.approx(found[chosen.ridge])


def test_noise_is_reckoned_with() -> None:
    train, held, judge = moments(text(2000, 0)), moments(text(500, 1)), text(4000, 2)
    variances = torch.full((12,), 1.0, dtype=torch.float64)
    aware = ridge_regression(train, held, ["0.k", "0.v"], "1.k", variances)
    blind = ridge_regression(train, held, ["0.k", "0.v"], "1.k")
    seen = left_on((aware.weight, aware.bias), judge, noise=1.0)
    assert seen < 0.9 * left_on((blind.weight, blind.bias), judge, noise=1.0)
    assert aware.left == pytest.approx(seen, rel=0.2)  # what is foretold for noisy inputs is what comes


@pytest.mark.parametrize("tokens", [40, 80, 160, 320, 640])
def test_more_text_does_not_hurt(tokens: int) -> None:
    judge = text(4000, 2)

    def left(n: int) -> float:
        found = ridge_regression(moments(text(n - n // 8, 0, 2.0)), moments(text(n // 8, 1, 2.0)), NAMES[:2], "1.k")
        return left_on((found.weight, found.bias), judge)

    assert left(2 * tokens) < 1.05 * left(tokens)
