"""Predictors on the native kernels against the reference: the same logits in chunks of any size, token by token."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from kvcli.engine.config import EngineConfig
from kvcli.engine.runner import EngineRunner
from kvcli.errors import InputError, KvcliError, UsageError
from kvcli.evaluation.attention_speed import NativeAttention
from kvcli.models.architectures import Rope, geometry
from kvcli.plan import CachePlan
from kvcli.quant.prediction import Linear, Predictor, Source
from kvcli.runtime import kvrt, prefill
from kvcli.runtime.attention import attend
from kvcli.runtime.native_cache import NativeCache
from kvcli.runtime.packed_cache import PackedCache
from kvcli.runtime.packed_model import PackedModel
from kvcli.runtime.rebuilding import RebuildingAttention, products, rebuilds
from kvcli.runtime.runner import ModelRunner

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from test_predicted_cache import SETTINGS, plan_of, tensors_of, text
from test_runner import loaded_of

Tiny = Callable[..., PreTrainedModel]
TOKENS = 96

try:
    kvrt.library("cpu")
except kvrt.NativeError as error:
    pytest.skip(f"needs the native kernels: {error}", allow_module_level=True)


pytestmark = pytest.mark.usefixtures("one_thread")


def reference(model: PreTrainedModel, plan: CachePlan, ids: Tensor) -> Tensor:
    cache = PackedCache(plan, rope=Rope.from_model(model), tensors=tensors_of(plan))
    with torch.no_grad():
        out: Any = model(ids[None], past_key_values=cache)
    return Tensor(out.logits[0])


def assert_close(*pairs: tuple[Tensor, Tensor]) -> None:
    """Compare what was found with what is expected; of several texts the one in the middle counts.

    Sums of another order, as another processor has them, move a code now and then, which later tokens see; a wrong term
    moves everything.
    """
    ratios = [float((found - expected).norm() / expected.norm()) for found, expected in pairs]
    assert median(ratios) < 0.02
    assert max(ratios) < 0.05
    assert median(float((found - expected).abs().median()) for found, expected in pairs) < 1e-3


@pytest.mark.parametrize("kind", ["absorbed", "always"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_logits_are_the_reference_s(tiny: Tiny, architecture: str, setting: str, kind: str) -> None:
    model = tiny(architecture)
    plan = plan_of(model, kind, SETTINGS[setting])
    assert rebuilds(plan) == (kind == "always")
    tensors = tensors_of(plan)
    zeros = {name: torch.zeros_like(x) for name, x in tensors.items()}  # predictors are needed: others tell others
    at_once, in_steps = [], []
    for ids in text(rows=3, tokens=TOKENS):
        expected = reference(model, plan, ids)
        runner = ModelRunner(loaded_of(model), plan, tensors, capacity=TOKENS)
        at_once.append((runner.prefill(ids, all_logits=True, chunk=37), expected))
        runner = ModelRunner(loaded_of(model), plan, tensors, capacity=TOKENS)
        found = [runner.prefill(ids[:23], all_logits=True)]
        found += [runner.decode(x[None]).clone() for x in ids[23:70]]  # through flushes and page borders
        found += [runner.prefill(ids[70:91], all_logits=True, chunk=9)]
        found += [runner.decode(x[None]).clone() for x in ids[91:]]
        in_steps.append((torch.cat(found), expected))
        assert runner.nbytes["cache"] >= plan.bytes_at(TOKENS)
        other = ModelRunner(loaded_of(model), plan, zeros, capacity=TOKENS).prefill(ids, all_logits=True)
        assert float((other - expected).norm() / expected.norm()) > 0.02
    assert_close(*at_once)
    assert_close(*in_steps)


def any_predictors(plan: CachePlan) -> dict[str, Tensor]:
    """Return predictors as they are stored, also in codes."""
    g, out = torch.Generator().manual_seed(2), {}
    for name, (dtype, shape) in plan.model_tensors().items():
        if dtype == "U8":
            out[name] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=g)
        else:
            scale = 0.02 if name.endswith("scales") else 0.2
            out[name] = scale * torch.rand(shape, generator=g).add(-0.4).to(torch.float16 if dtype == "F16" else None)
    return out


def layers(window: int | None, fields: dict[str, Any]) -> tuple[NativeCache, PackedCache]:
    """Three layers that read one another, on both paths: not all of it, nor in order, and in other precisions."""
    from kvcli.models.architectures import LayerGeometry
    from kvcli.plan import LayerPlan

    seen = (Source(0, "k"), Source(0, "v"))
    predictors = (
        Predictor(v=Linear((Source(0, "k"),))),
        Predictor(Linear((seen[1],), bits=8, rank=5), Linear((Source(1, "k"), *seen), bits=4)),
        Predictor(Linear((Source(1, "v"), *seen)), Linear((seen[0], Source(1, "k")))),
    )
    shared = {k: x for k, x in fields.items() if k in ("block_size", "sink_tokens", "residual_window")}
    own = {k: x for k, x in fields.items() if k not in shared}
    kind: Any = "sliding" if window else "full"
    plan = CachePlan(
        tuple(LayerPlan(2, 16, kind=kind, window=window, predictor=x, **own) for x in predictors),
        dtype="float32", **shared,
    )  # fmt: skip
    rope, tensors = Rope(10000.0 ** -(torch.arange(0, 16, 2) / 16)), any_predictors(plan)
    shape = LayerGeometry(2, 4, 16, kind, window)
    cache = NativeCache(plan, (shape,) * 3, capacity=210, batch_size=2, rope=rope, tensors=tensors, threads=1)
    return cache, PackedCache(plan, rope=rope, tensors=tensors)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chunks=st.lists(st.one_of(st.just(1), st.integers(1, 60)), min_size=1, max_size=6),
    setting=st.sampled_from(sorted(SETTINGS)), window=st.sampled_from((None, None, 7, 24)),
)  # fmt: skip
def test_chunks_flushes_and_page_borders_do_not_show(
    chunks: list[int], setting: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same keys and values on both paths: what is attended to agrees to the digit, not only most of it."""
    monkeypatch.setattr(prefill, "SEGMENT", 50)
    cache, plain = layers(window, SETTINGS[setting])
    rows, run = range(2), RebuildingAttention(cache, max(chunks), torch.float32)
    positions = torch.arange(210)
    for step, count in enumerate([x for i, x in enumerate(chunks) if sum(chunks[: i + 1]) <= 210]):
        run.begin(positions)
        g = torch.Generator().manual_seed(step)
        for index in range(3):
            qkv = torch.randn(count, 8, 16, generator=g)
            q, k, v = qkv.split([4, 2, 2], 1)
            expected = attend(
                plain.stores[index], 0, q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), 0.25
            ).transpose(0, 1)
            for row in rows:
                found = torch.full_like(expected, torch.nan).contiguous()
                run(index, row, q, k, v, found)
                # 3 bits, and a code now and then on the other side of its border
                assert float((found - expected).abs().median()) < 2e-5
                assert float((found - expected).norm() / expected.norm()) < 0.02
        for row in rows:
            cache.advance(count, row)
        assert not run._kept  # nothing that was rebuilt outlives a pass


def test_sequences_of_a_batch_do_not_mix(tiny: Tiny) -> None:
    model = tiny("qwen2-sliding")
    plan, ids = plan_of(model, "always", SETTINGS["windowed"]), text(2, 70)
    expected = [reference(model, plan, x) for x in ids]
    runner = ModelRunner(loaded_of(model), plan, tensors_of(plan), capacity=80, batch_size=2)
    for row, length in enumerate((50, 41)):
        runner.prefill(ids[row, :length], row)
    for i in range(19):
        found = runner.decode(torch.stack((ids[0, 50 + i], ids[1, 41 + i])))
        assert_close((found[0], expected[0][50 + i]))
        assert_close((found[1], expected[1][41 + i]))


def test_memory_beside_the_cache_is_that_of_a_few_layers(tiny: Tiny) -> None:
    model = tiny("llama")
    plan = plan_of(model, "always", SETTINGS["windowed"])
    cache = NativeCache(
        plan, geometry(model.config), capacity=2048, rope=Rope.from_model(model), tensors=tensors_of(plan)
    )
    run = RebuildingAttention(cache, 512, torch.float32)
    layer, before = plan.layers[0], run.nbytes
    q = torch.zeros(512, 6, 8)
    for _ in range(4):
        run.begin(torch.arange(512))
        for index in range(2):
            run(index, 0, q, q[:, :2], q[:, :2], torch.empty_like(q))
        cache.advance(512, 0)
    assert 0 < run.nbytes - before <= 4 * 2 * layer.width * (2048 + 512)  # one layer is read, in float32


def test_engine_and_determinism(tiny: Tiny) -> None:
    """Absorbed values run wherever plain codes do; layers that are rebuilt are refused in a sentence."""
    model, ids = tiny("qwen3"), text(tokens=60)[0]
    packed = {kind: plan_of(model, kind, SETTINGS["rotated-after"]) for kind in ("absorbed", "always")}
    plan = packed["absorbed"]
    made = PackedModel(replace(loaded_of(model)), plan, tensors_of(plan))
    config = EngineConfig(memory=1 << 22, max_context=128, max_num_seqs=2, threads=1)
    engine = EngineRunner(made, config)
    engine.cache.place(1, [3, 0, 5, 2], 0)
    expected = reference(model, plan, ids)
    found = [engine.extend(1, ids[:37].tolist(), logits=37)]
    for token in ids[37:].tolist():
        found.append(engine.step([1], [token]).clone())
    assert_close((torch.cat([x for x in found if x is not None]), expected))
    runs = []
    for chunk in (60, 7):
        runner = ModelRunner(loaded_of(model), plan, tensors_of(plan), capacity=64, deterministic=True)
        runs.append(runner.prefill(ids, all_logits=True, chunk=chunk))
        assert_close((runs[-1], expected))
    assert torch.equal(runs[0], runs[1])
    plan = packed["always"]
    with pytest.raises(UsageError, match="rebuild layers from one another"):
        ModelRunner(loaded_of(model), plan, tensors_of(plan), capacity=64, deterministic=True)
    with pytest.raises(InputError, match="does not rebuild layers"):
        EngineRunner(PackedModel(loaded_of(model), plan, tensors_of(plan)), config)
    with pytest.raises(InputError, match="kvcli bench decode"):
        NativeAttention(plan, geometry(model.config), 64, tensors=tensors_of(plan))
    runner = ModelRunner(loaded_of(model), plan, tensors_of(plan), capacity=64)
    runner.device = torch.device("cuda")
    with pytest.raises(KvcliError, match="a graph cannot hold the rebuilding of layers"):
        runner.capture()


def test_a_product_is_read_where_it_is_told() -> None:
    plan = layers(None, SETTINGS["windowed"])[0].plan
    found = products(plan, 2, any_predictors(plan))
    assert [(x.layer, x.inputs, x.outputs) for x in found] == [
        (0, slice(0, 64), slice(0, 64)), (1, slice(0, 64), slice(0, 64)),
    ]  # fmt: skip
    only = products(plan, 1, any_predictors(plan))
    assert [x.layer for x in only] == [0, 1]
    assert (only[1].inputs, only[1].outputs) == (slice(0, 32), slice(32, 64))
