"""OSTQuant's transforms: orthogonal and scaling maps that leave the network's function as it is.

After Hu et al., arXiv:2501.13987. Vectors are rows and a linear layer computes ``x Wᵀ + b``. A transform maps some
vector of the network, ``x' = x M``, and every weight that makes or reads that vector takes its part:

- what **makes** ``x`` (a linear layer's rows and bias, a norm's weight, the embedding's rows) is mapped by ``M``;
- what **reads** ``x`` (a linear layer's columns) is mapped by ``M⁻ᵀ``, so that ``x' W'ᵀ = x M M⁻¹ Wᵀ``;
- what is **multiplied** with ``x`` (queries, where ``x`` are keys) is made anew by ``M⁻ᵀ`` too: ``q' k'ᵀ = q kᵀ``.

For an orthogonal ``M``, ``M⁻ᵀ = M``; for a scaling it is the reciprocal. That is all there is to fusing, and each class
below is one row of the paper's table: the vector, ``M``, and who makes, reads and meets it.

=========== ================================ ==================== =======================================
parameter   the vector and its map           value                fused into
=========== ================================ ==================== =======================================
``r_res``   residual stream ``x R``          [D, D]               embedding, o, down; q, k, v, gate, up, lm_head
``r_ov``    values ``v R`` of each KV head   [L, h, d, d]         v (and its bias); o
``s_attn``  attention's input ``x / S``      [L, D]               input_layernorm; q, k, v
``s_ffn``   feed-forward's input ``x / S``   [L, D]               post_attention_layernorm; gate, up
``s_qk``    keys ``k S``                     [L, h or 1, d / 2]   k, q (and their biases), or k_norm, q_norm
``s_ov``    values ``v / S``                 [L, h, d]            v (and its bias); o
``s_ud``    up's output ``x / S``            [L, F]               up (and its bias); down
=========== ================================ ==================== =======================================

L layers, D hidden_size, F intermediate_size, h KV heads, d head_dim. Several are fused in this order, each reading what
the one before it left; so values become ``v R / S``, and ``s_ud`` scales before :class:`DownHadamard` rotates.

The paper's two fixed Hadamard rotations stay online. H_qk, after RoPE on queries and keys, is a plan's own ``transform:
hadamard`` and needs nothing from here. H_down, on down's input, serves low-bit activations only; its fused half is
:class:`DownHadamard`, and :func:`kvcli.calibration.fusing.rotating_down` is its online half for simulated evaluation.

Fusing is built of differentiable torch operations and writes nothing: a learner makes the parameters leaves that
require gradients, calls :func:`transforms`, and fuses a layer's weights in every step (in float32, if it likes).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig

from kvcli.errors import InputError
from kvcli.models.architectures import geometry
from kvcli.protocols import Shard, Transform, Which
from kvcli.quant.transforms import hadamard

ROTATIONS = ("r_res", "r_ov")
KV = ("r_ov", "s_qk", "s_ov")  # what changes what a cache holds

_LINEAR_OF_NORM = {
    "input_layernorm": ("q_proj", "k_proj", "v_proj"),
    "post_attention_layernorm": ("gate_proj", "up_proj"),
    "norm": ("lm_head",),
}
_NAME = re.compile(r"(?:model\.layers\.(\d+)\.\w+\.|model\.layers\.(\d+)\.|model\.|)(\w+)\.(weight|bias)")


def _place(name: str) -> tuple[int, str]:
    """Return a parameter's layer (0 outside the layers) and its module's own name."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise InputError(f"Weight {name!r} has no place in the models that kvcli supports.")
    return int(match[1] or match[2] or 0), match[3]


class Fused(ABC):
    """A map that weights absorb; what all of this module's transforms share.

    Attributes
    ----------
    makes, meets, reads
        Modules that make the vector, that make what is multiplied with it, and that read it.
    caches
        Which of ``k`` and ``v`` the vector is.
    dtype
        In which weights are computed; float64 but for learning.
    """

    family: str = "transform"
    name: str
    shard: Shard = "head"
    online: Sequence[str] = ()
    makes: tuple[str, ...] = ()
    meets: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    caches: tuple[Which, ...] = ()
    dtype = torch.float64

    def __init__(self) -> None:
        self.fused: Sequence[str] = self.makes + self.meets + self.reads

    @abstractmethod
    def _map(self, layer: int, x: Tensor, *, undo: bool = False, dual: bool = False) -> Tensor:
        """Return x M, x M⁻¹ (``undo``) or x M⁻ᵀ (``dual``) for x [..., heads, n, d]."""

    @abstractmethod
    def _heads(self, width: int) -> tuple[int, int]:
        """Return heads and d of the vectors that lie side by side in a row of ``width``."""

    def forward(self, layer: int, which: Which, x: Tensor) -> Tensor:
        """Map [..., h, n, d] from what the original model caches to what the fused one does."""
        return self._map(layer, x) if which in self.caches else x

    def inverse(self, layer: int, which: Which, x: Tensor) -> Tensor:
        """Undo :meth:`forward`."""
        return self._map(layer, x, undo=True) if which in self.caches else x

    def fuse(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return those of ``weights`` that change, in ``dtype``; differentiable in them and in the parameters.

        Parameters
        ----------
        weights
            By their names in the model's state dict; any part of it.
        """
        changed = {}
        for name, weight in weights.items():
            layer, module = _place(name)
            if module in self.makes + self.meets:
                # the rows of an embedding, a bias and a norm's weight are vectors; a linear layer's columns are
                turned = weight.ndim == 2 and module != "embed_tokens"
                rows = self._rows(layer, weight.T if turned else weight, dual=module in self.meets)
                changed[name] = rows.T if turned else rows
            elif module in self.reads and weight.ndim == 2:
                changed[name] = self._rows(layer, weight, dual=True)
        return changed

    def tensors(self) -> dict[str, Tensor]:
        """Return nothing: weights hold it all."""
        return {}

    def _rows(self, layer: int, x: Tensor, *, dual: bool) -> Tensor:
        heads, d = self._heads(x.shape[-1])
        side_by_side = x.to(self.dtype).reshape(*x.shape[:-1], heads, -1, d)
        return self._map(layer, side_by_side, dual=dual).reshape(x.shape)


class _Valued(Fused):
    """A map with a parameter, which may require gradients."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def _at(self, layer: int, like: Tensor) -> Tensor:
        return self.value[layer].to(like)


class _Rotation(_Valued):
    def _map(self, layer: int, x: Tensor, *, undo: bool = False, dual: bool = False) -> Tensor:
        r = self._at(layer, x)  # [heads, d, d], its own M⁻ᵀ
        return torch.einsum("...hnd,hed->...hne" if undo else "...hnd,hde->...hne", x, r)

    def _heads(self, width: int) -> tuple[int, int]:
        return self.value.shape[-3], self.value.shape[-1]


class _Scaling(_Valued):
    _divides: ClassVar[bool] = True

    def _map(self, layer: int, x: Tensor, *, undo: bool = False, dual: bool = False) -> Tensor:
        s = self._at(layer, x)[..., None, :]  # [heads, 1, d]
        return x * s if self._divides == (undo or dual) else x / s

    def _heads(self, width: int) -> tuple[int, int]:
        return self.value.shape[-2], self.value.shape[-1]


class _WholeScaling(_Scaling):
    """Scales a vector that is not split into heads: its value is [L, width]."""

    def __init__(self, value: Tensor) -> None:
        super().__init__(value[:, None])


class ResidualRotation(_Rotation):
    """R_res: rotates the residual stream, once for the model.

    A norm's gain stands between the stream and what reads it and does not commute with a rotation, so it is folded
    first (:class:`NormGains`). K and V stay as they are. A tied embedding is made by R but read through the last norm's
    gain as well, so the two matrices become different ones.
    """

    name = "r_res"
    shard: Shard = "tensor"
    makes = ("embed_tokens", "o_proj", "down_proj")
    reads = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")

    def __init__(self, value: Tensor) -> None:
        super().__init__(value[None])

    def _at(self, layer: int, like: Tensor) -> Tensor:
        return self.value.to(like)

    def fuse(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Fold the gains, then rotate; norms and what reads them must stand in ``weights`` together."""
        plain = NormGains(dtype=self.dtype).fuse(weights)
        return plain | super().fuse({**weights, **plain})


class ValueRotation(_Rotation):
    """R_ov: rotates the values of each KV head; W_o reads them once for every query head of the group."""

    name = "r_ov"
    makes = ("v_proj",)
    reads = ("o_proj",)
    caches = ("v",)


class AttentionInputScale(_WholeScaling):
    """S_attn: divides the input of q, k and v, channel by channel."""

    name = "s_attn"
    makes = ("input_layernorm",)
    reads = ("q_proj", "k_proj", "v_proj")


class FeedForwardInputScale(_WholeScaling):
    """S_ffn: divides the input of gate and up, channel by channel."""

    name = "s_ffn"
    makes = ("post_attention_layernorm",)
    reads = ("gate_proj", "up_proj")


class KeyScale(_Scaling):
    """S_qk: multiplies keys, divides queries; one factor for the two channels that RoPE turns into one another.

    RoPE turns channels i and i + d/2 as a pair, so only a factor that both share commutes with it; every architecture
    that kvcli supports pairs them so, and turns whole heads. Each KV head has its own factors, for its whole query
    group. Where keys and queries are normalised per head (Qwen3), a factor in k's or q's weights would be normalised
    away; it goes into the norms' weights, which all heads of the layer share.

    Parameters
    ----------
    value
        [L, h, d / 2]; with QK-norm [L, 1, d / 2].
    qk_norm
        Whether the model has QK-norm.
    """

    name = "s_qk"
    caches = ("k",)
    _divides = False

    def __init__(self, value: Tensor, *, qk_norm: bool) -> None:
        self.makes, self.meets = (("k_norm",), ("q_norm",)) if qk_norm else (("k_proj",), ("q_proj",))
        super().__init__(torch.cat((value, value), dim=-1))


class ValueScale(_Scaling):
    """S_ov: divides the values of each KV head, channel by channel."""

    name = "s_ov"
    makes = ("v_proj",)
    reads = ("o_proj",)
    caches = ("v",)


class UpScale(_WholeScaling):
    """S_ud: divides up's output, and with it down's input, channel by channel; the gate's factor is not touched."""

    name = "s_ud"
    makes = ("up_proj",)
    reads = ("down_proj",)


class DownHadamard(Fused):
    """H_down: the fused half of a Hadamard rotation of down's input; the other half stays online.

    Sizes that are no power of two are rotated in blocks (:func:`kvcli.quant.transforms.hadamard`).
    """

    name = "h_down"
    shard: Shard = "tensor"
    online = ("down",)
    reads = ("down_proj",)

    def _map(self, layer: int, x: Tensor, *, undo: bool = False, dual: bool = False) -> Tensor:
        return hadamard(x)  # symmetric and orthogonal: its own inverse and its own M⁻ᵀ

    def _heads(self, width: int) -> tuple[int, int]:
        return 1, width


class NormGains:
    """Folds the weights of RMSNorms into what reads them; norms become ones.

    Parameters
    ----------
    final
        Fold the last norm into lm_head too, which a tied embedding cannot share.
    dtype
        In which weights are computed.
    """

    family: str = "transform"
    name: str = "gains"
    shard: Shard = "head"
    online: Sequence[str] = ()

    def __init__(self, *, final: bool = True, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype
        self.norms = {k: v for k, v in _LINEAR_OF_NORM.items() if final or k != "norm"}
        self.fused: Sequence[str] = (*self.norms, *(x for reads in self.norms.values() for x in reads))

    def forward(self, layer: int, which: Which, x: Tensor) -> Tensor:
        """Return ``x``: keys and values do not change."""
        return x

    inverse = forward

    def fuse(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the norms and linear layers that change, in ``dtype``.

        Raises
        ------
        InputError
            If a norm stands in ``weights`` without what reads it, or the other way round.
        """
        by_place = {_place(name): name for name in weights if name.endswith(".weight")}
        changed = {}
        for layer in sorted({layer for layer, _ in by_place}):
            for norm, reads in self.norms.items():
                names = [by_place.get((layer, x)) for x in (norm, *reads)]
                if not any(names):
                    continue
                if not all(names):
                    raise InputError(f"A norm's gain can only be folded together with all that reads it ({norm}).")
                own, *others = (x for x in names if x is not None)
                gain = weights[own].to(self.dtype)
                changed[own] = torch.ones_like(gain)
                changed.update({x: weights[x].to(self.dtype) * gain for x in others})
        return changed

    def tensors(self) -> dict[str, Tensor]:
        """Return nothing: weights hold it all."""
        return {}


def has_qk_norm(config: PretrainedConfig) -> bool:
    """Whether queries and keys are normalised per head before RoPE."""
    return bool(config.model_type == "qwen3")


def shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter, in the order in which they are fused."""
    layers, hidden, kv = config.num_hidden_layers, config.hidden_size, geometry(config)[0]
    h, d = kv.num_kv_heads, kv.head_dim
    return {
        "r_res": (hidden, hidden),
        "r_ov": (layers, h, d, d),
        "s_attn": (layers, hidden),
        "s_ffn": (layers, hidden),
        "s_qk": (layers, 1 if has_qk_norm(config) else h, d // 2),
        "s_ov": (layers, h, d),
        "s_ud": (layers, config.intermediate_size),
    }


def identity(config: PretrainedConfig, names: Sequence[str]) -> dict[str, Tensor]:
    """Return parameters, float64, under which nothing changes."""
    known = shapes(config)
    _check_names(names, known)
    return {
        name: torch.eye(known[name][-1], dtype=torch.float64).repeat(*known[name][:-2], 1, 1)
        if name in ROTATIONS
        else torch.ones(known[name], dtype=torch.float64)
        for name in names
    }


def transforms(
    config: PretrainedConfig, parameters: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float64
) -> list[Transform]:
    """Return the transforms of ``parameters``, named and shaped as :func:`shapes` says, in the order of fusing.

    Parameters
    ----------
    dtype
        In which weights are computed: a learner may do with less than float64.

    Raises
    ------
    InputError
        For an unknown name or a wrong shape.
    """
    known = shapes(config)
    _check_names(tuple(parameters), known)
    maps: list[Transform] = []
    for name in (x for x in known if x in parameters):
        value = parameters[name]
        found, needed = list(value.shape), list(known[name])
        if found != needed:
            raise InputError(f"Transform {name} has shape {found} where the model needs {needed}.")
        own = KeyScale(value, qk_norm=has_qk_norm(config)) if name == KeyScale.name else _CLASSES[name](value)
        own.dtype = dtype
        maps.append(own)
    return maps


_CLASSES: dict[str, type[_Valued]] = {
    x.name: x
    for x in (ResidualRotation, ValueRotation, AttentionInputScale, FeedForwardInputScale, ValueScale, UpScale)
}


def _check_names(names: Sequence[str], known: Mapping[str, object]) -> None:
    for name in names:
        if name not in known:
            raise InputError(f"There is no transform {name!r}; known are {', '.join(known)}.")
