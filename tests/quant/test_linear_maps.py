"""Predictors as tensors: what is stored gives the map back."""

from __future__ import annotations

import pytest
import torch

from kvcli.errors import InputError
from kvcli.quant.linear_maps import LinearMap, factored, restore, store
from kvcli.quant.prediction import Linear, Source

INPUTS = (Source(0, "k"),)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("bits", "error"), [(16, 2**-10), (8, 2**-6), (4, 0.2)])
@pytest.mark.parametrize("columns", [64, 50])
def test_a_stored_map_comes_back_within_its_bits(bits: int, error: float, columns: int) -> None:
    linear, weight, bias = Linear(INPUTS, bits=bits), random(24, columns), random(24, seed=1)
    kept = store(linear, {"weight": weight}, bias)
    spec = linear.stored(24, columns)
    dtypes = {"F32": torch.float32, "F16": torch.float16, "U8": torch.uint8}
    assert {k: (x.dtype, tuple(x.shape)) for k, x in kept.items()} == {k: (dtypes[d], s) for k, (d, s) in spec.items()}
    found = restore(linear, {f"a.{name}": x for name, x in kept.items()}, "a.", (24, columns))
    assert torch.equal(found.bias, bias.float())
    assert ((found.weight - weight).norm() / weight.norm()) < error


def test_the_factors_are_the_best_of_their_rank() -> None:
    weight, x = random(12, 20), random(400, 20, seed=1) * torch.linspace(0.1, 3, 20, dtype=torch.float64)
    moments = x.t() @ x
    left, right = factored(weight, 5, moments)
    assert (left.shape, right.shape) == ((12, 5), (5, 20))
    u, s, v = torch.linalg.svd(x @ weight.t(), full_matrices=False)  # Eckart and Young: the best there is
    best = s[5:].square().sum()
    lost = (x @ (weight - left @ right).t()).square().sum()
    assert lost == pytest.approx(float(best))
    assert u.shape[1] == v.shape[0]
    whole = factored(weight, 12, moments)
    assert torch.allclose(whole[0] @ whole[1], weight)


def test_a_prediction_does_not_depend_on_how_many_there_are() -> None:
    mapped = LinearMap(random(96, 192).float(), random(96, seed=1).float())
    x = random(300, 192, seed=2).float()
    whole = mapped(x)
    assert whole.dtype == torch.float32
    for size in (1, 7, 64):
        assert torch.equal(torch.cat([mapped(part) for part in x.split(size)]), whole)


@pytest.mark.parametrize("linear", [Linear(INPUTS), Linear(INPUTS, bits=8), Linear(INPUTS, bits=4, rank=4)])
def test_what_is_missing_or_of_another_shape_is_named(linear: Linear) -> None:
    parts = {name: random(*shape) for name, shape in linear.factors(16, 32).items()}
    kept = {f"p.{name}": x for name, x in store(linear, parts, random(16)).items()}
    for name in kept:
        with pytest.raises(InputError, match=f"tensor {name} is missing"):
            restore(linear, {k: x for k, x in kept.items() if k != name}, "p.", (16, 32))
        with pytest.raises(InputError, match=rf"tensor {name} is \[.*\], and the plan needs"):
            restore(linear, {**kept, name: kept[name][1:]}, "p.", (16, 32))
