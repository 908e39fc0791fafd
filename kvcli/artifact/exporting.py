"""Writing an artifact's plan as other engines state theirs: one function a format, and the table of them.

An exporter takes an opened artifact and returns the file's bytes and sentences that say what the format cannot hold.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kvcli.artifact.reader import Artifact
from kvcli.calibration import presets
from kvcli.errors import InputError, UsageError
from kvcli.plan import CachePlan, LayerPlan

Exporter = Callable[[Artifact], tuple[bytes, list[str]]]


def kvtuner(artifact: Artifact) -> tuple[bytes, list[str]]:
    """Return KVTuner's YAML, ``layer_id: {nbits_key, nbits_value}`` (arXiv:2502.04420).

    Raises
    ------
    InputError
        Naming the first layer whose keys or values are not stored in 2, 4, 8 or 16 bits, or are stored as what a
        predictor leaves over.
    """
    bits = []
    for i, layer in enumerate(artifact.plan.layers):
        if layer.predictor is not None:
            raise InputError(
                f"layer {i} stores what predictor {layer.predictor!r} leaves over: not in KVTuner's format."
            )
        for which, fmt in (("keys", layer.k), ("values", layer.v)):
            if fmt.bits not in presets.WIDTHS:
                raise InputError(
                    f"layer {i} stores {which} in {fmt.bits} bits, and KVTuner's format knows {presets.WIDTHS} only."
                )
        bits.append((layer.k.bits, layer.v.bits))
    return presets.dump(bits).encode(), _left_out(artifact.plan, tuple(bits))


def _left_out(plan: CachePlan, bits: tuple[tuple[int, int], ...]) -> list[str]:
    """Say what is lost beside the bits, or in which of KVTuner's modes nothing is."""
    for mode in presets.MODES:
        if presets.Preset("", mode, bits).plan(plan.layers, plan.dtype) == plan:
            return [f"The file holds bits only; read in KVTuner's {mode} mode it is the same plan."]

    def varies(what: Callable[[LayerPlan], bool]) -> bool:
        return any(what(x) for x in plan.layers)

    lost = ["axes, groups, grids and scale dtypes"]
    lost += ["calibrated means"] if varies(lambda x: x.center) else []
    lost += ["rotations"] if varies(lambda x: x.transform != "none") else []
    lost += ["keys stored before RoPE"] if varies(lambda x: x.rope == "before") else []
    lost += [f"{plan.sink_tokens} exact sinks"] if plan.sink_tokens else []
    lost += [f"the window of {plan.residual_window} exact tokens"] if plan.residual_window else []
    return [f"The file holds bits only; lost: {', '.join(lost)}."]


EXPORTERS: dict[str, Exporter] = {"kvtuner": kvtuner}


def export(artifact: Artifact, format: str, path: Path, *, overwrite: bool = False) -> list[str]:
    """Write an artifact's plan in another engine's format, whole or not at all, and return what it cannot hold.

    Raises
    ------
    InputError
        If the format cannot express the plan.
    UsageError
        If ``path`` exists and ``overwrite`` is not set, or it is no file in a folder that exists.
    """
    if not path.absolute().parent.is_dir() or (path.exists() and not path.is_file()):
        raise UsageError(f"{path} is not a file in a folder that exists.")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} is already there, and replacing it has to be asked for.")
    data, left_out = EXPORTERS[format](artifact)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return left_out
