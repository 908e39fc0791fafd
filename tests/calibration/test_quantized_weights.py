"""Storing a model's layers in few bits: what becomes of them, in which order, and what an interrupted run keeps."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcli.calibration.corpora import Corpus
from kvcli.calibration.quantized_weights import (
    LayerQuantizer,
    WeightSettings,
    check,
    common_group,
    quantize,
    stored_with,
)
from kvcli.errors import InputError, UsageError
from kvcli.models.loading import LoadedModel, load
from kvcli.quant.weight_format import WeightFormat

METHODS = ("rtn", "precalibrated", "gptq", "precalibrated+gptq")


@pytest.fixture
def loaded(tinystories: Path) -> LoadedModel:
    return load(str(tinystories), dtype="float32")


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    ids = torch.randint(3, 2000, (2, 96), generator=torch.Generator().manual_seed(0))
    return Corpus("random", "0" * 64, ids, "random")


@given(st.lists(st.integers(1, 400).map(lambda x: 8 * x), min_size=1, max_size=4))
def test_the_group_divides_all_inputs(widths):
    group = common_group(widths)
    assert group % 8 == 0
    assert group <= 128
    assert all(x % group == 0 for x in widths)


@pytest.mark.parametrize(
    ("widths", "group"), [((4096, 14336), 128), ((576, 1536), 64), ((96, 160), 32), ((72, 144), 72)]
)
def test_the_group_is_one_that_other_engines_know_if_it_can_be(widths, group):
    assert common_group(widths) == group


def test_inputs_without_a_common_group_are_refused():
    with pytest.raises(InputError, match="12, 64 inputs have no group size in common"):
        common_group([64, 12])


@pytest.mark.parametrize("bits", [3, 4])
def test_methods_improve_what_they_are_made_for(bits):
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 256, generator=g) * torch.rand(64, 256, generator=g).clamp(min=0.05).pow(-0.4)
    x = torch.randn(400, 256, generator=g) @ torch.randn(256, 256, generator=g)
    moments = (x.t() @ x).double()
    found = {m: stored_with(weight, WeightFormat(bits, 128), m, moments)[1] for m in METHODS}
    assert found["rtn"]["kl_after"] == found["rtn"]["kl_before"]
    assert found["precalibrated"]["kl_after"] < found["precalibrated"]["kl_before"]
    assert found["gptq"]["output_error"] < 0.8 * found["rtn"]["output_error"]
    assert found["precalibrated+gptq"]["output_error"] < 0.8 * found["precalibrated"]["output_error"]


def test_the_output_error_is_that_of_the_outputs():
    g = torch.Generator().manual_seed(1)
    weight, x = torch.randn(32, 64, generator=g), torch.randn(100, 64, generator=g).double()
    layer, found = stored_with(weight, WeightFormat(3, 64), "rtn", x.t() @ x)
    off = x @ (weight.double() - layer.dequantize().double()).t()
    assert found["output_error"] == pytest.approx(float(off.square().sum() / (x @ weight.double().t()).square().sum()))


def test_moments_are_of_the_inputs_that_the_stored_layers_before_give(loaded, corpus):
    work = LayerQuantizer(loaded, corpus.ids, {128: WeightFormat(3, 128), 384: WeightFormat(3, 128)}, "gptq")
    before = [x.clone() for x in work.hidden]
    work.quantize(0)
    found = work._moments(1, "mlp.down_proj")
    assert not any(torch.equal(a, b) for a, b in zip(before, work.hidden, strict=True))
    seen = []
    module: Any = loaded.model.get_submodule("model.layers.1.mlp.down_proj")
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1).double()))
    loaded.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        loaded.model(corpus.ids, use_cache=False)
    torch.testing.assert_close(found, seen[0].t() @ seen[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["int3", "int4", "int8", "nf4", "llm-int8"])
def test_the_model_becomes_what_is_stored(kind, loaded, corpus, tmp_path):
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    embedding = loaded.model.model.embed_tokens.weight.clone()
    before = {name: x.clone() for name, x in loaded.model.state_dict().items()}
    done, record, report = quantize(loaded, corpus, WeightSettings(kind, "precalibrated"), tmp_path / "out")
    assert done.quantized is not None
    assert len(done.quantized.layers) == len(report["layers"]) == 14
    for name, layer in done.quantized.layers.items():
        weight = done.model.state_dict()[f"{name}.weight"]
        assert torch.equal(weight, layer.dequantize())
        off = float((weight - before[f"{name}.weight"]).norm() / weight.norm())
        assert 0 < off < {"int3": 0.35, "int4": 0.15, "int8": 0.01, "nf4": 0.12, "llm-int8": 0.02}[kind]
    assert torch.equal(done.model.model.embed_tokens.weight, embedding)
    assert record["settings"]["kind"] == kind
    assert record["settings"]["model"] == done.source_sha256 != done.sha256
    assert report["bits_per_weight"] == done.quantized.bits
    with pytest.raises(InputError, match="quantised already"):
        check(done, WeightSettings())


def test_symmetric_weights_have_one_zero_point_and_say_so(loaded, corpus, tmp_path):
    with pytest.raises(UsageError, match="--weight-symmetric is for --weights int3, int4, int8, not nf4"):
        check(loaded, WeightSettings("nf4", symmetric=True))
    settings = WeightSettings("int4", "precalibrated", symmetric=True)
    done, _, report = quantize(loaded, corpus, settings, tmp_path / "out")
    assert done.quantized is not None
    assert done.quantized.config["sym"] is True
    for layer in done.quantized.layers.values():
        assert (layer.tensors["qzeros"] == 0x77777777).all()  # less one
    assert all(x["kl_after"] <= x["kl_before"] for x in report["layers"])


def test_finished_layers_are_taken_from_an_interrupted_run(loaded, corpus, tinystories, tmp_path, monkeypatch):
    settings = WeightSettings("int4", "precalibrated+gptq")
    other, whole, _ = quantize(load(str(tinystories), dtype="float32"), corpus, settings, tmp_path / "other")

    class Stop(Exception):
        pass

    @contextmanager
    def stopping(*_: object) -> Any:
        class Bar:
            def advance(self, steps: float = 1) -> None:
                raise Stop

        yield Bar()

    with pytest.raises(Stop):
        quantize(loaded, corpus, settings, tmp_path / "out", show=stopping)
    asked = []
    real = LayerQuantizer.quantize
    monkeypatch.setattr(LayerQuantizer, "quantize", lambda self, i: (asked.append(i), real(self, i))[1])
    done, record, report = quantize(load(str(tinystories), dtype="float32"), corpus, settings, tmp_path / "out")
    assert asked == [1]
    assert record == whole
    assert done.sha256 == other.sha256
    assert done.quantized is not None
    assert other.quantized is not None
    for name, layer in done.quantized.layers.items():
        assert all(torch.equal(x, other.quantized.layers[name].tensors[k]) for k, x in layer.tensors.items())
    assert all(x["kl_after"] <= x["kl_before"] for x in report["layers"])


def test_what_cannot_be_stored_is_refused(loaded, corpus, tmp_path):
    loaded.model.model.layers[1].mlp.down_proj = torch.nn.Linear(384, 100, bias=False)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj: 100 x 384 codes"):
        quantize(loaded, corpus, WeightSettings(), tmp_path / "out")
    loaded.model.to("meta")
    with pytest.raises(UsageError, match="--device-map"):
        check(loaded, WeightSettings())
