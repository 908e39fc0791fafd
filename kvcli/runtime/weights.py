"""A decoder's weights, taken out of a Transformers model and laid out for the model runner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from kvcli.errors import InputError, KvcliError
from kvcli.models.architectures import check_model_type
from kvcli.models.loading import LoadedModel
from kvcli.plan import CachePlan
from kvcli.runtime.linear import Activations, Blocks, Codes, Dense, Int4, Linear, Scratch, check_width
from kvcli.runtime.stored_codes import codes_of

Kind = Literal["none", "int4"]


@dataclass
class LayerWeights:
    """One decoder layer: query, key and value in one projection, gate and up in another."""

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear


def check_runnable(config: PretrainedConfig, plan: CachePlan) -> None:
    """Raise :class:`InputError`, naming the reason, for what the native backends leave to others."""
    check_model_type(config.model_type)
    if config.hidden_act not in ("silu", "swish"):
        raise InputError(f"the native runtime computes SiLU, and the model uses {config.hidden_act!r}.")
    if plan.dtype == "float64":
        raise InputError("the native runtime does not compute in float64.")
    for layer in plan.layers:
        if layer.head_dim % 8 or layer.head_dim > 256:
            raise InputError(f"the native runtime does not take heads of {layer.head_dim} channels.")


class ModelWeights:
    """All weights of a model.

    Parameters
    ----------
    loaded
        The model. With ``kind`` none, and where dtype and device agree, it goes on to share its memory with what is
        made here; with int4, and layers that the checkpoint stores in 4 bits, it loses its weights, so that they do
        not stay in memory beside the packed ones.
    dtype
        Of norms, embedding and activations; bfloat16 for int4.
    kind
        How linear layers are stored that the checkpoint does not store in 4 bits or fewer itself. Its own codes are
        multiplied as they are, on a CPU in bfloat16.
    device
        Where everything goes.
    block
        Rows that linear layers compute at a time, so that no row depends on how many there are; 0 for all.
    threads
        Of int4 layers on a CPU; 0 for as many as torch uses.
    activations
        Bits that products of 4-bit layers round activations to.

    Attributes
    ----------
    embedding
        [vocabulary, hidden].
    logits_dtype
        What the head writes.
    rows
        A product's rows are a multiple of it: ``block``, or 1 if no layer needs blocks.

    Raises
    ------
    InputError
        If a layer does not fit int4; the model keeps its weights then.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        dtype: torch.dtype,
        kind: Kind = "none",
        device: torch.device,
        block: int = 0,
        threads: int = 0,
        activations: Activations = 16,
    ) -> None:
        model: Any = loaded.model
        self._dtype, self._kind, self._device, self._block, self._threads = dtype, kind, device, block, threads
        self._activations, self.scratch = activations, Scratch()
        self.logits_dtype = torch.float32 if kind == "int4" else dtype
        packs = loaded.quantized is not None and device.type == "cpu" and dtype == torch.bfloat16
        self._stored = loaded.quantized.layers if loaded.quantized is not None and packs else {}
        self._names = {id(module): name for name, module in model.named_modules()}
        if not model.model.embed_tokens.weight.numel():
            raise KvcliError("this model's weights were given to int4 layers already; load it anew.")
        if kind == "int4":
            for width in {x.in_features for x in model.modules() if isinstance(x, nn.Linear)}:
                check_width(width)
        self.rows = 1
        self.embedding: Tensor = self._move(model.model.embed_tokens.weight)
        self.norm: Tensor = self._move(model.model.norm.weight)
        self.eps = float(model.config.rms_norm_eps)
        tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
        self.head = self._linear(model.lm_head, release=False, moved=self.embedding if tied else None)
        if kind == "int4":
            _release(model.lm_head, model.model.embed_tokens)
        self.layers = [self._layer(x) for x in model.model.layers]

    def _move(self, x: Tensor) -> Tensor:
        return x.detach().to(self._device, self._dtype).contiguous()

    def _layer(self, layer: Any) -> LayerWeights:
        attention, mlp = layer.self_attn, layer.mlp
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        return LayerWeights(
            input_norm=self._move(layer.input_layernorm.weight),
            qkv=self._linear(attention.q_proj, attention.k_proj, attention.v_proj),
            q_norm=None if norms[0] is None else self._move(norms[0].weight),
            k_norm=None if norms[1] is None else self._move(norms[1].weight),
            o=self._linear(attention.o_proj),
            post_norm=self._move(layer.post_attention_layernorm.weight),
            gate_up=self._linear(mlp.gate_proj, mlp.up_proj),
            down=self._linear(mlp.down_proj),
        )

    def _linear(self, *modules: nn.Linear, release: bool = True, moved: Tensor | None = None) -> Linear:
        """Put layers that read the same input into one; ``moved`` is what became of the weights already."""
        bias = None
        if modules[0].bias is not None:
            bias = torch.cat([m.bias.detach() for m in modules]).to(self._device, self._dtype)
        made: Linear
        names = [self._names[id(m)] for m in modules]
        codes = codes_of([self._stored[x] for x in names]) if all(x in self._stored for x in names) else None
        if codes is not None:
            made = self._int4(codes, bias)
            if release:
                _release(*modules)
            return self._in_blocks(made)
        weight = fuse([m.weight for m in modules])
        if self._kind == "int4":
            made = self._int4(weight.to(self._device), bias)
            if release:
                _release(*modules)
        else:
            made = Dense(self._move(weight) if moved is None else moved, bias)
        return self._in_blocks(made)

    def _int4(self, weight: Tensor | Codes, bias: Tensor | None) -> Int4:
        return Int4(weight, bias, scratch=self.scratch, threads=self._threads, activations=self._activations)

    def _in_blocks(self, made: Linear) -> Linear:
        if not self._block or (isinstance(made, Int4) and made.rows_alone):
            return made
        self.rows = self._block
        return Blocks(made, self._block)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights; an embedding that is also the head counts once."""
        tensors: dict[int, int] = {x.data_ptr(): x.nbytes for x in (self.embedding, self.norm)}
        linears: list[Linear] = [self.head]
        for layer in self.layers:
            for field in fields(layer):
                value = getattr(layer, field.name)
                if isinstance(value, Tensor):
                    tensors[value.data_ptr()] = value.nbytes
                elif value is not None:
                    linears.append(value)
        inner = [x.linear if isinstance(x, Blocks) else x for x in linears]
        tied = [x for x in inner if isinstance(x, Dense) and x.weight.data_ptr() in tensors]
        return sum(tensors.values()) + sum(x.nbytes for x in inner) - sum(x.weight.nbytes for x in tied)


def fuse(weights: Sequence[Tensor]) -> Tensor:
    """Stack weights of [out, in] and let the originals be views of the stack, so that memory holds them once."""
    first = weights[0].detach()
    if len(weights) == 1:
        return first
    rows, place = sum(len(w) for w in weights), first.storage_offset()
    adjacent = True
    for weight in weights:
        same = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        adjacent &= same and weight.storage_offset() == place and weight.is_contiguous()
        place += weight.numel()
    if adjacent:  # by an earlier runner of the same model
        return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))
    stacked = torch.cat([w.detach() for w in weights])
    for weight, part in zip(weights, stacked.split([len(w) for w in weights]), strict=True):
        weight.data = part
    return stacked


def _release(*modules: nn.Module) -> None:
    for module in modules:
        for parameter in module.parameters():
            parameter.data = parameter.new_empty(0)
