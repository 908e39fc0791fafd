"""Reading the text of one source: a built-in corpus, a file, standard input or a data set from the hub."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from importlib import resources
from pathlib import Path
from typing import Any

from kvcli.errors import InputError

# A JSON line without `text` or `messages` is the text of those of these fields that it has, in this order.
FIELDS = ("instruction", "question", "prompt", "context", "input", "answer", "completion", "response", "output")


def builtin_names() -> list[str]:
    """Names of the built-in corpora; none where the package was installed without its data."""
    try:
        folder = resources.files("kvcli_calib") / "corpora"
        return sorted(Path(x.name).stem for x in folder.iterdir() if x.name.endswith(".txt"))
    except (ModuleNotFoundError, FileNotFoundError):
        return []


def read(source: str, *, enough: int | None = None) -> str:
    """Return the text of ``builtin:NAME``, a path, ``-`` or ``hub:NAME[:split[:field]]``.

    Parameters
    ----------
    source
        Files are UTF-8 text; ``.jsonl`` holds one document a line; either may end in ``.gz``. Documents are joined by
        a blank line.
    enough
        Characters after which reading a hub data set may stop.

    Raises
    ------
    InputError
        For a source that is missing, empty or not what its name says.
    """
    if source == "-":
        text = _decode(sys.stdin.buffer.read(), "standard input")
    elif source.startswith("builtin:"):
        text = _read_builtin(source.removeprefix("builtin:"))
    elif source.startswith("hub:"):
        text = _read_hub(source, enough)
    else:
        text = _read_file(Path(source).expanduser())
    if not text.strip():
        raise InputError(f"{'Standard input' if source == '-' else source} holds no text.")
    return text


def _read_builtin(name: str) -> str:
    names = builtin_names()
    if name not in names:
        known = ", ".join(names) or "none: the package was installed without its data"
        raise InputError(f"There is no built-in corpus {name!r}; there are {known}.")
    return (resources.files("kvcli_calib") / "corpora" / f"{name}.txt").read_text("utf-8")


def _read_file(path: Path) -> str:
    if not path.exists():
        raise InputError(f"{path} is not a file, and not builtin, builtin:NAME, hub:NAME, self or '-'.")
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    text = _decode(data, str(path))
    if not path.name.removesuffix(".gz").endswith(".jsonl"):
        return text
    lines = enumerate(text.splitlines(), start=1)
    return "\n\n".join(_document(line, f"{path} line {number}") for number, line in lines if line.strip())


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}.") from error


def _document(line: str, where: str) -> str:
    """Return the text of one JSON line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON: {error}.") from error
    text = _record_text(record)
    if text is None:
        raise InputError(f"{where} has none of the fields text, messages, {', '.join(FIELDS)}.")
    return text


def _record_text(record: Any) -> str | None:
    """Text of a record: its field ``text``, else the contents of its ``messages``, else its ``FIELDS`` in order."""
    if not isinstance(record, dict):
        return None
    if isinstance(record.get("text"), str):
        return str(record["text"])
    turns = record.get("messages")
    parts = [x.get("content") for x in turns if isinstance(x, dict)] if isinstance(turns, list) else []
    texts = [x for x in parts or [record.get(x) for x in FIELDS] if isinstance(x, str)]
    return "\n".join(texts) if texts else None


def _read_hub(source: str, enough: int | None) -> str:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{source} needs the package datasets: pip install 'kvcli[data]'.") from error
    _, name, *rest = source.split(":")
    split, field = [*rest, "", ""][:2]
    texts: list[str] = []
    try:
        for record in datasets.load_dataset(name, split=split or "train", streaming=True):
            text = record.get(field) if field else _record_text(record)
            if not isinstance(text, str):
                raise InputError(f"{source} has no text field{' ' + field if field else ''} among {', '.join(record)}.")
            texts.append(text)
            if enough is not None and sum(map(len, texts)) > enough:
                break
    except InputError:
        raise
    except Exception as error:  # the library raises whatever its many back ends raise
        raise InputError(f"{source} cannot be read: {' '.join(str(error).split())[:200]}.") from error
    return "\n\n".join(texts)
