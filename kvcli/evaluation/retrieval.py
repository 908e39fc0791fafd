"""Finding one thing again in a long context: a passkey among filler, a value among keys.

Mohtashami and Jaggi, "Landmark Attention" (2023), and Liu et al., "Lost in the Middle" (2023); with eight hexadecimal
digits instead of UUIDs, so that short contexts hold enough of them. The answer is ranked among distractors, which also
small models can be measured by; ``greedy`` says how often it would have been written.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from kvcli.errors import InputError
from kvcli.evaluation.choice import Question, choose
from kvcli.evaluation.reading import encode
from kvcli.evaluation.tasks import Outcome, Settings
from kvcli.runtime.packed_model import PackedModel

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
CANDIDATES = 5
T = TypeVar("T")
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class Placed:
    """A question about something at one place of a context.

    Attributes
    ----------
    question
        What is asked.
    length
        Tokens that the context was built for.
    depth
        Where it stands, from 0 (the beginning) to 1.
    """

    question: Question
    length: int
    depth: float


@dataclass(frozen=True)
class Retrieval:
    """Questions of one kind, at several depths and lengths in turn.

    Attributes
    ----------
    name
        As in ``--tasks``.
    build
        Makes a question of so many pieces of filler, or returns None if they are too few for one.
    """

    name: str
    build: Callable[[int, float, random.Random], Question | None]

    def items(self, model: PackedModel, settings: Settings) -> list[Placed]:
        """Return questions whose context and answer take just as many tokens as a length allows.

        Raises
        ------
        InputError
            If the shortest one is longer than that.
        """
        grid = [(length, depth) for length in settings.lengths for depth in DEPTHS]
        count, size = settings.items, len(grid)
        places = [grid[i % size if count >= size else i * size // count] for i in range(count)]
        return [
            Placed(self._fitting(model, length, depth, f"{self.name} {settings.seed} {i}"), length, depth)
            for i, (length, depth) in enumerate(places)
        ]

    def _fitting(self, model: PackedModel, length: int, depth: float, seed: str) -> Question:
        def made(pieces: int) -> Question | None:
            return self.build(pieces, depth, random.Random(seed))

        return largest(made, lambda x: max(len(encode(model.loaded.tokenizer, a + b)) for a, b in x.pairs), length)

    def measure(self, model: PackedModel, item: Placed, reference: Outcome | None) -> Outcome:
        """Let a model choose."""
        return choose(model, item.question)


def largest(build: Callable[[int], T | None], tokens: Callable[[T], int], room: int) -> T:
    """Return what is built of the most pieces that fit into so many tokens.

    Raises
    ------
    InputError
        If nothing fits.
    """
    fits, fails = 0, room  # pieces; a piece is a token at least
    best = None
    while fails - fits > 1:
        middle = (fits + fails) // 2
        made = build(middle)
        if made is None or tokens(made) <= room:
            fits, best = middle, made or best
        else:
            fails = middle
    if best is None:
        raise InputError(f"a context of {room} tokens is too short to hide anything in; give longer --lengths.")
    return best


def hexadecimal(rng: random.Random, count: int) -> list[str]:
    """Return so many different numbers of eight digits."""
    return [f"{x:08x}" for x in rng.sample(range(2**32), count)]


def passkey(pieces: int, depth: float, rng: random.Random) -> Question:
    """Return a question for a number of five digits, among others that the context does not hold."""
    keys = [str(x) for x in rng.sample(range(10_000, 100_000), CANDIDATES)]
    right = rng.randrange(CANDIDATES)
    before = round(depth * pieces)
    needle = f"The pass key is {keys[right]}. Remember it. {keys[right]} is the pass key."
    parts = [
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it.",
        *[FILLER] * before, needle, *[FILLER] * (pieces - before), "What is the pass key? The pass key is",
    ]  # fmt: skip
    context = "\n".join(parts)
    return Question(tuple((context, f" {x}") for x in keys), right)


def key_values(pieces: int, depth: float, rng: random.Random) -> Question | None:
    """Return a question for the value of one key, among the values of others of the same context."""
    if pieces < CANDIDATES:
        return None
    keys, values = hexadecimal(rng, pieces), hexadecimal(rng, pieces)
    place = round(depth * (pieces - 1))
    return ask(listing(keys, values), keys, values, place, rng)


def listing(keys: Sequence[str], values: Sequence[str]) -> str:
    """Return the text that holds keys and values."""
    lines = "\n".join(f"{k}: {v}" for k, v in zip(keys, values, strict=True))
    return f"Here is a list of keys and their values.\n{lines}\n"


def ask(before: str, keys: Sequence[str], values: Sequence[str], place: int, rng: random.Random) -> Question:
    """Return the question for one key's value, with other keys' values as distractors."""
    others = rng.sample([x for i, x in enumerate(values) if i != place], CANDIDATES - 1)
    right = rng.randrange(CANDIDATES)
    candidates = [*others[:right], values[place], *others[right:]]
    context = f"{before}The value of {keys[place]} in this list is:"
    return Question(tuple((context, f" {x}") for x in candidates), right)
