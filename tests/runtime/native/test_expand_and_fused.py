"""Expanding pages, and the small operations, with the CPU library."""

from __future__ import annotations

import sys
from ctypes import byref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcli.plan import CachePlan
from kvcli.quant import transforms
from kvcli.runtime import kvrt

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from cpu_cases import INVALID, VARIANTS, feed, pair, plans, queries, rope_of, tokens
from cpu_store import cpu_library

pytestmark = pytest.mark.usefixtures("variant_is_put_back")


# --- expand ---------------------------------------------------------------------------------------------------------


@given(plans(), st.integers(1, 200), st.sampled_from(VARIANTS), st.data())
@settings(max_examples=40)
def test_expanding_equals_reading(plan: CachePlan, n: int, variant: str, data: st.DataObject) -> None:
    cpu_library().use(variant)
    store, layer = pair(plan, 2, 256)
    kv = [tokens(plan.layers[0], m, m) for m in (3, n)]
    store.append(kv)
    for row in range(2):
        feed(layer, row, kv[row])
    boundary = layer.boundary(n)
    if not boundary:
        return
    first = data.draw(st.integers(0, boundary - 1))
    count = data.draw(st.integers(1, boundary - first))
    k, v, _ = layer.read(1)
    found = store.expand(1, first, count)
    for x, expected in zip(found, (k, v), strict=True):
        torch.testing.assert_close(x, expected[:, first : first + count].float(), rtol=1e-6, atol=1e-6)
    before = store.expand(1, first, count, before=True)[0]
    expected = store.rope.unrotate(k[:, first : first + count].float(), torch.arange(first, first + count))
    torch.testing.assert_close(before, expected, rtol=1e-5, atol=1e-5)
    sinks = layer.sinks[:, 1, :, first : min(layer.sinks.shape[3], first + count)].float()
    whole = store.expand(1, first, count, with_sinks=True)
    assert torch.equal(whole[:, :, : sinks.shape[2]], sinks)
    assert torch.equal(whole[:, :, sinks.shape[2] :], found[:, :, sinks.shape[2] :])
    assert torch.equal(store.expand(1, first, count, torch.bfloat16), found.bfloat16())
    assert torch.equal(store.expand(1, first, count, torch.float16, threads=2), found.half())


# --- the small operations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 5, 700])
@pytest.mark.parametrize("dim", [8, 16, 64, 80, 96, 128, 256])
def test_hadamard_is_the_reference_s_bit_for_bit(variant: str, dim: int, rows: int) -> None:
    x = queries(1, rows, dim)[0]
    out = torch.empty_like(x)
    cpu_library().call("hadamard", out.data_ptr(), x.data_ptr(), rows, dim, byref(kvrt.Exec(2, 0)))
    assert torch.equal(out, transforms.hadamard(x))
    cpu_library().call("hadamard", x.data_ptr(), x.data_ptr(), rows, dim, None)
    assert torch.equal(out, x)


TOLERANCE: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {"rtol": 2e-6, "atol": 2e-6},
    torch.float16: {"rtol": 2e-3, "atol": 1e-4},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-3},
}


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rms_norm_and_silu(dtype: torch.dtype, rows: int) -> None:
    width = 200
    x, residual = queries(2, rows, width).to(dtype)
    weight = (queries(1, 1, width, 5)[0, 0] + 1).to(dtype)
    y, kept = torch.empty_like(x), residual.clone()
    library, run = cpu_library(), byref(kvrt.Exec(2, 0))
    for res in (None, kept):
        library.call("rms_norm", y.data_ptr(), x.data_ptr(), kvrt.pointer(res), weight.data_ptr(), rows, width, 1e-5,
                     kvrt.DTYPES[dtype], run)  # fmt: skip
        total = x if res is None else residual + x
        wide = total.float()
        expected = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(dtype)
        torch.testing.assert_close(y, expected, **TOLERANCE[dtype])
    assert torch.equal(kept, residual + x)
    both = torch.cat((x * 8, residual), dim=-1).contiguous()
    library.call("silu_mul", y.data_ptr(), both.data_ptr(), rows, width, kvrt.DTYPES[dtype], run)
    gate, up = both.float().chunk(2, -1)
    torch.testing.assert_close(y, (torch.nn.functional.silu(gate) * up).to(dtype), **TOLERANCE[dtype])


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rope_with_and_without_norms(dtype: torch.dtype, norm: bool) -> None:
    rope, positions = rope_of(64), torch.tensor([3, 0, 99], dtype=torch.int32)
    qkv = queries(3, 6 + 2 * 2, 64).to(dtype)
    weights = (queries(2, 1, 64, 1)[:, 0] + 1).to(dtype)
    table = rope.table(128)[:128].contiguous()
    expected = qkv.clone()
    for part, weight in ((slice(0, 6), weights[0]), (slice(6, 8), weights[1])):
        x = qkv[:, part]
        if norm:
            wide = x.float()
            x = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(dtype)
        expected[:, part] = rope.rotate(x.float(), positions.long()[:, None]).to(dtype)
    arguments = [positions.data_ptr(), table.data_ptr(), 128, *(kvrt.pointer(w) if norm else None for w in weights)]
    cpu_library().call("rope", qkv.data_ptr(), *arguments, 1e-6, 3, 6, 2, 64, kvrt.DTYPES[dtype], None)
    torch.testing.assert_close(qkv, expected, **TOLERANCE[dtype])
    arguments[2] = 99
    with pytest.raises(kvrt.NativeError, match=INVALID):
        cpu_library().call("rope", qkv.data_ptr(), *arguments, 1e-6, 3, 6, 2, 64, kvrt.DTYPES[dtype], None)
