"""Binding of the native runtime, ``csrc/kvrt.h``: the structs, the libraries, and the calls with their errors.

Only pointers cross this border. What the structs mean stands in ``kv_layout.h`` and ``kvrt.h``; the classes here name
the same fields in the same order, and a test holds the two together.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcli.errors import KvcliError
from kvcli.plan import CachePlan
from kvcli.quant import grids, linear_maps
from kvcli.quant.format import KVFormat

VERSION = 3
LIBRARIES = Path(__file__).parent / "lib"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
PACKED, EXACT, ALL = 1, 2, 3
ROPE_ROWS = 16  # rows that the CUDA kernels want of the rotary table at least


class Format(ctypes.Structure):
    """``kv_format``."""

    _fields_ = (
        ("bits", c_int32), ("axis", c_int32), ("group", c_int32), ("symmetric", c_int32), ("scale_dtype", c_int32),
        ("table", c_int32), ("hadamard", c_int32), ("level_steps", c_int32), ("levels", c_float * 16),
    )  # fmt: skip


class Layer(ctypes.Structure):
    """``kv_layer``."""

    _fields_ = (
        ("k", Format), ("v", Format), ("num_heads", c_int32), ("num_kv_heads", c_int32), ("head_dim", c_int32),
        ("block_size", c_int32), ("sink_tokens", c_int32), ("residual_window", c_int32), ("tail_tokens", c_int32),
        ("window", c_int32), ("portable", c_int32), ("rope_before", c_int32), ("page_dtype", c_int32),
        ("exact_dtype", c_int32), ("softmax_scale", c_float), ("softcap", c_float), ("k_mean", c_void_p),
        ("v_mean", c_void_p), ("rope", c_void_p), ("rope_positions", c_int64), ("v_weight", c_void_p),
    )  # fmt: skip


class PageLayout(ctypes.Structure):
    """``kv_page_layout``."""

    _fields_ = tuple(
        (name, c_int64)
        for name in ("k_codes", "k_scales", "k_zeros", "v_codes", "v_scales", "v_zeros", "head_bytes")
    )  # fmt: skip


class Exec(ctypes.Structure):
    """``kvrt_exec``."""

    _fields_ = (("threads", c_int32), ("reserved", c_int32), ("stream", c_void_p))


class Cache(ctypes.Structure):
    """``kvrt_cache``."""

    _fields_ = (
        ("pages", c_void_p), ("tail", c_void_p), ("sinks", c_void_p), ("block_tables", c_void_p),
        ("block_table_stride", c_int64), ("block_table_head_stride", c_int64), ("lengths", c_void_p),
        ("length_head_stride", c_int64), ("length_stride", c_int64), ("slots", c_void_p), ("positions", c_void_p),
        ("position_stride", c_int64), ("num_seqs", c_int32), ("max_pages", c_int32),
    )  # fmt: skip


class Append(ctypes.Structure):
    """``kvrt_append_args``."""

    _fields_ = (
        ("cache", Cache), ("starts", c_void_p), ("max_new", c_int32), ("dtype", c_int32), ("k", c_void_p),
        ("v", c_void_p), ("k_row_stride", c_int64), ("k_head_stride", c_int64), ("v_row_stride", c_int64),
        ("v_head_stride", c_int64), ("k_predicted", c_void_p), ("v_predicted", c_void_p),
    )  # fmt: skip


class Attend(ctypes.Structure):
    """``kvrt_attend_args``."""

    _fields_ = (
        ("cache", Cache), ("parts", c_int32), ("dtype", c_int32), ("q", c_void_p), ("out", c_void_p),
        ("q_row_stride", c_int64), ("q_head_stride", c_int64), ("out_row_stride", c_int64),
        ("out_head_stride", c_int64), ("query_positions", c_void_p), ("lse", c_void_p), ("mass", c_void_p),
        ("mass_stride", c_int64), ("key_sum", c_void_p), ("packed_mass", c_void_p), ("splits", c_int32),
        ("split_pages", c_int32), ("workspace", c_void_p), ("workspace_bytes", c_int64),
    )  # fmt: skip


class Expand(ctypes.Structure):
    """``kvrt_expand_args``."""

    _fields_ = (
        ("cache", Cache), ("sequence", c_int32), ("dtype", c_int32), ("first", c_int64), ("count", c_int64),
        ("k", c_void_p), ("v", c_void_p), ("k_head_stride", c_int64), ("k_row_stride", c_int64),
        ("v_head_stride", c_int64), ("v_row_stride", c_int64), ("keys_before_rope", c_int32), ("with_sinks", c_int32),
    )  # fmt: skip


class Chunk(ctypes.Structure):
    """``kvrt_chunk_args``."""

    _fields_ = (
        ("q", c_void_p), ("out", c_void_p), ("lse", c_void_p), ("q_row_stride", c_int64), ("out_row_stride", c_int64),
        ("dtype", c_int32), ("out_dtype", c_int32), ("start", c_int64), ("tokens", c_int64), ("packed_k", c_void_p),
        ("packed_v", c_void_p), ("exact_k", c_void_p), ("exact_v", c_void_p), ("packed_first", c_int64),
        ("packed_count", c_int64), ("packed_head_stride", c_int64), ("exact_first", c_int64), ("exact_count", c_int64),
        ("exact_head_stride", c_int64),
    )  # fmt: skip


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "kvrt_version": (c_int, ()),
    "kvrt_kind": (c_char_p, ()),
    "kvrt_status_text": (c_char_p, (c_int,)),
    "kvrt_variant": (c_char_p, (c_int, POINTER(c_char_p))),
    "kvrt_use_variant": (c_int, (c_char_p,)),
    "kvrt_current_variant": (c_char_p, ()),
    "kvrt_page_layout": (c_int, (POINTER(Layer), POINTER(PageLayout))),
    "kvrt_boundary": (c_int64, (POINTER(Layer), c_int64)),
    "kvrt_append": (c_int, (POINTER(Layer), POINTER(Append), POINTER(Exec))),
    "kvrt_attend_workspace": (c_int64, (POINTER(Layer), c_int32, c_int32)),
    "kvrt_attend": (c_int, (POINTER(Layer), POINTER(Attend), POINTER(Exec))),
    "kvrt_expand": (c_int, (POINTER(Layer), POINTER(Expand), POINTER(Exec))),
    "kvrt_attend_chunk": (c_int, (POINTER(Layer), POINTER(Chunk), POINTER(Exec))),
    "kvrt_hadamard": (c_int, (c_void_p, c_void_p, c_int64, c_int32, POINTER(Exec))),
    "kvrt_rms_norm": (
        c_int, (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int32, c_float, c_int32, POINTER(Exec)),
    ),
    "kvrt_rope": (
        c_int,
        (
            c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_float, c_int64, c_int32, c_int32, c_int32,
            c_int32, POINTER(Exec),
        ),
    ),
    "kvrt_silu_mul": (c_int, (c_void_p, c_void_p, c_int64, c_int32, c_int32, POINTER(Exec))),
    "kvrt_int4_matmul": (
        c_int,
        (
            c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int32, c_int32, c_int32, c_int32, c_int32, c_int32,
            c_int32, POINTER(Exec),
        ),
    ),
    "kvrt_int4_expand": (
        c_int, (c_void_p, c_void_p, c_int32, c_int32, c_int32, c_int32, c_int32, POINTER(Exec)),
    ),
}  # fmt: skip


class NativeError(KvcliError):
    """A native call that did not succeed."""


class Library:
    """One library that implements ``kvrt.h``.

    Parameters
    ----------
    path
        The shared library.

    Raises
    ------
    NativeError
        If it cannot be loaded or speaks another version.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._c = ctypes.CDLL(str(path))
        except OSError as error:
            raise NativeError(f"{path.name} cannot be loaded: {error}.") from None
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._c, name)
            function.restype, function.argtypes = result, arguments
        if self._c.kvrt_version() != VERSION:
            raise NativeError(f"{path.name} speaks version {self._c.kvrt_version()} of kvrt.h, not {VERSION}.")
        self.kind: str = self._c.kvrt_kind().decode()

    def call(self, name: str, *arguments: Any) -> None:
        """Call ``kvrt_{name}``, and raise :class:`NativeError` unless it says it succeeded."""
        self.bind(name, *arguments)()

    def bind(self, name: str, *arguments: Any, kept: object = None) -> Callable[[], None]:
        """Return :meth:`call` with these arguments; ``kept`` lives as long, for pointers to point to."""
        function = self.function(name)

        def run(_: object = kept) -> None:
            if status := function(*arguments):
                raise NativeError(f"{name}: {self._c.kvrt_status_text(status).decode()}.")

        return run

    def function(self, name: str) -> Any:
        """Return ``kvrt_{name}`` itself, for loops that cannot afford :meth:`call`."""
        return getattr(self._c, f"kvrt_{name}")

    def workspace_bytes(self, layer: Layer, num_seqs: int, splits: int) -> int:
        """Bytes that :func:`kvrt_attend` needs to work in."""
        return int(self._c.kvrt_attend_workspace(byref(layer), num_seqs, splits))

    def page_layout(self, layer: Layer) -> dict[str, int]:
        """Return the byte offsets inside a head's slice as the header computes them."""
        out = PageLayout()
        self.call("page_layout", byref(layer), byref(out))
        return {field[0]: int(getattr(out, field[0])) for field in PageLayout._fields_}

    def boundary(self, layer: Layer, n: int) -> int:
        """Return the first exactly read slot as the header computes it."""
        return int(self._c.kvrt_boundary(byref(layer), n))

    def variants(self) -> dict[str, str | None]:
        """Return the kernels' names, best first, each with why it does not run here, or None if it does."""
        found: dict[str, str | None] = {}
        while True:
            reason = c_char_p()
            name = self._c.kvrt_variant(len(found), byref(reason))
            if name is None:
                return found
            found[name.decode()] = reason.value.decode() if reason.value else None

    @property
    def variant(self) -> str:
        """The kernels in use."""
        return str(self._c.kvrt_current_variant().decode())

    def use(self, variant: str | None) -> None:
        """Choose kernels by name, or the best that run."""
        self.call("use_variant", variant.encode() if variant else None)


@cache
def library(kind: str) -> Library:
    """Load the ``cpu`` or the ``cuda`` library that came with the package.

    Raises
    ------
    NativeError
        If there is none, or it cannot run here.
    """
    suffixes = [f"libkvrt_{kind}{x}" for x in (".so", ".dylib")]
    path = next((LIBRARIES / x for x in suffixes if (LIBRARIES / x).exists()), None)
    if path is None:
        raise NativeError(f"this build of kvcli has no {kind} kernels.")
    found = Library(path)
    reasons = found.variants()
    if all(reasons.values()):
        raise NativeError(f"the {kind} kernels do not run here: {'; '.join(str(r) for r in reasons.values())}.")
    return found


def format_struct(fmt: KVFormat, transform: str) -> Format:
    """Lay a format out for the kernels; ``transform`` is the layer's."""
    levels = grids.levels(fmt.grid, fmt.bits).tolist() if fmt.grid != "uniform" else []
    steps = grids.steps(fmt.grid, fmt.bits) if levels else 0
    return Format(
        fmt.bits, int(fmt.axis == "channel"), fmt.group, int(fmt.symmetric), int(fmt.scale_dtype == "e5m3"),
        int(bool(levels)), int(transform == "hadamard" and fmt.axis == "token" and not fmt.is_exact), steps,
        (c_float * 16)(*levels),
    )  # fmt: skip


def layer_struct(
    plan: CachePlan,
    index: int,
    *,
    num_heads: int,
    rope: Tensor | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
) -> Layer:
    """Lay one layer of a plan out for the kernels.

    Parameters
    ----------
    plan, index
        The plan, and which layer.
    num_heads
        Query heads.
    rope
        The model's table of cosines and sines, :meth:`kvcli.models.architectures.Rope.table`, on the kernels' device.
    tensors
        ``layer.{i}.k.mean`` and ``layer.{i}.v.mean``, float32, contiguous, on the kernels' device, for centred layers;
        and predictors as the artifact has them. The kernels add what values owe to their own layer's keys; of other
        predictors they get the bias, in the mean's place.
    softmax_scale
        Factor on scores; ``head_dim ** -0.5`` by default.
    softcap
        Bound on scores, 0 for none.

    Returns
    -------
    Layer
        Holds pointers into ``rope`` and ``tensors``, and keeps those tensors alive.
    """
    layer = plan.layers[index]
    maps = linear_maps.of_layer(plan, index, tensors or {})
    means = {w: (tensors or {}).get(f"layer.{index}.{w}.mean") if layer.center else None for w in "kv"}
    means |= {w: x.bias.contiguous() for w, x in maps.items()}
    absorbed = layer.predictor is not None and layer.predictor.is_absorbed(index)
    weight = maps["v"].weight.t().contiguous() if absorbed else None
    for tensor in (rope, *means.values()):
        if tensor is not None and (tensor.dtype != torch.float32 or not tensor.is_contiguous()):
            raise KvcliError("kernels read float32 tensors without gaps.")
    exact = {w: getattr(torch, getattr(plan, w)) for w in ("page_dtype", "exact_dtype")}
    out = Layer(
        format_struct(layer.k, layer.transform), format_struct(layer.v, layer.transform), num_heads,
        layer.num_kv_heads, layer.head_dim, plan.block_size, plan.sinks(index), plan.residual_window,
        plan.tail(index), layer.window or 0, int(plan.is_portable(index)), int(layer.rope == "before"),
        DTYPES[exact["page_dtype"]], DTYPES[exact["exact_dtype"]],
        layer.head_dim**-0.5 if softmax_scale is None else softmax_scale, softcap,
        pointer(means["k"]), pointer(means["v"]), pointer(rope), 0 if rope is None else rope.shape[0], pointer(weight),
    )  # fmt: skip
    out.kept = (rope, means, weight)  # ctypes structs carry attributes of their own
    return out


def pointer(tensor: Tensor | None) -> int | None:
    """Return a tensor's address."""
    return None if tensor is None else tensor.data_ptr()
