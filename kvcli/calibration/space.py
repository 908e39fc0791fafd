"""What a search may choose from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any, Literal

import yaml

from kvcli.errors import InputError
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat


@dataclass(frozen=True)
class Setting:
    """What all layers share: page size, exact sinks, exact window."""

    block_size: int
    sink_tokens: int
    residual_window: int


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
    """

    k: tuple[KVFormat, ...]
    v: tuple[KVFormat, ...]
    block_sizes: tuple[int, ...] = (16,)
    sink_tokens: tuple[int, ...] = (0,)
    residual_windows: tuple[int, ...] = (0,)
    rope: Literal["before", "after"] = "after"
    transform: str = "none"
    center: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) == ():
                raise InputError(f"the search space has no candidate for {field.name}.")

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
        """Return the space with only what fits the model: groups that divide the heads and some block size.

        A token-axis group larger than a head becomes the head. Raises :class:`InputError` if nothing is left.
        """
        dims = {layer.head_dim for layer in geometry}

        def fit(formats: tuple[KVFormat, ...]) -> tuple[KVFormat, ...]:
            kept: dict[KVFormat, None] = {}
            for fmt in formats:
                if fmt.axis == "token" and not fmt.is_exact and fmt.group > min(dims):
                    fmt = KVFormat(**{**asdict(fmt), "group": min(dims)})
                try:
                    for dim, block in product(dims, self.block_sizes):
                        fmt.check(head_dim=dim, block_size=block)
                except InputError:
                    continue
                kept[fmt] = None
            if not kept:
                raise InputError(f"no candidate format fits heads of {sorted(dims)} channels.")
            return tuple(kept)

        return SearchSpace(**{**self.__dict__, "k": fit(self.k), "v": fit(self.v)})

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


def load_recipe(name: str) -> SearchSpace | None:
    """Read a search space from a YAML file or a shipped recipe; None if ``name`` is neither.

    Raises
    ------
    InputError
        If the file cannot be read as a recipe.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise InputError(f"recipe {name} does not exist.")
        text = path.read_text()
    elif name in recipe_names():
        text = (resources.files("kvcli_calib") / "recipes" / f"{name}.yaml").read_text()
    else:
        return None
    try:
        return SearchSpace.from_json(yaml.safe_load(text)["search"])
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"recipe {name} is not a recipe: {str(error).splitlines()[0]}.") from None
