"""Search spaces: recipes hold what they say, and only what fits a model is searched."""

from __future__ import annotations

import json
import re
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from kvcli.calibration.adapting import AdapterSettings
from kvcli.calibration.learn_settings import LearnSettings
from kvcli.calibration.quantized_weights import WeightSettings
from kvcli.calibration.space import SearchSpace, Setting, load_recipe, recipe_names
from kvcli.errors import InputError
from kvcli.plan import LayerPlan
from kvcli.quant.format import KVFormat

EXACT = KVFormat.exact()
TOKEN = KVFormat(4, group=32)
CHANNEL = KVFormat(4, "channel", group=32)


def geometry(*dims: int) -> list[LayerPlan]:
    return [LayerPlan(2, dim, EXACT, EXACT) for dim in dims]


def space(*k: KVFormat, **fields: object) -> SearchSpace:
    return SearchSpace(k=k, v=(TOKEN,), **fields)  # type: ignore[arg-type]


@pytest.fixture
def recipe(tmp_path: Path):
    """Write a recipe and return its name."""

    def write(text: str | bytes) -> str:
        file = tmp_path / "mine.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(file)

    return write


def refusal(name: str) -> str:
    with pytest.raises(InputError) as error:
        load_recipe(name)
    message = str(error.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_the_default_recipe_ships():
    assert "balanced" in recipe_names()


@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_fits_every_common_head(name, dim):
    layers = geometry(dim)
    recipe = load_recipe(name)
    fitted = recipe.fitting(layers)
    for formats, listed in ((fitted.k, recipe.k), (fitted.v, recipe.v)):
        widths = {16} if name == "weights-only" else {2, 4, 8}
        assert {f.bits for f in formats} == {f.bits for f in listed} >= widths  # no width is lost to a head
    held = set()
    for setting in fitted.settings():
        for k in fitted.k:
            for v in fitted.v:
                if all(f.axis == "token" or setting.block_size % f.group == 0 for f in (k, v)):
                    plan = fitted.plan([fitted.layer(layers[0], k, v)], setting, "float16")
                    held |= {k, v}
                    assert plan.bytes_at(2048) > 0
    assert held == {*fitted.k, *fitted.v}


def test_recipes_for_one_method_leave_out_the_others():
    settings = (LearnSettings, AdapterSettings, WeightSettings)

    def parts(name: str) -> tuple[object, ...]:
        space = load_recipe(name)
        return (space.transform != "none", space.center, space.layerwise, *(x.of_recipe(name) for x in settings))

    balanced, smallest, everything = map(parts, ("balanced", "smallest", "everything"))
    nothing = AdapterSettings()
    assert smallest == (*balanced[:4], AdapterSettings("always"), None)
    assert everything == (*smallest[:5], WeightSettings())
    assert parts("search-only") == (False, False, True, None, nothing, None)
    assert parts("transforms-only") == (True, True, False, balanced[3], nothing, None)
    assert parts("predictors-only") == (False, False, False, None, smallest[4], None)
    assert parts("weights-only") == (False, False, True, None, nothing, WeightSettings("int4", "precalibrated"))
    assert load_recipe("everything") == load_recipe("smallest") == load_recipe("balanced")
    as_default = {"transform": "hadamard", "center": True, "layerwise": True}
    for name in ("search-only", "transforms-only", "predictors-only"):
        assert replace(load_recipe(name), **as_default) == load_recipe("balanced")


def test_the_page_lists_every_recipe_and_its_example_is_one(recipe):
    page = (Path(__file__).parents[2] / "docs/recipes.md").read_text("utf-8")
    listed = [name for line in page.splitlines() if line.startswith("| `") for name in re.findall("`([^`]+)`", line)]
    assert set(recipe_names()) <= set(listed)
    [example] = re.findall(r"## Sections\n\n((?:    .*\n)+)", page)
    name = recipe(textwrap.dedent(example))
    assert load_recipe(name) == replace(load_recipe("balanced"), residual_windows=(32,), layerwise=False)
    found = [x.of_recipe(name) for x in (LearnSettings, AdapterSettings, WeightSettings)]
    assert found[1:] == [AdapterSettings("always"), WeightSettings()]
    assert found[0] is not None
    assert not found[0].steps


def test_a_space_may_be_that_of_another_recipe_with_changes(recipe):
    balanced = load_recipe("balanced")
    assert load_recipe(recipe("search: balanced")) == load_recipe(recipe("search: {like: balanced}")) == balanced
    changed = load_recipe(recipe("search: {like: balanced, residual_windows: [8], layerwise: false}"))
    assert changed == replace(balanced, residual_windows=(8,), layerwise=False)
    said = "which is no recipe with a space"
    for other in ("nonsense", "smallest", "search-only"):  # the last two name another themselves
        assert said in refusal(recipe(f"search: {other}"))
        assert said in refusal(recipe(f"search: {{like: {other}}}"))
    itself = recipe("")
    assert said in refusal(recipe(f"search: {{like: {itself}}}"))


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_survives_json(name):
    found = load_recipe(name)
    again = SearchSpace.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    assert hash(again) == hash(found)


def test_lists_inside_a_format_are_multiplied_out_without_repeats(recipe):
    found = load_recipe(
        recipe("""
search:
  k:
    - {bits: [2, 4], axis: token, group: [64, 32]}
    - {bits: 4, group: 32}
    - {bits: 16}
  v: [{bits: 3}]
  sink_tokens: [4, 0]
""")
    )
    assert found.k == (KVFormat(2, group=64), KVFormat(2, group=32), KVFormat(4, group=64), TOKEN, KVFormat(16))
    assert found.v == (KVFormat(3),)
    assert found.sink_tokens == (4, 0)
    assert [s.sink_tokens for s in found.settings()] == [0, 4]


def test_a_name_that_is_no_recipe_is_left_to_the_plugins():
    assert load_recipe("kivi") is None
    assert load_recipe("../recipes/balanced") is None


def test_a_missing_file_is_named(tmp_path):
    missing = str(tmp_path / "none.yaml")
    assert refusal(missing) == f"recipe {missing} does not exist."


V = "  v: [{bits: 4}]\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("search:\n  k: [{bits: 4}]\n  nonsense: 1\n" + V, "no 'nonsense'"),
        ("search:\n  k: [{bits: 4, colour: red}]\n" + V, "not a storage format"),
        ("search:\n  k: [{bits: 5}]\n" + V, "5 bits"),
        ("search:\n  k: [{bits: 4, group: '32'}]\n" + V, "not a storage format"),
        ("search:\n  k: []\n" + V, "no candidate for k"),
        ("search:\n  k: [{bits: 4}]\n  sink_tokens: []\n" + V, "no candidate for sink_tokens"),
        ("search:\n" + V, "not a recipe"),
        ("search:\n  k: abc\n" + V, "not a recipe"),
        ("- 1\n", "not a recipe"),
        ("", "not a recipe"),
        ("search: [\n", "not a recipe"),
        ("\u0000", "not a recipe"),
    ],
)
def test_what_is_not_a_recipe_is_refused(recipe, text, said):
    assert said in refusal(recipe(text))


@pytest.mark.parametrize(
    "line",
    [
        "block_sizes: 16",
        "sink_tokens: [a]",
        "residual_windows: [1.5]",
        "center: maybe",
        "sink_tokens: [true]",
        "layerwise: 1",
    ],
)
def test_fields_of_the_wrong_type_are_refused_when_they_are_read(recipe, line):
    # not after the model has been measured
    assert line.partition(":")[0] in refusal(recipe(f"search:\n  {line}\n  k: [{{bits: 4}}]\n{V}"))


def test_a_recipe_that_is_not_utf8_is_refused(recipe):
    assert "not a recipe" in refusal(recipe(b"\xff\xfe\x80"))


# --- fitting a model --------------------------------------------------------------------------------------------------


def test_a_token_group_larger_than_a_head_becomes_the_head():
    fitted = space(KVFormat(4, group=64), TOKEN, KVFormat(4, group=16)).fitting(geometry(32))
    assert fitted.k == (TOKEN, KVFormat(4, group=16))  # the first two are now one


def test_the_smallest_head_decides():
    fitted = space(KVFormat(4, group=64)).fitting(geometry(64, 32, 128))
    assert fitted.k == (TOKEN,)


def test_a_token_group_that_does_not_divide_a_head_is_never_kept():
    for dim in (80, 96, 48):
        for fmt in space(KVFormat(4, group=64), KVFormat(4, group=16)).fitting(geometry(dim)).k:
            assert dim % fmt.group == 0


@pytest.mark.parametrize(
    ("blocks", "kept"), [((32,), True), ((64, 128), True), ((16,), False), ((16, 32), True), ((16, 64), True)]
)
def test_a_channel_group_is_kept_if_some_page_holds_it(blocks, kept):
    fitted = space(TOKEN, CHANNEL, block_sizes=blocks).fitting(geometry(32))
    assert (CHANNEL in fitted.k) == kept
    assert TOKEN in fitted.k


def test_a_page_size_that_no_format_fits_is_left_out():
    assert space(CHANNEL, block_sizes=(16, 32)).fitting(geometry(32)).block_sizes == (32,)


def test_exact_formats_fit_everything():
    assert space(EXACT, TOKEN).fitting(geometry(32)).k == (EXACT, TOKEN)


def test_nothing_left_is_an_error_that_names_the_heads():
    with pytest.raises(InputError, match=r"heads of \[20\] channels"):
        space(KVFormat(3, "channel", group=16)).fitting(geometry(20))  # 60 bits a head are no whole bytes


def test_everything_else_is_kept_by_fitting():
    before = space(TOKEN, sink_tokens=(0, 2), residual_windows=(5,), rope="before", transform="hadamard", center=True)
    after = before.fitting(geometry(32))
    assert after == before


# --- making plans -----------------------------------------------------------------------------------------------------


def test_settings_are_all_combinations_cheapest_first():
    found = list(space(TOKEN, block_sizes=(32, 16), sink_tokens=(4, 0), residual_windows=(8, 0)).settings())
    assert found[0] == Setting(block_size=16, sink_tokens=0, residual_window=0)
    assert len(set(found)) == len(found) == 8
    assert found == sorted(found, key=lambda s: (s.block_size, s.sink_tokens, s.residual_window))


def test_a_layer_keeps_its_geometry_and_takes_the_treatment():
    sliding = LayerPlan(3, 32, EXACT, EXACT, kind="sliding", window=24)
    treated = space(TOKEN, rope="before", transform="hadamard", center=True)
    layer = treated.layer(sliding, TOKEN, EXACT)
    assert layer == LayerPlan(
        3, 32, TOKEN, EXACT, kind="sliding", window=24, rope="before", transform="hadamard", center=True
    )
    plan = treated.plan([layer, layer], Setting(32, 4, 16), "bfloat16")
    assert (plan.block_size, plan.sink_tokens, plan.residual_window, plan.dtype) == (32, 4, 16, "bfloat16")
    assert plan.layers == (layer, layer)
