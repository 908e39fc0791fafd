"""The plan of a whole cache, and the only place that counts its bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from kvcli.errors import InputError
from kvcli.quant.format import KVFormat
from kvcli.quant.layout import PageLayout
from kvcli.quant.prediction import Predictor

if TYPE_CHECKING:
    from torch import Tensor

    N = TypeVar("N", int, Tensor)

BLOCK_SIZES = (16, 32, 64, 128)
COMPUTE_DTYPES = ("float32", "float16", "bfloat16", "float64")
TRANSFORMS = ("none", "hadamard")
DTYPE_BYTES = {"F32": 4, "F16": 2, "U8": 1}


@dataclass(frozen=True)
class LayerPlan:
    """How one attention layer keeps its keys and values.

    Attributes
    ----------
    num_kv_heads, head_dim
        The layer's geometry; a token of the layer is ``2 * num_kv_heads * head_dim`` cached scalars.
    k, v
        Storage formats.
    kind, window
        ``full``, or ``sliding`` with its window in tokens (a query at t sees t - window + 1 … t).
    rope
        Whether keys are quantised ``before`` or ``after`` the rotary embedding.
    transform
        What is applied to each head's vector before it is quantised, and undone after: ``none`` or ``hadamard``.
        Tensors on the channel axis are left alone: a rotation would mix what their scales keep apart.
    center
        Whether a calibrated mean (``layer.{i}.k.mean``, ``layer.{i}.v.mean``: [num_kv_heads, head_dim], the keys'
        before RoPE) is taken off first; of a predicted tensor the prediction is, which has a bias.
    predictor
        From what keys and values are predicted, where only the residual is stored; None where neither is.
    """

    num_kv_heads: int
    head_dim: int
    k: KVFormat
    v: KVFormat
    kind: Literal["full", "sliding"] = "full"
    window: int | None = None
    rope: Literal["before", "after"] = "after"
    transform: str = "none"
    center: bool = False
    predictor: Predictor | None = None

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.head_dim < 1:
            raise InputError(f"a layer of {self.num_kv_heads} heads of {self.head_dim} channels is empty.")
        if self.kind not in ("full", "sliding"):
            raise InputError(f"a layer of kind {self.kind!r} is neither 'full' nor 'sliding'.")
        if (self.kind == "sliding") != (self.window is not None):
            raise InputError("a sliding layer needs a window, and only a sliding layer has one.")
        if self.window is not None and self.window < 1:
            raise InputError(f"a sliding window of {self.window} tokens is empty.")
        if self.rope not in ("before", "after"):
            raise InputError(f"rope {self.rope!r} is neither 'before' nor 'after'.")
        if self.transform not in TRANSFORMS:
            raise InputError(f"transform {self.transform!r} is not one of {TRANSFORMS}.")
        for which, fmt in (("k", self.k), ("v", self.v)):
            if fmt.is_exact and self.predicts(which):
                raise InputError(
                    f"{which} is stored in {fmt.bits} bits, and predicted: nothing would be left to store."
                )

    @property
    def is_exact(self) -> bool:
        """Whether both tensors are stored as they are, so that nothing beside the pages is needed."""
        return self.k.is_exact and self.v.is_exact

    @property
    def is_token_wise(self) -> bool:
        """Whether tokens can be written into pages one by one."""
        return self.k.is_token_wise and self.v.is_token_wise

    @property
    def width(self) -> int:
        """Channels of the keys, and of the values, of all heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def scalars_per_token(self) -> int:
        """Cached scalars one token costs in this layer."""
        return 2 * self.width

    def predicts(self, which: str) -> bool:
        """Whether the keys (``k``) or the values (``v``) are stored as what a predictor leaves over."""
        return self.predictor is not None and self.predictor.of(which) is not None

    def with_format(self, which: Literal["k", "v"], fmt: KVFormat) -> LayerPlan:
        """Return the layer with another format for its keys or its values."""
        return replace(self, k=fmt) if which == "k" else replace(self, v=fmt)

    def layout(self, block_size: int) -> PageLayout:
        """Return the layout of this layer's pages."""
        return PageLayout(self.k, self.v, self.head_dim, block_size)

    def page_bytes(self, block_size: int) -> int:
        """Bytes of one page: codes, scales, zeros and padding of all heads."""
        return self.num_kv_heads * self.layout(block_size).head_bytes

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON."""
        return {
            "num_kv_heads": self.num_kv_heads, "head_dim": self.head_dim,
            "k": self.k.to_json(), "v": self.v.to_json(), "kind": self.kind, "window": self.window,
            "rope": self.rope, "transform": self.transform, "center": self.center,
            "predictor": None if self.predictor is None else self.predictor.to_json(),
        }  # fmt: skip

    @classmethod
    def from_json(cls, obj: dict[str, Any]) -> LayerPlan:
        """Rebuild a layer from :meth:`to_json`."""
        fields = {name: x for name, x in obj.items() if name != "anchor"}  # which plans stated, as null, at first
        predictor = None if obj.get("predictor") is None else Predictor.from_json(obj["predictor"])
        stored = {"k": KVFormat.from_json(obj["k"]), "v": KVFormat.from_json(obj["v"]), "predictor": predictor}
        return cls(**{**fields, **stored})


@dataclass(frozen=True)
class CachePlan:
    """All layers, and what they share. Everything that prints a number of bits asks it.

    Attributes
    ----------
    layers
        One :class:`LayerPlan` per attention layer, in order.
    block_size
        Tokens of a page: 16, 32, 64 or 128, the same for every layer.
    sink_tokens
        First tokens of a sequence that are kept in 16 bits beside the pages (in full-attention layers).
    residual_window
        Most recent tokens that a query always reads in 16 bits.
    dtype
        Compute dtype. Exact tensors are kept in it when it has 16 bits, else in float16.
    """

    layers: tuple[LayerPlan, ...]
    block_size: int = 16
    sink_tokens: int = 0
    residual_window: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not self.layers:
            raise InputError("a plan needs at least one layer.")
        if self.block_size not in BLOCK_SIZES:
            raise InputError(f"block_size {self.block_size} is not one of {BLOCK_SIZES}.")
        if self.sink_tokens < 0 or self.residual_window < 0:
            raise InputError("sink_tokens and residual_window cannot be negative.")
        if self.dtype not in COMPUTE_DTYPES:
            raise InputError(f"compute dtype {self.dtype!r} is not one of {COMPUTE_DTYPES}.")
        for i, layer in enumerate(self.layers):
            layer.layout(self.block_size)
            self._check_predictor(i)

    def _check_predictor(self, index: int) -> None:
        """Whatever a layer is predicted from must hold the same slots, packed, whenever it is read."""
        layer = self.layers[index]
        if layer.predictor is None:
            return
        layer.predictor.check(index)
        for x in (self.layers[source.layer] for source in layer.predictor.sources()):
            if (x.kind, x.window) != (layer.kind, layer.window):
                raise InputError(f"layer {index} is predicted from a layer of another kind or window.")
        if self.is_portable(index) and not all(self.is_portable(x.layer) for x in layer.predictor.sources()):
            raise InputError(f"layer {index} packs tokens before the layers it is predicted from do.")

    # --- geometry -----------------------------------------------------------------------------------------------

    @property
    def page_dtype(self) -> str:
        """Dtype of 16-bit pages: the compute dtype if it has 16 bits, else float16."""
        return self.dtype if self.dtype in ("float16", "bfloat16") else "float16"

    @property
    def exact_dtype(self) -> str:
        """Dtype of sinks and window: that of 16-bit pages; float32 once any layer uses the test format of 32 bits."""
        if any(32 in (x.k.bits, x.v.bits) for x in self.layers):
            return "float32"
        return self.page_dtype

    def is_portable(self, layer: int) -> bool:
        """Whether layer's tokens go straight into pages, one by one, with nothing beside them."""
        plan = self.layers[layer]
        return plan.is_exact or (plan.is_token_wise and not self.sink_tokens and not self.residual_window)

    def sinks(self, layer: int) -> int:
        """Exact sink slots of a layer: none where they would leave a sliding window, or where pages are exact."""
        return 0 if self.is_portable(layer) or self.layers[layer].kind == "sliding" else self.sink_tokens

    def tail(self, layer: int) -> int:
        """Exact slots of a layer's unfinished tail and residual window: a fixed pool, W + B - 1 tokens."""
        return 0 if self.is_portable(layer) else self.residual_window + self.block_size - 1

    def boundary(self, layer: int, n: N) -> N:
        """First slot that is read exactly once a sequence holds ``n`` tokens; the slots below are read packed.

        ``B * max(0, (n - W) // B)``, and n - W in the portable profile, where W is 0. Depends on position alone; ``n``
        may also be an integer tensor.
        """
        if self.is_portable(layer):
            return n
        blocks = (n - self.residual_window) // self.block_size
        return blocks * (blocks > 0) * self.block_size

    def first_page(self, layer: int, n: int) -> int:
        """First page a layer still needs once a sequence holds ``n`` tokens; pages behind a sliding window go."""
        window = self.layers[layer].window
        return 0 if window is None else max(0, n - window + 1) // self.block_size

    def num_pages(self, layer: int, n: int) -> int:
        """Pages a layer needs for a sequence of ``n`` tokens: in a sliding layer, the most of any step up to then."""
        if self.layers[layer].window is None:
            return -(-self.boundary(layer, n) // self.block_size)
        # the last block repeats for ever; a page goes only after the step that stopped seeing it
        steps = range(max(1, n - self.block_size + 1), n + 1)
        held = (-(-self.boundary(layer, m) // self.block_size) - self.first_page(layer, m - 1) for m in steps)
        return max([0, *held])  # below 0 where the residual window is wider than the sliding one

    # --- bits ---------------------------------------------------------------------------------------------------

    def layer_bytes_at(self, layer: int, context: int) -> int:
        """Every byte one layer holds for one sequence of ``context`` tokens."""
        plan = self.layers[layer]
        beside = (
            (self.sinks(layer) + self.tail(layer))
            * plan.scalars_per_token
            * (4 if self.exact_dtype == "float32" else 2)
        )
        return self.num_pages(layer, context) * plan.page_bytes(self.block_size) + beside

    def bytes_at(self, context: int) -> int:
        """Every byte the cache holds for one sequence of ``context`` tokens: pages, padding, sinks and tail."""
        return sum(self.layer_bytes_at(i, context) for i in range(len(self.layers)))

    @cached_property
    def scalars_per_token(self) -> int:
        """Cached scalars one token costs in all layers."""
        return sum(layer.scalars_per_token for layer in self.layers)

    def worst_length(self, context: int) -> int:
        """Return the length among the last block, context - B + 1 … context, that costs most bits per scalar."""
        if context < 1:
            raise InputError(f"a context of {context} tokens has no bits to count.")
        lengths = range(max(1, context - self.block_size + 1), context + 1)
        return max(lengths, key=lambda n: (self.bytes_at(n) / n, n))

    def effective_bits(self, context: int) -> float:
        """Bits per cached scalar with everything counted, at the worst length of the last block before context."""
        n = self.worst_length(context)
        return 8 * self.bytes_at(n) / (n * self.scalars_per_token)

    @property
    def nominal_bits(self) -> float:
        """Mean over layers of (K bits + V bits) / 2: what papers quote. Leaves out everything but the codes."""
        return sum(x.k.bits + x.v.bits for x in self.layers) / (2 * len(self.layers))

    def model_tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return name, dtype (as safetensors spells it) and shape of what is stored per model: predictors and means."""
        out: dict[str, tuple[str, tuple[int, ...]]] = {}
        for i, layer in enumerate(self.layers):
            for which in ("k", "v"):
                linear = None if layer.predictor is None else layer.predictor.of(which)
                if linear is not None:
                    inputs = sum(self.layers[x.layer].width for x in linear.inputs)
                    for name, spec in linear.stored(layer.width, inputs).items():
                        out[f"layer.{i}.{which}.predictor.{name}"] = spec
                if layer.center:
                    out[f"layer.{i}.{which}.mean"] = ("F32", (layer.num_kv_heads, layer.head_dim))
        return out

    def model_bytes(self) -> int:
        """Bytes of what is stored per model, not per sequence: predictors and means."""
        return sum(DTYPE_BYTES[dtype] * prod(shape) for dtype, shape in self.model_tensors().values())

    def effective_bits_with_model(self, context: int) -> float:
        """Effective bits with the per-model tensors spread over one sequence of ``context`` tokens."""
        return self.effective_bits(context) + 8 * self.model_bytes() / (context * self.scalars_per_token)

    def shares_pages_with(self, other: CachePlan) -> bool:
        """Whether another plan cuts the same sequences at the same places: equal but for how pages are coded."""
        mine, theirs = (
            (x.block_size, x.sink_tokens, x.residual_window, x.dtype,
             [(y.num_kv_heads, y.head_dim, y.kind, y.window) for y in x.layers])
            for x in (self, other)
        )  # fmt: skip
        return mine == theirs

    # --- making one ---------------------------------------------------------------------------------------------

    def as_exact(self) -> CachePlan:
        """Return the 16-bit plan of the same model: the reference every loss is measured against."""
        fmt = KVFormat.exact()
        plain = tuple(
            replace(x, k=fmt, v=fmt, rope="after", transform="none", center=False, predictor=None) for x in self.layers
        )
        return CachePlan(plain, block_size=self.block_size, dtype=self.dtype)

    def with_layer(self, index: int, layer: LayerPlan) -> CachePlan:
        """Return the plan with one layer replaced."""
        return replace(self, layers=(*self.layers[:index], layer, *self.layers[index + 1 :]))

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON."""
        return {
            "block_size": self.block_size, "sink_tokens": self.sink_tokens, "residual_window": self.residual_window,
            "dtype": self.dtype, "layers": [x.to_json() for x in self.layers],
        }  # fmt: skip

    @classmethod
    def from_json(cls, obj: dict[str, Any]) -> CachePlan:
        """Rebuild a plan from :meth:`to_json`."""
        return cls(**{**obj, "layers": tuple(LayerPlan.from_json(x) for x in obj["layers"])})
