"""The model runner of the engine: steps of any number of sequences on one pool, and chunks of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import byref
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvcli.engine.config import EngineConfig
from kvcli.engine.pool import PoolCache, PoolSize
from kvcli.errors import InputError
from kvcli.runtime import kvrt
from kvcli.runtime.packed_model import PackedModel
from kvcli.runtime.passes import Pass
from kvcli.runtime.rebuilding import rebuilds
from kvcli.runtime.runner import ModelRunner


class EngineRunner(ModelRunner):
    """A model on a pool of pages, on the CPU's native kernels.

    Parameters
    ----------
    model
        The model and its plan; with int4 weights it loses its own.
    config
        Settings.

    Attributes
    ----------
    cache
        The pool.
    size
        How large it is.

    Raises
    ------
    BudgetError
        If the memory does not hold one short sequence.
    InputError, UsageError, NativeError
        As :class:`ModelRunner` does.
    """

    cache: PoolCache

    def __init__(self, model: PackedModel, config: EngineConfig) -> None:
        if rebuilds(model.plan):
            raise InputError(
                "the engine does not rebuild layers from one another at every step; calibrate with --adapters absorbed."
            )
        self.size = PoolSize.of(model.plan, config, model.loaded.max_context)
        self.chunk = min(config.chunk, self.size.max_context)
        super().__init__(
            model.loaded, model.plan, model.tensors, weights=config.weights, activations=config.activations,
            capacity=self.size.max_context, batch_size=self.size.num_seqs, threads=config.threads,
            deterministic=config.deterministic,
        )  # fmt: skip

    def resize(self, *, capacity: int, batch_size: int = 1) -> None:
        """Start over with an empty pool."""
        self.cache = PoolCache(
            self.plan, self.loaded.geometry, size=self.size, rope=self.loaded.rope, tensors=self._tensors,
            library=self.library, device=self.device, threads=self.threads, deterministic=bool(self.block),
        )  # fmt: skip
        new = partial(torch.zeros, dtype=torch.int32, device=self.device)
        self._slots, self._lengths = new(batch_size), new(batch_size)
        self._tables = new(batch_size, self.cache.tables.shape[1])
        self._step = Pass(self, batch_size, self._lengths)
        rows = self.padded(batch_size)
        self._raw_logits = torch.zeros(rows, self.weights.head.shape[0], dtype=self.weights.logits_dtype)
        self._logits = self._raw_logits.float()
        self._steps: dict[int, tuple[Pass, list[tuple[Callable[[], Any], ...]], Callable[[], Any]]] = {}
        self._chunk, self._chunk_size, self._chunk_passes = None, 0, {}

    def _bind_attention(self, index: int, step: Pass) -> tuple[Callable[[], int], Callable[[], int]]:
        """Bind append and attend of the sequences that stand in the first rows of a step."""
        store = self.cache.layers[index]
        q, k, v = step.qkv_of(index)
        cache = self.cache.cache_struct(store)
        cache.block_tables, cache.lengths = self._tables.data_ptr(), self._lengths.data_ptr()
        cache.slots, cache.num_seqs = self._slots.data_ptr(), step.rows
        a, b = kvrt.Append.from_buffer_copy(store.append), kvrt.Attend.from_buffer_copy(store.attend)
        a.cache = b.cache = cache
        a.dtype = b.dtype = kvrt.DTYPES[self.dtype]
        a.k, a.v, a.k_row_stride, a.v_row_stride = k.data_ptr(), v.data_ptr(), k.stride(0), v.stride(0)
        b.q, b.out, b.q_row_stride = q.data_ptr(), step.mixed.data_ptr(), q.stride(0)
        b.out_row_stride = q.shape[1] * q.shape[2]
        layer, exec_ = byref(store.struct), byref(self.cache.exec)
        return (
            partial(self.library.function("append"), layer, byref(a), exec_),
            partial(self.library.function("attend"), layer, byref(b), exec_),
        )

    @torch.no_grad()
    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Feed one token to the sequences in some slots.

        Returns
        -------
        Tensor
            Logits of the next tokens, float32 [slots, vocabulary]. The next call writes over them.
        """
        rows, cache = len(slots), self.cache
        if rows not in self._steps:
            work = Pass(self, rows, share=self._step)
            padded = self.padded(rows)
            head = self.weights.head.bind(work.normed, self._raw_logits[:padded])
            self._steps[rows] = work, self._bind_layers(work), head
        work, layers, head = self._steps[rows]
        self._slots[:rows] = torch.tensor(slots, dtype=torch.int32)
        index = self._slots[:rows]
        torch.index_select(cache.lengths, 0, index, out=self._lengths[:rows])
        torch.index_select(cache.tables, 0, index, out=self._tables[:rows])
        work.tokens[:rows] = torch.tensor(tokens)
        self._run_layers(work, layers)
        head()
        if self._logits is not self._raw_logits:
            self._logits[:rows].copy_(self._raw_logits[:rows])
        cache.lengths.index_add_(0, index, torch.ones_like(index))
        for slot in slots:
            cache.host_lengths[slot] += 1
        return self._logits[:rows]

    @torch.no_grad()
    def extend(self, slot: int, tokens: Sequence[int], *, logits: int) -> Tensor | None:
        """Feed a chunk of tokens to the sequence in a slot; return the logits of so many of the last ones.

        Returns
        -------
        Tensor
            float32 [logits, vocabulary], None for 0.
        """
        hidden = self._run_chunk(torch.tensor(tokens), slot, self.chunk)
        return self._logits_of(hidden[-logits:]) if logits else None
