"""Values predicted from their own layer's keys, and layers that are rebuilt, with the CUDA kernels run on the CPU."""

from __future__ import annotations

import sys
from ctypes import byref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcli.models.architectures import LayerGeometry
from kvcli.models.loading import load
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.quant.prediction import Linear, Predictor, Source
from kvcli.runtime import kvrt
from kvcli.runtime.attention import attend
from kvcli.runtime.native_cache import NativeCache
from kvcli.runtime.packed_cache import PackedCache
from kvcli.runtime.rebuilding import RebuildingAttention
from kvcli.runtime.runner import ModelRunner

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from cpu_store import predicting, rope_of
from kernel_checks import SCALAR, SCHEDULES, TENSOR, Emulated, check_predicted, pair, queries, tokens

pytestmark = pytest.mark.usefixtures("stores_use_it")

TOKEN, TABLE = KVFormat(3, "token", 32, False, scale_dtype="e5m3"), KVFormat(2, "token", 64, grid="gaussian")
CHANNEL, FINE, EXACT = KVFormat(4, "channel", 32, False), KVFormat(8, "token", 64), KVFormat(16)
ABSORBED = Predictor(v=Linear((Source(0, "k"),)))


@pytest.mark.parametrize(
    ("layer", "shared", "group", "variant"),
    [
        (LayerPlan(2, 64, TOKEN, TABLE, transform="hadamard", center=True), {"residual_window": 5}, 3, TENSOR),
        (LayerPlan(2, 64, TOKEN, CHANNEL, rope="before", center=True), {"sink_tokens": 2, "block_size": 32}, 1, SCALAR),
        (LayerPlan(2, 128, CHANNEL, TOKEN), {"sink_tokens": 20, "residual_window": 7, "block_size": 64}, 3, TENSOR),
        (LayerPlan(1, 128, EXACT, FINE, kind="sliding", window=24), {"residual_window": 20}, 2, SCALAR),
        (LayerPlan(3, 80, KVFormat(4, "token", 16), KVFormat(3, "token", 80), center=True), {"dtype": "bfloat16"}, 9,
         SCALAR),
    ],
    ids=["rotated", "before-rope", "128", "sliding", "80"],
)  # fmt: skip
def test_what_is_stored_read_and_attended_to(
    layer: LayerPlan, shared: dict[str, Any], group: int, variant: str
) -> None:
    check_predicted(CachePlan((layer,), **shared), ((70, 3), (1, 40)), group=group, variant=variant)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_and_half_precision(schedule: int) -> None:
    plan = CachePlan((LayerPlan(2, 16, KVFormat(4, "token", 16), KVFormat(4, "channel", 16)),), residual_window=1)
    check_predicted(plan, ((20, 33),), group=2, splits=1 + schedule, schedule=schedule, dtype=torch.bfloat16)


@pytest.mark.parametrize("rope", ["before", "after"])
@pytest.mark.parametrize("window", [None, 20])
def test_decoding_is_the_cpu_library_s(window: int | None, rope: Any, library: Emulated) -> None:
    # token by token, through flushes and page borders
    kind: Any = "full" if window is None else "sliding"
    layer = LayerPlan(2, 64, TOKEN, FINE, kind=kind, window=window, rope=rope, transform="hadamard", center=True)
    plan = predicting(CachePlan((layer,), sink_tokens=2, residual_window=6))[0]
    stores = [pair(plan, 2, 64, 2)[0] for _ in range(2)]
    stores[1].library = kvrt.library("cpu")
    for step in range(45):
        new = [tokens(layer, 1, 2 * step + row) for row in range(2)]
        for store in stores:
            store.append(new, advance=False)
        if step % 4 == 3:
            found, expected = (x.attend(queries(2, 4, 64, step)) for x in stores)
            for name in ("out", "key_sum", "packed_mass"):
                torch.testing.assert_close(found[name], expected[name], rtol=0, atol=2e-3, msg=f"{name} of step {step}")
        for store in stores:
            store.lengths += 1
    assert float((stores[0].pages != stores[1].pages).double().mean()) < 1e-3  # of codes on the border between two


def test_fixed_cuts_give_the_same_bits() -> None:
    plan = predicting(CachePlan((LayerPlan(1, 64, TOKEN, TOKEN, center=True),)))[0]
    store = pair(plan, 1, 128, 3)[0]
    store.append([tokens(store.layer, 90)])
    store.append([tokens(store.layer, 1)], advance=False)
    first, *others = (store.attend(queries(1, 3, 64), splits=s, split_pages=2) for s in (1, 2, 4))
    for x in others:
        assert torch.equal(x["out"], first["out"])
        assert torch.equal(x["key_sum"], first["key_sum"])


def test_what_cannot_be_is_refused(library: Emulated) -> None:
    plan = predicting(CachePlan((LayerPlan(2, 64, TOKEN, TOKEN),)))[0]
    kv = tokens(plan.layers[0], 20)
    store = pair(plan, 1, 64, head_tables=True)[0]
    with pytest.raises(kvrt.NativeError, match="not implemented"):  # a prediction needs the keys of all heads in a slot
        store.append([kv])
    store = pair(plan, 1, 64)[0]
    a = store.append_args([kv])
    a.v_predicted = a.k
    with pytest.raises(kvrt.NativeError, match="contradict"):
        library.call("append", byref(store.struct), byref(a), None)
    store.struct.rope = None
    with pytest.raises(kvrt.NativeError, match="contradict"):
        store.append([kv])


def tensors_of(plan: CachePlan) -> dict[str, Tensor]:
    g, dtypes = torch.Generator().manual_seed(2), {"F16": torch.float16, "F32": torch.float32}
    return {
        name: (torch.randn(shape, generator=g) * shape[-1] ** -0.5).to(dtypes[dtype])
        for name, (dtype, shape) in plan.model_tensors().items()
    }


@pytest.mark.parametrize(
    ("own", "window", "dtype"),
    [
        ({"k": CHANNEL, "v": TOKEN}, None, torch.float32),
        ({"k": TOKEN, "v": FINE, "transform": "hadamard", "rope": "before"}, 24, torch.float32),
        ({"k": FINE, "v": TABLE, "transform": "hadamard", "center": True}, None, torch.bfloat16),
    ],
    ids=["channels", "sliding", "rotated"],
)
def test_layers_are_rebuilt_in_chunks(
    own: dict[str, Any], window: int | None, dtype: torch.dtype, library: Emulated
) -> None:
    """Keys and values from those of the layer before, in chunks and token by token, against the plain reference."""
    told = (Source(0, "k"), Source(0, "v"))
    predictors = (ABSORBED, Predictor(Linear(told), Linear((Source(1, "k"), *told))))
    kind: Any = "sliding" if window else "full"
    layers = tuple(LayerPlan(2, 64, kind=kind, window=window, predictor=x, **own) for x in predictors)
    plan = CachePlan(layers, block_size=32, sink_tokens=3, residual_window=5)
    rope, tensors, chunks = rope_of(64), tensors_of(plan), (41, 1, 7, 1, 30, 1, 1)
    shape = LayerGeometry(2, 4, 64, kind, window)
    cache = NativeCache(plan, (shape,) * 2, capacity=sum(chunks), rope=rope, tensors=tensors, library=library)
    plain, run = PackedCache(plan, rope=rope, tensors=tensors), RebuildingAttention(cache, max(chunks), dtype)
    for step, count in enumerate(chunks):
        run.begin(torch.arange(sum(chunks)))
        for index in range(2):
            qkv = torch.randn(count, 8, 64, generator=torch.Generator().manual_seed(2 * step + index))
            q, k, v = qkv.half().float().split([4, 2, 2], 1)
            expected = attend(plain.stores[index], 0, *(x.transpose(0, 1) for x in (q, k, v)), 0.125).transpose(0, 1)
            found = torch.full_like(expected, torch.nan).contiguous()
            run(index, 0, q, k, v, found)
            # a code now and then falls on the other side of its border
            assert float((found - expected).abs().median()) < (2e-5 if dtype == torch.float32 else 4e-3)
            assert float((found - expected).norm() / expected.norm()) < 0.02
        cache.advance(count, 0)
    assert not run._kept


@pytest.mark.parametrize("kind", ["absorbed", "always"])
def test_a_model_says_the_same(
    kind: str, tinystories: Path, library: Emulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill in chunks and decode, as the model runner drives the kernels."""
    loaded = load(str(tinystories), dtype="float32")
    told = (Source(0, "k"), Source(0, "v"))
    rebuilt = Predictor(Linear(told), Linear((Source(1, "k"), *told)))
    own = Predictor(v=Linear((Source(1, "k"),)))
    predictors = (ABSORBED, own if kind == "absorbed" else rebuilt)
    fmt = KVFormat(4, "token", 16)
    layers = tuple(
        LayerPlan(g.num_kv_heads, g.head_dim, fmt, fmt, predictor=x)
        for g, x in zip(loaded.geometry, predictors, strict=True)
    )
    plan = CachePlan(layers, sink_tokens=2, residual_window=3, dtype="float32")
    ids = torch.randint(3, 2000, (29,), generator=torch.Generator().manual_seed(0))
    results = []
    for kernels in (kvrt.library("cpu"), library):
        monkeypatch.setattr(kvrt, "library", lambda kind, kernels=kernels: kernels)
        for capacity, count in ((40, 24), (8, 5)):  # also a cache of fewer slots than the kernels want cosines
            runner = ModelRunner(loaded, plan, tensors_of(plan), capacity=capacity)
            logits = [runner.prefill(ids[:count], chunk=9, all_logits=True)]
            logits += [runner.decode(x[None]).clone() for x in ids[count : min(capacity, len(ids))]]
            results.append(torch.cat(logits))
    for found, expected in zip(results[2:], results[:2], strict=True):
        assert float((found - expected).norm() / expected.norm()) < 0.02
        assert float((found - expected).abs().median()) < 1e-3
