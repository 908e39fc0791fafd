"""Plans for residuals, found without measuring anything anew."""

from __future__ import annotations

import pytest
import torch

from kvcli.calibration import adapting, aqua_kv, corpora, pipeline
from kvcli.calibration.adapting import AdapterSettings, on_residuals
from kvcli.calibration.pipeline import Budget
from kvcli.calibration.sensitivity import Sensitivity
from kvcli.calibration.surrogate import solve
from kvcli.errors import BudgetError
from kvcli.models.loading import load
from kvcli.plan import CachePlan
from kvcli.runtime.packed_cache import ATTENTION


@pytest.fixture(scope="module")
def known(tinystories):
    """Losses of an invented kind, on a real model's moments."""
    loaded = load(str(tinystories))
    loaded.model.set_attn_implementation(ATTENTION)
    geometry = pipeline.exact_layers(loaded)
    space = pipeline.search_space("balanced", geometry)
    table = [[4.0 ** -min(f.bits, 8) for f in space.k] for _ in geometry]
    costs = Sensitivity(
        space, geometry, loaded.dtype, {"k": table, "v": table}, {"k": table, "v": table}, {},
        dict.fromkeys(space.settings(), 1.0),
    )  # fmt: skip
    layers = [space.layer(x, space.k[0], space.v[0]) for x in geometry]
    widest = AdapterSettings("always").applied(CachePlan(tuple(layers), dtype=loaded.dtype))
    ids = corpora.tokens("builtin", loaded, num_tokens=2048, seed=0, length=256).ids
    return costs, aqua_kv.statistics(loaded, widest, ids)


def test_a_loss_is_multiplied_by_what_is_left(known):
    costs, _ = known
    found = on_residuals(costs, {"1.v": 0.25})
    assert found.kl["v"][1] == [x / 4 for x in costs.kl["v"][1]]
    assert (found.kl["k"], found.kl["v"][0]) == (costs.kl["k"], costs.kl["v"][0])
    assert found.error == costs.error


@pytest.mark.parametrize("mode", ["absorbed", "always"])
def test_what_is_told_well_gets_fewer_bits(known, mode):
    costs, own = known
    budget, settings = Budget(4.0, 512), AdapterSettings(mode)
    best, *others = adapting.search(costs, own, settings, budget)
    for x in (best, *others):
        assert x.plan.effective_bits(512) <= 4
        assert all(torch.isfinite(t.float()).all() for t in x.fitted.tensors.values())
        assert x.plan.layers[1].predictor is not None
    plain = solve(costs, 4.0, 512)[0]
    assert best.predicted_kl < plain.predicted_kl
    # all losses were equal, so whatever differs between tensors comes from what is left of them
    told = {w: [x.k.bits if w == "k" else x.v.bits for x in best.plan.layers] for w in "kv"}
    left = {w: [best.fitted.left.get(f"{i}.{w}", 1.0) for i in range(len(best.plan.layers))] for w in "kv"}
    every = [(b, s) for w in "kv" for b, s in zip(told[w], left[w], strict=True)]
    assert all(a[0] >= b[0] for a in every for b in every if a[1] > 4.1 * b[1])


def test_a_budget_that_cannot_be_met_is_refused(known):
    costs, own = known
    with pytest.raises(BudgetError, match="the least reachable"):
        adapting.search(costs, own, AdapterSettings("always"), Budget(1.0, 512))
