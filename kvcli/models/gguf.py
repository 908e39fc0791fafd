"""Reading .gguf files through Transformers: what it would get wrong is refused, and each file is parsed once."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
from transformers import modeling_gguf_pytorch_utils

from kvcli.errors import InputError
from kvcli.models.architectures import check_model_type


@contextmanager
def parsed_once() -> Iterator[None]:
    """Share one parse of a file among all that ask for it inside the block.

    Transformers parses the file three times and rebuilds gguf's table of tensor names for every module; sharing both
    takes a model of 135 million parameters from 22 to 9 seconds. Its progress bar knows no switch and is silenced too.
    """
    reader: Any = modeling_gguf_pytorch_utils
    with (
        mock.patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)),
        mock.patch.object(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
        mock.patch.object(reader, "tqdm", functools.partial(reader.tqdm, disable=True)),
    ):
        yield


def check(path: Path) -> None:
    """Raise :class:`InputError` unless Transformers reads this file as the model it holds.

    Its reader leaves out RoPE scaling and sliding windows, and so would compute another model without a word.
    """
    try:
        reader = gguf.GGUFReader(str(path))
    except Exception as error:  # the parser trusts the file, so a damaged one can raise anything
        raise InputError(f"{path} is damaged, truncated or not a GGUF file.") from error
    architecture = _field(reader, "general.architecture")
    check_model_type(architecture)
    scaling = _field(reader, f"{architecture}.rope.scaling.type")
    dropped = {
        "scaled RoPE": scaling not in (None, "none") or any(x.name.startswith("rope_f") for x in reader.tensors),
        "a sliding window": bool(_field(reader, f"{architecture}.attention.sliding_window")),
    }
    for what in (what for what, there in dropped.items() if there):
        raise InputError(f"{path} has {what}, which Transformers does not read from .gguf files; use its safetensors.")


def _field(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()
