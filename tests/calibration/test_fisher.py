"""Importance of keys and values, and the closed forms that follow from it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package
from transform_models import build

from kvcli.calibration import fisher
from kvcli.calibration.fisher import Importance, closed_form, gather, geometric_mean
from kvcli.calibration.ostquant import transforms
from kvcli.models.architectures import Rope, geometry
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.runtime.packed_cache import ATTENTION

HEADS, DIM, COUNT = 2, 8, 400


def rows(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Vectors and gradients of uneven spread, whose large ones lie off the origin: [1, h, n, d]."""
    generator = torch.Generator().manual_seed(seed)
    x, g = torch.randn(2, 1, HEADS, COUNT, DIM, generator=generator, dtype=torch.float64)
    mix = torch.randn(2, DIM, DIM, generator=generator, dtype=torch.float64)
    loud = torch.rand(1, HEADS, COUNT, 1, generator=generator, dtype=torch.float64) < 0.1
    return x @ mix[0] + 3.0 * loud, (g @ mix[1]) * (1 + 4.0 * loud)


def importance(x: Tensor, g: Tensor) -> Importance:
    found = Importance.empty(HEADS, DIM)
    for a, b in zip(x.split(150, -2), g.split(150, -2), strict=True):
        found.add(a, b)
    return found


def cost(x: Tensor, g: Tensor, mean: Tensor, back: Tensor) -> float:
    """C of the module's docstring, with A⁻¹ ``back`` [h, d, d]."""
    stored = (x[0] - mean[:, None]) @ torch.linalg.inv(back)
    return float((stored.square().sum(-1) * (g[0] @ back.mT).square().sum(-1)).sum())


def test_the_mean_that_costs_least_is_weighted() -> None:
    x, g = rows()
    found, eye = importance(x, g).mean, torch.eye(DIM, dtype=torch.float64).expand(HEADS, DIM, DIM)
    w = g.square().sum(-1, keepdim=True)
    torch.testing.assert_close(found, ((w * x).sum(-2) / w.sum(-2))[0])
    least = cost(x, g, found, eye)
    assert least < 0.9 * cost(x, g, x[0].mean(-2), eye)
    for i in range(DIM):
        assert cost(x, g, found + 0.05 * eye[0, i], eye) > least


def test_moments_are_about_the_weighted_mean() -> None:
    x, g = rows()
    s, m = importance(x, g).moments(0.5)
    w = g.square().sum(-1, keepdim=True)
    centred = x - importance(x, g).mean[:, None]
    for found, direct in (
        (s, (centred.mT @ (w * centred))[0]),
        (m, (g.mT @ (x.square().sum(-1, keepdim=True) * g))[0]),
    ):
        scaled = direct / direct.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        torch.testing.assert_close(found, scaled + 0.5 * torch.eye(DIM, dtype=torch.float64))


def test_the_geometric_mean_solves_its_equation_and_is_least() -> None:
    a, b = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    s, m = a @ a.mT + 0.1 * torch.eye(6), b @ b.mT + 0.1 * torch.eye(6)
    g = geometric_mean(s, m)
    torch.testing.assert_close(g @ s @ g, m)
    torch.testing.assert_close(g, g.mT)

    def product(x: Tensor) -> Tensor:
        trace = torch.einsum("bij,bji->b", s, x) * torch.einsum("bij,bji->b", m, torch.linalg.inv(x))
        return trace

    other = a.mT @ a
    for x in (torch.eye(6, dtype=torch.float64).expand_as(g), g + 0.05 * other):
        assert (product(g) < product(x)).all()


@pytest.mark.parametrize("names", [("r_ov", "s_ov"), ("s_ov",), ("s_qk",), ("r_ov",)])
def test_closed_forms_lower_the_cost_they_are_of(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fisher, "RIDGE", {"k": 1e-9, "v": 1e-9})
    model = build("llama")
    x, g = rows(3)
    own = importance(x, g)
    parameters = closed_form(model, [{"k": own, "v": own}] * 2, names)
    maps = transforms(model.config, parameters)
    which = "k" if names == ("s_qk",) else "v"
    back = torch.eye(DIM, dtype=torch.float64).expand(HEADS, DIM, DIM)
    before = cost(x, g, own.mean, back)
    for each in reversed(maps):
        back = each.inverse(0, which, back)
    after = cost(x, g, own.mean, back)
    # a rotation alone leaves white noise white
    assert after == pytest.approx(before) if names == ("r_ov",) else after < before


def plan_of(model, window: int) -> CachePlan:  # type: ignore[no-untyped-def]
    fmt = KVFormat(4, group=8)
    layers = [LayerPlan(x.num_kv_heads, x.head_dim, fmt, fmt, kind=x.kind, window=x.window)
              for x in geometry(model.config)]  # fmt: skip
    return CachePlan(tuple(layers), residual_window=window)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "llama-mqa-yarn", "mistral"])
def test_only_what_is_read_packed_matters(architecture: str) -> None:
    model = build(architecture, torch.float32)
    model.set_attn_implementation(ATTENTION)
    ids = torch.randint(1, 96, (2, 64), generator=torch.Generator().manual_seed(0))
    zeros = [{w: torch.zeros(x.num_kv_heads, x.head_dim) for w in ("k", "v")} for x in geometry(model.config)]
    rope = Rope.from_model(model)
    for window, packed in ((0, True), (64, False)):
        for own in gather(model, rope, plan_of(model, window), zeros, ids):
            for found in own.values():
                assert bool((found.weight > 0).all()) == packed
                assert found.spread.isfinite().all()
    names = ("r_ov", "s_qk", "s_ov", "s_ud")
    found = gather(model, rope, plan_of(model, 0), zeros, ids)
    assert list(closed_form(model, found, names)) == list(names)
    transforms(model.config, closed_form(model, found, names))  # their shapes are right
