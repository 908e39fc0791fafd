"""``kvcli plugins``: what is installed, and from where."""

from __future__ import annotations

from dataclasses import asdict

from kvcli.cli.console import emit, say, table
from kvcli.cli.options import JsonFlag


def plugins(json: JsonFlag = False) -> None:
    """List the installed plug-ins, and the package each came with."""
    from kvcli.plugins import discover

    found = discover()
    if json:
        emit({"plugins": [asdict(x) for x in found]})
        return
    usable = [x for x in found if x.error is None]
    if usable:
        rows = [(x.name, x.family, f"{x.distribution} {x.version}", x.module, x.summary) for x in usable]
        table(("name", "family", "package", "module", "summary"), rows)
    for x in found:
        if x.error is not None:
            say(f"{x.name} ({x.distribution} {x.version}, {x.module}) cannot be loaded: {x.error}", style="red")
    if not found:
        say("No plug-ins are installed.")
