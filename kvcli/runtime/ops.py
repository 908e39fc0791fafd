"""The native calls as torch custom ops, with fake implementations: torch.compile keeps whole graphs around them.

The ops name the cache by a number from :func:`register`, and read and write the tensors they are given: a compiler may
hand them copies and put those back.
"""

from __future__ import annotations

from ctypes import byref
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from kvcli.runtime import kvrt
from kvcli.runtime.native_cache import NativeCache

_caches: WeakValueDictionary[int, NativeCache] = WeakValueDictionary()


def register(cache: NativeCache) -> int:
    """Return the number under which ops find a cache, for as long as the cache lives."""
    number = id(cache)
    _caches[number] = cache
    return number


@torch.library.custom_op("kvcli::append", mutates_args=("pages", "tail", "sinks"))
def append(
    k: Tensor, v: Tensor, pages: Tensor, tail: Tensor, sinks: Tensor, lengths: Tensor, cache: int, layer: int
) -> None:
    """Append one token to every sequence: k, v [batch, num_kv_heads, head_dim]; see :meth:`NativeCache.append`."""
    owner = _caches[cache]
    store = owner.layers[layer]
    a = kvrt.Append.from_buffer_copy(store.append)
    _redirect(a.cache, pages, tail, sinks, lengths)
    a.k, a.v, a.dtype = k.data_ptr(), v.data_ptr(), kvrt.DTYPES[k.dtype]
    a.k_row_stride, a.v_row_stride = k.stride(0), v.stride(0)
    owner.library.call("append", byref(store.struct), byref(a), byref(owner.exec))


@torch.library.custom_op("kvcli::attend", mutates_args=())
def attend(q: Tensor, pages: Tensor, tail: Tensor, sinks: Tensor, lengths: Tensor, cache: int, layer: int) -> Tensor:
    """Attend from the token just appended: q and the result [batch, num_heads, head_dim]."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    owner = _caches[cache]
    store = owner.layers[layer]
    a = kvrt.Attend.from_buffer_copy(store.attend)
    _redirect(a.cache, pages, tail, sinks, lengths)
    a.q, a.out, a.dtype = q.data_ptr(), out.data_ptr(), kvrt.DTYPES[q.dtype]
    a.q_row_stride, a.out_row_stride = q.stride(0), out.stride(0)
    owner.library.call("attend", byref(store.struct), byref(a), byref(owner.exec))
    return out


@attend.register_fake
def _(q: Tensor, pages: Tensor, tail: Tensor, sinks: Tensor, lengths: Tensor, cache: int, layer: int) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op("kvcli::hadamard", mutates_args=())
def hadamard(x: Tensor) -> Tensor:
    """Rotate the last axis of float32 [..., head_dim]; see :func:`kvcli.quant.transforms.hadamard`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    rows = x.numel() // x.shape[-1]
    _library(x).call("hadamard", out.data_ptr(), x.data_ptr(), rows, x.shape[-1], byref(_exec(x)))
    return out


@torch.library.custom_op("kvcli::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last axis of [..., width]; the weight [width] is of the same dtype."""
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    _library(x).call(
        "rms_norm", out.data_ptr(), x.data_ptr(), None, weight.data_ptr(), x.numel() // width, width, eps,
        kvrt.DTYPES[x.dtype], byref(_exec(x)),
    )  # fmt: skip
    return out


@torch.library.custom_op("kvcli::silu_mul", mutates_args=())
def silu_mul(x: Tensor) -> Tensor:
    """Return silu(gate) * up of [..., 2 * width], gate first: [..., width]."""
    x = x.contiguous()
    width = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], width)
    _library(x).call(
        "silu_mul", out.data_ptr(), x.data_ptr(), out.numel() // width, width, kvrt.DTYPES[x.dtype], byref(_exec(x))
    )
    return out


@hadamard.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@silu_mul.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


def _redirect(cache: kvrt.Cache, pages: Tensor, tail: Tensor, sinks: Tensor, lengths: Tensor) -> None:
    """Point a struct at the storage an op was given, which may be a compiler's copy."""
    cache.pages, cache.tail, cache.sinks = pages.data_ptr(), tail.data_ptr(), sinks.data_ptr()
    cache.lengths = lengths.data_ptr()


def _library(x: Tensor) -> kvrt.Library:
    return kvrt.library("cuda" if x.is_cuda else "cpu")


def _exec(x: Tensor) -> kvrt.Exec:
    return kvrt.Exec(0, 0, torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None)
