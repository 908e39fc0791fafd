"""What a predictor reads, and what it refuses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcli.errors import InputError
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.quant.prediction import Linear, Predictor, Source

FOUR, EXACT = KVFormat(4, group=16), KVFormat.exact()
sources = st.builds(Source, st.integers(0, 99), st.sampled_from(("k", "v")))
linears = st.builds(
    Linear,
    st.lists(sources, min_size=1, max_size=4, unique=True).map(tuple),
    bits=st.sampled_from((4, 8, 16)),
    rank=st.none() | st.integers(1, 64),
)


def layer(predictor: Predictor | None = None, **fields: object) -> LayerPlan:
    return LayerPlan(2, 16, **{"k": FOUR, "v": FOUR, "predictor": predictor, **fields})  # type: ignore[arg-type]


@given(st.builds(Predictor, st.none() | linears, st.none() | linears))
def test_a_predictor_survives_json(predictor: Predictor) -> None:
    assert Predictor.from_json(predictor.to_json()) == predictor


def test_a_plan_survives_json_with_and_without_the_old_anchor() -> None:
    plan = CachePlan((layer(), layer(Predictor(Linear((Source(0, "k"),)), Linear((Source(1, "k"), Source(0, "v")))))))
    obj = plan.to_json()
    assert CachePlan.from_json(obj) == plan
    obj["layers"][0]["anchor"] = None
    assert CachePlan.from_json(obj) == plan


@pytest.mark.parametrize("text", ["", "3", "k.3", "3.q", "-1.k", "3.k.v", "³.k", 3, None])
def test_what_names_no_tensor_is_refused(text: object) -> None:
    with pytest.raises(InputError, match="names no tensor"):
        Source.parse(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inputs": ()}, "at least one tensor"),
        ({"inputs": (Source(0, "k"), Source(0, "k"))}, "each once"),
        ({"inputs": (Source(0, "k"),), "bits": 5}, "not 5"),
        ({"inputs": (Source(0, "k"),), "rank": 0}, "rank 0"),
    ],
)
def test_malformed_predictors_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Linear(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "predictor",
    [
        Predictor(k=Linear((Source(1, "k"),))),  # itself
        Predictor(k=Linear((Source(1, "v"),))),  # values come after keys
        Predictor(v=Linear((Source(1, "v"),))),
        Predictor(v=Linear((Source(2, "k"),))),
    ],
)
def test_what_is_rebuilt_later_predicts_nothing(predictor: Predictor) -> None:
    with pytest.raises(InputError, match=r"^1\.[kv] cannot be predicted from"):
        CachePlan((layer(), layer(predictor), layer()))


def test_layers_of_different_kinds_are_not_mixed() -> None:
    last = layer(Predictor(k=Linear((Source(0, "k"),))), kind="sliding", window=8)
    with pytest.raises(InputError, match="another kind or window"):
        CachePlan((layer(), last))
    with pytest.raises(InputError, match="another kind or window"):
        CachePlan((layer(kind="sliding", window=9), last))
    CachePlan((layer(kind="sliding", window=8), last))


def test_an_exact_tensor_is_not_predicted() -> None:
    with pytest.raises(InputError, match=r"^v is stored in 16 bits, and predicted"):
        layer(Predictor(v=Linear((Source(0, "k"),))), v=EXACT)


def test_what_a_layer_is_predicted_from_is_packed_as_early() -> None:
    wide = KVFormat(4, axis="channel", group=16)
    with pytest.raises(InputError, match="packs tokens before"):
        CachePlan((layer(k=wide, v=wide), layer(Predictor(k=Linear((Source(0, "k"),))))))
    CachePlan((layer(k=EXACT, v=EXACT), layer(Predictor(k=Linear((Source(0, "k"),))))), residual_window=8)


def test_model_bytes_count_what_is_stored() -> None:
    both = Predictor(Linear((Source(0, "k"),)), Linear((Source(1, "k"), Source(0, "v"))))
    plain = CachePlan((layer(center=True), layer(center=True)))
    plan = CachePlan((layer(center=True), layer(both, center=True)))
    assert plain.model_bytes() == 2 * 2 * 32 * 4
    # two biases in float32, and 32 x 32 and 32 x 64 weights in float16
    assert plan.model_bytes() == plain.model_bytes() + 2 * 32 * 4 + 2 * (32 * 32 + 32 * 64)
    assert plan.bytes_at(100) == plain.bytes_at(100)
    low = Predictor(v=Linear((Source(1, "k"),), bits=4, rank=8))
    small = CachePlan((layer(), layer(low))).model_tensors()
    assert small == {
        "layer.1.v.predictor.bias": ("F32", (32,)),
        "layer.1.v.predictor.left": ("U8", (32, 16)),  # 8 columns padded to a group of 32, in 4 bits
        "layer.1.v.predictor.left.scales": ("F16", (32, 1)),
        "layer.1.v.predictor.right": ("U8", (8, 16)),
        "layer.1.v.predictor.right.scales": ("F16", (8, 1)),
    }


def test_only_values_from_their_own_keys_are_absorbed() -> None:
    own = Linear((Source(1, "k"),))
    assert Predictor(v=own).is_absorbed(1)
    assert not Predictor(v=own).is_absorbed(2)
    assert not Predictor(k=Linear((Source(0, "k"),)), v=own).is_absorbed(1)
    assert not Predictor(v=Linear((Source(1, "k"), Source(0, "v")))).is_absorbed(1)
