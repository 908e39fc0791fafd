"""What a search may choose from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from itertools import product
from math import gcd
from pathlib import Path
from typing import Any, Literal

import yaml

from kvcli.errors import InputError
from kvcli.plan import BLOCK_SIZES, CachePlan, LayerPlan
from kvcli.quant.format import KVFormat


@dataclass(frozen=True)
class Setting:
    """What all layers share: page size, exact sinks, exact window."""

    block_size: int
    sink_tokens: int
    residual_window: int


def fits(fmt: KVFormat, block_size: int) -> bool:
    """Whether pages of ``block_size`` tokens can hold the format."""
    return fmt.is_exact or fmt.axis == "token" or block_size % fmt.group == 0


@dataclass(frozen=True)
class SearchSpace:
    """Candidate formats for keys and values, and candidate settings for the whole cache.

    Attributes
    ----------
    k, v
        Formats each layer chooses one of, freely for keys and values.
    block_sizes, sink_tokens, residual_windows
        Candidates for what all layers share; every combination is weighed.
    rope, transform, center
        How every layer treats keys and values before they are quantised; see :class:`kvcli.plan.LayerPlan`.
    layerwise
        Whether each layer chooses for itself; if not, one format holds all keys and one all values.
    """

    k: tuple[KVFormat, ...]
    v: tuple[KVFormat, ...]
    block_sizes: tuple[int, ...] = (16,)
    sink_tokens: tuple[int, ...] = (0,)
    residual_windows: tuple[int, ...] = (0,)
    rope: Literal["before", "after"] = "after"
    transform: str = "none"
    center: bool = False
    layerwise: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) == ():
                raise InputError(f"the search space has no candidate for {field.name}.")
        for name in ("block_sizes", "sink_tokens", "residual_windows"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not all(type(x) is int and x >= 0 for x in values):
                raise InputError(f"{name} must be a list of whole numbers.")
        if unknown := set(self.block_sizes) - set(BLOCK_SIZES):
            raise InputError(f"block_sizes {min(unknown)} is not one of {BLOCK_SIZES}.")
        for name in ("center", "layerwise"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be true or false.")

    def settings(self) -> Iterator[Setting]:
        """Yield every combination of what all layers share, cheapest first."""
        for b, s, w in product(sorted(self.block_sizes), sorted(self.sink_tokens), sorted(self.residual_windows)):
            yield Setting(b, s, w)

    def layer(self, geometry: LayerPlan, k: KVFormat, v: KVFormat) -> LayerPlan:
        """Return a layer of the given geometry with this space's treatment and these formats."""
        return LayerPlan(
            geometry.num_kv_heads, geometry.head_dim, k, v, kind=geometry.kind, window=geometry.window,
            rope=self.rope, transform=self.transform, center=self.center,
        )  # fmt: skip

    def plan(self, layers: list[LayerPlan], setting: Setting, dtype: str) -> CachePlan:
        """Return the cache plan of these layers under one setting."""
        return CachePlan(tuple(layers), **asdict(setting), dtype=dtype)

    def fitting(self, geometry: list[LayerPlan]) -> SearchSpace:
        """Return the space with only what fits the model's heads, and pages that some format of each tensor fits.

        A token-axis group that does not divide a head becomes the head if it is more than half of it, else the greatest
        common divisor. Raises :class:`InputError` if nothing is left.
        """
        dims = sorted({layer.head_dim for layer in geometry})

        def fit(formats: tuple[KVFormat, ...]) -> tuple[KVFormat, ...]:
            kept: dict[KVFormat, None] = {}
            for fmt in formats:
                if fmt.axis == "token" and not fmt.is_exact and any(dim % fmt.group for dim in dims):
                    fmt = replace(fmt, group=dims[0] if 2 * fmt.group > dims[0] else gcd(fmt.group, *dims))
                try:
                    for dim in dims:
                        fmt.check(head_dim=dim, block_size=max(BLOCK_SIZES))
                except InputError:
                    continue
                if any(fits(fmt, block) for block in self.block_sizes):
                    kept[fmt] = None
            if not kept:
                raise InputError(f"no candidate format fits heads of {dims} channels.")
            return tuple(kept)

        k, v = fit(self.k), fit(self.v)
        blocks = tuple(b for b in self.block_sizes if all(any(fits(f, b) for f in x) for x in (k, v)))
        return replace(self, k=k, v=v, block_sizes=blocks)

    @classmethod
    def from_json(cls, obj: dict[str, Any]) -> SearchSpace:
        """Rebuild a space from :meth:`to_json`, or from a recipe, whose formats may list several values of a field."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(obj) - known):
            raise InputError(f"a search space has no {unknown[0]!r}; it has {', '.join(sorted(known))}.")
        lists = {k: tuple(v) for k, v in obj.items() if isinstance(v, list) and k not in ("k", "v")}
        return cls(**{**obj, **lists, "k": _formats(obj["k"]), "v": _formats(obj["v"])})

    def to_json(self) -> dict[str, Any]:
        """Return the space as plain JSON."""
        return {**asdict(self), "k": [f.to_json() for f in self.k], "v": [f.to_json() for f in self.v]}


def _formats(entries: list[dict[str, Any]]) -> tuple[KVFormat, ...]:
    """Expand entries whose fields may be lists (``bits: [2, 3, 4]``) into single formats, without repeats."""
    out: dict[KVFormat, None] = {}
    for entry in entries:
        values = [v if isinstance(v, list) else [v] for v in entry.values()]
        for combination in product(*values):
            try:
                out[KVFormat(**dict(zip(entry, combination, strict=True)))] = None
            except TypeError:
                raise InputError(f"{entry} is not a storage format.") from None
    return tuple(out)


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship with kvcli."""
    folder = resources.files("kvcli_calib") / "recipes"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


SECTIONS = ("search", "learn", "adapters", "weights")  # of a recipe; all but the first may be left out


def read_recipe(name: str) -> dict[str, Any] | None:
    """Read a recipe, from a YAML file or one that ships with kvcli, as plain data; None if ``name`` is neither.

    Raises
    ------
    InputError
        If the file cannot be read as a recipe, or has a section that recipes do not have.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise InputError(f"recipe {name} does not exist.")
        data = path.read_bytes()
    elif name in recipe_names():
        data = (resources.files("kvcli_calib") / "recipes" / f"{name}.yaml").read_bytes()
    else:
        return None
    try:
        found = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {name} is not a recipe: {str(error).splitlines()[0]}.") from None
    if not isinstance(found, dict) or "search" not in found:
        raise InputError(f"recipe {name} is not a recipe: it has no section 'search'.")
    if unknown := sorted(map(str, found.keys() - set(SECTIONS))):
        raise InputError(f"recipe {name} has no section {unknown[0]!r}; it has {', '.join(SECTIONS)}.")
    return found


def section(recipe: str, name: str) -> dict[str, Any] | None:
    """Return a recipe's section but ``search``; None without one, or without such a recipe.

    Raises
    ------
    InputError
        As :func:`read_recipe`, and if the section is no mapping.
    """
    found = (read_recipe(recipe) or {}).get(name)
    if found is not None and not isinstance(found, dict):
        raise InputError(f"recipe {recipe} is not a recipe: its section {name!r} is no mapping.")
    return found


def load_recipe(name: str) -> SearchSpace | None:
    """Read the search space of a recipe; None if ``name`` is none.

    A space may be that of another recipe (``search: balanced``), with changes (``{like: balanced, center: false}``).

    Raises
    ------
    InputError
        If the file cannot be read as a recipe.
    """
    found = read_recipe(name)
    if found is None:
        return None
    space = found["search"]
    space = {"like": space} if isinstance(space, str) else space
    try:
        if "like" in space:
            other = str(space["like"])
            shared = None if other == name else read_recipe(other)
            if shared is None or not isinstance(shared["search"], dict) or "like" in shared["search"]:
                raise InputError(f"recipe {name} searches as {other!r} does, which is no recipe with a space.")
            space = {**shared["search"], **{k: x for k, x in space.items() if k != "like"}}
        return SearchSpace.from_json(space)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"recipe {name} is not a recipe: {str(error).splitlines()[0]}.") from None
