"""A model that accelerate spreads over memory and disk computes, is checked and is saved as the plain one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvcli.calibration.capture import device_of, embed, layer_inputs, plain_cache, run_layers
from kvcli.calibration.pipeline import exact_layers, moments
from kvcli.calibration.sensitivity import Probe, measure_layer, measure_plan
from kvcli.calibration.space import SearchSpace
from kvcli.errors import InputError
from kvcli.models.loading import LoadedModel, load, state_dict_for_saving
from kvcli.plan import CachePlan
from kvcli.quant.format import KVFormat
from kvcli.runtime.packed_cache import ATTENTION

ON_DISK = {
    "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
    "model.norm": "cpu", "lm_head": "cpu",
}  # fmt: skip
ALL_ON_DISK = {**dict.fromkeys(ON_DISK, "disk"), "model.rotary_emb": "cpu"}
MAPS: dict[str, Any] = {"auto": "auto", "part of it on disk": ON_DISK, "all on disk": ALL_ON_DISK}


@pytest.fixture(scope="module")
def plain(tinystories: Path) -> LoadedModel:
    return ready(load(str(tinystories)))


@pytest.fixture(scope="module", params=MAPS)
def mapped(request: pytest.FixtureRequest, tinystories: Path) -> LoadedModel:
    return ready(load(str(tinystories), device_map=MAPS[request.param]))


def ready(loaded: LoadedModel) -> LoadedModel:
    loaded.model.set_attn_implementation(ATTENTION)
    return loaded


def plan_of(loaded: LoadedModel) -> CachePlan:
    return CachePlan(tuple(exact_layers(loaded)), dtype=loaded.dtype)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.arange(64)[None] * 7 % 2048


def seen(loaded: LoadedModel, ids: torch.Tensor) -> Iterator[torch.Tensor]:
    for _, hidden, attention in layer_inputs(loaded.model, plan_of(loaded), ids):
        yield from (hidden, attention.query, attention.key, attention.value)


def test_its_layers_compute_the_same(plain, mapped, ids):
    ours, theirs = list(seen(mapped, ids)), list(seen(plain, ids))
    assert len(ours) == 8
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, theirs, strict=True))


def test_layers_run_from_any_of_them_on(plain, mapped, ids):
    plan = plan_of(plain)
    hidden = list(layer_inputs(plain.model, plan, ids))[1][1]
    expected = run_layers(plain.model, embed(plain.model, ids), plain_cache(plan), 0)
    for start, x in ((0, embed(mapped.model, ids)), (1, hidden)):
        assert torch.equal(run_layers(mapped.model, x, plain_cache(plan), start).cpu(), expected)


def test_what_calibration_measures_is_the_same(plain, mapped, ids):
    fmt = tuple(KVFormat(bits, group=16, symmetric=False) for bits in (2, 4))
    space = SearchSpace(fmt, fmt, center=True)
    geometry = exact_layers(plain)
    means = moments(plain, plan_of(plain), ids, lambda: None)
    again = moments(mapped, plan_of(plain), ids, lambda: None)
    assert {name: x.tolist() for name, x in again.items()} == {name: x.tolist() for name, x in means.items()}
    plan = CachePlan(tuple(space.layer(x, *fmt) for x in geometry), dtype=plain.dtype).to_json()
    found = []
    for loaded in (plain, mapped):
        probe = Probe(loaded.model, ids, loaded.rope, means)
        layers = [measure_layer(probe, space, geometry, loaded.dtype, i) for i in range(2)]
        found.append((layers, measure_plan(probe, plan)))
    assert found[0] == found[1]
    assert found[0][1]["kl"] > 0


def test_it_is_the_same_model_and_is_saved_as_such(plain, mapped):
    assert (mapped.dtype, mapped.sha256, mapped.geometry) == (plain.dtype, plain.sha256, plain.geometry)
    ours, theirs = dict(state_dict_for_saving(mapped)), dict(state_dict_for_saving(plain))
    assert list(ours) == list(theirs)
    assert all(torch.equal(x.cpu(), theirs[name]) for name, x in ours.items())


def test_a_layer_on_disk_takes_no_memory_and_says_where_it_computes(tinystories):
    model = load(str(tinystories), device_map=ON_DISK).model
    assert all(x.is_meta for x in model.model.layers[1].parameters())
    assert device_of(model.model.layers[1]) == torch.device("cpu")
    assert device_of(model.model.layers[0]) == torch.device("cpu")


def test_what_is_on_disk_is_checked_too(tinystories, tmp_path):
    for file in tinystories.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"^Tensor model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        load(str(tmp_path), device_map=ON_DISK)
