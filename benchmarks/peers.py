"""Peers, as they are meant to be run, entered into the same race as kvcli (see kvcli/evaluation/speed.py)."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcli.evaluation.decode_speed import TransformersDecoder
from kvcli.models.loading import LoadedModel

BATCH = 512  # tokens of one forward pass of prefill, llama.cpp's default, and ours
GGML_TYPES = {"f16": (1, 16.0), "q8_0": (8, 8.5), "q4_0": (2, 4.5)}  # ggml's number of a type, and its bits with scales


class LlamaCpp:
    """llama.cpp's own library on a GGUF file; its Python wrapper's overhead is left out.

    Parameters
    ----------
    weights
        The loaded file, from :func:`llama_weights`: one for all.
    cache
        ``f16``, ``q8_0`` or ``q4_0``, for keys and values alike.
    capacity
        Tokens that the cache can hold.
    threads
        For single tokens and for batches.
    """

    def __init__(self, weights: LlamaWeights, cache: str, *, depth: int, capacity: int, threads: int) -> None:
        import llama_cpp

        self._c: Any = llama_cpp
        self.name = f"llama.cpp {cache} cache"
        kind, bits = GGML_TYPES[cache]
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = -(-capacity // 256) * 256
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_threads = settings.n_threads_batch = threads
        settings.type_k = settings.type_v = kind
        if cache != "f16":  # a quantised V needs it; for f16 llama.cpp decides itself
            settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._weights = weights  # the context points into it
        self._context = llama_cpp.llama_init_from_model(weights.model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp does not make a context with a {cache} cache.")
        self.bytes_read = weights.bytes_read + int(depth * weights.scalars_per_token * bits / 8)

    def prefill(self, ids: Tensor) -> None:
        """Empty the cache and run tokens through the model."""
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
        for part in ids.split(BATCH):
            self._decode(part)

    def fill(self, depth: int) -> None:
        """Read a text all the same: llama.cpp's cache takes no tokens from outside."""
        self.prefill(torch.full((depth,), 100))

    def rewind(self, depth: int) -> None:
        """Go back to ``depth`` tokens."""
        if not self._c.llama_memory_seq_rm(self._c.llama_get_memory(self._context), 0, depth, -1):
            raise RuntimeError(f"{self.name}: llama.cpp takes no tokens back.")

    def decode(self, ids: Tensor) -> None:
        """Run tokens through the model one by one."""
        for part in ids.split(1):
            self._decode(part)

    def _decode(self, ids: Tensor) -> None:
        tokens = (ctypes.c_int32 * len(ids))(*ids.tolist())
        # positions follow by themselves, and logits come for the last token only
        if self._c.llama_decode(self._context, self._c.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError(f"{self.name}: llama_decode failed.")
        self._c.llama_synchronize(self._context)

    def close(self) -> None:
        """Give back the context's memory."""
        self._c.llama_free(self._context)


class LlamaWeights:
    """A GGUF file as llama.cpp loads it."""

    def __init__(self, path: Path) -> None:
        import llama_cpp

        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept: llama.cpp holds its address
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path.name}.")
        heads = llama_cpp.llama_model_n_head_kv(self.model)
        head_dim = llama_cpp.llama_model_n_embd(self.model) // llama_cpp.llama_model_n_head(self.model)
        self.scalars_per_token = 2 * heads * head_dim * llama_cpp.llama_model_n_layer(self.model)
        self.bytes_read = int(llama_cpp.llama_model_size(self.model))  # a tied embedding is read as the output's matrix


def llama_cpp_decoders(
    path: Path, *, depth: int, capacity: int, threads: int, caches: tuple[str, ...] = tuple(GGML_TYPES)
) -> tuple[list[LlamaCpp], dict[str, str]]:
    """Enter llama.cpp with each kind of cache; also returns who is absent and why."""
    if find_spec("llama_cpp") is None:
        return [], {"llama.cpp": "not installed: pip install 'kvcli[bench]'"}
    if path.suffix != ".gguf":
        return [], {"llama.cpp": f"{path.name} is not a GGUF file"}
    weights = LlamaWeights(path)
    found, absent = [], {}
    for cache in caches:
        try:
            found.append(LlamaCpp(weights, cache, depth=depth, capacity=capacity, threads=threads))
        except RuntimeError as error:
            absent[f"llama.cpp {cache} cache"] = str(error)
    return found, absent


def transformers_decoders(loaded: list[LoadedModel], depth: int) -> tuple[list[TransformersDecoder], dict[str, str]]:
    """Enter stock Transformers in each dtype, and its own quantised cache; also returns who is absent and why."""
    found = [TransformersDecoder(f"transformers {x.dtype} sdpa", x, depth) for x in loaded]
    absent = {}
    for backend, package in (("hqq", "hqq"), ("quanto", "optimum.quanto")):
        name = f"transformers QuantizedCache {backend} 4 bits"
        try:
            missing = find_spec(package) is None
        except ModuleNotFoundError:  # the package around it is not there either
            missing = True
        if missing:
            absent[name] = "not installed"
            continue
        found.append(TransformersDecoder(name, loaded[0], depth, new_cache=_quantized(backend, loaded[0])))
    return found, absent


def _quantized(backend: str, loaded: LoadedModel) -> Callable[[], Any]:
    from transformers import QuantizedCache

    axis = 1 if backend == "hqq" else 0
    return lambda: QuantizedCache(backend, loaded.model.config, nbits=4, axis_key=axis, axis_value=axis)


def write(result: dict[str, Any], path: Path) -> None:
    """Write a result where the repository keeps them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(f"written to {path}")
