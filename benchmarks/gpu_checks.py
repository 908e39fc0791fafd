"""Native kernels against the plain reference: every feature once, on a ragged batch. Part of ``benchmarks/gpu.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvcli.evaluation import attention_speed as attention
from kvcli.models.architectures import LayerGeometry
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.quant.prediction import Linear, Predictor, Source
from kvcli.runtime import kvrt
from kvcli.runtime.attention import attend
from kvcli.runtime.native_cache import NativeCache
from kvcli.runtime.packed_cache import PackedCache
from kvcli.runtime.rebuilding import RebuildingAttention, rebuilds

TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 2e-2}  # of the largest output: sums in another order, bf16's rounding


def plans(head_dim: int) -> dict[str, CachePlan]:
    """Return a compact set of plans in which every feature of the kernels occurs."""

    def plan(k: KVFormat, v: KVFormat | None = None, **more: Any) -> CachePlan:
        shared = {x: more.pop(x) for x in ("block_size", "sink_tokens", "residual_window", "dtype") if x in more}
        return CachePlan((LayerPlan(2, head_dim, k, v or k, **more),), **{"block_size": 16, **shared})

    token = {b: KVFormat(b, "token", head_dim, scale_dtype="e5m3") for b in (2, 3, 4, 8)}
    channel = KVFormat(4, "channel", 32, symmetric=False)
    table = KVFormat(3, "token", 32, grid="gaussian", scale_dtype="e5m3")
    beside: dict[str, Any] = {"sink_tokens": 4, "residual_window": 32}
    # a layer's keys tell its values; the second layer is told by the first, and has to be rebuilt. In 8 bits a code
    # that rounding puts on the other side of its border does not show
    absorbed = Predictor(v=Linear((Source(0, "k"),)))
    seen = (Source(0, "k"), Source(0, "v"))
    told = Predictor(Linear(seen), Linear((Source(1, "k"), *seen)))
    first = LayerPlan(2, head_dim, token[4], token[8], predictor=absorbed, transform="hadamard", center=True)
    second = LayerPlan(2, head_dim, token[8], token[8], predictor=told)
    portable = {f"{b} bits, portable": plan(fmt, block_size=64) for b, fmt in token.items()}
    return portable | {
        "16 bits": plan(KVFormat.exact()),
        "16 bits, bfloat16": plan(KVFormat.exact(), dtype="bfloat16"),
        "4 bits K by channel, 2 bits V, window": plan(channel, token[2], block_size=32, **beside),
        "2 bits K by channel before RoPE, 3 bits V": plan(
            KVFormat(2, "channel", 16), token[3], rope="before", residual_window=16
        ),
        "3 bits by table, rotated, centred, window": plan(table, transform="hadamard", center=True, **beside),
        "2 bits rotated, 128 a page": plan(token[2], transform="hadamard", block_size=128, **beside),
        "4 bits asymmetric, sliding": plan(
            KVFormat(4, "token", 32, symmetric=False), kind="sliding", window=48, residual_window=16
        ),
        "8 bits K, 16 bits V": plan(token[8], KVFormat.exact(), sink_tokens=4),
        "4 bits K, 8 bits V less what K tells, window": CachePlan((first,), block_size=32, **beside),
        "8 bits K before RoPE, 8 bits V less what K tells, sliding": plan(
            token[8], rope="before", kind="sliding", window=48, predictor=absorbed, residual_window=16
        ),
        "8 bits less what the layer before tells": CachePlan((first, second), block_size=32, **beside),
    }


def check(
    library: kvrt.Library, device: torch.device, plan: CachePlan, lengths: tuple[int, ...], dtype: torch.dtype
) -> dict[str, Any]:
    """Append ragged sequences and one token more, attend, and compare with the reference on the CPU."""
    generator = torch.Generator().manual_seed(0)
    layer = plan.layers[0]
    geometry = tuple(
        LayerGeometry(x.num_kv_heads, 4 * x.num_kv_heads, x.head_dim, x.kind, x.window) for x in plan.layers
    )
    rope, tensors = attention.any_rope(layer.head_dim), model_tensors(plan, generator)
    native = NativeCache(
        plan, geometry, capacity=max(lengths) + 1, batch_size=len(lengths), rope=rope, tensors=tensors,
        library=library, device=device,
    )  # fmt: skip
    cache = PackedCache(plan, batch_size=len(lengths), rope=rope, tensors=tensors)
    if rebuilds(plan):
        return check_rebuilding(native, cache, lengths, dtype, generator)
    plain = cache.stores[0]
    kv = [attention.random_kv(layer, n + 1, generator, dtype) for n in lengths]
    q = torch.randn(len(lengths), geometry[0].num_heads, layer.head_dim, generator=generator).to(dtype)
    expected = []
    for row, (n, (k, v)) in enumerate(zip(lengths, kv, strict=True)):
        for begin in range(0, n, 700):  # chunks, whose ends are no page's
            part = slice(begin, min(begin + 700, n))
            native.append_chunk(0, row, k[part].to(device), v[part].to(device))
            native.advance(part.stop - begin, row)
        past, new = (x.transpose(0, 1).float() for x in (k, v)), slice(n, n + 1)
        k_all, v_all = past
        plain.append(row, plain.exact(row, k_all[:, :n], v_all[:, :n]))
        scale = layer.head_dim**-0.5
        expected.append(attend(plain, row, q[row, :, None].float(), k_all[:, new], v_all[:, new], scale)[:, 0])
    k, v = (torch.stack([pair[i][-1] for pair in kv]).to(device) for i in (0, 1))
    moved = q.to(device)
    out = torch.empty_like(moved)
    native.append(0, k, v)
    native.attend(0, moved, out)
    return measured(out.float().cpu(), torch.stack(expected), dtype)


def model_tensors(plan: CachePlan, generator: torch.Generator) -> dict[str, Tensor]:
    """Return means and predictors so large that leaving them out would show."""
    out = {}
    for name, (dtype, shape) in plan.model_tensors().items():
        scale = shape[1] ** -0.5 if name.endswith("weight") else 1.0
        out[name] = (scale * torch.randn(shape, generator=generator)).to(torch.float16 if dtype == "F16" else None)
    return out


def check_rebuilding(
    native: NativeCache, cache: PackedCache, lengths: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Any]:
    """Run chunks through layers that are rebuilt from one another, and compare the last token's outputs."""
    run, plan, device = RebuildingAttention(native, 700, dtype), native.plan, native.device
    found, wanted = [], []
    for row, n in enumerate(lengths):
        kv = [attention.random_kv(x, n + 1, generator, dtype) for x in plan.layers]
        q = [torch.randn(n + 1, x.num_heads, x.head_dim, generator=generator).to(dtype) for x in native.geometry]
        for begin in range(0, n + 1, 700):
            part = slice(begin, min(begin + 700, n + 1))
            run.begin(torch.arange(part.start, part.stop, device=device))
            for i in range(len(plan.layers)):
                query, k, v = (x[part].to(device) for x in (q[i], *kv[i]))
                out = torch.empty_like(query)
                run(i, row, query, k, v, out)
                if part.stop > n:
                    found.append(out[-1].float().cpu())
            native.advance(part.stop - part.start, row)
        past = [[x.transpose(0, 1).float() for x in pair] for pair in kv]
        for store, (k, v) in zip(cache.stores, past, strict=True):
            store.append(row, store.exact(row, k[:, :n], v[:, :n]))
        for store, query, (k, v) in zip(cache.stores, q, past, strict=True):
            scale = store.plan.head_dim**-0.5
            wanted.append(attend(store, row, query[n, :, None].float(), k[:, n:], v[:, n:], scale)[:, 0])
    return measured(torch.stack(found), torch.stack(wanted), dtype)


def measured(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Return the largest error, as a part of the largest output, and whether it is allowed."""
    error = ((found - wanted).abs().amax() / wanted.abs().amax()).item()
    return {"passed": error <= TOLERANCE[dtype], "relative_error": error, "limit": TOLERANCE[dtype]}  # NaN fails
