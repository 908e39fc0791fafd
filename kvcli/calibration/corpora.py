"""Token windows for calibration and evaluation, from what ``--data`` names.

A SPEC is one source, or several with commas between them, mixed in equal shares:

``builtin``, ``builtin:NAME``
    All the corpora that come with kvcli in equal shares, or one of them.
a path
    UTF-8 text, or ``.jsonl`` with a field ``text``, with ``messages``, or with question and answer by any of the names
    in :data:`kvcli.calibration.texts.FIELDS`; either may be gzipped.
``-``
    Text from standard input.
``self``
    The model writes its own: calibration only.
``hub:NAME[:split[:field]]``
    A data set from the hub, through the package ``datasets``.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvcli.calibration import selftext
from kvcli.calibration.texts import builtin_names, read
from kvcli.errors import InputError, UsageError
from kvcli.models.loading import LoadedModel, added_bos

# Text beyond this many characters for every token asked for is thinned out before it is tokenised.
CHARACTERS_PER_TOKEN = 32


@dataclass(frozen=True, eq=False)
class Corpus:
    """Calibration windows and where they came from.

    Attributes
    ----------
    name
        The SPEC, with paths reduced to file names.
    sha256
        Hash of the token ids.
    ids
        int64 [windows, length].
    description
        How many windows each source gave.
    """

    name: str
    sha256: str
    ids: Tensor
    description: str


def tokens(
    spec: str,
    loaded: LoadedModel,
    *,
    num_tokens: int,
    seed: int,
    length: int,
    progress: Callable[[int, int], None] | None = None,
) -> Corpus:
    """Cut windows of ``length`` tokens, ``num_tokens`` in all, or as many as the sources have.

    Windows of one source are spread evenly over it and do not overlap; the seed decides where each lies. A source that
    runs out leaves its share to the others. Where the tokenizer adds a BOS, every window begins with it.

    Raises
    ------
    InputError
        For a source that cannot be read, or too short for one window.
    UsageError
        For windows longer than the model's context.
    """
    pools, rooms = sources(spec, loaded, num_tokens=num_tokens, seed=seed, length=length)
    count = max(1, num_tokens // length)
    shares = _shares({part: sum(room.values()) for part, room in rooms.items()}, count)
    shares = {name: n for part, share in shares.items() for name, n in _shares(rooms[part], share).items()}
    cuts = [
        _with_bos(_spread(pools[name], share, length, _random(seed, name)), loaded.tokenizer)
        if name in pools
        else selftext.write(loaded, share, length, seed, progress)
        for name, share in shares.items()
    ]
    ids = torch.cat(cuts)
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
    return Corpus(
        name=",".join(_public(x) for x in _parts(spec)),
        sha256=hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest(),
        ids=ids,
        description=", ".join(f"{n} of {length} tokens from {_public(x)}" for x, n in shares.items()),
    )


def sources(
    spec: str, loaded: LoadedModel, *, num_tokens: int, seed: int, length: int
) -> tuple[dict[str, Tensor], dict[str, dict[str, int]]]:
    """Read every source of a SPEC but ``self``, which the model has yet to write, and check that there is enough.

    Returns the token ids of each source, and for each part of the SPEC how many windows each of its sources can give.

    Raises
    ------
    InputError, UsageError
        As :func:`tokens`.
    """
    if not 1 < length <= loaded.max_context:
        raise UsageError(f"Windows of {length} tokens do not fit the model's context of {loaded.max_context} tokens.")
    count = max(1, num_tokens // length)
    pools: dict[str, Tensor] = {}
    rooms: dict[str, dict[str, int]] = {}
    for part in _parts(spec):
        for name in (x for x in _members(part) if x != "self"):
            pools[name] = _pool(name, loaded, count, length, seed)
        rooms[part] = {x: len(pools[x]) // length if x in pools else count for x in _members(part)}
        if not any(rooms[part].values()):
            _refuse_short(part, max(len(pools[x]) for x in _members(part)), length)
    return pools, rooms


def windows(spec: str, tokenizer: PreTrainedTokenizerBase, length: int, *, limit: int | None = None) -> list[Tensor]:
    """Cut consecutive windows for evaluation, from the beginning of the whole text, tokenised in one go.

    This is what llama.cpp's perplexity tool does: windows begin at multiples of ``length``, what is left over at the
    end is dropped, and where the tokenizer adds a BOS, it takes the place of each window's first token.

    Parameters
    ----------
    spec
        Sources as in calibration, except ``self``; several are joined by a blank line.
    tokenizer
        The model's.
    length
        Tokens of a window.
    limit
        At most so many windows.

    Returns
    -------
    list of Tensor
        int64 [length] each.

    Raises
    ------
    InputError
        For a source that cannot be read, or too short for one window.
    UsageError
        For ``self``: a model is not to be judged by its own words.
    """
    sources = []
    for part in _parts(spec):
        if part == "self":
            raise UsageError("Evaluation needs text that the model did not write: self is for calibration.")
        sources += _members(part)
    ids = _encode("\n\n".join(map(read, sources)), tokenizer)
    if len(ids) < length:
        _refuse_short(_public(spec), len(ids), length)
    count = len(ids) // length if limit is None else min(limit, len(ids) // length)
    return list(_with_bos(ids[: count * length].reshape(count, length), tokenizer))


def _parts(spec: str) -> list[str]:
    """Split a SPEC into its sources; a file whose name has commas is one source."""
    parts = [spec] if Path(spec).is_file() else [x.strip() for x in spec.split(",")]
    if not all(parts):
        raise UsageError(f"--data {spec!r} has an empty source.")
    if len(set(parts)) < len(parts):
        raise UsageError(f"--data {spec!r} names a source twice.")
    if "builtin" in parts and not builtin_names():
        raise InputError("The built-in corpora are not installed; name a file, or self.")
    return parts


def _members(part: str) -> list[str]:
    return [f"builtin:{x}" for x in builtin_names()] if part == "builtin" else [part]


def _public(source: str) -> str:
    """Return a source's name as it is recorded: of a path, the last part."""
    return Path(source).name if Path(source).is_file() else source


def _random(seed: int, name: str) -> random.Random:
    return random.Random(f"{seed} {_public(name)}")


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    encoding: Any = tokenizer(text, verbose=False)  # or it warns that the text is longer than the model's context
    return torch.tensor(encoding.input_ids, dtype=torch.int64)


def _pool(source: str, loaded: LoadedModel, count: int, length: int, seed: int) -> Tensor:
    """Return the ids of a source, or of ``count`` slices spread over one that is far longer than needed."""
    width = CHARACTERS_PER_TOKEN * length
    text = read(source, enough=2 * count * width)
    if len(text) > count * width:
        text = "\n\n".join(_slices(text, count, width, _random(seed, source)))
    return _encode(text, loaded.tokenizer)


def _starts(size: int, count: int, width: int, rng: random.Random) -> list[int]:
    """Return where ``count`` stretches of ``width`` lie: one at random in each of as many equal parts of ``size``."""
    room = size // count
    return [i * room + rng.randrange(room - width + 1) for i in range(count)]


def _slices(text: str, count: int, width: int, rng: random.Random) -> list[str]:
    return [text[i : i + width] for i in _starts(len(text), count, width, rng)]


def _spread(ids: Tensor, count: int, length: int, rng: random.Random) -> Tensor:
    return torch.stack([ids[i : i + length] for i in _starts(len(ids), count, length, rng)])


def _with_bos(ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Begin each window with the BOS that the tokenizer would have begun it with."""
    bos = added_bos(tokenizer)
    if bos is not None:
        ids = ids.clone()
        ids[:, 0] = bos
    return ids


def _refuse_short(source: str, there: int, length: int) -> NoReturn:
    what = {"-": "Standard input", "builtin": "The longest of the built-in corpora"}.get(source, source)
    raise InputError(f"{what} holds {there} tokens, and one window needs {length}.")


def _shares(room: dict[str, int], count: int) -> dict[str, int]:
    """Divide ``count`` windows equally among sources with limited room; the roomiest get what does not divide."""
    shares = dict.fromkeys(room, 0)
    for _ in range(count):
        free = [x for x in room if shares[x] < room[x]]
        if free:
            shares[min(free, key=lambda x: (shares[x], -room[x]))] += 1
    return {x: n for x, n in shares.items() if n}
