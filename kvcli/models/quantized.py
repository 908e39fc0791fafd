"""A model's linear layers in few bits: what a checkpoint says of them, reading them, and writing them.

Read are AutoGPTQ's layout (3, 4 and 8 bits; symmetric or not; with or without act-order; described in config.json or in
an old quantize_config.json) and what bitsandbytes writes (NF4, FP4, LLM.int8). Kernels of those libraries are not
needed: weights are dequantised as they are read, and what they were stored as is kept beside the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import kvcli
from kvcli.errors import InputError
from kvcli.models.checkpoint import read_json
from kvcli.quant.stored import BnbLinear, GptqLinear, StoredLinear
from kvcli.quant.weight_format import BITS, WeightFormat

GPTQ_FORMATS = {"gptq": 1, "gptq_v2": 0}  # what is taken off zero points
_GPTQ = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class QuantizedWeights:
    """The linear layers of a model that are stored in few bits.

    Attributes
    ----------
    config
        ``quantization_config``, as config.json has it.
    layers
        By the module's name, ``model.layers.0.self_attn.q_proj``.
    """

    config: dict[str, Any]
    layers: Mapping[str, StoredLinear]

    @property
    def method(self) -> str:
        """Return ``gptq`` or ``bitsandbytes``."""
        return str(self.config["quant_method"])

    @property
    def has_codes(self) -> bool:
        """Whether layers are stored in codes of 4 bits or fewer, which the native runtime multiplies on a CPU."""
        return not self.config.get("load_in_8bit") and int(self.config.get("bits", 4)) <= 4

    @property
    def bits(self) -> float:
        """Bits that a weight of these layers takes, with all that is stored beside it."""
        stored = sum(x.nbytes for layer in self.layers.values() for x in layer.tensors.values())
        return 8 * stored / sum(layer.shape[0] * layer.shape[1] for layer in self.layers.values())


def gptq_config(fmt: WeightFormat, *, damping: float | None = None) -> dict[str, Any]:
    """Return the quantization_config of layers in one format; ``damping`` is GPTQ's, if that chose the codes."""
    return {
        "quant_method": "gptq", "checkpoint_format": "gptq", "bits": fmt.bits, "group_size": fmt.group,
        "desc_act": False, "sym": fmt.symmetric, "static_groups": True, "true_sequential": True, "lm_head": False,
        "pack_dtype": "int32", "damp_percent": damping or 0.01, "is_marlin_format": False,
        "meta": {"quantizer": [f"kvcli:{kvcli.__version__}"]},
    }  # fmt: skip


def bnb_config(*, nf4: bool, dtype: str) -> dict[str, Any]:
    """Return the quantization_config of layers in NF4 (computing in ``dtype``) or LLM.int8."""
    shared = {"quant_method": "bitsandbytes", "load_in_4bit": nf4, "load_in_8bit": not nf4}
    own = {
        "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
    } if nf4 else {"llm_int8_threshold": 6.0, "llm_int8_has_fp16_weight": False}  # fmt: skip
    return {**shared, **own}


def config_of(folder: Path) -> dict[str, Any] | None:
    """Return what a checkpoint's folder says of how its weights are quantised; None for plain weights.

    Raises
    ------
    InputError
        For a method, a layout or bits that kvcli does not read.
    """
    config = read_json(folder / "config.json").get("quantization_config")
    old = folder / "quantize_config.json"
    if config is None and old.is_file():
        config = {"quant_method": "gptq", **read_json(old)}
    if config is None:
        return None
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.json'} has a quantization_config that is no object.")
    method = config.get("quant_method")
    if method == "bitsandbytes" or (method is None and (config.get("load_in_4bit") or config.get("load_in_8bit"))):
        return {**config, "quant_method": "bitsandbytes"}
    if method != "gptq":
        raise InputError(f"Weights quantised by {str(method)[:50]!r} are not read; kvcli reads gptq and bitsandbytes.")
    layout = config.get("checkpoint_format") or "gptq"
    if layout not in GPTQ_FORMATS:
        raise InputError(f"The GPTQ layout {str(layout)[:50]!r} is not read; kvcli reads {', '.join(GPTQ_FORMATS)}.")
    if config.get("bits") not in BITS:
        raise InputError(f"GPTQ weights of {str(config.get('bits'))[:50]} bits are not read; kvcli reads {BITS}.")
    group = config.get("group_size", -1)
    if type(group) is not int or group == 0 or group < -1:
        raise InputError(f"The quantization_config has a group_size of {str(group)[:50]}.")
    return config


def read(
    files: tuple[Path, ...], config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Tensor], QuantizedWeights]:
    """Read a quantised checkpoint.

    Parameters
    ----------
    files
        The safetensors files.
    config
        From :func:`config_of`.
    shapes
        Of the model's own tensors, by name, if nothing were quantised: headers are held to them before anything is
        read.

    Returns
    -------
    tuple
        A state dict whose quantised weights are dequantised, float32; and the layers as they were stored.

    Raises
    ------
    InputError
        One sentence naming the tensor that is missing, of a wrong shape or dtype, or holds impossible values.
    """
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    part = opened.get_slice(name)
                    if name in shapes and part.get_dtype().startswith(("F", "BF")):
                        _check_shape(name, tuple(part.get_shape()), shapes[name])
                    found[name] = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is damaged or truncated: {error}.") from error
    layers: dict[str, StoredLinear] = {}
    make = _gptq if config["quant_method"] == "gptq" else _bnb
    for name, shape in shapes.items():
        module, _, own = name.rpartition(".")
        if own == "weight" and len(shape) == 2 and (made := make(module, found, config, (shape[0], shape[1]))):
            layers[module] = made
            for suffix in made.tensors:
                del found[f"{module}.{suffix}"]
            found.pop(f"{module}.weight_format", None)
    if not layers:
        raise InputError("The configuration says that weights are quantised, and no layer is.")
    for module, layer in layers.items():
        try:
            weight = layer.dequantize()
        except InputError as error:
            raise InputError(f"{module}: {error}") from None
        if not weight.isfinite().all():
            raise InputError(f"{module} has scales that are NaN or infinite.")
        found[f"{module}.weight"] = weight
        bias = f"{module}.bias"
        if bias in found and bias not in shapes and not found[bias].any():
            del found[bias]  # AutoGPTQ gave every layer one
    return found, QuantizedWeights(config, layers)


def _gptq(
    module: str, found: Mapping[str, Tensor], config: dict[str, Any], shape: tuple[int, int]
) -> GptqLinear | None:
    tensors = {x: found[f"{module}.{x}"] for x in _GPTQ if f"{module}.{x}" in found}
    if "qweight" not in tensors:
        if tensors:
            raise InputError(f"{module} has {next(iter(tensors))} and no qweight.")
        return None
    if missing := [x for x in _GPTQ[:3] if x not in tensors]:
        raise InputError(f"{module} has no {missing[0]}.")
    bits, (out, width) = config["bits"], shape
    group = width if config.get("group_size", -1) == -1 else config["group_size"]
    try:
        fmt = WeightFormat(bits, group)
    except InputError as error:
        raise InputError(f"{module}: {error}") from None
    groups = -(-width // group)
    expected = {
        "qweight": (torch.int32, (width * bits // 32, out)), "qzeros": (torch.int32, (groups, out * bits // 32)),
        "scales": (torch.float16, (groups, out)), "g_idx": (torch.int32, (width,)),
    }  # fmt: skip
    for name, tensor in tensors.items():
        dtype, needed = expected[name]
        _check_shape(f"{module}.{name}", tuple(tensor.shape), needed)
        if (tensor.dtype != dtype) if dtype == torch.int32 else not tensor.is_floating_point():
            raise InputError(f"Tensor {module}.{name} is {tensor.dtype}, where {dtype} belongs.")
    return GptqLinear(tensors, fmt, GPTQ_FORMATS[config.get("checkpoint_format") or "gptq"])


def _bnb(module: str, found: Mapping[str, Tensor], config: dict[str, Any], shape: tuple[int, int]) -> BnbLinear | None:
    weight = found.get(f"{module}.weight")
    if weight is None or weight.is_floating_point():
        return None
    suffixes = [x.removeprefix(f"{module}.") for x in found if x.startswith(f"{module}.weight.")]
    suffixes += ["SCB"] if f"{module}.SCB" in found else []
    if weight.dtype == torch.int8 and "SCB" not in suffixes:
        raise InputError(f"{module} has no SCB.")
    return BnbLinear({"weight": weight, **{x: found[f"{module}.{x}"] for x in suffixes}}, shape)


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise InputError(f"Tensor {name} has shape {list(found)} where the configuration says {list(expected)}.")
