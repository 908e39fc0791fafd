"""The model runner: decodes and prefills on the native packed cache, without Transformers' cost per step.

A step of decoding is ten calls a layer, four of them matrix products, all bound beforehand to buffers that never move:
a loop over them is all that Python does, and a CUDA graph can record it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from ctypes import byref
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from kvcli.errors import KvcliError, UsageError
from kvcli.models.loading import LoadedModel
from kvcli.plan import CachePlan
from kvcli.runtime import kvrt
from kvcli.runtime.linear import Activations
from kvcli.runtime.native_cache import NativeCache
from kvcli.runtime.passes import Pass
from kvcli.runtime.prefill import ChunkAttention, TokenAttention
from kvcli.runtime.rebuilding import RebuildingAttention, rebuilds
from kvcli.runtime.weights import Kind, ModelWeights, check_runnable

CHUNK = 512  # tokens of one pass of prefill; any other gives the same function
BLOCK = 16  # rows of a matrix product where results must not depend on how many there are
Backend = Literal["cpu", "cuda"]


class ModelRunner:
    """A model on the native packed cache.

    Parameters
    ----------
    loaded
        The model. With ``weights`` none it shares its weights where the dtype is its own; with int4 it loses them.
    plan, tensors
        How the cache is kept, and the artifact's tensors.
    backend
        Which kernels.
    weights
        ``int4`` stores linear layers in 4 bits.
    activations
        Bits that products of 4-bit layers round activations to: 8 is faster, and costs a little fidelity.
    dtype
        What to compute in: by default the plan's dtype; bfloat16 for int4 and, on a CPU, for a checkpoint's own codes.
    capacity, batch_size
        Tokens a sequence may hold, and sequences; :meth:`resize` changes both.
    threads
        CPU threads of the kernels; 0 for as many as torch uses.
    deterministic
        Results do not depend, to the bit, on batch size, chunk size or on what is prefilled and what decoded.

    Raises
    ------
    InputError
        For a model or a plan that the native runtime does not compute.
    UsageError
        For int4 weights in another dtype than bfloat16 or on a GPU.
    NativeError
        If there are no kernels for the backend, or none that run here.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        plan: CachePlan,
        tensors: Mapping[str, Tensor] | None = None,
        *,
        backend: Backend = "cpu",
        weights: Kind = "none",
        activations: Activations = 16,
        dtype: torch.dtype | None = None,
        capacity: int,
        batch_size: int = 1,
        threads: int = 0,
        deterministic: bool = False,
    ) -> None:
        check_runnable(loaded.model.config, plan)
        if deterministic and rebuilds(plan):
            raise UsageError("deterministic results are not for plans that rebuild layers from one another.")
        self.library = kvrt.library(backend)
        self.loaded, self.plan, self._tensors = loaded, plan, tensors
        self.device = torch.device(backend)
        int4 = weights == "int4"
        codes = backend == "cpu" and loaded.quantized is not None and loaded.quantized.has_codes
        self.dtype = dtype or (torch.bfloat16 if int4 or codes else getattr(torch, plan.dtype))
        if self.dtype not in kvrt.DTYPES:
            raise UsageError(f"the native runtime does not compute in {self.dtype}.")
        if int4 and self.dtype != torch.bfloat16:
            raise UsageError("int4 weights compute in bfloat16.")
        if int4 and backend != "cpu":
            raise UsageError("int4 weights run on the CPU only; leave out --weights int4 on a GPU.")
        self.threads, self.block = threads or torch.get_num_threads(), BLOCK if deterministic else 0
        self.weights = ModelWeights(
            loaded, dtype=self.dtype, kind=weights, device=self.device, block=self.block, threads=self.threads,
            activations=activations,
        )  # fmt: skip
        self.resize(capacity=capacity, batch_size=batch_size)

    def resize(self, *, capacity: int, batch_size: int = 1) -> None:
        """Start over with an empty cache of another size."""
        self.cache = NativeCache(
            self.plan, self.loaded.geometry, capacity=capacity, batch_size=batch_size, rope=self.loaded.rope,
            tensors=self._tensors, library=self.library, device=self.device, threads=self.threads,
            deterministic=bool(self.block),
        )  # fmt: skip
        self._step = Pass(self, batch_size, self.cache.lengths)
        self._layers = self._bind_layers(self._step)
        vocabulary = self.weights.head.shape[0]
        rows = self.padded(batch_size)
        self._raw_logits = torch.zeros(rows, vocabulary, dtype=self.weights.logits_dtype, device=self.device)
        self._logits = self._raw_logits.float()  # itself if it is float32
        self._head = self.weights.head.bind(self._step.normed, self._raw_logits)
        self._graph: Any = None
        self._chunk: ChunkAttention | TokenAttention | None = None
        self._chunk_size = 0
        self._chunk_passes: dict[int, Pass] = {}

    def padded(self, rows: int) -> int:
        """Return how many rows a matrix product of ``rows`` computes."""
        return -(-rows // self.weights.rows) * self.weights.rows

    def _bind_layers(self, step: Pass) -> list[tuple[Callable[[], Any], ...]]:
        """Return the ten calls of every layer of a step of decoding."""
        attend = (self._bind_attention(i, step) for i in range(len(self.plan.layers)))
        return [(*a, *b, *c) for a, b, c in zip(step.before, attend, step.after, strict=True)]

    def _bind_attention(self, index: int, step: Pass) -> tuple[Callable[[], int], Callable[[], int]]:
        """Bind one layer's append and attend, of one token a sequence, to the buffers of the step."""
        store = self.cache.layers[index]
        q, k, v = step.qkv_of(index)
        if rebuilds(self.plan):
            out = step.mixed[: step.rows].view(q.shape)
            return lambda: 0, partial(self._attend_rebuilding, index, q, k, v, out)
        a, b = store.append, store.attend
        a.dtype = b.dtype = kvrt.DTYPES[self.dtype]
        a.k, a.v, a.k_row_stride, a.v_row_stride = k.data_ptr(), v.data_ptr(), k.stride(0), v.stride(0)
        b.q, b.out, b.q_row_stride, b.out_row_stride = (
            q.data_ptr(),
            step.mixed.data_ptr(),
            q.stride(0),
            q.shape[1] * (q.shape[2]),
        )
        layer, exec_ = byref(store.struct), byref(self.cache.exec)
        return (
            partial(self.library.function("append"), layer, byref(a), exec_),
            partial(self.library.function("attend"), layer, byref(b), exec_),
        )

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes allocated: ``weights``; ``cache``, what sequences take; ``constant``, buffers that none make longer."""
        passes = [self._step, *self._chunk_passes.values()]
        buffers = sum(x.nbytes for p in passes for x in p.buffers)
        logits = sum({x.data_ptr(): x.nbytes for x in (self._raw_logits, self._logits)}.values())
        chunk = self._chunk.nbytes if self._chunk else 0
        return {
            "weights": self.weights.nbytes,
            "cache": self.cache.nbytes,
            "constant": self.cache.constant_bytes + buffers + logits + chunk + self.weights.scratch.nbytes,
        }

    # --- decoding -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Feed one token to every sequence.

        Parameters
        ----------
        tokens
            [batch] int64.

        Returns
        -------
        Tensor
            Logits of the next tokens, float32 [batch, vocabulary]. The next call writes over them.
        """
        self.cache.check_room(1)
        batch = self.cache.batch_size
        self._step.tokens[:batch] = tokens
        if self._graph is not None:
            self._graph.replay()
        else:
            self._use_stream()
            self._run_step()
        for row in range(batch):
            self.cache.host_lengths[row] += 1
        return self._logits[:batch]

    def _run_step(self) -> None:
        self._run_layers(self._step, self._layers)
        self._head()
        if self._logits is not self._raw_logits:
            self._logits.copy_(self._raw_logits)
        self.cache.lengths.add_(1)

    def _run_layers(self, step: Pass, layers: list[tuple[Callable[[], Any], ...]]) -> None:
        step.embed()
        failed = 0
        for norm, qkv, rope, append, attend, o, post_norm, gate_up, silu, down in layers:
            failed |= norm()
            qkv()
            failed |= rope() | append() | attend()
            o()
            failed |= post_norm()
            gate_up()
            failed |= silu()
            down()
        failed |= step.last_norm()
        if failed:
            raise kvrt.NativeError("a kernel failed in decoding.")

    def capture(self) -> None:
        """Record a step of decoding as a CUDA graph, which later steps replay; lengths live on the device.

        The cache must be empty: recording runs a step, and the token it appends takes another's place in a full tail.
        """
        if any(self.cache.host_lengths):
            raise KvcliError("a graph is recorded while the cache is empty.")
        if self.device.type != "cuda":
            raise KvcliError("only a GPU records graphs.")
        if rebuilds(self.plan):
            raise KvcliError("a graph cannot hold the rebuilding of layers, whose shapes change from step to step.")
        side: Any = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries allocate on first use, which a recording does not allow
            self._use_stream()
            self._run_step()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._use_stream()
            self._run_step()
        self.cache.reset()  # the token of the first run is the first to be written over

    def _use_stream(self) -> None:
        if self.device.type == "cuda":
            self.cache.exec.stream = torch.cuda.current_stream().cuda_stream

    # --- prefill ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, ids: Tensor, row: int = 0, *, all_logits: bool = False, chunk: int = CHUNK) -> Tensor:
        """Feed several tokens to one sequence.

        Parameters
        ----------
        ids
            [tokens] int64.
        row
            Which sequence.
        all_logits
            Return the logits of all tokens, not of the last one only.
        chunk
            Tokens of one pass.

        Returns
        -------
        Tensor
            float32 [vocabulary], or [tokens, vocabulary].
        """
        hidden = self._hidden(ids, row, 0 if all_logits else len(ids) - 1, chunk)
        logits = self._logits_of(hidden)
        return logits if all_logits else logits[0]

    @torch.no_grad()
    def log_probs(self, ids: Tensor, *, scored: int, chunk: int = CHUNK) -> tuple[Tensor, int]:
        """Run one window through an empty cache of its size: :meth:`kvcli.runtime.packed_model.PackedModel.log_probs`.

        Forgets what the cache held.

        Parameters
        ----------
        ids
            [tokens] int64.
        scored
            How many of the last tokens to predict.
        chunk
            Tokens of one pass.

        Returns
        -------
        tuple
            Log-probabilities float32 [scored, vocabulary] of the last ``scored`` tokens, each given all before; and the
            bytes that the cache has allocated.
        """
        self.resize(capacity=len(ids))
        hidden = self._hidden(ids, 0, len(ids) - scored - 1, chunk)
        return self._logits_of(hidden[:-1]).log_softmax(-1), self.cache.nbytes

    def _hidden(self, ids: Tensor, row: int, first: int, chunk: int) -> Tensor:
        """Run tokens through all layers, and return the normed hidden states from the token ``first`` on."""
        if not len(ids):
            raise UsageError("there are no tokens to prefill.")
        if self.cache.host_lengths[row] + len(ids) > self.cache.capacity:
            raise UsageError(f"{len(ids)} more tokens do not fit a cache made for {self.cache.capacity}.")
        self._use_stream()
        kept = []
        for begin, part in zip(range(0, len(ids), chunk), ids.split(chunk), strict=True):
            hidden = self._run_chunk(part, row, min(chunk, len(ids)))
            if begin + len(part) > first:
                kept.append(hidden[max(0, first - begin) :].clone())
        return torch.cat(kept)

    def _attention(self, size: int) -> ChunkAttention | TokenAttention:
        """Return what attends from chunks of up to ``size`` tokens."""
        if self._chunk is None or self._chunk_size < size:
            self._chunk_passes.clear()
            self._chunk_size = size
            kind = TokenAttention if self.block else RebuildingAttention if rebuilds(self.plan) else ChunkAttention
            # on a CPU, attention is as fast in float32, and more exact
            dtype = torch.float32 if self.device.type == "cpu" else self.dtype
            self._chunk = kind(self.cache, size, dtype)
        return self._chunk

    def _attend_rebuilding(self, index: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> int:
        """Append a token to every sequence and attend from it, where layers are rebuilt from one another."""
        attention = self._attention(1)
        if index == 0:
            attention.begin(self._step.positions)
        for row in range(self.cache.batch_size):
            part = slice(row, row + 1)
            attention(index, row, q[part], k[part], v[part], out[part])
        return 0

    def _run_chunk(self, ids: Tensor, row: int, size: int) -> Tensor:
        attention = self._attention(size)
        tokens = len(ids)
        work = self._chunk_passes.get(tokens)
        if work is None:  # a chunk and a rest, of one set of buffers
            base = next(iter(self._chunk_passes.values()), None)
            if base is None:
                base = self._chunk_passes[self._chunk_size] = Pass(self, self._chunk_size)
            work = base if tokens == self._chunk_size else Pass(self, tokens, share=base)
            for old in list(self._chunk_passes)[1:]:
                del self._chunk_passes[old]
            self._chunk_passes[tokens] = work
        start = self.cache.host_lengths[row]
        torch.arange(start, start + tokens, out=work.positions[:tokens])
        work.tokens[:tokens] = ids
        work.embed()
        attention.begin(work.positions)
        for i, ((norm, qkv, rope), (o, post_norm, gate_up, silu, down)) in enumerate(
            zip(work.before, work.after, strict=True)
        ):
            failed = norm()
            qkv()
            failed |= rope()
            q, k, v = work.qkv_of(i)
            attention(i, row, q, k, v, work.mixed[:tokens].view(q.shape))
            o()
            failed |= post_norm()
            gate_up()
            failed |= silu()
            down()
            if failed:
                raise kvrt.NativeError("a kernel failed in prefill.")
        if work.last_norm():
            raise kvrt.NativeError("a kernel failed in prefill.")
        self.cache.advance(tokens, row)
        return work.normed[:tokens]

    def _logits_of(self, hidden: Tensor) -> Tensor:
        """Logits of normed hidden states [tokens, hidden], float32 [tokens, vocabulary]."""
        rows, head = len(hidden), self.weights.head
        out = torch.empty(self.padded(rows), head.shape[0], dtype=self.weights.logits_dtype, device=self.device)
        if len(out) > rows:
            hidden = torch.cat((hidden, hidden.new_zeros(len(out) - rows, hidden.shape[1])))
        head.bind(hidden, out)()
        return out[:rows].float()
