"""Caches of others on the windows that kvcli is judged on, measured by kvcli's own metrics.

Each is read as its users' decoding reads it:

``llama.cpp``
    Its cache types through its own library, flash attention on (quantised values need it). Every token reads what the
    cache holds, its own batch included. The reference is llama.cpp's own f16 cache; the weights are the file's.
``Transformers``
    ``QuantizedCache`` with HQQ and quanto, groups of 64, a residual of 128. The first half of a window is the prompt:
    one call, whose attention sees exact keys and values, as ``generate`` does it; only its last row is scored. The
    rest goes in in chunks of the residual's length. The cache empties its residual at the end of each, so a token
    reads what decoding one by one reads: codes before its chunk, exact values in it. (Each time, the older codes are
    quantised once more, which is also how that cache works.) The reference is kvcli's 16-bit cache.
``KIVI``
    Liu et al., ICML 2024, arXiv:2402.02750: keys per channel and values per token in groups of 32, asymmetric, 32 or
    128 recent tokens exact. A kvcli plan on kvcli's cache, so the prompt is read through the cache too, and the recent
    tokens stand beside an unfinished page of keys and values. The reference is kvcli's 16-bit cache.

Bits are counted as kvcli counts its own: every byte held at the worst length of the last page or residual, by cached
scalars. Tensors of floats count 16 bits a value, as in a model that computes in 16 bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import BATCH, LlamaWeights
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kvcli.calibration.pipeline import exact_layers
from kvcli.calibration.presets import Preset
from kvcli.evaluation.fidelity import compare, measures
from kvcli.models.loading import LoadedModel
from kvcli.plan import CachePlan
from kvcli.runtime.packed_model import PackedModel

LLAMA_TYPES = ("q8_0", "q8_0/q4_0", "q5_1", "q4_1", "q4_0")
WIDTHS = (4, 2)
KIVI_WINDOWS = (32, 128)
BACKENDS = {"HQQ": ("hqq", "hqq", 1), "quanto": ("quanto", "optimum.quanto", 0)}  # name there, package, axis it takes

Found = tuple[Tensor, float, int]  # log-probabilities [scored, vocabulary], effective bits, bytes held


class Absent(Exception):
    """A peer cannot take part; the message says why."""


@dataclass(frozen=True)
class Peer:
    """A cache that takes part.

    Attributes
    ----------
    group, family, name
        What ``--only`` calls it, whose line it is on, and its own name.
    measure
        Returns the figures; raises :class:`Absent`.
    """

    group: str
    family: str
    name: str
    measure: Callable[[], dict[str, Any]]


class Judge:
    """The windows, and what references say of them.

    Parameters
    ----------
    loaded
        The model as Transformers runs it.
    path
        Its file, for llama.cpp.
    windows
        [tokens] int64 each, of one length; the second half is scored.
    """

    def __init__(self, loaded: LoadedModel, path: Path, windows: Sequence[Tensor]) -> None:
        self.loaded, self.path, self.windows = loaded, path, windows
        self.tokens = len(windows[0])
        self.scored = self.tokens - self.tokens // 2
        self.geometry = exact_layers(loaded)

    @cached_property
    def exact(self) -> list[Tensor]:
        """Log-probabilities [scored, vocabulary] of each window on kvcli's 16-bit cache."""
        reference = PackedModel(self.loaded, CachePlan(tuple(self.geometry), dtype=self.loaded.dtype), {})
        return [reference.log_probs(ids, scored=self.scored)[0] for ids in self.windows]

    @cached_property
    def llama(self) -> LlamaCpp:
        """llama.cpp with the model's weights.

        Raises
        ------
        Absent
            If it cannot load them, or is not installed.
        """
        if find_spec("llama_cpp") is None:
            raise Absent("not installed: pip install 'kvcli[bench]'")
        if self.path.suffix != ".gguf":
            raise Absent(f"{self.path.name} is not a GGUF file")
        return LlamaCpp(self.path, self.tokens)

    @cached_property
    def llama_exact(self) -> list[Tensor]:
        """The same of llama.cpp's f16 cache."""
        return [self.llama.log_probs(ids, "f16", self.scored)[0] for ids in self.windows]

    def figures(self, references: Sequence[Tensor], run: Callable[[Tensor], Found]) -> dict[str, Any]:
        """Return a cache's bits, bytes and :func:`~kvcli.evaluation.fidelity.measures` on all windows."""
        found, bits, nbytes = [], 0.0, 0
        for ids, p in zip(self.windows, references, strict=True):
            q, b, n = run(ids)
            found.append(compare(p, q, ids[-self.scored :]))
            bits, nbytes = max(bits, b), max(nbytes, n)
        return {
            "context": self.tokens, "windows": len(self.windows), "scored_tokens": self.scored * len(self.windows),
            "effective_bits": bits, "measured_bytes": nbytes, **measures(found, self.tokens - self.scored),
        }  # fmt: skip


def peers(judge: Judge) -> Iterator[Peer]:
    """Name all who could take part."""
    for kinds in LLAMA_TYPES:
        yield Peer("llama.cpp", "llama.cpp", f"llama.cpp {kinds}", partial(_llama, judge, kinds))
    for window in KIVI_WINDOWS:
        family = f"KIVI, {window} exact"
        for bits in WIDTHS:
            yield Peer("KIVI", family, f"{family}, {bits} bits", partial(_kivi, judge, bits, window))
    for backend in BACKENDS:
        family = f"Transformers {backend}"
        for bits in WIDTHS:
            yield Peer("Transformers", family, f"{family}, {bits} bits", partial(_transformers, judge, backend, bits))


def held(x: Any) -> int:
    """Return the bytes of every tensor in a structure, floats counted at 16 bits."""
    if isinstance(x, Mapping):
        return sum(map(held, x.values()))
    if isinstance(x, (tuple, list)):
        return sum(map(held, x))
    if not isinstance(x, Tensor):
        return 0
    if is_traceable_wrapper_subclass(x):  # a quantised tensor of quanto's is made of plain ones
        return sum(held(getattr(x, name)) for name in x.__tensor_flatten__()[0])
    return x.numel() * (2 if x.is_floating_point() else x.element_size())


# --- plain KIVI -------------------------------------------------------------------------------------------------------


def kivi_plan(judge: Judge, bits: int, window: int) -> CachePlan:
    """Return the paper's cache as a plan."""
    preset = Preset(f"kivi-{bits}", "kivi", ((bits, bits),) * len(judge.geometry))
    return replace(preset.plan(judge.geometry, judge.loaded.dtype), residual_window=window)


def _kivi(judge: Judge, bits: int, window: int) -> dict[str, Any]:
    subject = PackedModel(judge.loaded, kivi_plan(judge, bits, window), {})

    def run(ids: Tensor) -> Found:
        log_probs, allocated = subject.log_probs(ids, scored=judge.scored)
        nbytes = max(allocated, subject.plan.bytes_at(judge.tokens))
        own = 8 * nbytes / (judge.tokens * subject.plan.scalars_per_token)
        return log_probs, max(own, subject.plan.effective_bits(judge.tokens)), nbytes

    return judge.figures(judge.exact, run)


# --- Transformers -----------------------------------------------------------------------------------------------------


def _transformers(judge: Judge, backend: str, bits: int) -> dict[str, Any]:
    kind, package, axis = BACKENDS[backend]
    try:
        missing = find_spec(package) is None
    except ModuleNotFoundError:  # the package around it is not there either
        missing = True
    if missing:
        raise Absent("not installed")
    from transformers import QuantizedCache

    references, model = judge.exact, judge.loaded.model
    model.set_attn_implementation("sdpa")  # what references ran on is kvcli's
    scalars = sum(x.scalars_per_token for x in judge.geometry)

    @torch.no_grad()
    def run(ids: Tensor) -> Found:
        filled = QuantizedCache(kind, model.config, nbits=bits, axis_key=axis, axis_value=axis)
        prompt = judge.tokens - judge.scored
        kept = [model.model(ids[None, :prompt], past_key_values=filled).last_hidden_state[0, -1:]]
        # the last token predicts nothing that is scored: without it the residual is as long as it ever gets
        for part in ids[prompt:-1].split(filled.layers[0].residual_length):
            kept.append(model.model(part[None], past_key_values=filled).last_hidden_state[0])
        nbytes = sum(held([x._quantized_keys, x._quantized_values, x.keys, x.values]) for x in filled.layers)
        log_probs = model.lm_head(torch.cat(kept)).float().log_softmax(-1)
        return log_probs, 8 * nbytes / ((len(ids) - 1) * scalars), nbytes

    return judge.figures(references, run)


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def _llama(judge: Judge, kinds: str) -> dict[str, Any]:
    return judge.figures(judge.llama_exact, lambda ids: judge.llama.log_probs(ids, kinds, judge.scored))


class LlamaCpp:
    """llama.cpp's own library, asked for log-probabilities.

    Parameters
    ----------
    path
        A GGUF file.
    tokens
        Of the longest window.
    """

    def __init__(self, path: Path, tokens: int) -> None:
        import llama_cpp

        self._c: Any = llama_cpp
        self.weights, self.tokens = LlamaWeights(path), tokens
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.weights.model))

    def log_probs(self, ids: Tensor, kinds: str, scored: int) -> Found:
        """Run one window through an empty cache.

        Parameters
        ----------
        ids
            [tokens] int64.
        kinds
            A cache type, or two: of keys and of values, with a slash between.
        scored
            How many of the last tokens to predict.

        Raises
        ------
        Absent
            If llama.cpp refuses the type or the tokens.
        """
        k, _, v = kinds.partition("/")
        c, first = self._c, len(ids) - scored - 1  # the row that predicts the first scored token
        context = self._context(k, v or k)
        batch = c.llama_batch_init(BATCH, 0, 1)
        kept = []
        try:
            for begin in range(0, len(ids) - 1, BATCH):
                part = ids[begin : min(begin + BATCH, len(ids) - 1)].tolist()
                batch.n_tokens = len(part)
                for i, token in enumerate(part):
                    batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, begin + i, 1, 0
                    batch.logits[i] = begin + i >= first
                if c.llama_decode(context, batch):
                    raise Absent("llama_decode failed")
                if rows := len(part) - max(0, min(len(part), first - begin)):
                    logits = np.ctypeslib.as_array(c.llama_get_logits(context), (rows, self.vocabulary))
                    kept.append(torch.from_numpy(logits.copy()).log_softmax(-1))
        finally:
            c.llama_batch_free(batch)
            c.llama_free(context)
        bits = (_bits(k) + _bits(v or k)) / 2
        return torch.cat(kept), bits, round(len(ids) * self.weights.scalars_per_token * bits / 8)

    def _context(self, k: str, v: str) -> ctypes.c_void_p:
        settings = self._c.llama_context_default_params()
        settings.n_ctx = -(-self.tokens // 256) * 256
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        settings.type_k, settings.type_v = _number(k), _number(v)
        settings.flash_attn_type = self._c.LLAMA_FLASH_ATTN_TYPE_ENABLED  # f16 as well: only the cache differs
        context: ctypes.c_void_p = self._c.llama_init_from_model(self.weights.model, settings)
        if not context:
            raise Absent(f"llama.cpp makes no context with a {k}/{v} cache")
        return context


@cache
def _bits(kind: str) -> float:
    """Return bits a value, scales counted."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    values, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind.upper()]]
    return 8 * nbytes / values


def _number(kind: str) -> int:
    from gguf import GGMLQuantizationType

    return int(GGMLQuantizationType[kind.upper()])
