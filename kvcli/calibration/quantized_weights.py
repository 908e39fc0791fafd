"""Storing a model's linear layers in few bits: rounding, pre-calibration, GPTQ, and the formats of bitsandbytes.

One decoder layer after the other: its inputs come from the layers before it as they are stored already, and so do the
inputs of its later matrices (GPTQ's "true sequential" order: query, key and value; the attention's output; gate and up;
down). Second moments of one matrix at a time are in memory. The embedding and lm_head stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcli.calibration import precalibration
from kvcli.calibration.capture import embed, plain_cache, run_layer
from kvcli.calibration.corpora import Corpus
from kvcli.calibration.gptq import DAMPING, gptq
from kvcli.calibration.space import section
from kvcli.calibration.stages import Show, Stages, Step, silent
from kvcli.errors import InputError, UsageError
from kvcli.models.loading import LoadedModel
from kvcli.models.quantized import QuantizedWeights, bnb_config, gptq_config
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant import stored
from kvcli.quant.format import KVFormat
from kvcli.quant.stored import BnbLinear, GptqLinear, StoredLinear
from kvcli.quant.weight_format import WeightFormat
from kvcli.runtime.packed_cache import ATTENTION

Kind = Literal["int3", "int4", "int8", "nf4", "llm-int8"]
Method = Literal["rtn", "precalibrated", "gptq", "precalibrated+gptq"]

BITS = {"int3": 3, "int4": 4, "int8": 8}
GROUP = 128
OTHERS_GROUPS = (128, 64, 32)  # that kernels of other engines are made for
# Matrices that read the same input, in the order in which a layer computes them.
MATRICES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@dataclass(frozen=True)
class WeightSettings:
    """How weights are to be stored.

    Attributes
    ----------
    kind
        ``int3``, ``int4`` and ``int8`` are AutoGPTQ's layout; ``nf4`` and ``llm-int8`` are bitsandbytes'.
    method
        How grids and codes of AutoGPTQ's layout are chosen.
    symmetric
        In AutoGPTQ's layout, whether all zero points are the middle code: vLLM reads no others.
    """

    kind: Kind = "int4"
    method: Method = "precalibrated+gptq"
    symmetric: bool = False

    @classmethod
    def of_recipe(cls, name: str) -> WeightSettings | None:
        """Read a recipe's section ``weights``; None without one, or without such a recipe.

        Raises
        ------
        InputError
            If the section is not valid.
        """
        stated = section(name, "weights")
        if stated is None:
            return None
        known = {"kind": get_args(Kind), "method": get_args(Method), "symmetric": (True, False)}
        for key, value in stated.items():
            if key not in known:
                raise InputError(f"weights has no {key!r}; it has {', '.join(known)}.")
            if not any(type(value) is type(x) and value == x for x in known[key]):
                raise InputError(f"weights: {key} {value!r} is not one of {', '.join(map(str, known[key]))}.")
        return cls(**stated)


def common_group(widths: Sequence[int], most: int = GROUP) -> int:
    """Return one group size for layers of these inputs, since a checkpoint states one.

    The largest of 128, 64 and 32 that divides all of them, which is what kernels of other engines know; failing that,
    the largest multiple of 8 up to ``most`` that does.

    Raises
    ------
    InputError
        If there is none.
    """
    candidates: list[int] = [*(x for x in OTHERS_GROUPS if x <= most), *range(most // 8 * 8, 0, -8)]
    for group in candidates:
        if all(width % group == 0 for width in widths):
            return group
    raise InputError(f"layers of {', '.join(map(str, sorted(set(widths))))} inputs have no group size in common.")


def stored_with(
    weight: Tensor, fmt: WeightFormat, method: Method, moments: Tensor | None = None
) -> tuple[GptqLinear, dict[str, float]]:
    """Store one weight in AutoGPTQ's layout.

    Parameters
    ----------
    weight
        [out, in], any float dtype.
    fmt, method
        How.
    moments
        float64 [in, in], the sum of x xᵀ over the inputs; GPTQ needs it.

    Returns
    -------
    tuple
        The layer, and figures: ``kl_before`` and ``kl_after``, the KL divergence of round-to-nearest's grids and of the
        chosen ones; with moments also ``output_error``, the squared error of the outputs relative to their square.
    """
    chosen = precalibration.precalibrate if method.startswith("precalibrated") else precalibration.round_to_nearest
    scale, zero = chosen(weight, fmt)
    kl = precalibration.divergence(weight, fmt, scale, zero)
    figures = {"kl_before": kl.before, "kl_after": kl.after}
    if method.endswith("gptq"):
        assert moments is not None, "GPTQ needs second moments"
        codes = gptq(weight, moments, fmt, scale, zero)
    else:
        codes = fmt.encode(fmt.groups(weight.float()), scale[..., None], zero[..., None]).flatten(1)
    layer = GptqLinear(fmt.pack(codes, scale, zero), fmt)
    if moments is not None:
        w = weight.double()
        error = w - layer.dequantize().double()
        figures["output_error"] = float(((error @ moments) * error).sum() / ((w @ moments) * w).sum())
    return layer, figures


class LayerQuantizer:
    """Stores a model's decoder layers in few bits, one after the other, changing the model as it goes.

    Parameters
    ----------
    loaded
        The model, in memory; its attention is switched to ``kvcli``.
    ids
        Calibration windows, int64 [windows, tokens]; read only where GPTQ is asked for.
    formats
        The format for layers of so many inputs.
    method
        How codes are chosen.
    bnb
        Instead of formats, what makes a layer of bitsandbytes.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        ids: Tensor,
        formats: Mapping[int, WeightFormat],
        method: Method,
        *,
        bnb: Callable[[Tensor], BnbLinear] | None = None,
    ) -> None:
        self.model, self.formats, self.method, self.bnb = loaded.model, formats, method, bnb
        self.model.set_attn_implementation(ATTENTION)
        exact = KVFormat.exact()
        self.plan = CachePlan(
            tuple(
                LayerPlan(g.num_kv_heads, g.head_dim, exact, exact, kind=g.kind, window=g.window)
                for g in loaded.geometry
            ),
            dtype=loaded.dtype,
        )
        self.sees = bnb is None and method.endswith("gptq")
        self.hidden = [embed(self.model, window[None]) for window in ids] if self.sees else []

    @torch.no_grad()
    def quantize(self, index: int) -> tuple[dict[str, StoredLinear], dict[str, dict[str, float]]]:
        """Store one layer's matrices; layers before it are done. Returns them and their figures, by module name."""
        layers: dict[str, StoredLinear] = {}
        figures: dict[str, dict[str, float]] = {}
        for names in MATRICES:
            moments = self._moments(index, names[0]) if self.sees else None
            for name in names:
                full = f"model.layers.{index}.{name}"
                weight = _linear(self.model, full).weight
                if self.bnb is not None:
                    layers[full], figures[full] = self.bnb(weight), {}
                else:
                    layers[full], figures[full] = stored_with(
                        weight, self.formats[weight.shape[1]], self.method, moments
                    )
                weight.copy_(layers[full].dequantize())
        self._advance(index)
        return layers, figures

    @torch.no_grad()
    def install(self, index: int, layers: Mapping[str, StoredLinear]) -> None:
        """Take one layer's matrices from an earlier run."""
        for name, layer in layers.items():
            _linear(self.model, name).weight.copy_(layer.dequantize())
        self._advance(index)

    def _advance(self, index: int) -> None:
        self.hidden = [run_layer(self.model, x, plain_cache(self.plan), index) for x in self.hidden]

    def _moments(self, index: int, name: str) -> Tensor:
        """Return the sum of x xᵀ over a matrix's inputs, float64; products of one window are float32."""
        module = _linear(self.model, f"model.layers.{index}.{name}")
        total = torch.zeros(module.in_features, module.in_features, dtype=torch.float64)

        def see(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2).to(torch.promote_types(inputs[0].dtype, torch.float32))
            total.add_((x.t() @ x).cpu())
            raise _Seen  # what the layer would compute from here on is not needed

        handle = module.register_forward_pre_hook(see)
        try:
            for x in self.hidden:
                with suppress(_Seen):
                    run_layer(self.model, x, plain_cache(self.plan), index)
        finally:
            handle.remove()
        return total


class _Seen(Exception):
    """A matrix's input has been seen."""


def _linear(model: PreTrainedModel, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def quantize(
    loaded: LoadedModel,
    corpus: Corpus,
    settings: WeightSettings,
    out: Path,
    *,
    fresh: bool = False,
    show: Show = silent,
) -> tuple[LoadedModel, dict[str, Any], dict[str, Any]]:
    """Store a model's linear layers as ``settings`` say; finished layers are kept beside ``out`` until it is written.

    Parameters
    ----------
    loaded
        The model, in memory; its weights become what the stored ones stand for, in the model's dtype.
    corpus
        What GPTQ sees.
    settings
        How.
    out
        The artifact to be.
    fresh
        Forget finished stages of an interrupted run.
    show
        Makes the progress display.

    Returns
    -------
    tuple
        The model with its stored layers; the stage's record for the artifact; and what was measured, for the report.

    Raises
    ------
    InputError
        If the model's weights are quantised already or do not fit the format.
    UsageError
        If the model is not in memory whole, or bitsandbytes is not installed.
    """
    fmt = check(loaded, settings)
    data = corpus.sha256 if fmt is not None and settings.method.endswith("gptq") else None
    chosen: dict[str, Any] = {"kind": settings.kind}
    if fmt is not None:
        chosen |= {"method": settings.method, **asdict(fmt), "damping": DAMPING, "kappa": precalibration.KAPPA}
    source = {"model": loaded.sha256, "dtype": loaded.dtype, "data": data, **chosen}
    make = {"nf4": stored.nf4, "llm-int8": stored.llm_int8}.get(settings.kind)
    formats = {} if fmt is None else dict.fromkeys(_widths(loaded), fmt)
    work = LayerQuantizer(loaded, corpus.ids, formats, settings.method, bnb=make)

    def keep(index: int, _: Step) -> dict[str, Tensor]:
        return _pack(*work.quantize(index))

    layers: dict[str, StoredLinear] = {}
    report: list[dict[str, Any]] = []
    with (
        Stages.beside(out, fresh=fresh) as stages,
        show(f"storing weights: {settings.kind}", len(loaded.geometry)) as progress,
    ):
        for i in range(len(loaded.geometry)):
            before = len(stages.resumed)
            kept = stages.run(f"weights-{i}", partial(keep, i), description="", settings=source)
            own, figures = _unpack(kept, fmt, loaded)
            if len(stages.resumed) > before:
                work.install(i, own)
            layers |= own
            report += [{"name": name, **figures[name]} for name in own]
            progress.advance()
    config = bnb_config(nf4=settings.kind == "nf4", dtype=loaded.dtype) if fmt is None else gptq_config(fmt)
    weights = QuantizedWeights(config, layers)
    loaded.model.config.quantization_config = config
    record = {"name": "weights", "settings": source, "sha256": stages.digest("weights", source, ())}
    done = replace(loaded, quantized=weights, changes={**loaded.changes, "weights": {**chosen, "data": data}})
    return done, record, {**chosen, "bits_per_weight": weights.bits, "layers": report}


def check(loaded: LoadedModel, settings: WeightSettings) -> WeightFormat | None:
    """Return the format of AutoGPTQ's layout that the model's layers get, or None for those of bitsandbytes.

    Raises
    ------
    InputError
        If the model's weights are quantised already, or a layer does not fit the format.
    UsageError
        If the model is not in memory whole, bitsandbytes is not installed, or its formats are to be symmetric.
    """
    if settings.symmetric and settings.kind not in BITS:
        raise UsageError(f"--weight-symmetric is for --weights {', '.join(BITS)}, not {settings.kind}.")
    if loaded.quantized is not None:
        raise InputError(f"{loaded.source}: its weights are quantised already; leave out --weights.")
    if loaded.offload is not None or any(x.is_meta for x in loaded.model.parameters()):
        raise UsageError("--weights changes a model in memory: leave out --device-map.")
    if settings.kind not in BITS:
        if settings.kind == "nf4":
            stored.library()
        return None
    fmt = WeightFormat(BITS[settings.kind], common_group(_widths(loaded)), settings.symmetric)
    for i in range(len(loaded.geometry)):
        for name in (x for names in MATRICES for x in names):
            full = f"model.layers.{i}.{name}"
            linear = _linear(loaded.model, full)
            fmt.check((linear.out_features, linear.in_features), full)
    return fmt


def _widths(loaded: LoadedModel) -> list[int]:
    return [_linear(loaded.model, f"model.layers.0.{x}").in_features for names in MATRICES for x in names]


def _pack(layers: Mapping[str, StoredLinear], figures: Mapping[str, Mapping[str, float]]) -> dict[str, Tensor]:
    """Lay one decoder layer's matrices and figures out as tensors, to be kept."""
    kept = {f"{name}/{suffix}": x for name, layer in layers.items() for suffix, x in layer.tensors.items()}
    numbers = {
        f"{name}/figure.{which}": torch.tensor(x, dtype=torch.float64)
        for name, own in figures.items()
        for which, x in own.items()
    }
    return {**kept, **numbers}


def _unpack(
    kept: Mapping[str, Tensor], fmt: WeightFormat | None, loaded: LoadedModel
) -> tuple[dict[str, StoredLinear], dict[str, dict[str, float]]]:
    """Undo :func:`_pack`."""
    tensors: dict[str, dict[str, Tensor]] = {}
    figures: dict[str, dict[str, float]] = {}
    for key, x in kept.items():
        name, _, what = key.partition("/")
        own, numbers = tensors.setdefault(name, {}), figures.setdefault(name, {})
        if what.startswith("figure."):
            numbers[what.removeprefix("figure.")] = float(x)
        else:
            own[what] = x
    layers: dict[str, StoredLinear] = {}
    for name, own in tensors.items():
        linear = _linear(loaded.model, name)
        shape = (linear.out_features, linear.in_features)
        layers[name] = BnbLinear(own, shape) if fmt is None else GptqLinear(own, fmt)
    return layers, figures
