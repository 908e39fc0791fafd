"""The command line's table of contents.

A new command is a module ``kvcli/cli/NAME.py`` with a function ``NAME`` and one line in :data:`COMMANDS`; a mapping of
names to functions makes sub-commands. The modules are imported to answer ``--help``, so they import whatever is heavy
(torch, transformers) inside their functions.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any

import typer

import kvcli
from kvcli.cli.options import option

COMMANDS = {
    "calibrate": "calibrate",
    "solve": "solve",
    "generate": "generate",
    "serve": "serve",
    "eval": "evaluate",
    "bench": "bench",
    "report": "report",
    "compare": "compare",
    "inspect": "inspect",
    "export": "export",
    "plugins": "plugins",
    "doctor": "doctor",
}
"""Command names, in the order of ``--help``, and the modules that hold them."""

_Command = Callable[..., Any]
_GROUPS = {"bench": "Time an artifact beside its peers, all in the same run."}
_SECTION = re.compile(r"\n\n\w+\n-{3,}\n")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kvcli {kvcli.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and leave.")
    ] = False,
    # taken out of the arguments in main.py, so that it works after the command's name too
    debug: Annotated[bool, option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Calibrate a language model's KV cache to a bit budget, prove what it cost, and serve the result."""


def build() -> typer.Typer:
    """Return the application with every command."""
    app = typer.Typer(
        name="kvcli",
        callback=_root,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for name, module in COMMANDS.items():
        found: _Command | dict[str, _Command] = getattr(import_module(f"kvcli.cli.{module}"), module)
        if isinstance(found, dict):
            group = typer.Typer(name=name, rich_markup_mode=None, help=_GROUPS[name])
            for part, function in found.items():
                group.command(part, help=_help(function))(function)
            app.add_typer(group)
        else:
            app.command(name, help=_help(found))(found)
    return app


def _help(function: Callable[..., Any]) -> str:
    """Return the docstring up to its first numpy-style section: what a function raises is not for the user."""
    return _SECTION.split(inspect.getdoc(function) or "", maxsplit=1)[0]
