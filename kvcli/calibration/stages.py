"""Running calibration stages so that finished ones are never run twice.

A stage is a function with a name, settings and inputs. Its digest is the hash of all three (inputs by their digests),
and its result is kept in a file of that digest until the artifact is written: a rerun after an interruption takes it
from there, and any change of model, data or settings misses it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

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

    @classmethod
    def beside(cls, out: Path, *, fresh: bool = False, show: Show = silent) -> Stages:
        """Return the stages kept beside ``out``, without those of earlier runs if ``fresh``."""
        folder = out.absolute().parent / f".{out.name}.stages"
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        return cls(folder, show)

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
        self.folder.mkdir(parents=True, exist_ok=True)
        part = stem.with_suffix(f".{os.getpid()}.part")
        if result and all(isinstance(x, Tensor) for x in result.values()):
            save_file(result, part)
            part.replace(tensors)
        else:
            part.write_text(json.dumps(result))
            part.replace(plain)
        return result

    def discard(self) -> None:
        """Forget everything: the artifact is written."""
        shutil.rmtree(self.folder, ignore_errors=True)
