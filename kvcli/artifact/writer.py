"""Writing an artifact: whole, or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import kvcli
from kvcli.artifact.reader import INDEX, Artifact, Progress, is_artifact, open_artifact, sha256_of
from kvcli.artifact.schema import MANIFEST, SCHEMA_VERSION
from kvcli.artifact.tensors import CAPACITY, TENSORS
from kvcli.errors import InputError, KvcliError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

MAX_SHARD_BYTES = 4 * 2**30
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
TOOLS = ("torch", "transformers", "safetensors")


def check_target(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Check that an artifact may be written to ``path``: cheap, and so worth asking before hours of work.

    Raises
    ------
    UsageError
        Something is there that is no empty folder, or is an artifact and ``overwrite`` is not set.
    KvcliError
        What is there cannot be looked at.
    """
    try:
        target = Path(path).resolve()
        if not target.exists():
            return
        if not target.is_dir():
            raise UsageError(f"{path} is a file, and an artifact is a folder.")
        if target.is_mount():
            raise UsageError(f"{path} is a mount point, which cannot be replaced: name a folder inside it.")
        if is_artifact(target):
            if not overwrite:
                raise UsageError(f"{path} already holds an artifact, and replacing it has to be asked for.")
        elif any(target.iterdir()):
            raise UsageError(f"{path} is neither empty nor an artifact, and will not be replaced.")
    except OSError as exc:
        raise KvcliError(f"{path} cannot be written: {exc.strerror}.") from exc


def tool_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that shape an artifact."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in TOOLS}}


class ArtifactWriter:
    """A context in which an artifact is put together, beside its target, until :meth:`commit` moves it there.

    Leaving the context without a commit, for whatever reason, leaves nothing behind and an older artifact as it was.
    What a killed process left is removed by the next writer of the same target.

    Parameters
    ----------
    path
        The target folder; its parents are made.
    overwrite
        Whether an artifact that is there may be replaced.

    Raises
    ------
    UsageError
        The target may not be written, see :func:`check_target`.
    KvcliError
        The disk is full, or the folder cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        self.target = Path(path).resolve()
        self.overwrite = overwrite
        self._path: Path | None = None
        self._lock = -1
        self._made: list[Path] = []
        self._known: dict[int, Mapping[str, Any]] = {}  # by inode, so that a file written anew is hashed anew

    @property
    def path(self) -> Path:
        """The temporary folder, for others to save the model's files and the tokenizer into."""
        assert self._path is not None, "the writer is used inside its context"
        return self._path

    def __enter__(self) -> ArtifactWriter:
        try:
            _clean_up(self.target)
            check_target(self.target, overwrite=self.overwrite)
            self._made = [parent for parent in self.target.parents if not parent.exists()]
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._path = self._beside("tmp")
            self._path.mkdir()
            self._lock = os.open(self._path, os.O_RDONLY)
            with suppress(OSError):  # some file systems have no locks
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            self._discard()
            raise self._refusal(exc) from exc
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()
        if isinstance(exc, Exception) and self._is_ours(exc):
            raise self._refusal(exc) from exc

    def write_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Write the model's weights as Transformers does, one file or shards of at most 4 GiB, and always their index.

        A loader that would read every safetensors file of a folder, as vLLM's does, reads those of the index instead,
        and so leaves the cache's tensors alone.

        Of tensors that share their memory (tied embeddings) the first is kept; Transformers ties the others again.

        Raises
        ------
        KvcliError
            The disk has not enough room.
        """
        from huggingface_hub import get_torch_storage_size, save_torch_state_dict

        state = _own_memory(weights)
        self._reserve(sum(get_torch_storage_size(tensor) for tensor in state.values()))
        save_torch_state_dict(state, self.path, max_shard_size=MAX_SHARD_BYTES)
        if not (self.path / INDEX).exists():
            self.write_json(INDEX, {"metadata": {}, "weight_map": dict.fromkeys(state, "model.safetensors")})

    def link(self, source: Artifact, pattern: str) -> None:
        """Take the files of another artifact whose names match.

        Safetensors files, which nobody edits in place, are hard-linked where the file system allows it; all else is
        copied.

        Raises
        ------
        KvcliError
            The disk has not enough room.
        """
        for name, entry in source.manifest["files"].items():
            if not fnmatchcase(name, pattern):
                continue
            old, new = source.path / name, self.path / name
            new.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".safetensors"):
                with suppress(OSError):  # another file system, another owner, too many links
                    os.link(old, new)
                    self._known[new.stat().st_ino] = entry
                    continue
            self._reserve(entry["size"])
            shutil.copyfile(old, new)

    def write_tensors(self, tensors: Mapping[str, Tensor], capacity: Mapping[str, Tensor] | None = None) -> None:
        """Write ``kv.safetensors``, the plan's tensors and the capacity plan's; :meth:`commit` checks them."""
        from safetensors.torch import save_file

        state = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        # clones: both plans may have the same means, and safetensors refuses two names of one memory
        state |= {CAPACITY + name: tensor.detach().contiguous().clone() for name, tensor in (capacity or {}).items()}
        (self.path / TENSORS).unlink(missing_ok=True)  # a link: some versions of safetensors write in place
        save_file(state, self.path / TENSORS, metadata={"format": "pt"})

    def write_json(self, name: str, obj: object) -> None:
        """Write a JSON file.

        Raises
        ------
        KvcliError
            ``obj`` holds what JSON cannot say, such as NaN.
        """
        try:
            text = json.dumps(obj, indent=2, allow_nan=False)
        except (TypeError, ValueError) as exc:
            raise KvcliError(f"{name} cannot be written as JSON: {exc}.") from exc
        (self.path / name).write_text(text + "\n", encoding="utf-8")

    def commit(self, manifest: Mapping[str, Any], *, progress: Progress | None = None) -> Path:
        """Complete ``kvcli.json``, check that the result can be read, and move it to its target.

        Parameters
        ----------
        manifest
            ``plan``, ``context``, ``budget``, ``stages``, ``source`` and ``calibration``, and ``capacity`` where there
            is a second plan; see ``docs/artifact.md``.
            Versions, tools and files are filled in.
        progress
            Called after each file that was hashed.

        Returns
        -------
        Path
            The target.

        Raises
        ------
        InputError
            What was written is not an artifact that kvcli would read.
        UsageError
            The target has been taken in the meantime.
        """
        self.write_json(
            MANIFEST,
            {
                "schema_version": SCHEMA_VERSION,
                "kvcli_version": kvcli.__version__,
                "tools": tool_versions(),
                **manifest,
                "files": self._list_files(progress),
            },
        )
        _sync(self.path / MANIFEST)
        try:
            open_artifact(self.path, verify=False).tensors()
        except InputError as exc:
            raise InputError(str(exc).replace(str(self.path), str(self.target))) from exc
        for folder, _, _ in os.walk(self.path):
            _sync(Path(folder))
        check_target(self.target, overwrite=self.overwrite)
        self._move()
        return self.target

    def _list_files(self, progress: Progress | None) -> dict[str, Mapping[str, Any]]:
        """Hash every file and force it to the disk."""
        files = sorted(path for path in self.path.rglob("*") if path.is_file())
        done, total = 0, sum(file.stat().st_size for file in files)
        mode = self.path.stat().st_mode & 0o666  # the umask's: safetensors makes its files private
        listed: dict[str, Mapping[str, Any]] = {}
        for file in files:
            name, status = file.relative_to(self.path).as_posix(), file.stat()
            if status.st_ino in self._known:
                listed[name] = self._known[status.st_ino]
            else:
                file.chmod(mode)
                listed[name] = {"sha256": sha256_of(file), "size": status.st_size}
            _sync(file)
            done += status.st_size
            if progress:
                progress(done, total)
        return listed

    def _move(self) -> None:
        """Rename the temporary folder onto its target: in one step, or in two where an artifact is replaced."""
        if not is_artifact(self.target):
            os.rename(self.path, self.target)  # an empty folder is replaced in the same step
            _sync(self.target.parent)
            return
        aside = self._beside("old")
        try:
            os.rename(self.target, aside)
            os.rename(self.path, self.target)
        except BaseException:
            if not self.target.exists():
                os.rename(aside, self.target)
            raise
        _sync(self.target.parent)
        shutil.rmtree(aside, ignore_errors=True)

    def _beside(self, kind: str) -> Path:
        return self.target.parent / f".{self.target.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}"

    def _reserve(self, need: int) -> None:
        have = shutil.disk_usage(self.path).free
        if need > have:
            raise KvcliError(
                f"{self.target} needs {need / 1e6:,.1f} MB more, and its disk has {have / 1e6:,.1f} MB free."
            )

    def _discard(self) -> None:
        """Remove the temporary folder, if it has not been moved, and the parents that were made for it."""
        if self._path is not None:
            shutil.rmtree(self._path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        with suppress(OSError):  # not empty, then: the artifact is there
            for parent in self._made:
                parent.rmdir()

    def _is_ours(self, exc: Exception) -> bool:
        """Whether an error is about writing this artifact, and not about something its caller read."""
        return _is_disk_full(exc) or (isinstance(exc, OSError) and str(exc.filename).startswith(str(self._path)))

    def _refusal(self, exc: Exception) -> KvcliError:
        """Say what the disk refused."""
        if _is_disk_full(exc):
            return KvcliError(f"the disk is full while writing {self.target}; nothing was left behind.")
        reason = exc.strerror if isinstance(exc, OSError) else exc
        return KvcliError(f"{self.target} cannot be written: {reason}; nothing was left behind.")


def _own_memory(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Give each tensor memory of its own, and drop those that another name already keeps whole."""
    from huggingface_hub import get_torch_storage_id

    state: dict[str, Tensor] = {}
    seen = set()
    for name, weight in weights:
        tensor = weight.detach()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # a slice of something larger, which the library refuses
        elif tensor.nbytes:
            where = get_torch_storage_id(tensor)
            if where in seen:
                continue
            seen.add(where)
        state[name] = tensor
    return state


def _is_disk_full(exc: Exception) -> bool:
    """Whether the disk is full: the libraries in Rust say so in their text only."""
    return getattr(exc, "errno", None) in DISK_FULL or any(os.strerror(code) in str(exc) for code in DISK_FULL)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _clean_up(target: Path) -> None:
    """Remove what killed writers of the same target left, and put back what one of them had just set aside."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(tmp|old)-(\d{{1,9}})-[0-9a-f]{{8}}")
    for folder in target.parent.iterdir() if target.parent.is_dir() else ():
        match = pattern.fullmatch(folder.name)
        if match is None or not _is_abandoned(folder, pid=int(match[2])):
            continue
        if match[1] == "old" and not target.exists():
            folder.rename(target)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path, *, pid: int) -> bool:
    """Whether the process is gone, here and, by the lock it held, in other containers and on other machines."""
    try:
        os.kill(pid, 0)
        return False
    except PermissionError:  # somebody else's, and alive
        return False
    except ProcessLookupError:
        pass
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True
