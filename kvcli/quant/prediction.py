"""What a layer's keys and values are predicted from, and how the predictor itself is stored.

After AQUA-KV (Shutova et al., 2025, arXiv:2501.19392): a tensor is predicted by a linear map with a bias from tensors
that are already reconstructed, and only the residual is quantised. A tensor is one layer's keys (before RoPE, after any
QK-norm) or values, all heads side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from kvcli.errors import InputError

Which = Literal["k", "v"]
STORED_BITS = (4, 8, 16)
GROUP = 32  # inputs that share a scale where a predictor is stored in 8 or 4 bits


class Source(NamedTuple):
    """One tensor that predictions read: the keys or the values of a layer."""

    layer: int
    which: Which

    def __str__(self) -> str:
        return f"{self.layer}.{self.which}"

    @classmethod
    def parse(cls, text: object) -> Source:
        """Rebuild from ``str``: ``"3.k"`` are the keys of layer 3."""
        layer, _, which = text.partition(".") if isinstance(text, str) else ("", "", "")
        if not (layer.isascii() and layer.isdigit()) or which not in ("k", "v"):
            raise InputError(f"{text!r} names no tensor; those of layer 3 are '3.k' and '3.v'.")
        return cls(int(layer), "k" if which == "k" else "v")


@dataclass(frozen=True)
class Linear:
    """One tensor's predictor: weight and bias.

    Attributes
    ----------
    inputs
        The tensors it reads, in the order in which they are laid side by side. Each is a tensor of an earlier layer, or
        for values the keys of the same layer.
    bits
        16: the weight in float16. 8 or 4: codes with a float16 scale for :data:`GROUP` inputs of a row.
    rank
        None, or that of the weight, which is then stored as two factors.
    """

    inputs: tuple[Source, ...]
    bits: int = 16
    rank: int | None = None

    def __post_init__(self) -> None:
        if not self.inputs or len(set(self.inputs)) < len(self.inputs):
            raise InputError("a predictor reads at least one tensor, and each once.")
        if self.bits not in STORED_BITS:
            raise InputError(f"a predictor is stored in one of {STORED_BITS} bits, not {self.bits}.")
        if self.rank is not None and self.rank < 1:
            raise InputError(f"a predictor of rank {self.rank} predicts nothing.")

    def factors(self, outputs: int, inputs: int) -> dict[str, tuple[int, int]]:
        """Return name and shape of the matrices whose product is the weight [outputs, inputs]."""
        if self.rank is None:
            return {"weight": (outputs, inputs)}
        return {"left": (outputs, self.rank), "right": (self.rank, inputs)}

    def stored(self, outputs: int, inputs: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return every stored tensor by its last name: dtype as safetensors spells it, and shape."""
        out: dict[str, tuple[str, tuple[int, ...]]] = {"bias": ("F32", (outputs,))}
        for name, (rows, columns) in self.factors(outputs, inputs).items():
            if self.bits == 16:
                out[name] = ("F16", (rows, columns))
            else:
                groups = -(-columns // GROUP)
                out[name] = ("U8", (rows, groups * GROUP * self.bits // 8))
                out[f"{name}.scales"] = ("F16", (rows, groups))
        return out

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON."""
        return {"inputs": [str(x) for x in self.inputs], "bits": self.bits, "rank": self.rank}

    @classmethod
    def from_json(cls, obj: dict[str, Any]) -> Linear:
        """Rebuild from :meth:`to_json`."""
        return cls(**{**obj, "inputs": tuple(Source.parse(x) for x in obj["inputs"])})


@dataclass(frozen=True, repr=False)
class Predictor:
    """The predictors of one layer; None for a tensor that is stored as it is."""

    k: Linear | None = None
    v: Linear | None = None

    def of(self, which: str) -> Linear | None:
        """Return the predictor of the keys or of the values."""
        return self.k if which == "k" else self.v

    def sources(self) -> frozenset[Source]:
        """Every tensor that is read."""
        return frozenset(x for part in (self.k, self.v) if part is not None for x in part.inputs)

    def is_absorbed(self, layer: int) -> bool:
        """Whether decoding can read codes only: values are predicted from their own layer's keys, and keys are not."""
        return self.k is None and self.v is not None and self.v.inputs == (Source(layer, "k"),)

    def check(self, layer: int) -> None:
        """Raise :class:`InputError` unless everything that layer ``layer`` reads is reconstructed before."""
        for which, part in (("k", self.k), ("v", self.v)):
            for x in part.inputs if part is not None else ():
                if x.layer > layer or (x.layer == layer and (which, x.which) != ("v", "k")):
                    raise InputError(f"{layer}.{which} cannot be predicted from {x}, which is reconstructed later.")

    def to_json(self) -> dict[str, Any]:
        """Return the predictors as plain JSON."""
        return {w: None if x is None else x.to_json() for w, x in (("k", self.k), ("v", self.v))}

    @classmethod
    def from_json(cls, obj: dict[str, Any]) -> Predictor:
        """Rebuild from :meth:`to_json`."""
        return cls(**{w: None if x is None else Linear.from_json(x) for w, x in obj.items()})

    def __repr__(self) -> str:
        parts = [f"{w} from {'+'.join(map(str, x.inputs))}" for w, x in (("k", self.k), ("v", self.v)) if x is not None]
        return ", ".join(parts) or "none"
