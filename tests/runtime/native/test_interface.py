"""What the CPU library says of itself, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from ctypes import byref
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.runtime import kvrt

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from cpu_cases import INVALID, UNSUPPORTED, VARIANTS, pair, queries, tokens
from cpu_store import Store, cpu_library

pytestmark = pytest.mark.usefixtures("variant_is_put_back")


def test_variants() -> None:
    library = cpu_library()
    assert library.kind == "cpu"
    assert list(library.variants()) == ["avx512", "avx2", "portable"]
    assert library.variants()["portable"] is None
    for name, reason in library.variants().items():
        if reason is None:
            library.use(name)
            assert library.variant == name
        else:
            with pytest.raises(kvrt.NativeError, match=UNSUPPORTED):
                library.use(name)
    library.use(None)
    assert library.variant == VARIANTS[0]
    with pytest.raises(kvrt.NativeError, match=INVALID):
        library.use("abacus")


@pytest.mark.parametrize(("wanted", "used"), [("portable", "portable"), ("abacus", VARIANTS[0]), ("", VARIANTS[0])])
def test_the_environment_may_choose_the_variant(wanted: str, used: str) -> None:
    program = (
        "import ctypes, sys; name = ctypes.CDLL(sys.argv[1]).kvrt_current_variant\n"
        "name.restype = ctypes.c_char_p; print(name().decode())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(kvrt.LIBRARIES / "libkvrt_cpu.so")],
        env={**os.environ, "KVCLI_CPU_VARIANT": wanted},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == used


def small(**fields: Any) -> Store:
    spec = LayerPlan(1, 64, KVFormat(4), KVFormat(4), center=True)
    return pair(CachePlan((spec,), residual_window=4, sink_tokens=2), 1, 128, 2, **fields)[0]


def test_nothing_is_written_where_a_page_is_missing() -> None:
    store = small()
    store.append([tokens(store.layer, 20)])
    kept = [x.clone() for x in (store.pages, store.tail, store.sinks)]
    store.tables[0, 0, 2] = -1
    with pytest.raises(kvrt.NativeError, match=INVALID):
        store.append([tokens(store.layer, 40)])
    store.tables[0, 0, 2] = 5
    store.struct.rope_positions = 40
    with pytest.raises(kvrt.NativeError, match=INVALID):
        store.append([tokens(store.layer, 40)])
    for x, y in zip((store.pages, store.tail, store.sinks), kept, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


@pytest.mark.parametrize(("field", "value", "message"), [
    ("head_dim", 60, UNSUPPORTED), ("head_dim", 512, UNSUPPORTED), ("num_heads", 65, UNSUPPORTED),
    ("block_size", 24, INVALID), ("num_heads", 0, INVALID), ("exact_dtype", 7, INVALID), ("page_dtype", 0, INVALID),
    ("tail_tokens", 3, INVALID), ("rope", None, INVALID), ("portable", 1, INVALID),
])  # fmt: skip
def test_a_layer_that_cannot_be(field: str, value: Any, message: str) -> None:
    store = small()
    store.append([tokens(store.layer, 40)])
    setattr(store.struct, field, value)
    with pytest.raises(kvrt.NativeError, match=message):
        store.append([tokens(store.layer, 1)])
    with pytest.raises(kvrt.NativeError, match=message):
        store.expand(0, 0, 16)
    assert store.library.workspace_bytes(store.struct, 1, 1) == -1


@pytest.mark.parametrize(("field", "value", "message"), [
    ("bits", 5, INVALID), ("bits", 1, UNSUPPORTED), ("group", 24, INVALID), ("group", 0, INVALID), ("axis", 2, INVALID),
    ("scale_dtype", 2, INVALID),
])  # fmt: skip
def test_a_format_that_cannot_be(field: str, value: Any, message: str) -> None:
    for which in "kv":
        store = small()
        setattr(getattr(store.struct, which), field, value)
        with pytest.raises(kvrt.NativeError, match=message):
            store.append([tokens(store.layer, 1)])


@pytest.mark.parametrize(("field", "value"), [
    ("parts", 0), ("parts", 4), ("splits", 0), ("split_pages", -1), ("workspace", None), ("workspace_bytes", 16),
    ("mass_stride", 5), ("q", None), ("out", None), ("dtype", 9),
])  # fmt: skip
def test_attention_s_arguments_are_checked(field: str, value: Any) -> None:
    store = small()
    store.append([tokens(store.layer, 40)])
    a = store.attend_args(queries(1, 2, 64))
    setattr(a, field, value)
    with pytest.raises(kvrt.NativeError, match=INVALID):
        store.library.call("attend", byref(store.struct), byref(a), None)


def test_attention_needs_the_pages_it_reads() -> None:
    store = small()
    store.append([tokens(store.layer, 41)])
    store.lengths -= 1
    q = queries(1, 2, 64)
    whole = store.attend(q)
    store.tables[0, 0, 1] = -1
    with pytest.raises(kvrt.NativeError, match=INVALID):
        store.attend(q)
    exact = store.attend(q, parts=kvrt.EXACT)
    assert torch.isfinite(exact["lse"]).all()
    assert not torch.equal(exact["out"], whole["out"])
    store.struct.window, store.struct.sink_tokens = 9, 0  # pages behind a window may be gone
    store.tables[0, 0, :2] = -1
    assert torch.isfinite(store.attend(q)["lse"]).all()


def test_expanding_needs_pages_and_sense() -> None:
    store = small()
    store.append([tokens(store.layer, 41)])
    for arguments, options in (((1, 0, 8), {}), ((0, -1, 8), {}), ((0, 0, 8), {"before": True, "with_sinks": True}),
                               ((0, 120, 20), {})):  # fmt: skip
        with pytest.raises(kvrt.NativeError, match=INVALID):
            store.expand(*arguments, **options)
    store.tables[0, 0, 0] = -1
    with pytest.raises(kvrt.NativeError, match=INVALID):
        store.expand(0, 0, 8)


def test_null_pointers_are_refused() -> None:
    store = small()
    for name in ("append", "attend", "expand"):
        with pytest.raises(kvrt.NativeError, match=INVALID):
            store.library.call(name, None, None, None)
        with pytest.raises(kvrt.NativeError, match=INVALID):
            store.library.call(name, byref(store.struct), None, None)
