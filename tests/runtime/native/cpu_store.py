"""One layer's storage for the CPU library, the calls on it with every option, and the same in plain torch."""

from __future__ import annotations

from ctypes import byref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvcli.models.architectures import Rope
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.prediction import Linear, Predictor, Source
from kvcli.runtime import kvrt
from kvcli.runtime.packed_layer import PackedLayer


def cpu_library() -> kvrt.Library:
    """Return the package's library; who changes its variant puts it back."""
    return kvrt.library("cpu")


def rope_of(dim: int, scaling: float = 1.0) -> Rope:
    return Rope(10000.0 ** -(torch.arange(0, dim, 2) / dim), scaling)


def means_of(layer: LayerPlan) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    return {f"layer.0.{w}.mean": torch.randn(layer.num_kv_heads, layer.head_dim, generator=g) for w in "kv"}


def predicting(plan: CachePlan) -> tuple[CachePlan, dict[str, Tensor]]:
    """The plan with its values absorbed, and means and a predictor that no result could do without."""
    layer = replace(plan.layers[0], predictor=Predictor(v=Linear((Source(0, "k"),))))
    plan = replace(plan, layers=(layer,))
    g = torch.Generator().manual_seed(5)
    weight = (torch.randn(layer.width, layer.width, generator=g) * layer.width**-0.5).half()
    bias = torch.randn(layer.width, generator=g)
    own = {"layer.0.v.predictor.weight": weight, "layer.0.v.predictor.bias": bias}
    return plan, {"layer.0.k.mean": means_of(layer)["layer.0.k.mean"], **own}


def available() -> list[str]:
    """Return the variants that run here."""
    return [name for name, reason in cpu_library().variants().items() if reason is None]


class Store:
    """Pages, sinks and tails of layer 0 of a plan for a batch; pages lie in shuffled order.

    Parameters
    ----------
    plan, rope, tensors
        As for :class:`PackedLayer`.
    batch, capacity, num_heads
        Sequences, tokens of each, query heads.
    head_tables
        Give every kv head a block table of its own.
    """

    def __init__(
        self,
        plan: CachePlan,
        *,
        rope: Rope,
        tensors: dict[str, Tensor],
        batch: int,
        capacity: int,
        num_heads: int,
        head_tables: bool = False,
        softcap: float = 0.0,
    ) -> None:
        self.plan, self.layer, self.rope = plan, plan.layers[0], rope
        self.library = cpu_library()
        heads, dim, block = self.layer.num_kv_heads, self.layer.head_dim, plan.block_size
        self.struct = kvrt.layer_struct(
            plan, 0, num_heads=num_heads, rope=rope.table(capacity).contiguous(), tensors=tensors, softcap=softcap
        )
        self.num_heads, self.logical = num_heads, -(-capacity // block)
        tables = heads if head_tables else 1
        g = torch.Generator().manual_seed(7)
        pool = torch.randperm(batch * tables * self.logical, generator=g).to(torch.int32)
        self.tables = pool.view(batch, tables, self.logical).contiguous()
        self.pages = torch.zeros(len(pool), heads, self.layer.layout(block).head_bytes, dtype=torch.uint8)
        exact = getattr(torch, plan.exact_dtype)
        self.tail = torch.full((batch, 2, heads, plan.tail(0), dim), torch.nan, dtype=exact)
        self.sinks = torch.full((batch, 2, heads, plan.sinks(0), dim), torch.nan, dtype=exact)
        self.lengths = torch.zeros(batch, dtype=torch.int32)
        self.slots = torch.randperm(batch, generator=g).to(torch.int32)
        self.positions: Tensor | None = None
        self.head_lengths: Tensor | None = None  # [batch, num_kv_heads] int32, instead of lengths

    def cache(self) -> kvrt.Cache:
        """Return the struct of pointers."""
        batch, tables, logical = self.tables.shape
        lengths = self.lengths if self.head_lengths is None else self.head_lengths
        return kvrt.Cache(
            pages=self.pages.data_ptr(), tail=self.tail.data_ptr(), sinks=self.sinks.data_ptr(),
            block_tables=self.tables.data_ptr(), block_table_stride=tables * logical,
            block_table_head_stride=logical if tables > 1 else 0, lengths=lengths.data_ptr(),
            length_stride=lengths.stride(0), length_head_stride=int(lengths.ndim == 2),
            slots=self.slots.data_ptr(), positions=kvrt.pointer(self.positions),
            position_stride=0 if self.positions is None else self.positions.shape[1],
            num_seqs=batch, max_pages=logical,
        )  # fmt: skip

    def append_args(self, new: list[Tensor]) -> kvrt.Append:
        """Lay out the arguments for new tokens: per sequence [2, num_kv_heads, tokens, head_dim]."""
        counts = [x.shape[2] for x in new]
        rows = torch.cat([x.transpose(1, 2) for x in new], dim=1).contiguous()  # [2, rows, heads, dim]
        starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
        _, _, heads, dim = rows.shape
        a = kvrt.Append(
            cache=self.cache(), starts=starts.data_ptr(), max_new=max(counts), dtype=kvrt.DTYPES[rows.dtype],
            k=rows[0].data_ptr(), v=rows[1].data_ptr(), k_row_stride=heads * dim, k_head_stride=dim,
            v_row_stride=heads * dim, v_head_stride=dim,
        )  # fmt: skip
        if all(x == 1 for x in counts):
            a.starts = None
        a.kept = (rows, starts)
        return a

    def append(self, new: list[Tensor], *, threads: int = 1, advance: bool = True) -> None:
        """Append and, by default, count the tokens."""
        self.library.call("append", byref(self.struct), byref(self.append_args(new)), byref(kvrt.Exec(threads, 0)))
        if advance:
            self.lengths += torch.tensor([x.shape[2] for x in new], dtype=torch.int32)

    def attend_args(self, q: Tensor, *, parts: int = kvrt.ALL, splits: int = 1, split_pages: int = 0) -> kvrt.Attend:
        """Lay out the arguments for queries [batch, num_heads, head_dim], with every output."""
        batch, heads, dim = q.shape
        most = int(self.lengths.max()) + 3
        out = {
            "out": torch.empty_like(q), "lse": torch.empty(batch, heads), "packed_mass": torch.empty(batch, heads),
            "mass": torch.full((batch, heads, most), 9.0),
            "key_sum": torch.empty(batch, heads, self.layer.num_kv_heads, dim),
        }  # fmt: skip
        size = self.library.workspace_bytes(self.struct, batch, splits)
        work = torch.empty(size // 4 + 4)
        a = kvrt.Attend(
            cache=self.cache(), parts=parts, dtype=kvrt.DTYPES[q.dtype], q=q.data_ptr(), q_row_stride=heads * dim,
            q_head_stride=dim, out_row_stride=heads * dim, out_head_stride=dim, mass_stride=most, splits=splits,
            split_pages=split_pages, workspace=work.data_ptr(), workspace_bytes=size,
            **{name: x.data_ptr() for name, x in out.items()},
        )  # fmt: skip
        a.kept, a.results = (q, work), out
        return a

    def attend(self, q: Tensor, *, threads: int = 1, **options: Any) -> dict[str, Tensor]:
        """Attend from the token after ``lengths``, and return every output."""
        a = self.attend_args(q, **options)
        self.library.call("attend", byref(self.struct), byref(a), byref(kvrt.Exec(threads, 0)))
        return a.results

    def expand(
        self, row: int, first: int, count: int, dtype: torch.dtype = torch.float32, *, before: bool = False,
        with_sinks: bool = False, threads: int = 1,
    ) -> Tensor:  # fmt: skip
        """Decode slots: [2, num_kv_heads, count, head_dim]."""
        heads, dim = self.layer.num_kv_heads, self.layer.head_dim
        out = torch.empty(2, heads, count, dim, dtype=dtype)
        a = kvrt.Expand(
            cache=self.cache(), sequence=row, dtype=kvrt.DTYPES[dtype], first=first, count=count, k=out[0].data_ptr(),
            v=out[1].data_ptr(), k_head_stride=count * dim, k_row_stride=dim, v_head_stride=count * dim,
            v_row_stride=dim, keys_before_rope=int(before), with_sinks=int(with_sinks),
        )  # fmt: skip
        self.library.call("expand", byref(self.struct), byref(a), byref(kvrt.Exec(threads, 0)))
        return out

    def page(self, row: int, logical: int) -> Tensor:
        """Return a page's bytes, [num_kv_heads, head_bytes]."""
        heads = torch.arange(self.layer.num_kv_heads)
        tables = self.tables[row, :, logical].long().expand(self.layer.num_kv_heads)
        return self.pages[tables, heads]

    def tail_of(self, row: int) -> Tensor:
        """Return the tokens of a sequence's tail in order, [2, num_kv_heads, tokens, head_dim]."""
        n = int(self.lengths[row])
        where = torch.arange(self.plan.boundary(0, n), n) % max(1, self.plan.tail(0))
        return self.tail[int(self.slots[row])][:, :, where]


def reference(
    layer: PackedLayer, row: int, q: Tensor, *, rope: Rope, parts: int = kvrt.ALL, softcap: float = 0.0, width: int = 0
) -> dict[str, Tensor]:
    """What :func:`Store.attend` should give for q [num_heads, head_dim], in float64, once its token is appended."""
    n, plan = layer.lengths[row], layer.plan
    boundary, sinks = layer.boundary(n), min(layer.sinks.shape[3], layer.boundary(n))
    first = max(0, n - plan.window) if plan.window else 0
    packed_k, packed_v, start = layer.read(row)
    group = q.shape[0] // plan.num_kv_heads
    seen: list[tuple[Tensor, Tensor, Tensor, bool]] = []
    if parts & kvrt.EXACT:
        slots = torch.arange(first, max(first, sinks))
        seen.append((slots, *layer.sinks[:, row][:, :, slots], False))
        slots = torch.arange(max(first, boundary), n)
        seen.append((slots, *layer.tail[:, row][:, :, slots - boundary], False))
    if parts & kvrt.PACKED:
        slots = torch.arange(min(boundary, max(first, layer.sinks.shape[3])), boundary)
        seen.append((slots, packed_k[:, slots - start], packed_v[:, slots - start], True))
    slots = torch.cat([x[0] for x in seen])
    k, v = (torch.cat([x[i].double() for x in seen], dim=1) for i in (1, 2))
    packed = torch.cat([torch.full((len(x[0]),), float(x[3]), dtype=torch.float64) for x in seen])
    wide = q.double().view(plan.num_kv_heads, group, -1)
    scores = (wide @ k.transpose(1, 2)) * plan.head_dim**-0.5
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    lse = scores.logsumexp(-1).flatten()
    weights = scores.softmax(-1).nan_to_num() if len(slots) else scores
    out = (weights @ v).flatten(0, 1)
    mass = torch.zeros(q.shape[0], width or n, dtype=torch.float64)
    mass[:, slots] = weights.flatten(0, 1)
    plain = rope.unrotate(k, slots) if len(slots) else k
    key_sum = torch.einsum("hs,jsd->hjd", weights.flatten(0, 1) * packed, plain)
    return {
        "out": out, "lse": lse, "mass": mass, "key_sum": key_sum,
        "packed_mass": (weights.flatten(0, 1) * packed).sum(-1),
    }  # fmt: skip
