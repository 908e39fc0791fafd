"""Python's view of a page and of visibility is the header's, for every format and length."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvcli.runtime.kvrt as kvrt
from kvcli.plan import BLOCK_SIZES, CachePlan, LayerPlan
from kvcli.quant.format import KVFormat

HEADER = Path(kvrt.__file__).parent / "csrc" / "kvrt.h"
LAYOUT = HEADER.with_name("kv_layout.h")


@pytest.fixture(scope="module")
def library() -> kvrt.Library:
    return kvrt.library("cpu")


@st.composite
def formats(draw, head_dim: int, block_size: int) -> KVFormat:
    bits = draw(st.sampled_from((2, 3, 4, 8, 16)))
    axis = draw(st.sampled_from(("token", "channel")))
    sizes = [g for g in (8, 16, 32, 40, 64, 80, 128) if (head_dim if axis == "token" else block_size) % g == 0]
    symmetric = draw(st.booleans())
    table = symmetric and bits <= 4 and draw(st.booleans())
    return KVFormat(
        bits, axis, draw(st.sampled_from(sizes)), symmetric, "gaussian" if table else "uniform",
        draw(st.sampled_from(("float16", "e5m3"))),
    )  # fmt: skip


@st.composite
def plans(draw) -> CachePlan:
    head_dim, block = draw(st.sampled_from((8, 16, 24, 64, 80, 96, 128, 256))), draw(st.sampled_from(BLOCK_SIZES))
    window = draw(st.sampled_from((None, 7, 64)))
    layer = LayerPlan(
        draw(st.integers(1, 9)), head_dim, draw(formats(head_dim, block)), draw(formats(head_dim, block)),
        kind="sliding" if window else "full", window=window, transform=draw(st.sampled_from(("none", "hadamard"))),
    )  # fmt: skip
    dtype = draw(st.sampled_from(("float32", "float16", "bfloat16")))
    return CachePlan((layer,), block, draw(st.integers(0, 5)), draw(st.integers(0, 70)), dtype)


@given(plans())
def test_sections_and_sizes(library: kvrt.Library, plan: CachePlan) -> None:
    layout = plan.layers[0].layout(plan.block_size)
    theirs = library.page_layout(kvrt.layer_struct(plan, 0, num_heads=plan.layers[0].num_kv_heads))
    assert theirs.pop("head_bytes") == layout.head_bytes
    assert theirs == {name: section.start for name, section in layout.sections.items()}


@given(plans(), st.integers(0, 5000))
def test_boundaries(library: kvrt.Library, plan: CachePlan, n: int) -> None:
    struct = kvrt.layer_struct(plan, 0, num_heads=plan.layers[0].num_kv_heads)
    assert library.boundary(struct, n) == plan.boundary(0, n)
    assert struct.tail_tokens == plan.tail(0)


STRUCTS = {
    "kv_format": (kvrt.Format, LAYOUT),
    "kv_layer": (kvrt.Layer, LAYOUT),
    "kv_page_layout": (kvrt.PageLayout, LAYOUT),
    "kvrt_exec": (kvrt.Exec, HEADER),
    "kvrt_cache": (kvrt.Cache, HEADER),
    "kvrt_append_args": (kvrt.Append, HEADER),
    "kvrt_attend_args": (kvrt.Attend, HEADER),
    "kvrt_expand_args": (kvrt.Expand, HEADER),
    "kvrt_chunk_args": (kvrt.Chunk, HEADER),
}


@pytest.mark.parametrize("name", STRUCTS)
def test_structs_have_the_headers_fields_in_its_order(name) -> None:
    struct, header = STRUCTS[name]
    text = header.read_text()
    body = text[text.index(f"typedef struct {name} {{") : text.index(f"}} {name};")].partition("{")[2]
    while "/*" in body:
        before, _, rest = body.partition("/*")
        body = before + rest.partition("*/")[2]
    names = []
    for declaration in body.split(";"):
        for part in declaration.split(","):
            if part.strip():
                names.append(part.split()[-1].lstrip("*").partition("[")[0])
    assert names == [field[0] for field in struct._fields_]


def test_means_must_lie_without_gaps() -> None:
    layer = LayerPlan(2, 64, KVFormat(4), KVFormat(4), center=True)
    plan = CachePlan((layer,))
    mean = torch.zeros(64, 2).t()
    with pytest.raises(Exception, match="without gaps"):
        kvrt.layer_struct(plan, 0, num_heads=2, tensors={"layer.0.k.mean": mean, "layer.0.v.mean": mean})
