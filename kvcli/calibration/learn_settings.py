"""What a recipe's section ``learn`` says: which transforms are learned, for which storage, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from kvcli.calibration.space import SearchSpace, section
from kvcli.errors import InputError
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.quant.weight_format import WeightFormat

MAPS = ("r_res", "r_ov", "s_attn", "s_ffn", "s_qk", "s_ov", "s_ud")
LEAST = 64  # tokens of a window
STARTS = ("closed-form", "womi", "identity")


@dataclass(frozen=True)
class Weights:
    """Uniform, asymmetric, rounded to nearest: how learning sees weights that are to be quantised.

    Attributes
    ----------
    bits
        3, 4 or 8.
    group
        Inputs that share a scale; where they do not divide a layer's, its largest divisor that is a multiple of 8.
    """

    bits: int = 4
    group: int = 128

    def __post_init__(self) -> None:
        self.fitting(self.group)

    def fitting(self, width: int) -> WeightFormat:
        """Return the format for a layer of ``width`` inputs; raise :class:`InputError` if there is none."""
        groups = [x for x in range(8, min(self.group, width) + 1, 8) if width % x == 0]
        if not groups:
            raise InputError(f"{width} weights do not divide into groups of a multiple of 8 up to {self.group}.")
        return WeightFormat(self.bits, groups[-1])


@dataclass(frozen=True)
class LearnSettings:
    """How transforms are learned.

    Attributes
    ----------
    maps
        Parameters of :mod:`kvcli.calibration.ostquant` by name.
    format
        How keys and values are stored while learning; the search may choose otherwise.
    transform, center
        As in :class:`~kvcli.plan.LayerPlan`.
    block_size, sink_tokens, residual_window
        As in :class:`~kvcli.plan.CachePlan`.
    weights, activations
        Quantised too while learning; None leaves them.
    means
        Take off means weighted by importance, rather than plain ones.
    start
        ``closed-form`` (:mod:`kvcli.calibration.fisher`), ``womi``, or ``identity``.
    loss
        Of :mod:`kvcli.calibration.losses`.
    windows, tokens
        How many windows of text are read, and their length; the last ``held_out`` are not learned from.
    steps, batch
        Steps of the optimiser, none for the start alone, and windows of each.
    rotation_rate, scale_rate
        Rates at the first step.
    check_every, patience
        Steps between looks at the held-out windows, and how many in a row may bring nothing.
    """

    maps: tuple[str, ...] = ("r_ov", "s_qk", "s_ov")
    format: KVFormat = field(default_factory=lambda: KVFormat(3, grid="gaussian", scale_dtype="e5m3"))
    transform: str = "hadamard"
    center: bool = True
    block_size: int = 16
    sink_tokens: int = 4
    residual_window: int = 32
    weights: Weights | None = None
    activations: int | None = None
    means: bool = True
    start: str = "closed-form"
    loss: str = "kl-top"
    windows: int = 24
    tokens: int = 512
    held_out: int = 4
    steps: int = 40
    batch: int = 1
    rotation_rate: float = 0.02
    scale_rate: float = 0.01
    check_every: int = 10
    patience: int = 2

    def __post_init__(self) -> None:
        for name in self.maps:
            if name not in MAPS:
                raise InputError(f"there is no transform {name!r} to learn; there are {', '.join(MAPS)}.")
        if self.start not in STARTS:
            raise InputError(f"start {self.start!r} is not one of {', '.join(STARTS)}.")
        if self.start == "closed-form" and self.transform != "hadamard":
            raise InputError("learn: the start 'closed-form' counts on the rotation of transform: hadamard.")
        for name, least in {
            "windows": 1, "tokens": LEAST, "held_out": 1, "steps": 0, "batch": 1, "check_every": 1, "patience": 1,
        }.items():  # fmt: skip
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise InputError(f"learn: {name} must be a whole number of at least {least}.")
        for name in ("rotation_rate", "scale_rate"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
                raise InputError(f"learn: {name} must lie between 0 and 1.")
        for name in ("means", "center"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"learn: {name} must be true or false.")
        if self.tokens % self.block_size:
            raise InputError(f"learn: windows of {self.tokens} tokens are not whole pages of {self.block_size}.")
        if self.held_out >= self.windows:
            raise InputError(f"learn: {self.held_out} of {self.windows} windows held out leave none to learn from.")

    def plan(self, geometry: Sequence[LayerPlan], dtype: str) -> CachePlan:
        """Return the cache that learning sees; raise :class:`InputError` if no such format fits the model."""
        space = SearchSpace(
            k=(self.format,), v=(self.format,), block_sizes=(self.block_size,), sink_tokens=(self.sink_tokens,),
            residual_windows=(self.residual_window,), transform=self.transform, center=self.center,
        ).fitting(list(geometry))  # fmt: skip
        layers = [space.layer(x, space.k[0], space.v[0]) for x in geometry]
        return space.plan(layers, next(space.settings()), dtype)

    @classmethod
    def for_space(cls, space: SearchSpace | None) -> LearnSettings:
        """Return the defaults for a search that rotates or centres as ``space`` does; None does neither."""
        rotated = space is not None and space.transform == "hadamard"
        center = space is not None and space.center
        start, transform = ("closed-form", "hadamard") if rotated else ("womi", "none")
        return cls(transform=transform, center=center, means=center, start=start)

    @classmethod
    def of_recipe(cls, name: str) -> LearnSettings | None:
        """Read a recipe's section ``learn``; None if it has none, or there is no such recipe."""
        stated = section(name, "learn")
        return None if stated is None else cls.from_json(stated)

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> LearnSettings:
        """Build settings from a recipe's section; raise :class:`InputError` for what they do not have."""
        known = {x.name for x in fields(cls)}
        if unknown := sorted(set(obj) - known):
            raise InputError(f"learn has no {unknown[0]!r}; it has {', '.join(sorted(known))}.")
        out = dict(obj)
        try:
            if "maps" in out:
                out["maps"] = tuple(out["maps"])
            if "format" in out:
                out["format"] = KVFormat.from_json(out["format"])
            if out.get("weights") is not None:
                out["weights"] = Weights(**out["weights"])
            return cls(**out)
        except TypeError as error:
            raise InputError(f"the section learn is not valid: {error}.") from None

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain JSON."""
        return {**asdict(self), "maps": list(self.maps), "format": self.format.to_json()}

    def shortened(self, max_context: int) -> LearnSettings:
        """Return settings whose windows fit the model's context."""
        most = max_context // self.block_size * self.block_size
        return self if self.tokens <= most else replace(self, tokens=most)
