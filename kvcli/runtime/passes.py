"""One pass of the model over some rows, attention left out: buffers that never move, and the calls bound to them."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import byref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvcli.runtime import kvrt

if TYPE_CHECKING:
    from kvcli.runtime.runner import ModelRunner


class Pass:
    """What is not attention, for a number of rows: buffers, and the calls bound to them.

    Parameters
    ----------
    runner
        Weights, kernels and the cache's table of cosines.
    rows
        Tokens of a pass.
    positions
        int32 [rows] that the caller keeps up to date; made here by default.
    share
        A pass of more rows, whose buffers are used.

    Attributes
    ----------
    before
        Per layer: norm, projection to q, k and v, RoPE.
    after
        Per layer: output projection, norm, projection to gate and up, SiLU, down projection.
    normed
        [rows, hidden]: what linear layers and the head read.
    mixed
        [rows, num_heads * head_dim]: what attention writes.
    """

    def __init__(
        self, runner: ModelRunner, rows: int, positions: Tensor | None = None, *, share: Pass | None = None
    ) -> None:
        weights, geometry = runner.weights, runner.loaded.geometry
        self.geometry, self.rows, padded = geometry, rows, runner.padded(rows)
        heads = geometry[0]
        hidden, wide = weights.embedding.shape[1], weights.layers[0].down.shape[1]
        widths = {
            "stream": hidden, "normed": hidden, "added": hidden,
            "qkv": weights.layers[0].qkv.shape[0], "mixed": heads.num_heads * heads.head_dim,
            "gated": 2 * wide, "active": wide,
        }  # fmt: skip
        new = partial(torch.zeros, device=runner.device)
        if share is None:
            self.tokens = new(padded, dtype=torch.int64)
            self.positions = new(rows, dtype=torch.int32) if positions is None else positions
            made = {name: new(padded, width, dtype=runner.dtype) for name, width in widths.items()}
        else:
            self.tokens, self.positions = share.tokens[:padded], share.positions
            made = {name: getattr(share, name)[:padded] for name in widths}
        self.stream, self.normed, self.added, self.qkv, self.mixed, self.gated, self.active = made.values()
        self.buffers = [] if share else [self.tokens, self.positions, *made.values()]  # its own
        self.embed = partial(torch.index_select, weights.embedding, 0, self.tokens, out=self.stream)

        dtype, exec_ = kvrt.DTYPES[runner.dtype], byref(runner.cache.exec)
        table = runner.cache.rope_table
        call = runner.library.function
        at = {name: x.data_ptr() for name, x in made.items()}

        def norm(weight: Tensor, *, first: bool = False) -> Callable[[], int]:
            x, residual = (at["stream"], None) if first else (at["added"], at["stream"])
            return partial(
                call("rms_norm"), at["normed"], x, residual, weight.data_ptr(), rows, hidden, weights.eps, dtype, exec_
            )

        self.before: list[tuple[Callable[[], Any], ...]] = []
        self.after: list[tuple[Callable[[], Any], ...]] = []
        for i, (layer, shape) in enumerate(zip(weights.layers, geometry, strict=True)):
            rope = partial(
                call("rope"), at["qkv"], self.positions.data_ptr(), table.data_ptr(), table.shape[0],
                kvrt.pointer(layer.q_norm), kvrt.pointer(layer.k_norm), weights.eps, rows, shape.num_heads,
                shape.num_kv_heads, shape.head_dim, dtype, exec_,
            )  # fmt: skip
            silu = partial(call("silu_mul"), at["active"], at["gated"], rows, wide, dtype, exec_)
            self.before.append(
                (norm(layer.input_norm, first=i == 0), layer.qkv.bind(self.normed, self.qkv), rope)
            )  # fmt: skip
            o, down = layer.o.bind(self.mixed, self.added), layer.down.bind(self.active, self.added)
            self.after.append(
                (o, norm(layer.post_norm), layer.gate_up.bind(self.normed, self.gated), silu, down)
            )  # fmt: skip
        self.last_norm = norm(weights.norm)

    def qkv_of(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of a layer: [rows, heads, head_dim] each."""
        shape = self.geometry[index]
        whole = self.qkv[: self.rows].view(self.rows, -1, shape.head_dim)
        q, k, v = whole.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], 1)
        return q, k, v
