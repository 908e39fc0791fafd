"""Prefill and decoding of a whole model: the packed cache beside the exact one and beside stock Transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from kvcli.calibration import corpora
from kvcli.evaluation.attention_speed import bytes_read, fill, random_kv
from kvcli.evaluation.speed import Contestant
from kvcli.models.loading import LoadedModel
from kvcli.plan import CachePlan
from kvcli.runtime.packed_cache import ATTENTION
from kvcli.runtime.packed_model import CHUNK, PackedModel

if TYPE_CHECKING:
    from kvcli.runtime.runner import ModelRunner

PIECE = 16  # tokens in which text is gathered


class Decoder(Protocol):
    """A model and its cache, by the name it has in the results."""

    @property
    def name(self) -> str:
        """As it stands in the results."""
        ...

    @property
    def bytes_read(self) -> int | None:
        """Bytes of weights and cache that a step of decoding has to read, where that is known."""
        ...

    def prefill(self, ids: Tensor) -> None:
        """Empty the cache and run [tokens] int64 through the model."""
        ...

    def fill(self, depth: int) -> None:
        """Empty the cache and put ``depth`` random tokens into it instead."""
        ...

    def rewind(self, depth: int) -> None:
        """Go back to ``depth`` tokens after some more were decoded; what those left behind does not change speed."""

    def decode(self, ids: Tensor) -> None:
        """Run [tokens] int64 through the model one by one."""
        ...


def text(spec: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    """Return the first ``length`` tokens of what ``--data`` names, repeated where there are fewer."""
    ids = torch.cat(corpora.windows(spec, tokenizer, PIECE))
    return ids.repeat(-(-length // len(ids)))[:length]


def contestants(decoder: Decoder, ids: Tensor, depth: int) -> tuple[Contestant, Contestant]:
    """Enter a decoder into two races, the first of which must be run first.

    One is reading ``depth`` tokens; the other, which starts over from what was read, decoding those that follow. So a
    slow reader does not have to read again for every round of decoding.
    """
    tokens = len(ids) - depth
    reading = Contestant(decoder.name, {"prefill": lambda: decoder.prefill(ids[:depth])}, {"prefill": depth})
    decoding = Contestant(
        decoder.name, {"decode": lambda: decoder.decode(ids[depth:])}, {"decode": tokens}, steps={"decode": tokens},
        bytes_read={} if decoder.bytes_read is None else {"decode": decoder.bytes_read},
        prepare=lambda: decoder.rewind(depth),
    )  # fmt: skip
    return reading, decoding


def contestant(decoder: Decoder, ids: Tensor, depth: int, *, random: bool = False, batch: int = 1) -> Contestant:
    """Enter a decoder into a race: reading ``depth`` tokens, timed unless random, and decoding the others.

    ``batch`` is how many sequences the decoder runs at once.
    """
    tokens = len(ids) - depth
    phases: dict[str, Any] = {"prefill": lambda: decoder.prefill(ids[:depth])}
    phases = {} if random else phases
    phases["decode"] = lambda: decoder.decode(ids[depth:])
    return Contestant(
        decoder.name, phases, {"prefill": batch * depth, "decode": batch * tokens}, steps={"decode": tokens},
        bytes_read={} if decoder.bytes_read is None else {"decode": decoder.bytes_read},
        prepare=(lambda: decoder.fill(depth)) if random else (lambda: None),
    )  # fmt: skip


class RunnerDecoder:
    """The model runner on native kernels.

    Parameters
    ----------
    name
        As it stands in the results.
    runner
        The runner, with room for what is decoded.
    depth
        Where decoding begins.
    """

    def __init__(self, name: str, runner: ModelRunner, depth: int) -> None:
        self.name, self.runner = name, runner
        cache = runner.cache
        self.bytes_read = weight_bytes(runner) + bytes_read(cache.plan, depth + 1, cache.batch_size)
        self._filled = False

    def prefill(self, ids: Tensor) -> None:
        """Empty the cache and run tokens through the model, in every sequence."""
        self.runner.cache.reset()
        for row in range(self.runner.cache.batch_size):
            self.runner.prefill(ids, row=row)

    def fill(self, depth: int) -> None:
        """Put random tokens into the cache."""
        if self._filled:
            self.runner.cache.advance_to(depth)  # what it decoded before is written over: speed does not depend on it
            return
        fill(self.runner.cache, depth)
        self._filled = True

    def rewind(self, depth: int) -> None:
        """Go back to ``depth`` tokens."""
        self.runner.cache.advance_to(depth)

    def decode(self, ids: Tensor) -> None:
        """Run tokens through the model one by one, the same in every sequence."""
        for token in ids:
            self.runner.decode(token.expand(self.runner.cache.batch_size))


class ReferenceDecoder:
    """Transformers on the plain reference cache."""

    def __init__(self, name: str, model: PackedModel, depth: int, capacity: int) -> None:
        self.name, self.model, self.capacity = name, model, capacity
        self.bytes_read = matrix_bytes(model.loaded) + bytes_read(model.plan, depth + 1)
        self.cache = model.new_cache()

    def _renew(self) -> None:
        self.model.loaded.model.set_attn_implementation(ATTENTION)
        self.cache = self.model.new_cache(capacity=self.capacity)

    def prefill(self, ids: Tensor) -> None:
        """Empty the cache and run tokens through the model."""
        self._renew()
        _forward(self.model.loaded, ids, self.cache)

    def fill(self, depth: int) -> None:
        """Put random tokens into the cache."""
        self._renew()
        generator = torch.Generator().manual_seed(0)
        layers: Any = self.cache.layers
        for layer, store in zip(layers, self.cache.stores, strict=True):
            k, v = random_kv(store.plan, depth, generator, torch.float32)
            store.append(0, store.exact(0, k.transpose(0, 1), v.transpose(0, 1)))
            store.release(0)
            layer.seen = depth

    def rewind(self, depth: int) -> None:
        """Read on: what is packed cannot be taken back."""

    def decode(self, ids: Tensor) -> None:
        """Run tokens through the model one by one."""
        for i in range(len(ids)):
            _forward(self.model.loaded, ids[i : i + 1], self.cache)


class TransformersDecoder:
    """Stock Transformers with a cache of its own.

    Parameters
    ----------
    name
        As it stands in the results.
    loaded
        The model, which others may use in between.
    depth
        Where decoding begins.
    attention
        Transformers' name of an attention.
    new_cache
        Makes the cache; a dense one by default.
    """

    def __init__(
        self, name: str, loaded: LoadedModel, depth: int, *, attention: str = "sdpa", new_cache: Any = None
    ) -> None:
        self.name, self.loaded, self.attention = name, loaded, attention
        self._new_cache = new_cache or (lambda: DynamicCache(config=loaded.model.config))
        self.bytes_read: int | None = None
        if new_cache is None:
            size = loaded.model.dtype.itemsize
            cached = sum(
                2 * x.num_kv_heads * x.head_dim * min(depth + 1, x.window or depth + 1) for x in loaded.geometry
            )
            self.bytes_read = matrix_bytes(loaded) + cached * size
        self.cache: Any = None

    def _renew(self) -> None:
        self.loaded.model.set_attn_implementation(self.attention)
        self.cache = self._new_cache()

    def prefill(self, ids: Tensor) -> None:
        """Empty the cache and run tokens through the model."""
        self._renew()
        _forward(self.loaded, ids, self.cache)

    def fill(self, depth: int) -> None:
        """Put random tokens into the cache."""
        self._renew()
        model = self.loaded.model
        for i, g in enumerate(self.loaded.geometry):
            k, v = torch.randn(2, 1, g.num_kv_heads, depth, g.head_dim, dtype=model.dtype, device=model.device)
            self.cache.update(k, v, i)

    def rewind(self, depth: int) -> None:
        """Go back to ``depth`` tokens, where the cache can."""
        if more := self.cache.get_seq_length() - depth:
            self.cache.crop(-more)

    def decode(self, ids: Tensor) -> None:
        """Run tokens through the model one by one."""
        for i in range(len(ids)):
            _forward(self.loaded, ids[i : i + 1], self.cache)


@torch.no_grad()
def _forward(loaded: LoadedModel, ids: Tensor, cache: Any) -> None:
    """Run tokens through a model in chunks; logits for the last one only."""
    model: Any = loaded.model
    for begin in range(0, len(ids), CHUNK):
        part = ids[None, begin : begin + CHUNK].to(model.device)
        model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)


def matrix_bytes(loaded: LoadedModel) -> int:
    """Bytes of the matrices that a step of decoding reads: all of them, but of an untied embedding a row only."""
    model: Any = loaded.model
    # a tied embedding is listed once, and read as the output's matrix
    total = sum(p.nbytes for p in model.parameters() if p.ndim > 1)
    return int(total if model.config.tie_word_embeddings else total - model.get_input_embeddings().weight.nbytes)


def weight_bytes(runner: ModelRunner) -> int:
    """Bytes of the matrices that a step of a runner reads."""
    weights = runner.weights
    matrices = [weights.head, *(m for x in weights.layers for m in (x.qkv, x.o, x.gate_up, x.down))]
    return sum(x.nbytes for x in matrices)


def native(
    name: str,
    loaded: LoadedModel,
    plan: CachePlan,
    tensors: Mapping[str, Tensor],
    *,
    backend: Literal["cpu", "cuda"],
    depth: int,
    capacity: int,
    weights: Literal["none", "int4"] = "none",
    threads: int = 0,
    batch_size: int = 1,
) -> RunnerDecoder:
    """Enter the model runner as it is run: on a GPU a step of decoding is recorded once and replayed, if it can be."""
    from kvcli.runtime.rebuilding import rebuilds
    from kvcli.runtime.runner import ModelRunner

    runner = ModelRunner(
        loaded, plan, tensors, backend=backend, weights=weights, capacity=capacity, batch_size=batch_size,
        threads=threads,
    )  # fmt: skip
    if backend == "cuda" and not rebuilds(plan):
        runner.capture()
    return RunnerDecoder(name, runner, depth)


def packed(
    name: str, loaded: LoadedModel, plan: CachePlan, tensors: Mapping[str, Tensor], *,
    backend: Literal["cpu", "cuda", "reference"], depth: int, capacity: int,
    weights: Literal["none", "int4"] = "none", threads: int = 0,
) -> Decoder:  # fmt: skip
    """Enter a model on its packed cache, on native kernels or on the plain reference, which takes no ``weights``."""
    if backend == "reference":
        return ReferenceDecoder(name, PackedModel(loaded, plan, dict(tensors)), depth, capacity)
    return native(
        name, loaded, plan, tensors, backend=backend, depth=depth, capacity=capacity, weights=weights, threads=threads
    )
