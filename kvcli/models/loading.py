"""Loading a checkpoint so that it is either wholly right or refused in one sentence."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import align_module_device
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from kvcli.errors import InputError, KvcliError, UsageError
from kvcli.models import gguf, quantized
from kvcli.models.architectures import LayerGeometry, Rope, check_supported, geometry
from kvcli.models.checkpoint import Checkpoint, find, read_json, sha256
from kvcli.models.quantized import QuantizedWeights

DTYPES = ("auto", "float32", "float16", "bfloat16", "float64")

# What stands beside the weights and is copied as it is.
_BESIDE = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "chat_template*", "*.py",
)  # fmt: skip


@dataclass
class LoadedModel:
    """A model in evaluation mode, its tokenizer, and what is recorded of where they came from.

    Attributes
    ----------
    model
        Without gradients, on the device asked for.
    tokenizer
        The checkpoint's own.
    source
        The hub id, or the last part of a local path: never a path of the machine.
    geometry
        One entry per layer.
    rope
        The rotary embedding of all layers.
    files
        The weight files that were read.
    offload
        Folder of the weights that a device map left on disk; it goes when the model goes.
    quantized
        The linear layers that are stored in few bits; the model holds their dequantised weights.
    changes
        What was done to the weights after they were read, by the name of the step: its settings, plain JSON.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    geometry: tuple[LayerGeometry, ...]
    rope: Rope
    files: tuple[Path, ...]
    offload: TemporaryDirectory[str] | None = field(default=None, repr=False)
    quantized: QuantizedWeights | None = field(default=None, repr=False)
    changes: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def source_sha256(self) -> str:
        """Hash of the weight files' content; reads them all, once."""
        return sha256(self.files)

    @property
    def sha256(self) -> str:
        """Hash of the weights: of the files' content, and of what was done to it since."""
        if not self.changes:
            return self.source_sha256
        text = json.dumps([self.source_sha256, self.changes], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def dtype(self) -> str:
        """Dtype of the weights and of compute, as in ``float32``."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def max_context(self) -> int:
        """Longest sequence that the model was made for."""
        return int(self.model.config.max_position_embeddings)


DeviceMap = str | dict[str, Any]


def load(
    source: str,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    device: str = "cpu",
    device_map: DeviceMap | None = None,
) -> LoadedModel:
    """Load a model from a local folder, a hub id or a .gguf file.

    Parameters
    ----------
    source
        Anything that exists is a path; anything else is a hub id, taken from the cache when the hub is out of reach.
    dtype
        One of ``DTYPES``; ``auto`` is the checkpoint's own, and float32 for .gguf, whose weights are dequantised.
    trust_remote_code
        Let the checkpoint bring its own Python code.
    device
        A torch device.
    device_map
        Instead of one device, accelerate's map of modules to devices, memory and disk, or ``auto``: the way to run a
        model that is larger than one device.

    Raises
    ------
    InputError
        For a model that is missing, damaged, incomplete or not supported.
    UsageError
        For an unknown dtype or a device that is not there.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    with _quiet(keep_bars=sys.stderr.isatty()):  # a download takes long enough to be watched
        checkpoint = find(source)
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        if checkpoint.gguf:
            stack.enter_context(gguf.parsed_once())
            gguf.check(checkpoint.gguf)
        offload = TemporaryDirectory(prefix="kvcli-") if device_map is not None else None
        placement = {} if offload is None else {"device_map": device_map, "offload_folder": offload.name}
        try:
            model, tokenizer, packed = _from_pretrained(checkpoint, dtype, trust_remote_code, placement)
        except (KvcliError, MemoryError):
            raise
        except Exception as error:  # a checkpoint is foreign input, and its parsers raise whatever they like
            raise InputError(f"{source} cannot be loaded: {_first_sentence(error)}.") from error
    _check_finite(model)
    if device_map is None:
        try:
            model.to(device)  # type: ignore[arg-type]
        except (RuntimeError, AssertionError) as error:
            raise UsageError(f"Device {device!r} cannot be used: {_first_sentence(error)}.") from error
    return LoadedModel(
        model, tokenizer, checkpoint.name, geometry(model.config), Rope.from_model(model), checkpoint.weights, offload,
        packed,
    )  # fmt: skip


def copy_source_files(loaded: LoadedModel, folder: Path) -> None:
    """Write all but the weights into ``folder``, so that stock Transformers loads the model from there.

    Files are the checkpoint's own; config.json differs in what the model in memory differs in: dtype, tied embeddings
    and quantization_config. A .gguf file has none, so they are made from what was read from it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    now = json.loads(loaded.model.config.to_json_string())
    quantization = now.pop("quantization_config", None)
    if loaded.files[0].suffix == ".gguf":
        config = now
        loaded.tokenizer.save_pretrained(folder)
        _name_tokenizer_class(folder / "tokenizer_config.json")
        if loaded.model.generation_config is not None:
            loaded.model.generation_config.save_pretrained(folder)
    else:
        origin = loaded.files[0].parent
        config = read_json(origin / "config.json")
        for file in {x for pattern in _BESIDE for x in origin.glob(pattern) if x.is_file()}:
            shutil.copyfile(file, folder / file.name)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = loaded.dtype
    config["tie_word_embeddings"] = loaded.model.config.tie_word_embeddings
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = quantization
    if loaded.quantized is not None and loaded.quantized.method == "gptq":  # where AutoGPTQ itself looks
        (folder / "quantize_config.json").write_text(json.dumps(loaded.quantized.config, indent=2) + "\n", "utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def state_dict_for_saving(loaded: LoadedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor to be stored, by name; a tied one stands once, under the name Transformers gives it.

    Layers that are stored in few bits are yielded as they are stored.
    """
    state = loaded.model.state_dict()
    tied = loaded.model.all_tied_weights_keys
    for name, tensor in state.items():
        module, _, own = name.rpartition(".")
        if loaded.quantized is not None and own == "weight" and module in loaded.quantized.layers:
            for suffix, packed in loaded.quantized.layers[module].tensors.items():
                yield f"{module}.{suffix}", packed
        elif name not in tied or state[tied[name]].data_ptr() != tensor.data_ptr():
            yield name, _in_memory(loaded.model, name, tensor)


def _in_memory(model: PreTrainedModel, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor of the model, read from where accelerate keeps it if it is not in memory."""
    if not tensor.is_meta:
        return tensor
    with align_module_device(model.get_submodule(name.rpartition(".")[0]), "cpu"):
        return model.get_parameter(name).data


def added_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that the tokenizer puts before any text by itself, if it does."""
    encoding: Any = tokenizer("")
    return tokenizer.bos_token_id if encoding.input_ids[:1] == [tokenizer.bos_token_id] else None


@contextmanager
def _quiet(*, keep_bars: bool = False) -> Iterator[None]:
    """Keep Transformers off stderr, but for its progress bars if those are wanted."""
    hf: Any = hf_logging
    verbosity, bar = hf.get_verbosity(), hf.is_progress_bar_enabled()
    hf.set_verbosity(logging.CRITICAL)
    if not keep_bars:
        hf.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf.set_verbosity(verbosity)
        if bar and not keep_bars:
            hf.enable_progress_bar()


def _from_pretrained(
    checkpoint: Checkpoint, dtype: str, trust_remote_code: bool, placement: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, QuantizedWeights | None]:
    where: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if checkpoint.gguf:
        where["gguf_file"] = checkpoint.gguf.name
        dtype = "float32" if dtype == "auto" else dtype
    config = AutoConfig.from_pretrained(checkpoint.folder, **where)
    check_supported(config)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, **where)
    packing = None if checkpoint.gguf else quantized.config_of(checkpoint.folder)
    packed = None
    loaded: Any
    if packing is None:
        if not checkpoint.gguf:
            _check_shapes(checkpoint, config)
        loaded = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **where,
            **placement,
        )
    else:
        loaded, packed = _dequantised(checkpoint, config, packing, dtype, placement)
    model, report = loaded
    _check_complete(report)
    if checkpoint.gguf:  # dequantised, and not to pass for a quantised one when it is saved
        del model.config.quantization_config
        model.config.architectures = [type(model).__name__]
    model.config.name_or_path = tokenizer.name_or_path = checkpoint.name  # not a path of this machine
    return model.eval().requires_grad_(False), tokenizer, packed


def _dequantised(
    checkpoint: Checkpoint, config: PretrainedConfig, packing: dict[str, Any], dtype: str, placement: dict[str, Any]
) -> tuple[Any, QuantizedWeights]:
    """Load a quantised checkpoint as an ordinary model, without the kernels of whoever quantised it."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain: Any = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(x.shape) for name, x in plain.state_dict().items()}
    state, packed = quantized.read(checkpoint.weights, packing, shapes)
    if dtype == "auto" and config.dtype is None:
        dtype = "float16"  # the dtype of such checkpoints' scales, and of the models that AutoGPTQ takes
    loaded = type(plain).from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True, **placement
    )
    loaded[0].config.quantization_config = packing
    if (checkpoint.folder / "generation_config.json").is_file():
        loaded[0].generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    return loaded, packed


def _check_shapes(checkpoint: Checkpoint, config: PretrainedConfig) -> None:
    """Hold the files' headers against the configuration before an absurd one makes anything allocate."""
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    for file in checkpoint.weights:
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(state.keys() & tensors.keys()):
                found, expected = tensors.get_slice(name).get_shape(), list(state[name].shape)
                if found != expected:
                    raise InputError(f"Tensor {name} has shape {found} where the configuration says {expected}.")


def _check_complete(report: dict[str, Any]) -> None:
    """Refuse what Transformers would fill with random numbers or leave unread."""
    for name in sorted(report["missing_keys"]):
        raise InputError(f"Tensor {name}, which the configuration calls for, is missing from the weights.")
    for name in sorted(report["unexpected_keys"]):
        raise InputError(f"Tensor {name} in the weights has no place in the model that the configuration describes.")


def _check_finite(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        tensor = _in_memory(model, name, parameter)
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise InputError(f"Tensor {name} holds NaN or infinite values.")


def _name_tokenizer_class(path: Path) -> None:
    """Give the class the name that Transformers 4, and engines that build on it, know too."""
    config = read_json(path)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _first_sentence(error: BaseException) -> str:
    return " ".join(str(error).split()).split(". ")[0].rstrip(".") or type(error).__name__
