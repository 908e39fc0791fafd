"""Where a model's files are, and every check that is cheap enough to run before any weight is read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from kvcli.errors import InputError
from kvcli.models.architectures import check_model_type

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
# Other weights, such as Mistral's consolidated.safetensors, hold the same model once more.
_FROM_HUB = ("*.json", "*.model", "*.txt", "*.jinja", "*.py", "model*.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are all there and whose architecture is supported.

    Attributes
    ----------
    name
        How the user's source is recorded: the hub id, or the last part of a local path.
    folder
        The folder Transformers is to read.
    weights
        The safetensors files in order, or the one .gguf file.
    """

    name: str
    folder: Path
    weights: tuple[Path, ...]

    @property
    def gguf(self) -> Path | None:
        """The .gguf file, if that is what it is."""
        return self.weights[0] if self.weights[0].suffix == ".gguf" else None


def find(source: str) -> Checkpoint:
    """Locate ``source``, a local folder, a .gguf file or a hub id, and check it without reading weights.

    Raises
    ------
    InputError
        One sentence naming what is missing, damaged or not supported.
    """
    path = Path(source).expanduser()
    try:
        path.stat()
    except FileNotFoundError:
        pass  # perhaps a hub id
    except (OSError, ValueError) as error:
        raise InputError(f"{source[:100]} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"{source} is a file, but not a .gguf file; give the model's folder.")
        return Checkpoint(path.name, path.parent, (path,))
    if path.is_dir():
        return _check_folder(path, source, path.resolve().name)
    if path.suffix != ".gguf" and _HUB_ID.fullmatch(source):
        _check_config(_download(source, ("config.json",)), source)
        return _check_folder(_download(source, _FROM_HUB), source, source)
    raise InputError(f"{source} does not exist.")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises :class:`InputError` where the file holds anything else."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object.")
    return value


def sha256(files: Iterable[Path]) -> str:
    """Hash files in blocks: a single file's own sha256, or the sha256 over several files' digests in order."""
    digests = []
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        digests.append(digest)
    if len(digests) == 1:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(x.digest() for x in digests)).hexdigest()


def _download(name: str, patterns: tuple[str, ...]) -> Path:
    """Bring the named files of a hub model into the cache; a hub out of reach fails at once if they are not there."""
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=["*/*"], etag_timeout=5))
    except (OSError, ValueError) as error:
        raise InputError(f"{name} is neither a local path nor a model that the hub would give out.") from error


def _check_config(folder: Path, source: str) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(f"{source} holds no config.json.")
    check_model_type(read_json(config).get("model_type"))


def _check_folder(folder: Path, source: str, name: str) -> Checkpoint:
    _check_config(folder, source)
    weights = _find_weights(folder, source)
    if not any((folder / x).is_file() for x in _TOKENIZERS):
        raise InputError(f"{source} holds no tokenizer ({', '.join(_TOKENIZERS)}).")
    for file in weights:
        try:
            with safe_open(file, framework="pt"):  # reads the header and holds it against the file's length
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is damaged or truncated: {error}.") from error
    return Checkpoint(name, folder, weights)


def _find_weights(folder: Path, source: str) -> tuple[Path, ...]:
    """Return the files that Transformers would read, in order."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return (whole,)
    if not index.is_file():
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
            raise InputError(f"{source} holds pickled weights only, which can run code; convert them to safetensors.")
        raise InputError(f"{source} holds no weights (model.safetensors).")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(x, str) for x in shards.values()):
        raise InputError(f"{index} has no weight_map.")
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise InputError(f"{index} names {shard}, which is not there.")
    return tuple(folder / x for x in sorted(set(shards.values())))
