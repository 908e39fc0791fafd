"""Plans published by others: KVTuner's per-layer presets, read and written in its own YAML, and applied to a model.

KVTuner (Li et al., 2025, arXiv:2502.04420) states a plan as ``layer_id: {nbits_key, nbits_value}`` and one of two
modes, which its file does not hold:

- ``kivi``: keys per channel in groups of 32 tokens, values per token in groups of 32 channels, a residual window of 32;
- ``token``: keys and values per token, one group a head, no window.

Both are asymmetric and uniform, with a float16 scale and zero point a group. Departures: a window of 32 means that the
last 32 tokens are always exact (theirs empties each time it is full), and where 32 does not divide a head, groups of
values are the greatest common divisor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from math import gcd
from pathlib import Path
from typing import Any, Literal

import yaml

from kvcli.errors import InputError
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat

Mode = Literal["kivi", "token"]
MODES: tuple[Mode, ...] = ("kivi", "token")
WIDTHS = (2, 4, 8, 16)  # what KVTuner's file can say
PREFIX = "kvtuner:"
GROUP = 32  # of mode kivi: tokens of a key's group, channels of a value's, and the residual window
KEYS = ("nbits_key", "nbits_value")


@dataclass(frozen=True)
class Preset:
    """A fixed plan, as KVTuner states it.

    Attributes
    ----------
    name
        What the user called it, without a folder.
    mode
        How keys and values are grouped.
    bits
        Per layer, bits of keys and bits of values.
    """

    name: str
    mode: Mode
    bits: tuple[tuple[int, int], ...]

    @property
    def sha256(self) -> str:
        """Hash of what the preset says, whatever its file looks like."""
        return hashlib.sha256(f"{self.mode} {self.bits}".encode()).hexdigest()

    def plan(self, geometry: Sequence[LayerPlan], dtype: str) -> CachePlan:
        """Return the cache plan for a model.

        Parameters
        ----------
        geometry
            The model's layers; their formats are replaced.
        dtype
            Compute dtype.

        Raises
        ------
        InputError
            If the model has another number of layers.
        """
        if len(geometry) != len(self.bits):
            raise InputError(f"preset {self.name} is for {len(self.bits)} layers, and the model has {len(geometry)}.")
        layers = []
        for layer, (k, v) in zip(geometry, self.bits, strict=True):
            stored = {w: self._format(w, bits, layer.head_dim) for w, bits in (("k", k), ("v", v))}
            layers.append(
                replace(
                    layer, k=stored["k"], v=stored["v"], rope="after", transform="none", center=False, predictor=None
                )
            )
        if self.mode == "token":
            return CachePlan(tuple(layers), dtype=dtype)
        return CachePlan(tuple(layers), block_size=GROUP, residual_window=GROUP, dtype=dtype)

    def _format(self, which: str, bits: int, head_dim: int) -> KVFormat:
        if self.mode == "token":
            return KVFormat(bits, axis="token", group=head_dim, symmetric=False)
        if which == "k":
            return KVFormat(bits, axis="channel", group=GROUP, symmetric=False)
        return KVFormat(bits, axis="token", group=gcd(GROUP, head_dim), symmetric=False)


def is_preset(recipe: str) -> bool:
    """Whether a recipe's name asks for a preset."""
    return recipe.startswith(PREFIX)


def names() -> list[str]:
    """Return the names of the presets that ship with kvcli."""
    return sorted(x.name.removesuffix(".yaml") for x in _folder().iterdir() if x.name.endswith(".yaml"))


def load(recipe: str) -> Preset:
    """Return the preset of a recipe's name: ``kvtuner:NAME`` or ``kvtuner:FILE.yaml``, and ``:kivi`` or ``:token``.

    Without a mode, a shipped preset has that of its name, and a file ``kivi``.

    Raises
    ------
    InputError
        If there is no such preset, or the file is not one.
    """
    name, mode = recipe.removeprefix(PREFIX), None
    for candidate in MODES:
        if name.endswith(f":{candidate}"):
            name, mode = name.removesuffix(f":{candidate}"), candidate
    if name in names():
        shipped: Mode = "token" if "-token-" in name else "kivi"
        return Preset(name, mode or shipped, parse((_folder() / f"{name}.yaml").read_bytes(), name))
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"there is no preset {name!r}; there are {', '.join(names())}, and files: {PREFIX}FILE.yaml.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"preset {name} cannot be read: {error.strerror or error}.") from None
    return Preset(path.name, mode or "kivi", parse(data, name))


def parse(data: bytes | str, name: str) -> tuple[tuple[int, int], ...]:
    """Read KVTuner's YAML: bits of keys and values per layer.

    Parameters
    ----------
    data
        The file's content.
    name
        What messages call it.

    Raises
    ------
    InputError
        If it is not YAML, leaves a layer out or names one twice, or holds anything but the two widths of each layer.
    """
    try:
        found = yaml.load(data, _Strict)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"preset {name} is not valid YAML: {_first_line(error)}.") from None
    if not isinstance(found, dict) or not found:
        raise InputError(f"preset {name} does not map layers to their bits.")
    for layer in found:
        if type(layer) is not int or layer < 0:
            raise InputError(f"preset {name}: {str(layer)[:40]!r} is not a layer's number.")
    for layer in range(max(found) + 1):  # a number far too large ends at the first gap
        if layer not in found:
            raise InputError(f"preset {name} leaves out layer {layer}.")
    return tuple(
        (_width(found[i], "nbits_key", i, name), _width(found[i], "nbits_value", i, name)) for i in sorted(found)
    )


def dump(bits: Sequence[tuple[int, int]]) -> str:
    """Return KVTuner's YAML for each layer's bits of keys and values: the inverse of :func:`parse`."""
    return yaml.safe_dump({i: dict(zip(KEYS, pair, strict=True)) for i, pair in enumerate(bits)}, sort_keys=False)


def _width(entry: Any, key: str, layer: int, name: str) -> int:
    if not isinstance(entry, dict) or set(entry) != set(KEYS):
        raise InputError(f"preset {name}: layer {layer} does not hold exactly {' and '.join(KEYS)}.")
    if type(entry[key]) is not int or entry[key] not in WIDTHS:
        raise InputError(
            f"preset {name}: layer {layer} has {key} {str(entry[key])[:40]!r}, which is not one of {WIDTHS}."
        )
    return int(entry[key])


def _folder() -> Any:
    return resources.files("kvcli_calib") / "presets" / "kvtuner"


def _first_line(error: Exception) -> str:
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    mark = getattr(error, "problem_mark", None)
    return f"{problem} in line {mark.line + 1}" if mark else str(problem)


class _Strict(yaml.SafeLoader):
    """Refuses a key that stands twice: plain YAML takes the last and says nothing."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        if len(seen) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key stands twice", node.start_mark)
        return seen
