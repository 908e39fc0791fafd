"""Packed storage that the native kernels write and read: one pool of pages a layer, and the calls on it.

The bytes of a page are those of :class:`kvcli.runtime.packed_layer.PackedLayer`, the plain reference. All storage is
allocated at once for a number of sequences of a stated capacity, so that every address is fixed: a step of decoding is
three calls a layer with structs made beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import byref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvcli.errors import UsageError
from kvcli.models.architectures import LayerGeometry, Rope
from kvcli.plan import CachePlan
from kvcli.runtime import kvrt
from kvcli.runtime.arena import Arena, size

EVEN_SPLITS = 8  # parts a sequence's pages are cut into, at least
DETERMINISTIC_TOKENS = 512  # tokens of one split where results must not depend on how many there are


@dataclass
class LayerStore:
    """Storage of one layer.

    Attributes
    ----------
    struct
        What the kernels know of the layer.
    pages
        [pool, page bytes] uint8.
    tail, sinks
        [batch, 2, num_kv_heads, tokens, head_dim] in the plan's exact dtype.
    block_tables
        [batch, logical pages] int32.
    """

    struct: kvrt.Layer
    pages: Tensor
    tail: Tensor
    sinks: Tensor
    block_tables: Tensor
    append: kvrt.Append = field(default_factory=kvrt.Append)
    attend: kvrt.Attend = field(default_factory=kvrt.Attend)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for sequences."""
        return self.pages.nbytes + self.tail.nbytes + self.sinks.nbytes


class NativeCache:
    """The packed cache of a whole model for a fixed batch, on the native kernels.

    Parameters
    ----------
    plan
        How each layer is stored.
    geometry
        The model's layers, for their query heads.
    capacity
        Tokens each sequence may hold.
    batch_size
        Sequences.
    rope, tensors
        The model's rotary embedding and the artifact's ``kv.safetensors``.
    library
        The kernels; the CPU's by default.
    device
        Where everything lies.
    threads
        CPU threads; 0 for all that OpenMP takes.
    deterministic
        Cut sequences at fixed places, so that sums do not depend on batch, capacity or threads.

    Raises
    ------
    InputError
        If a tensor of a predictor is missing.
    NativeError
        If there are no kernels, or none that run here.
    """

    def __init__(
        self,
        plan: CachePlan,
        geometry: tuple[LayerGeometry, ...],
        *,
        capacity: int,
        batch_size: int = 1,
        rope: Rope,
        tensors: Mapping[str, Tensor] | None = None,
        library: kvrt.Library | None = None,
        device: torch.device | str = "cpu",
        threads: int = 0,
        deterministic: bool = False,
    ) -> None:
        self.plan, self.geometry, self.capacity, self.batch_size = plan, geometry, capacity, batch_size
        self.library = library or kvrt.library("cpu")
        self.device = torch.device(device)
        self.exec = kvrt.Exec(threads, 0, None)
        self.rope_table = rope.table(max(capacity, kvrt.ROPE_ROWS)).to(self.device).contiguous()
        self.tensors = {k: v.to(self.device) for k, v in (tensors or {}).items()}
        for name in [x for x in self.tensors if x.endswith(".mean")]:
            self.tensors[name] = self.tensors[name].float().contiguous()
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=self.device)
        self.host_lengths = [0] * batch_size
        self.splits, self.split_pages = max(EVEN_SPLITS, self._workers() // batch_size), 0
        if deterministic:
            self.split_pages = max(1, DETERMINISTIC_TOKENS // plan.block_size)
            self.splits = max(1, -(-capacity // (self.split_pages * plan.block_size)))
        shapes = [self._shapes(i) for i in range(len(plan.layers))]
        arena = Arena(sum(size(*shape, dtype=dtype) for x in shapes for shape, dtype in x), self.device)
        self.layers = [self._store(i, [arena.take(*x, dtype=d) for x, d in s]) for i, s in enumerate(shapes)]
        need = max(self.library.workspace_bytes(x.struct, batch_size, self.splits) for x in self.layers)
        self._workspace = torch.empty(max(16, need), dtype=torch.uint8, device=self.device)
        for store in self.layers:
            self._prepare(store)

    def _workers(self) -> int:
        """How many parts of a step are worth having at once: two a thread, or two a multiprocessor and kv head."""
        if self.device.type == "cuda":
            heads = min(layer.num_kv_heads for layer in self.plan.layers)
            return 2 * torch.cuda.get_device_properties(self.device).multi_processor_count // heads
        return 2 * (self.exec.threads or torch.get_num_threads())

    def _pages(self, index: int) -> int:
        """Pages of one layer and one sequence."""
        pages = self.plan.num_pages(index, self.capacity)
        # a sliding layer packs tokens on their way out of the residual window, even if no query sees them then
        return pages if self.plan.layers[index].window is None else max(1, pages)

    def _pool(self, index: int) -> int:
        """Pages of one layer and all sequences."""
        return self._pages(index) * self.batch_size

    def _tables(self, index: int) -> Tensor:
        """Return a layer's block tables, int32 [batch, logical pages]."""
        pages, logical = self._pages(index), -(-self.capacity // self.plan.block_size)
        # A sliding layer's pages are used in turn: the one that fell behind the window is the next to be written.
        tables = torch.arange(logical) % max(1, pages) + torch.arange(self.batch_size)[:, None] * pages
        return tables.to(torch.int32).to(self.device).contiguous()

    def _shapes(self, index: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of a layer's pages, tail and sinks."""
        plan, layer, batch = self.plan, self.plan.layers[index], self.batch_size
        exact, heads, dim = getattr(torch, plan.exact_dtype), layer.num_kv_heads, layer.head_dim
        return [
            ((self._pool(index), layer.page_bytes(plan.block_size)), torch.uint8),
            ((batch, 2, heads, plan.tail(index), dim), exact),
            ((batch, 2, heads, plan.sinks(index), dim), exact),
        ]

    def _store(self, index: int, storage: list[Tensor]) -> LayerStore:
        struct = kvrt.layer_struct(
            self.plan, index, num_heads=self.geometry[index].num_heads, rope=self.rope_table, tensors=self.tensors
        )
        page_pool, tail, sinks = storage
        return LayerStore(struct, page_pool, tail, sinks, self._tables(index))

    def _prepare(self, store: LayerStore) -> None:
        heads, dim = store.struct.num_kv_heads, store.struct.head_dim
        cache = self.cache_struct(store)
        store.append.cache, store.append.max_new = cache, 1
        store.append.k_head_stride = store.append.v_head_stride = dim
        store.append.k_row_stride = store.append.v_row_stride = heads * dim
        a = store.attend
        a.cache, a.parts = cache, kvrt.ALL
        a.q_head_stride = a.out_head_stride = dim
        a.q_row_stride = a.out_row_stride = store.struct.num_heads * dim
        a.splits, a.split_pages = self.splits, self.split_pages
        a.workspace, a.workspace_bytes = self._workspace.data_ptr(), self._workspace.nbytes

    def cache_struct(self, store: LayerStore, row: int | None = None) -> kvrt.Cache:
        """Return the pointers to a layer's storage, of all sequences or of one."""
        first = row or 0
        return kvrt.Cache(
            pages=store.pages.data_ptr(), tail=store.tail[first:].data_ptr(), sinks=store.sinks[first:].data_ptr(),
            block_tables=store.block_tables[first:].data_ptr(), block_table_stride=store.block_tables.shape[1],
            lengths=self.lengths[first:].data_ptr(), length_stride=1,
            num_seqs=self.batch_size if row is None else 1, max_pages=store.block_tables.shape[1],
        )  # fmt: skip

    def biases(self, index: int) -> Tensor:
        """Return what decoding a layer's codes adds to keys and values, float32 [2 * width]: biases and means."""
        width = self.plan.layers[index].width
        means = self.layers[index].struct.kept[1]
        zeros = torch.zeros(width, device=self.device)
        return torch.cat([zeros if means[w] is None else means[w].flatten() for w in "kv"])

    @property
    def nbytes(self) -> int:
        """Bytes allocated for sequences: pages, sinks and tails."""
        return sum(store.nbytes for store in self.layers)

    @property
    def constant_bytes(self) -> int:
        """Bytes allocated beside them, whatever the sequences hold: cosines and sines, block tables, work space."""
        tables = sum(store.block_tables.nbytes for store in self.layers)
        return self.rope_table.nbytes + tables + self._workspace.nbytes + self.lengths.nbytes

    def check_room(self, new: int) -> None:
        """Raise :class:`UsageError` if a sequence cannot take ``new`` more tokens."""
        if max(self.host_lengths) + new > self.capacity:
            raise UsageError(f"{max(self.host_lengths) + new} tokens do not fit a cache made for {self.capacity}.")

    # --- one step for the whole batch ---------------------------------------------------------------------------

    def append(self, index: int, k: Tensor, v: Tensor) -> None:
        """Append one token to every sequence: k and v [batch, num_kv_heads, head_dim], keys after RoPE.

        Heads must lie ``head_dim`` apart and channels next to each other; rows may lie any distance apart.
        """
        store = self.layers[index]
        a = store.append
        a.k, a.v, a.dtype = k.data_ptr(), v.data_ptr(), kvrt.DTYPES[k.dtype]
        a.k_row_stride, a.v_row_stride = k.stride(0), v.stride(0)
        self.library.call("append", byref(store.struct), byref(a), byref(self.exec))

    def attend(self, index: int, q: Tensor, out: Tensor) -> None:
        """Attend from the token just appended to every sequence: q and out [batch, num_heads, head_dim]."""
        store = self.layers[index]
        a = store.attend
        a.q, a.out, a.dtype = q.data_ptr(), out.data_ptr(), kvrt.DTYPES[q.dtype]
        a.q_row_stride, a.out_row_stride = q.stride(0), out.stride(0)
        self.library.call("attend", byref(store.struct), byref(a), byref(self.exec))

    def advance(self, new: int = 1, row: int | None = None) -> None:
        """Count tokens that all layers have appended, in all sequences or in one."""
        rows = range(self.batch_size) if row is None else (row,)
        for r in rows:
            self.host_lengths[r] += new
        (self.lengths if row is None else self.lengths[row : row + 1]).add_(new)

    def reset(self, row: int | None = None) -> None:
        """Forget the tokens of all sequences or of one."""
        self.advance_to(0, row)

    def advance_to(self, length: int, row: int | None = None) -> None:
        """Set the length of all sequences or of one, whose pages the caller vouches for."""
        rows = range(self.batch_size) if row is None else (row,)
        for r in rows:
            self.host_lengths[r] = length
            self.lengths[r] = length

    # --- a chunk of one sequence --------------------------------------------------------------------------------

    def append_chunk(
        self, index: int, row: int, k: Tensor | None, v: Tensor | None, *, before: int | None = None,
        k_predicted: Tensor | None = None, v_predicted: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Append several tokens to one sequence.

        Parameters
        ----------
        index, row
            Layer and sequence.
        k, v
            [tokens, num_kv_heads, head_dim], keys after RoPE. One may be None, and is appended by another call.
        before
            The length to append at, where the layer holds more than :meth:`advance` has counted.
        k_predicted, v_predicted
            float32 [slots, width] of the slots that are packed now: what is taken off in the mean's place, keys before
            RoPE. The same has to be added to what :meth:`expand_into` gives, less the bias.
        """
        store = self.layers[index]
        given = v if k is None else k
        assert given is not None
        tokens = given.shape[0]
        k_strides, v_strides = ((0, 0) if x is None else (x.stride(0), x.stride(1)) for x in (k, v))
        cache = self.cache_struct(store, row)
        before = self.host_lengths[row] if before is None else before
        starts = torch.tensor([0, tokens, before], dtype=torch.int32, device=self.device)
        cache.lengths = starts[2:].data_ptr()
        a = kvrt.Append(
            cache=cache, starts=starts.data_ptr(), max_new=tokens, dtype=kvrt.DTYPES[given.dtype],
            k=kvrt.pointer(k), v=kvrt.pointer(v), k_row_stride=k_strides[0], k_head_stride=k_strides[1],
            v_row_stride=v_strides[0], v_head_stride=v_strides[1], k_predicted=kvrt.pointer(k_predicted),
            v_predicted=kvrt.pointer(v_predicted),
        )  # fmt: skip
        self.library.call("append", byref(store.struct), byref(a), byref(self.exec))

    def expand(
        self, index: int, row: int, first: int, count: int, dtype: torch.dtype, *, with_sinks: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Decode slots ``first`` … of one sequence: keys after RoPE and values, [num_kv_heads, count, head_dim]."""
        struct = self.layers[index].struct
        k, v = torch.empty(2, struct.num_kv_heads, count, struct.head_dim, dtype=dtype, device=self.device)
        self.expand_into(index, row, first, k, v, with_sinks=with_sinks)
        return k, v

    def expand_into(
        self, index: int, row: int, first: int, k: Tensor, v: Tensor, *, with_sinks: bool = True,
        before_rope: bool = False,
    ) -> None:  # fmt: skip
        """Decode slots ``first`` … of one sequence into k and v, [num_kv_heads, count, head_dim].

        ``before_rope`` leaves keys as predictors see them; sinks are decoded like other slots then.
        """
        store, count = self.layers[index], k.shape[1]
        if count:
            a = kvrt.Expand(
                cache=self.cache_struct(store, row), sequence=0, dtype=kvrt.DTYPES[k.dtype], first=first, count=count,
                k=k.data_ptr(), v=v.data_ptr(), k_head_stride=k.stride(0), k_row_stride=k.stride(1),
                v_head_stride=v.stride(0), v_row_stride=v.stride(1), keys_before_rope=int(before_rope),
                with_sinks=int(with_sinks and not before_rope),
            )  # fmt: skip
            self.library.call("expand", byref(store.struct), byref(a), byref(self.exec))

    def tail_rows(self, index: int, row: int, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return exact keys and values of slots ``first`` … from the tail, [num_kv_heads, count, head_dim]."""
        tail = self.layers[index].tail[row]
        where = torch.arange(first, first + count, device=self.device) % max(1, tail.shape[2])
        k, v = tail[:, :, where]
        return k, v
