"""Native kernels against the plain reference: every feature once, on a ragged batch. Part of ``benchmarks/gpu.py``."""

from __future__ import annotations

from typing import Any

import torch

from kvcli.evaluation import attention_speed as attention
from kvcli.models.architectures import LayerGeometry
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.runtime import kvrt
from kvcli.runtime.attention import attend
from kvcli.runtime.native_cache import NativeCache
from kvcli.runtime.packed_cache import PackedCache

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
    }


def check(
    library: kvrt.Library, device: torch.device, plan: CachePlan, lengths: tuple[int, ...], dtype: torch.dtype
) -> dict[str, Any]:
    """Append ragged sequences and one token more, attend, and compare with the reference on the CPU."""
    generator = torch.Generator().manual_seed(0)
    layer = plan.layers[0]
    geometry = (LayerGeometry(layer.num_kv_heads, 4 * layer.num_kv_heads, layer.head_dim, layer.kind, layer.window),)
    rope = attention.any_rope(layer.head_dim)
    means = {f"layer.0.{x}.mean": torch.randn(layer.num_kv_heads, layer.head_dim, generator=generator) for x in "kv"}
    tensors = means if layer.center else {}
    native = NativeCache(
        plan, geometry, capacity=max(lengths) + 1, batch_size=len(lengths), rope=rope, tensors=tensors,
        library=library, device=device,
    )  # fmt: skip
    plain = PackedCache(plan, batch_size=len(lengths), rope=rope, tensors=tensors).stores[0]
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
    found, wanted = out.float().cpu(), torch.stack(expected)
    error = ((found - wanted).abs().amax() / wanted.abs().amax()).item()
    return {"passed": error <= TOLERANCE[dtype], "relative_error": error, "limit": TOLERANCE[dtype]}  # NaN fails
