"""What ``kv.safetensors`` holds: the tensors that the plan, and the capacity plan, ask for, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from kvcli.errors import InputError
from kvcli.plan import CachePlan

if TYPE_CHECKING:
    from torch import Tensor

TENSORS = "kv.safetensors"
CAPACITY = "capacity."  # what the names of a capacity plan's tensors begin with

Spec = tuple[str, tuple[int, ...]]  # the dtype as safetensors spells it, and the shape


def expected_tensors(plan: CachePlan, capacity: CachePlan | None = None) -> dict[str, Spec]:
    """Return name, dtype and shape of every tensor that a plan and its capacity plan need beside the weights."""
    second = {} if capacity is None else capacity.model_tensors()
    return plan.model_tensors() | {CAPACITY + name: spec for name, spec in second.items()}


def read_header(path: Path) -> dict[str, Spec]:
    """Return name, dtype and shape of every tensor in a safetensors file, without allocating any.

    Raises
    ------
    InputError
        The file is missing, damaged or no safetensors file.
    """
    try:
        with safe_open(path, framework="np") as file:  # numpy: a header needs no torch
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except FileNotFoundError:
        raise InputError(f"{path} is missing.") from None
    except (SafetensorError, OSError) as exc:
        raise InputError(f"{path} is damaged or is not a safetensors file: {exc}.") from exc


def check_header(path: Path, expected: Mapping[str, Spec]) -> None:
    """Check the header of a safetensors file against what it must hold.

    Raises
    ------
    InputError
        The file cannot be read, or a tensor is missing, unknown, or of another dtype or shape.
    """
    found = read_header(path)
    for name in sorted(expected.keys() - found.keys()):
        raise InputError(f"{path} lacks {name}, which the plan needs.")
    for name in sorted(found.keys() - expected.keys()):
        raise InputError(f"{path} holds {name[:200]!r}, which the plan does not know.")
    for name, want in expected.items():
        if found[name] != want:
            raise InputError(f"{path}: {name} is {_show(found[name])}, and the plan needs {_show(want)}.")


def read(path: Path, plan: CachePlan, capacity: CachePlan | None = None) -> dict[str, Tensor]:
    """Read the tensors of a plan and its capacity plan, checked before anything is allocated; none need no file.

    Raises
    ------
    InputError
        As :func:`check_header`, or a tensor holds a value that is not finite.
    """
    expected = expected_tensors(plan, capacity)
    if not expected and not path.exists():
        return {}
    check_header(path, expected)
    from safetensors.torch import load_file  # torch takes seconds to import: not for reading a plan

    tensors = load_file(path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"{path}: {name} holds a value that is not finite.")
    return tensors


def _show(spec: Spec) -> str:
    dtype, shape = spec
    return f"{dtype} {list(shape)}"
