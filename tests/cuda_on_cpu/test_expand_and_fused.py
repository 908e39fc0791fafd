"""Expanding pages and the small operations with the CUDA kernels, run on the CPU; the library's interface."""

from __future__ import annotations

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

from kernel_checks import (
    FLOATS,
    FORMATS,
    SCALAR,
    TENSOR,
    Emulated,
    check_expanding,
    check_hadamard,
    check_norms_and_gates,
    pair,
    queries,
    rope_of,
    tokens,
)

pytestmark = pytest.mark.usefixtures("stores_use_it")


@pytest.mark.parametrize("fmt", FORMATS[::2], ids=str)
@pytest.mark.parametrize("rope", ["before", "after"])
def test_expanding_equals_reading(fmt: KVFormat, rope: Any) -> None:
    check_expanding(fmt, rope)


@pytest.mark.parametrize("dim", [8, 64, 80, 256])
def test_hadamard_is_the_reference_s_bit_for_bit(dim: int, library: Emulated) -> None:
    check_hadamard(dim, library)


def test_int4_products_are_refused_by_name(library: Emulated) -> None:
    x = torch.zeros(1, 64)
    with pytest.raises(kvrt.NativeError, match="int4_matmul: not implemented"):
        library.call("int4_matmul", x.data_ptr(), x.data_ptr(), x.data_ptr(), None, 1, 16, 64, 32, 0, 0, 0, 16, None)
    with pytest.raises(kvrt.NativeError, match="int4_expand: not implemented"):
        library.call("int4_expand", x.data_ptr(), x.data_ptr(), 0, 16, 64, 32, 0, None)


@pytest.mark.parametrize("dtype", FLOATS)
def test_norms_and_gates(dtype: torch.dtype, library: Emulated) -> None:
    check_norms_and_gates(dtype, library)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("normed", [False, True])
def test_rotary_embedding(dtype: torch.dtype, normed: bool, library: Emulated) -> None:
    rope, heads, kv_heads, dim = rope_of(80), 6, 2, 80
    qkv = queries(7, heads + 2 * kv_heads, dim).to(dtype)
    at = torch.tensor([0, 5, 9, 2, 100, 63, 7], dtype=torch.int32)
    weights = [(1 + queries(1, 1, dim, i)[0, 0] / 4).to(dtype) for i in (2, 3)]
    turned = qkv[:, : heads + kv_heads].float()
    if normed:
        turned = turned * torch.rsqrt(turned.square().mean(-1, keepdim=True) + 1e-5)
        turned[:, :heads] *= weights[0].float()
        turned[:, heads:] *= weights[1].float()
    expected = torch.cat((rope.rotate(turned, at.long()[:, None]), qkv[:, heads + kv_heads :].float()), 1)
    table = rope.table(128).contiguous()
    norms = [w.data_ptr() if normed else None for w in weights]
    library.call("rope", qkv.data_ptr(), at.data_ptr(), table.data_ptr(), table.shape[0], *norms, 1e-5, 7, heads,
                 kv_heads, dim, kvrt.DTYPES[dtype], None)  # fmt: skip
    torch.testing.assert_close(qkv, expected.to(dtype), rtol=FLOATS[dtype], atol=FLOATS[dtype])


# --- the interface ----------------------------------------------------------------------------------------------------


def test_what_the_library_says_of_itself(library: Emulated) -> None:
    assert library.kind == "cuda"
    assert list(library.variants()) == ["cuda", SCALAR, TENSOR]
    library.use(TENSOR)
    assert library.variant == TENSOR
    library.use(None)
    assert library.variant == "cuda"
    with pytest.raises(kvrt.NativeError):
        library.use("neon")


def test_contradictions_are_refused(library: Emulated) -> None:
    store, _ = pair(CachePlan((LayerPlan(1, 64, KVFormat(4), KVFormat(4)),)), 1, 64)
    store.append([tokens(store.layer, 20)])
    q = queries(1, 1, 64)
    for change in ({"splits": 0}, {"workspace_bytes": 8}, {"parts": 0}, {"dtype": 9}, {"q": None}, {"mass": None}):
        a = store.attend_args(q)
        for name, value in change.items():
            setattr(a, name, value)
        with pytest.raises(kvrt.NativeError):
            library.call("attend", byref(store.struct), byref(a), None)
    layer = kvrt.Layer.from_buffer_copy(store.struct)
    layer.head_dim = 60
    with pytest.raises(kvrt.NativeError):
        library.call("attend", byref(layer), byref(store.attend_args(q)), None)
