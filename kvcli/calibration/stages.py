"""Running calibration stages so that finished ones are never run twice.

A stage is a function with a name, settings and inputs. Its digest is the hash of all three (inputs by their digests),
and its result is kept in a file of that digest until the artifact is written: a rerun after an interruption takes it
from there, and any change of model, data or settings misses it. A stage may be a list of independent tasks
(:meth:`Stages.map`): then every finished task is kept, and a rerun computes the others only.

Two calibrations of one output may run at the same time: results are kept in files that hold the same whoever writes
them, so that at worst something is computed twice, and whoever finishes first leaves the folder to the other.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvcli.errors import UsageError

Step = Callable[[], None]


class Progress(Protocol):
    """What a stage tells of how far it has come."""

    def advance(self, steps: float = 1) -> None:
        """Count ``steps`` more as done."""
        ...


class _Silent:
    def advance(self, steps: float = 1) -> None:
        pass


Show = Callable[[str, float | None], AbstractContextManager[Progress]]
"""Makes the progress display of one stage from its description and number of steps."""


def silent(description: str, total: float | None = None) -> AbstractContextManager[Progress]:
    """Show nothing."""
    return nullcontext(_Silent())


Run = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[tuple[int, Any]]]
"""Runs a function on every task and yields each task's number and result, in any order."""


def in_turn(work: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterable[tuple[int, Any]]:
    """Run the tasks here, one after another."""
    return ((i, work(task)) for i, task in enumerate(tasks))


def _finished(journal: Path, count: int) -> dict[int, Any]:
    """Return the results that a journal holds whole, by the number of their task."""
    results: dict[int, Any] = {}
    with suppress(OSError):
        for line in journal.read_text("utf-8", errors="replace").splitlines():
            with suppress(ValueError):  # torn by a crash or a full disk
                match json.loads(line):
                    case [int(at), result] if 0 <= at < count:
                        results.setdefault(at, result)
    return results


@dataclass
class Stages:
    """The finished stages of one calibration, kept beside its output.

    Attributes
    ----------
    folder
        Where results are kept; a hidden sibling of the output.
    show
        Makes progress displays.
    record
        What ran: name, settings and digest, for the artifact.
    resumed
        Names of the stages taken from an earlier run.
    """

    folder: Path
    show: Show = silent
    record: list[dict[str, Any]] = field(default_factory=list)
    resumed: list[str] = field(default_factory=list)
    _lock: int = field(default=-1, init=False, repr=False, compare=False)

    @classmethod
    def beside(cls, out: Path, *, fresh: bool = False, show: Show = silent) -> Stages:
        """Return the stages kept beside ``out``, without those of earlier runs if ``fresh``.

        Raises
        ------
        UsageError
            If they are to be forgotten while another calibration uses them.
        """
        stages = cls(out.absolute().parent / f".{out.name}.stages", show)
        if fresh and stages.folder.exists():
            if not stages._is_alone():
                raise UsageError(f"another calibration of {out} is running: wait for it, or name another output.")
            shutil.rmtree(stages.folder, ignore_errors=True)
            stages.release()
        return stages

    def digest(self, name: str, settings: dict[str, Any], inputs: Sequence[str]) -> str:
        """Return the content hash of a stage: its name, its settings and the digests of its inputs."""
        known = {x["name"]: x["sha256"] for x in self.record}
        text = json.dumps([name, settings, [known[i] for i in inputs]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def run(
        self,
        name: str,
        work: Callable[[Step], Any],
        *,
        description: str,
        settings: dict[str, Any],
        inputs: Sequence[str] = (),
        steps: int | None = None,
    ) -> Any:
        """Return a stage's result: tensors by name, or plain JSON; from an earlier run if nothing has changed.

        Parameters
        ----------
        name
            Of the stage, unique in a calibration.
        work
            Computes the result; calls its argument once a step.
        description
            For the progress display.
        settings
            All that the result depends on beside the inputs; plain JSON.
        inputs
            Names of the stages whose results it reads.
        steps
            How many steps there are.
        """
        digest = self.digest(name, settings, inputs)
        self.record.append({"name": name, "settings": settings, "sha256": digest})
        stem = self.folder / f"{name}-{digest[:16]}"
        tensors, plain = stem.with_suffix(".safetensors"), stem.with_suffix(".json")
        # a crash of the machine can leave a renamed file short: then the stage runs again
        with suppress(OSError, ValueError, SafetensorError):
            result = load_file(tensors) if tensors.exists() else json.loads(plain.read_text())
            self.resumed.append(name)
            return result
        with self.show(description, steps) as progress:
            result = work(progress.advance)
        self._hold()
        part = stem.with_suffix(f".{os.getpid()}.part")
        if result and all(isinstance(x, Tensor) for x in result.values()):
            save_file(result, part)
            part.replace(tensors)
        else:
            part.write_text(json.dumps(result))
            part.replace(plain)
        return result

    def map(
        self,
        name: str,
        work: Callable[[Any], Any],
        tasks: Sequence[Any],
        *,
        description: str,
        settings: dict[str, Any],
        inputs: Sequence[str] = (),
        run: Run = in_turn,
    ) -> list[Any]:
        """Return the results of independent tasks, each kept as soon as it is finished.

        Parameters
        ----------
        name, description, settings, inputs
            As in :meth:`run`; the tasks are part of what the result depends on.
        work
            Computes the result of one task, plain JSON.
        tasks
            Plain JSON each.
        run
            Runs ``work`` on the unfinished tasks, anywhere and in any order, and yields each one's number and result.
        """
        digest = self.digest(name, {**settings, "tasks": list(tasks)}, inputs)
        self.record.append({"name": name, "settings": settings, "sha256": digest})
        journal = self.folder / f"{name}-{digest[:16]}.jsonl"
        results = _finished(journal, len(tasks))
        left = [i for i in range(len(tasks)) if i not in results]
        if results:
            self.resumed.append(name if not left else f"{name} ({len(results)} of {len(tasks)})")
        if not left:
            return [results[i] for i in range(len(tasks))]
        with self.show(description, len(tasks)) as progress:
            progress.advance(len(results))
            for at, result in run(work, [tasks[i] for i in left]):
                line = json.dumps([left[at], result])
                self._hold()
                with journal.open("a") as file:  # one write: lines of two processes do not mix
                    file.write(f"\n{line}\n")  # the line before may have been torn
                results[left[at]] = json.loads(line)[1]  # what a rerun would read
                progress.advance()
        return [results[i] for i in range(len(tasks))]

    def file(self, name: str, *, settings: dict[str, Any], inputs: Sequence[str] = (), suffix: str) -> Path:
        """Return a file in which a stage may keep unfinished work; its folder is there."""
        self._hold()
        return self.folder / f"{name}-{self.digest(name, settings, inputs)[:16]}{suffix}"

    def discard(self) -> None:
        """Forget the stages: the artifact is written. Those that another calibration may still want stay."""
        if self._is_alone():
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            for entry in self.record:
                for kept in self.folder.glob(f"{entry['name']}-{entry['sha256'][:16]}.*"):
                    kept.unlink(missing_ok=True)
        self.release()

    def _hold(self) -> None:
        """Make the folder, and share a lock on it for as long as this calibration lives."""
        self.folder.mkdir(parents=True, exist_ok=True)
        while self._lock < 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # forgotten by another calibration at this very moment
                self._lock = os.open(self.folder, os.O_RDONLY)
                with suppress(OSError):  # some file systems have no locks
                    fcntl.flock(self._lock, fcntl.LOCK_SH)
                if os.fstat(self._lock).st_nlink == 0:  # forgotten while this one waited for the lock
                    self.release()

    def _is_alone(self) -> bool:
        """Whether no other calibration shares the folder; if so, none will until this one lets go."""
        if self._lock < 0:
            with suppress(OSError):
                self._lock = os.open(self.folder, os.O_RDONLY)
        if self._lock < 0:
            return False
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def release(self) -> None:
        """Let other calibrations of this output forget the stages, as far as this one is concerned."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()
