"""The schema takes every plan that can be made, and nothing malformed or absurd."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcli.artifact.schema import SCHEMA, SCHEMA_VERSION, validate
from kvcli.errors import InputError
from kvcli.plan import BLOCK_SIZES, COMPUTE_DTYPES, TRANSFORMS, CachePlan, LayerPlan
from kvcli.quant.format import CODE_BITS, EXACT_BITS, KVFormat

SHA = "0" * 64


@st.composite
def formats(draw: st.DrawFn, *, head_dim: int, block_size: int) -> KVFormat:
    if draw(st.booleans()):
        return KVFormat.exact(draw(st.sampled_from(EXACT_BITS)))
    axis = draw(st.sampled_from(("token", "channel")))
    extent = head_dim if axis == "token" else block_size
    return KVFormat(
        bits=draw(st.sampled_from(CODE_BITS)),
        axis=axis,
        group=draw(st.sampled_from([n for n in range(1, extent + 1) if extent % n == 0])),
        symmetric=draw(st.booleans()),
        scale_dtype=draw(st.sampled_from(("float16", "e5m3"))),
    )


@st.composite
def layers(draw: st.DrawFn, *, block_size: int) -> LayerPlan:
    head_dim = draw(st.sampled_from((8, 64, 80, 128, 256)))
    window = draw(st.none() | st.integers(1, 10**6))
    return LayerPlan(
        num_kv_heads=draw(st.integers(1, 128)),
        head_dim=head_dim,
        k=draw(formats(head_dim=head_dim, block_size=block_size)),
        v=draw(formats(head_dim=head_dim, block_size=block_size)),
        kind="full" if window is None else "sliding",
        window=window,
        rope=draw(st.sampled_from(("before", "after"))),
        transform=draw(st.sampled_from(TRANSFORMS)),
        center=draw(st.booleans()),
    )


@st.composite
def plans(draw: st.DrawFn) -> CachePlan:
    block_size = draw(st.sampled_from(BLOCK_SIZES))
    return CachePlan(
        layers=tuple(draw(st.lists(layers(block_size=block_size), min_size=1, max_size=4))),
        block_size=block_size,
        sink_tokens=draw(st.integers(0, 10**6)),
        residual_window=draw(st.integers(0, 10**6)),
        dtype=draw(st.sampled_from(COMPUTE_DTYPES)),
    )


@pytest.fixture
def stored(pristine: Path) -> dict[str, Any]:
    """What a written kvcli.json holds."""
    return json.loads((pristine / "kvcli.json").read_text())


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=plans())
def test_any_plan_survives_the_disk(plan: CachePlan, stored: dict[str, Any], tmp_path: Path) -> None:
    assert CachePlan.from_json(plan.to_json()) == plan
    (tmp_path / "kvcli.json").write_text(json.dumps({**stored, "plan": plan.to_json()}))
    read = validate(json.loads((tmp_path / "kvcli.json").read_text()), "kvcli.json")
    assert CachePlan.from_json(read["plan"]) == plan


def test_the_schema_names_every_field_of_a_plan() -> None:
    plan = SCHEMA["properties"]["plan"]["properties"]
    layer = plan["layers"]["items"]["properties"]
    assert set(plan) == {field.name for field in fields(CachePlan)}
    assert set(layer) == {field.name for field in fields(LayerPlan)} | {"anchor"}  # which was a field once
    assert set(layer["k"]["properties"]) == {field.name for field in fields(KVFormat)}


def test_a_newer_schema_is_named(stored: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        validate({**stored, "schema_version": 4, "novelty": True}, "A/kvcli.json")
    assert str(caught.value) == "A/kvcli.json was written by a newer kvcli (schema 4; this one reads 3)."


@pytest.mark.parametrize("version", [0, -1, "1", 1.0, True, None])
def test_an_unknown_schema_is_refused(stored: dict[str, Any], version: object) -> None:
    with pytest.raises(InputError, match=r"^A/kvcli\.json: schema_version: "):
        validate({**stored, "schema_version": version}, "A/kvcli.json")


@pytest.mark.parametrize("obj", [None, [], "plan", 3, {}])
def test_what_is_no_manifest_is_refused(obj: object) -> None:
    with pytest.raises(InputError, match=r"^A/kvcli\.json: "):
        validate(obj, "A/kvcli.json")


def put(*keys: str | int, value: object) -> Callable[[dict[str, Any]], None]:
    def change(obj: Any) -> None:
        for key in keys[:-1]:
            obj = obj[key]
        obj[keys[-1]] = value

    return change


LAYER = ("plan", "layers", 0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (put(*LAYER, "head_dim", value="8"), "plan.layers[0].head_dim: '8' is not of type 'integer'."),
        (put(*LAYER, "head_dim", value=8.0), "plan.layers[0].head_dim: 8.0 is not of type 'integer'."),
        (put(*LAYER, "head_dim", value=True), "plan.layers[0].head_dim: True is not of type 'integer'."),
        (put(*LAYER, "head_dim", value=9999), "plan.layers[0].head_dim: 9999 is greater than the maximum of 4096."),
        (put(*LAYER, "num_kv_heads", value=0), "plan.layers[0].num_kv_heads: 0 is less than the minimum of 1."),
        (put(*LAYER, "kind", value="sparse"), "plan.layers[0].kind: 'sparse' is not one of ['full', 'sliding']."),
        (put(*LAYER, "k", "bits", value=None), "plan.layers[0].k.bits: None is not of type 'integer'."),
        (put("plan", "sink_tokens", value=10**7), "plan.sink_tokens: 10000000 is greater than the maximum of 1000000."),
        (put("plan", "residual_window", value=-1), "plan.residual_window: -1 is less than the minimum of 0."),
        (put("plan", "layers", value=[]), "plan.layers: [] should be non-empty."),
        (put("plan", "hook", value="x"), "plan: Additional properties are not allowed ('hook' was unexpected)."),
        (put("files", "a", value={"size": -1, "sha256": SHA}), "files.a.size: -1 is less than the minimum of 0."),
        (put("source", "sha256", value="xyz"), "source.sha256: 'xyz' does not match '^[0-9a-f]{64}$'."),
        (put("budget", "bits", value=0), "budget.bits: 0 is less than or equal to the minimum of 0."),
    ],
)
def test_each_violation_is_one_sentence(
    stored: dict[str, Any], change: Callable[[dict[str, Any]], None], sentence: str
) -> None:
    obj = copy.deepcopy(stored)
    change(obj)
    with pytest.raises(InputError) as caught:
        validate(obj, "A/kvcli.json")
    assert str(caught.value) == f"A/kvcli.json: {sentence}"


@pytest.mark.parametrize("key", sorted(SCHEMA["required"]))
def test_every_key_is_required(stored: dict[str, Any], key: str) -> None:
    del stored[key]
    with pytest.raises(InputError, match=f"'{key}' is a required property"):
        validate(stored, "A/kvcli.json")


def test_a_huge_value_does_not_flood_the_message(stored: dict[str, Any]) -> None:
    stored["plan"]["layers"] = stored["plan"]["layers"] * 3000
    with pytest.raises(InputError, match=r"plan\.layers: .* is too long") as caught:
        validate(stored, "A/kvcli.json")
    assert len(str(caught.value)) < 600


def test_the_current_version_is_the_one_written(stored: dict[str, Any]) -> None:
    assert stored["schema_version"] == SCHEMA_VERSION
