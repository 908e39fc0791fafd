"""Opening an artifact. Nothing in the folder is trusted: every check comes before what it protects."""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, NoReturn

from kvcli.artifact import tensors
from kvcli.artifact.schema import MANIFEST, validate
from kvcli.errors import InputError
from kvcli.plan import CachePlan

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.json"
REPORT = "report.json"
WEIGHTS = "model*.safetensors"
INDEX = "model.safetensors.index.json"

MAX_JSON_BYTES = 16 * 2**20
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".h5", ".keras", ".joblib"}
LOADABLE = PICKLES | {".py", ".pyc", ".so", ".dll", ".dylib", ".safetensors", ".gguf", ".onnx", ".msgpack"}

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""


@dataclass(frozen=True)
class Artifact:
    """An opened artifact: what it says, checked.

    Attributes
    ----------
    path
        The folder.
    manifest
        ``kvcli.json``, valid against the schema.
    plan
        Its cache plan.
    report
        ``report.json``, or an empty object where there is none.
    capacity
        The plan by which idle sequences are packed again, if there is one.
    """

    path: Path
    manifest: dict[str, Any]
    plan: CachePlan
    report: dict[str, Any]
    capacity: CachePlan | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Read the plan's tensors.

        Raises
        ------
        InputError
            ``kv.safetensors`` does not hold exactly the plans' tensors, or one of them holds a value that is not
            finite.
        """
        return {name: x for name, x in self._read().items() if not name.startswith(tensors.CAPACITY)}

    def capacity_tensors(self) -> dict[str, Tensor]:
        """Read the capacity plan's tensors, by the names that the plan has for them; raises as :meth:`tensors`."""
        found = self._read().items()
        return {name.removeprefix(tensors.CAPACITY): x for name, x in found if name.startswith(tensors.CAPACITY)}

    def _read(self) -> dict[str, Tensor]:
        return tensors.read(self.path / tensors.TENSORS, self.plan, self.capacity)


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Whether a folder claims to be an artifact; :func:`open_artifact` tells whether it is a sound one."""
    return (Path(path) / MANIFEST).is_file()


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, read as a stream."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def open_artifact(path: str | os.PathLike[str], *, verify: bool = True, progress: Progress | None = None) -> Artifact:
    """Open an artifact, checking everything that loading it would rely on.

    Parameters
    ----------
    path
        The folder.
    verify
        Whether to hash every file. Without it sizes, headers, shapes and the plan are still checked.
    progress
        Called after each file that was hashed.

    Raises
    ------
    InputError
        The folder is missing, damaged, altered, contradicts itself, or was written by a newer kvcli.
    """
    root = Path(path)
    try:
        return _open(root, verify=verify, progress=progress)
    except OSError as exc:
        raise InputError(f"{exc.filename or root} cannot be read: {exc.strerror or exc}.") from exc


def _open(root: Path, *, verify: bool, progress: Progress | None) -> Artifact:
    if not root.exists():
        raise InputError(f"{root} does not exist.")
    if not root.is_dir():
        raise InputError(f"{root} is a file, and an artifact is a folder.")
    if not os.path.lexists(root / MANIFEST):
        raise InputError(f"{root} is not a kvcli artifact: it has no {MANIFEST}.")

    sizes = _walk(root)
    manifest = validate(_read_json(root / MANIFEST), str(root / MANIFEST))
    try:
        plan = CachePlan.from_json(manifest["plan"])
        capacity = CachePlan.from_json(manifest["capacity"]) if "capacity" in manifest else None
    except InputError as exc:
        raise InputError(f"{root / MANIFEST}: {exc}") from exc
    if capacity is not None and not plan.shares_pages_with(capacity):
        raise InputError(f"{root / MANIFEST}: the capacity plan is not for the plan's layers, pages, sinks and window.")

    _check_files(root, manifest["files"], sizes)
    if verify:
        _check_hashes(root, manifest["files"], progress)
    _check_weights(root, sizes)
    expected = tensors.expected_tensors(plan, capacity)
    if tensors.TENSORS in sizes or expected:
        tensors.check_header(root / tensors.TENSORS, expected)
    _check_geometry(root / CONFIG, plan)
    report = _read_json(root / REPORT) if REPORT in sizes else {}
    return Artifact(root, manifest, plan, report, capacity)


def _walk(root: Path) -> dict[str, int]:
    """Return name and size of every file, and refuse whatever is neither a plain file nor a folder."""
    sizes: dict[str, int] = {}
    for folder, folders, files in os.walk(root, onerror=_reraise):
        for entry in (Path(folder, name) for name in (*folders, *files)):
            status = entry.lstat()
            if stat.S_ISLNK(status.st_mode):
                raise InputError(f"{entry} is a symbolic link, and an artifact holds plain files only.")
            if stat.S_ISREG(status.st_mode):
                sizes[entry.relative_to(root).as_posix()] = status.st_size
            elif not stat.S_ISDIR(status.st_mode):
                raise InputError(f"{entry} is a device, pipe or socket, and an artifact holds plain files only.")
    return sizes


def _reraise(error: OSError) -> NoReturn:
    raise error


def _read_json(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise InputError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB.")
    try:
        obj = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as exc:
        raise InputError(f"{path} is not valid JSON: {exc}.") from exc
    if not isinstance(obj, dict):
        raise InputError(f"{path} does not hold a JSON object.")
    return obj


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _check_files(root: Path, listed: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, int]) -> None:
    for name, entry in listed.items():
        if ".." in PurePosixPath(name).parts or PureWindowsPath(name).anchor or "\\" in name:
            raise InputError(f"{root / MANIFEST} lists {name!r}, which is not a name inside the folder.")
        if PurePosixPath(name).suffix.lower() in PICKLES:
            raise InputError(f"{root / name} may hold pickled code, which kvcli never loads.")
        if name not in sizes:
            raise InputError(f"{root / name} is missing.")
        if sizes[name] != entry["size"]:
            raise InputError(
                f"{root / name} has {sizes[name]} bytes where {MANIFEST} lists {entry['size']}: "
                "it was truncated or changed."
            )
    for name in sorted(sizes.keys() - listed.keys()):
        if PurePosixPath(name).suffix.lower() in LOADABLE or name == CONFIG:
            raise InputError(f"{root / name} is not listed in {MANIFEST}: it was added later.")
    if CONFIG not in listed:
        raise InputError(f"{root / CONFIG} is missing.")


def _check_hashes(root: Path, listed: Mapping[str, Mapping[str, Any]], progress: Progress | None) -> None:
    done, total = 0, sum(entry["size"] for entry in listed.values())
    for name, entry in listed.items():
        if sha256_of(root / name) != entry["sha256"]:
            raise InputError(f"{root / name} is damaged: its sha256 is not the one in {MANIFEST}.")
        done += entry["size"]
        if progress:
            progress(done, total)


def _check_weights(root: Path, sizes: Mapping[str, int]) -> None:
    """Open every header, and hold the index to the shards it names."""
    headers = {
        name: tensors.read_header(root / name)
        for name in sizes
        if name.endswith(".safetensors") and name != tensors.TENSORS
    }
    weights = [name for name in headers if "/" not in name and fnmatchcase(name, WEIGHTS)]
    if not weights:
        raise InputError(f"{root} has no weights: neither model.safetensors nor model-*.safetensors.")
    if "model.safetensors" in weights and INDEX not in sizes:
        return  # as Transformers writes it
    if INDEX not in sizes:
        raise InputError(f"{root / INDEX} is missing, and the weights are in several files.")
    shards = _read_json(root / INDEX).get("weight_map")
    if not isinstance(shards, dict):
        raise InputError(f"{root / INDEX} has no weight_map.")
    for name, shard in shards.items():
        if not isinstance(shard, str) or name not in headers.get(shard, {}):
            raise InputError(f"{root / INDEX} places {name[:200]!r} in {reprlib.repr(shard)}, where it is not.")


def _check_geometry(path: Path, plan: CachePlan) -> None:
    """Hold the plan's layers to the model's configuration."""
    config = _read_json(path)
    if isinstance(config.get("text_config"), dict):
        config = config["text_config"]
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    derived = hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 else None
    stated = {
        "num_hidden_layers": config.get("num_hidden_layers"),
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or derived,
    }
    for layer in plan.layers:
        planned = {
            "num_hidden_layers": len(plan.layers),
            "num_key_value_heads": layer.num_kv_heads,
            "head_dim": layer.head_dim,
        }
        for name, want in planned.items():
            if stated[name] != want:
                raise InputError(f"{path} has {name} {reprlib.repr(stated[name])}, and the plan has {want}.")
