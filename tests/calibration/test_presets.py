"""KVTuner's presets: the published digits, its YAML read strictly and written back, and a plan for any model."""

from __future__ import annotations

from contextlib import suppress
from importlib import resources
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kvcli.calibration import presets
from kvcli.calibration.presets import Preset
from kvcli.errors import InputError
from kvcli.plan import LayerPlan
from kvcli.quant.format import KVFormat

EXACT = KVFormat.exact()
PAIRS = st.tuples(st.sampled_from(presets.WIDTHS), st.sampled_from(presets.WIDTHS))
PUBLISHED = {  # layers, KV heads, nominal bits, the real ones of a long sequence
    "llama-3.1-8b-instruct-kivi-3.25": (32, 8, 3.25, 4.25),
    "llama-3.1-8b-instruct-token-3.59": (32, 8, 3.59375, 3.84375),
    "qwen2.5-7b-instruct-token-4.0": (28, 4, 4.0, 4.25),
    "qwen2.5-7b-instruct-token-5.0": (28, 4, 5.0, 5.25),
}


def layers(count: int, heads: int = 4, head_dim: int = 128) -> list[LayerPlan]:
    return [LayerPlan(heads, head_dim, EXACT, EXACT)] * count


# --- what ships -------------------------------------------------------------------------------------------------------


def test_the_four_published_presets_ship():
    assert presets.names() == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_its_published_bits_and_costs_more(name):
    count, heads, nominal, real = PUBLISHED[name]
    plan = presets.load(f"kvtuner:{name}").plan(layers(count, heads), "bfloat16")
    assert plan.nominal_bits == nominal
    assert round(plan.nominal_bits, 2) == float(name.rsplit("-", 1)[1])
    # scales and zero points: 1 bit a value in groups of 32, 0.25 in groups of a head; the window adds to it
    assert real < plan.effective_bits(8192) < real + 0.2
    assert plan.effective_bits(2**22) == pytest.approx(real, abs=1e-3)


def test_a_shipped_preset_has_the_mode_of_its_name():
    kivi = presets.load("kvtuner:llama-3.1-8b-instruct-kivi-3.25").plan(layers(32), "bfloat16")
    assert kivi.layers[0].k == KVFormat(2, axis="channel", group=32, symmetric=False)
    assert kivi.layers[13].k == KVFormat(8, axis="channel", group=32, symmetric=False)
    assert kivi.layers[13].v == KVFormat(4, axis="token", group=32, symmetric=False)
    assert (kivi.block_size, kivi.sink_tokens, kivi.residual_window) == (32, 0, 32)
    token = presets.load("kvtuner:llama-3.1-8b-instruct-token-3.59").plan(layers(32), "bfloat16")
    assert token.layers[0].k == KVFormat(4, axis="token", group=128, symmetric=False)
    assert token.layers[0].v == KVFormat(8, axis="token", group=128, symmetric=False)
    assert all(token.is_portable(i) for i in range(32))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shipped_file_is_what_would_be_written(name):
    text = (resources.files("kvcli_calib") / "presets" / "kvtuner" / f"{name}.yaml").read_text("utf-8")
    first, rest = text.split("\n", 1)
    assert first.startswith("# ")
    assert rest == presets.dump(presets.load(f"kvtuner:{name}").bits)


# --- their file -------------------------------------------------------------------------------------------------------


@given(st.lists(PAIRS, min_size=1, max_size=80))
def test_what_is_written_is_read_back(bits):
    text = presets.dump(bits)
    assert presets.parse(text, "x") == tuple(bits)
    assert yaml.safe_load(text)[len(bits) - 1] == {"nbits_key": bits[-1][0], "nbits_value": bits[-1][1]}


def test_the_order_of_layers_in_the_file_is_free():
    assert presets.parse("1: {nbits_value: 2, nbits_key: 4}\n0: {nbits_key: 8, nbits_value: 8}\n", "x") == (
        (8, 8), (4, 2),
    )  # fmt: skip


WRONG = {
    "a layer left out": (
        "0: {nbits_key: 4, nbits_value: 4}\n2: {nbits_key: 4, nbits_value: 4}\n",
        "leaves out layer 1",
    ),
    "a layer far off": ("99999999999: {nbits_key: 4, nbits_value: 4}\n", "leaves out layer 0"),
    "a layer twice": ("0: {nbits_key: 4, nbits_value: 4}\n" * 2, "a key stands twice in line 1"),
    "a key twice": ("0: {nbits_key: 4, nbits_key: 2, nbits_value: 4}\n", "a key stands twice"),
    "3 bits": ("0: {nbits_key: 3, nbits_value: 4}\n", r"layer 0 has nbits_key '3', which is not one of"),
    "bits as text": ("0: {nbits_key: 4, nbits_value: 'four'}\n", r"layer 0 has nbits_value 'four'"),
    "bits that are true": ("0: {nbits_key: 4, nbits_value: true}\n", r"layer 0 has nbits_value 'True'"),
    "no value bits": ("0: {nbits_key: 4}\n", "layer 0 does not hold exactly nbits_key and nbits_value"),
    "more than bits": ("0: {nbits_key: 4, nbits_value: 4, group: 3}\n", "layer 0 does not hold exactly"),
    "a list": ("- {nbits_key: 4, nbits_value: 4}\n", "does not map layers to their bits"),
    "a recipe": ("search:\n  k: []\n", "'search' is not a layer's number"),
    "a negative layer": ("-1: {nbits_key: 4, nbits_value: 4}\n", "'-1' is not a layer's number"),
    "nothing": ("", "does not map layers to their bits"),
    "no YAML": ("0: {nbits_key: [", "is not valid YAML: .* in line"),
    "a tag": ("!!python/object/apply:os.getcwd []\n", "is not valid YAML"),
    "an unhashable key": ("? {a: b}\n: c\n", "is not valid YAML"),
    "bytes that are no text": (b"\xff\xfe\x00", "is not valid YAML"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused_in_one_sentence(case, tmp_path):
    data, message = WRONG[case]
    file = tmp_path / "mine.yaml"
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(InputError, match=message) as error:
        presets.load(f"kvtuner:{file}")
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text):
    with suppress(InputError):
        assert presets.parse(text, "x")


# --- naming one -------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(presets.dump([(4, 2), (8, 16)]))
    return path


def test_a_file_serves_in_either_mode(file):
    assert presets.load(f"kvtuner:{file}") == presets.load(f"kvtuner:{file}:kivi")
    assert presets.load(f"kvtuner:{file}") == Preset("mine.yaml", "kivi", ((4, 2), (8, 16)))
    token = presets.load(f"kvtuner:{file}:token")
    assert token.mode == "token"
    assert token.sha256 != presets.load(f"kvtuner:{file}").sha256
    assert token.plan(layers(2), "float32").layers[1].v.is_exact


def test_a_shipped_preset_can_be_read_in_the_other_mode():
    assert presets.load("kvtuner:qwen2.5-7b-instruct-token-4.0:kivi").mode == "kivi"


@pytest.mark.parametrize(("recipe", "message"), [
    ("kvtuner:nonsense", r"no preset 'nonsense'; there are llama-3.1-8b-instruct-kivi-3.25, .*FILE\.yaml"),
    ("kvtuner:", "no preset ''"),
    ("kvtuner:no/such.yaml", "preset no/such.yaml cannot be read: No such file or directory"),
])  # fmt: skip
def test_an_unknown_preset_is_answered_with_those_there_are(recipe, message):
    assert presets.is_preset(recipe)
    with pytest.raises(InputError, match=message):
        presets.load(recipe)


# --- a plan -----------------------------------------------------------------------------------------------------------


def test_a_model_with_another_number_of_layers_is_refused():
    preset = presets.load("kvtuner:qwen2.5-7b-instruct-token-4.0")
    with pytest.raises(InputError, match=r"^preset qwen2.5-7b-instruct-token-4.0 is for 28 layers, .* model has 32\.$"):
        preset.plan(layers(32), "bfloat16")


@given(
    st.lists(PAIRS, min_size=1, max_size=6), st.sampled_from(presets.MODES), st.sampled_from([8, 16, 48, 64, 80, 256])
)
def test_a_preset_fits_any_head_and_keeps_the_geometry(bits, mode, head_dim):
    geometry = [LayerPlan(3, head_dim, EXACT, EXACT, kind="sliding", window=100 + i) for i in range(len(bits))]
    plan = Preset("x", mode, tuple(bits)).plan(geometry, "float16")
    assert [(x.k.bits, x.v.bits) for x in plan.layers] == bits
    assert [(x.num_kv_heads, x.head_dim, x.window) for x in plan.layers] == [
        (x.num_kv_heads, x.head_dim, x.window) for x in geometry
    ]
    assert plan.nominal_bits == sum(k + v for k, v in bits) / (2 * len(bits))
