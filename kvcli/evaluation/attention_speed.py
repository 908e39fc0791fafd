"""Attention of one new token over a long cache: the packed formats beside torch's own attention on dense tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvcli.errors import InputError
from kvcli.evaluation.speed import Contestant, Flush
from kvcli.models.architectures import LayerGeometry, Rope
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.runtime import kvrt
from kvcli.runtime.native_cache import NativeCache
from kvcli.runtime.packed_cache import PackedCache
from kvcli.runtime.rebuilding import rebuilds

CHUNK = 512  # tokens that are appended at once while a cache is filled
UNIFORM_BITS = (16, 8, 4, 3, 2)
PHASE = "attention"


class Step(Protocol):
    """One decoding step's attention: all layers, one query a sequence."""

    @property
    def bytes_read(self) -> int:
        """Bytes of keys and values that it has to read."""
        ...

    def __call__(self) -> None:
        """Attend in every layer, one after the other."""
        ...


def uniform(geometry: Sequence[LayerGeometry], bits: int, *, block_size: int = 64, dtype: str = "float32") -> CachePlan:
    """Return a plan that keeps everything in one plain format: a scale of 8 bits for each token's head."""
    layers = []
    for g in geometry:
        fmt = KVFormat.exact() if bits == 16 else KVFormat(bits, "token", g.head_dim, scale_dtype="e5m3")
        layers.append(LayerPlan(g.num_kv_heads, g.head_dim, fmt, fmt, kind=g.kind, window=g.window))
    return CachePlan(tuple(layers), block_size=block_size, dtype=dtype)


def any_rope(head_dim: int) -> Rope:
    """Return a rotary embedding of the usual kind: which frequencies it turns by makes no step faster or slower."""
    return Rope(10_000.0 ** (-torch.arange(0, head_dim, 2).float() / head_dim))


def bytes_read(plan: CachePlan, n: int, batch: int = 1) -> int:
    """Bytes of the cache that the query at slot n - 1 of each sequence has to read in all layers.

    Pages below the boundary (of a page that is seen in part, its share), exact tokens above it, and the sinks' exact
    copies.
    """
    total = 0.0
    exact = 4 if plan.exact_dtype == "float32" else 2
    for i, layer in enumerate(plan.layers):
        first = 0 if layer.window is None else max(0, n - layer.window)
        boundary = max(first, plan.boundary(i, n))
        total += (boundary - first) * layer.page_bytes(plan.block_size) / plan.block_size
        total += (n - boundary + min(plan.sinks(i), boundary)) * layer.scalars_per_token * exact
    return batch * round(total)


def random_kv(layer: LayerPlan, tokens: int, generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return random keys and values [tokens, num_kv_heads, head_dim] on the generator's device."""
    shape = (2, tokens, layer.num_kv_heads, layer.head_dim)
    k, v = torch.randn(shape, generator=generator, device=generator.device).to(dtype)
    return k, v


def fill(cache: NativeCache, depth: int, dtype: torch.dtype = torch.float32) -> None:
    """Let every sequence hold ``depth`` random tokens.

    Layers of one kind, and sequences, get copies of the same bytes at addresses of their own: nobody reads them faster
    for that, and quantising them all would take minutes.
    """
    if cache.device.type == "cuda":  # a recorded graph leaves its own stream behind
        cache.exec.stream = torch.cuda.current_stream(cache.device).cuda_stream
    generator = torch.Generator(cache.device).manual_seed(0)
    kinds = [replace(layer, predictor=None) for layer in cache.plan.layers]  # residuals are as large as values
    first: dict[LayerPlan, int] = {}
    for i, layer in enumerate(kinds):
        first.setdefault(layer, i)
    cache.reset()
    for begin in range(0, depth, CHUNK):
        tokens = min(CHUNK, depth - begin)
        for layer, i in first.items():
            k, v = random_kv(layer, tokens, generator, dtype)
            cache.append_chunk(i, 0, k, v)
        cache.advance(tokens, 0)
    for i, layer in enumerate(kinds):
        source, store = cache.layers[first[layer]], cache.layers[i]
        pages = store.pages.shape[0] // cache.batch_size
        for row in range(cache.batch_size):
            if (i, row) != (first[layer], 0):
                store.pages[row * pages : (row + 1) * pages] = source.pages[:pages]
                store.tail[row], store.sinks[row] = source.tail[0], source.sinks[0]
    cache.advance_to(depth)


class NativeAttention:
    """The native kernels on a plan."""

    def __init__(
        self,
        plan: CachePlan,
        geometry: tuple[LayerGeometry, ...],
        depth: int,
        *,
        batch: int = 1,
        tensors: Mapping[str, Tensor] | None = None,
        library: kvrt.Library | None = None,
        device: torch.device | str = "cpu",
        threads: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if rebuilds(plan):
            raise InputError("attention alone tells nothing where layers are rebuilt; kvcli bench decode times them.")
        self.cache = NativeCache(
            plan, geometry, capacity=depth, batch_size=batch, rope=any_rope(geometry[0].head_dim), tensors=tensors,
            library=library, device=device, threads=threads,
        )  # fmt: skip
        fill(self.cache, depth)
        self.cache.advance_to(depth - 1)  # kernels are told the lengths before the step, and the last token is there
        self.bytes_read = bytes_read(plan, depth, batch)
        self.q = [random_query(g, batch, device, dtype) for g in geometry]
        self.out = [torch.empty_like(q) for q in self.q]

    def __call__(self) -> None:
        """Attend in every layer, one after the other."""
        for i, (q, out) in enumerate(zip(self.q, self.out, strict=True)):
            self.cache.attend(i, q, out)


class ReferenceAttention:
    """The plain reference on a plan; it cannot attend without appending, so each step adds a token."""

    def __init__(
        self,
        plan: CachePlan,
        geometry: tuple[LayerGeometry, ...],
        depth: int,
        *,
        batch: int = 1,
        tensors: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        rope = any_rope(geometry[0].head_dim)
        self.cache = PackedCache(plan, batch_size=batch, capacity=depth, rope=rope, tensors=tensors)
        generator = torch.Generator().manual_seed(0)
        for store in self.cache.stores:
            for row in range(batch):
                k, v = random_kv(store.plan, depth - 1, generator, dtype)
                store.append(row, store.exact(row, k.transpose(0, 1), v.transpose(0, 1)))
        self.bytes_read = bytes_read(plan, depth, batch)
        self.q = [random_query(g, batch, "cpu", dtype) for g in geometry]
        self.new = [random_kv(layer, batch, generator, dtype) for layer in plan.layers]

    def __call__(self) -> None:
        """Append and attend in every layer, one after the other."""
        from kvcli.runtime.attention import attend

        for store, q, (k, v) in zip(self.cache.stores, self.q, self.new, strict=True):
            for row in range(q.shape[0]):
                scale = q.shape[-1] ** -0.5
                attend(store, row, q[row, :, None], k[row, :, None], v[row, :, None], scale)


class Sdpa:
    """Torch's attention on dense keys and values.

    Query heads that share a key head are folded into the query axis. :meth:`as_gqa` calls it as Transformers does, with
    ``enable_gqa``, which takes five times as long in bfloat16 on a CPU.
    """

    def __init__(
        self,
        geometry: Sequence[LayerGeometry],
        depth: int,
        *,
        batch: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.layers = []
        self.gqa = False
        self.bytes_read = 0
        for g in geometry:
            seen = min(depth, g.window or depth)
            k, v = (torch.randn(batch, g.num_kv_heads, seen, g.head_dim, device=device, dtype=dtype) for _ in range(2))
            q = random_query(g, batch, device, dtype)
            self.layers.append((q.unflatten(1, (g.num_kv_heads, -1)), k, v))
            self.bytes_read += k.nbytes + v.nbytes

    def as_gqa(self) -> Sdpa:
        """Return the same on the same tensors, called with ``enable_gqa``."""
        other = copy(self)
        other.gqa = True
        other.layers = [(q.flatten(1, 2)[:, :, None], k, v) for q, k, v in self.layers]
        return other

    def __call__(self) -> None:
        """Attend in every layer, one after the other."""
        for q, k, v in self.layers:
            scaled_dot_product_attention(q, k, v, enable_gqa=self.gqa)


def random_query(g: LayerGeometry, batch: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Return queries [batch, num_heads, head_dim]."""
    return torch.randn(batch, g.num_heads, g.head_dim, device=device).to(dtype)


def contestant(name: str, step: Step, batch: int, flush: Flush | None = None) -> Contestant:
    """Enter a step into a race; ``flush`` sees to it that it finds nothing in the processor's caches."""
    return Contestant(
        name, {PHASE: step}, {PHASE: batch}, bytes_read={PHASE: step.bytes_read}, prepare=flush or (lambda: None)
    )


def contestants(
    plan: CachePlan,
    geometry: tuple[LayerGeometry, ...],
    depth: int,
    *,
    backend: str,
    batch: int = 1,
    tensors: Mapping[str, Tensor] | None = None,
    threads: int = 0,
    bits: Sequence[int] = UNIFORM_BITS,
    flush: bool = True,
) -> list[Contestant]:
    """Enter a plan, uniform plans of the same shape, and torch's attention, in this order.

    Parameters
    ----------
    plan, geometry, tensors
        What an artifact holds.
    depth
        Tokens that each query sees.
    backend
        ``cpu``, ``cuda`` or ``reference``.
    batch, threads
        Sequences, and CPU threads.
    bits
        Of the uniform plans.
    flush
        Whether caches are emptied before each turn.
    """
    device = "cuda" if backend == "cuda" else "cpu"
    plan = replace(plan, dtype="float32") if plan.dtype == "float64" else plan
    dtype: torch.dtype = getattr(torch, plan.dtype)

    def enter(p: CachePlan, t: Mapping[str, Tensor] | None) -> Step:
        if backend == "reference":
            return ReferenceAttention(p, geometry, depth, batch=batch, tensors=t, dtype=dtype)
        return NativeAttention(
            p, geometry, depth, batch=batch, tensors=t, library=kvrt.library(backend), device=device,
            threads=threads, dtype=dtype,
        )  # fmt: skip

    steps: dict[str, Callable[[], Step]] = {f"kvcli {backend}": partial(enter, plan, tensors)}
    for b in bits:
        like = uniform(geometry, b, block_size=plan.block_size, dtype=plan.dtype)
        steps[f"kvcli {backend}, uniform {b} bits"] = partial(enter, like, None)
    for kind in (torch.float32, torch.bfloat16):
        name = f"torch sdpa {str(kind).removeprefix('torch.')}"
        steps[name] = partial(Sdpa, geometry, depth, batch=batch, device=device, dtype=kind)
    emptied = Flush(device) if flush else None
    return [contestant(name, make(), batch, emptied) for name, make in steps.items()]
