"""Finding plug-ins: every entry point of the group ``kvcli.plugins``, whichever distribution brought it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from kvcli.errors import InputError
from kvcli.protocols import FAMILIES

GROUP = "kvcli.plugins"


@dataclass(frozen=True)
class PluginInfo:
    """What is known of one installed plug-in.

    Attributes
    ----------
    name
        The entry point's name.
    family
        The family it belongs to; None if it could not be loaded.
    distribution, version
        The package that brought it, and that package's version.
    module
        Where it is defined.
    summary
        The first line of its docstring.
    error
        Why it cannot be used; None if it can.
    """

    name: str
    family: str | None
    distribution: str | None
    version: str | None
    module: str
    summary: str
    error: str | None = None


def discover() -> list[PluginInfo]:
    """List the installed plug-ins by name; one that cannot be loaded is listed with its error."""
    return [_describe(entry) for entry in _entries()]


def load(name: str, family: str | None = None) -> Any:
    """Return the plug-in's class.

    Parameters
    ----------
    name
        The entry point's name.
    family
        If given, the family it must belong to.

    Raises
    ------
    InputError
        If no such plug-in is installed, naming those that are, or if it cannot be loaded.
    """
    broken: Exception | None = None
    for entry in _entries(name):
        try:
            plugin = _load(entry)
        except Exception as error:
            broken = error
        else:
            if family in (None, plugin.family):
                return plugin
    if broken is not None:
        raise InputError(f"plug-in {name!r} cannot be loaded: {_reason(broken)}.") from broken
    wanted = "plug-in" if family is None else f"{family} plug-in"
    known = [x.name for x in discover() if x.error is None and family in (None, x.family)]
    raise InputError(f"no {wanted} is called {name!r}; installed: {', '.join(known) or 'none'}.")


def _entries(name: str | None = None) -> Iterator[EntryPoint]:
    found = entry_points(group=GROUP)
    return iter(sorted(found if name is None else found.select(name=name), key=lambda x: (x.name, x.value)))


def _load(entry: EntryPoint) -> Any:
    """Load an entry point and check that it says what it is; whatever its module raises goes through."""
    plugin = entry.load()
    family = getattr(plugin, "family", None)
    if family not in FAMILIES:
        raise InputError(f"its family is {family!r}, not one of {', '.join(FAMILIES)}")
    methods = [name for name in vars(FAMILIES[family]) if not name.startswith("_")]
    missing = [name for name in ("name", *methods) if not hasattr(plugin, name)]
    if missing:
        raise InputError(f"it has no {', '.join(missing)}, which a {family} needs")
    return plugin


def _reason(error: Exception) -> str:
    return str(error).rstrip(".") if isinstance(error, InputError) else f"{type(error).__name__}: {error}"


def _describe(entry: EntryPoint) -> PluginInfo:
    family, summary, problem = None, "", None
    try:
        plugin = _load(entry)
        family, summary = plugin.family, (inspect.getdoc(plugin) or "").partition("\n")[0]
    except Exception as error:  # one broken plug-in must not hide the others
        problem = _reason(error)
    return PluginInfo(
        name=entry.name,
        family=family,
        distribution=entry.dist.name if entry.dist else None,
        version=entry.dist.version if entry.dist else None,
        module=entry.module,
        summary=summary,
        error=problem,
    )
