"""One context, many turns on one cache: retrieve, write, retrieve the same again, retrieve something else.

After SCBench (Li et al., 2024), which showed that what a cache loses may only show in later turns. Right answers stay
in the cache after each question, as SCBench does it, so that a wrong one does not spoil the next turn; what the model
writes by itself stays too.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial

from kvcli.evaluation.choice import Question
from kvcli.evaluation.reading import Reader, encode
from kvcli.evaluation.retrieval import CANDIDATES, ask, hexadecimal, largest, listing
from kvcli.evaluation.tasks import Outcome, Settings
from kvcli.runtime.packed_model import PackedModel

TURNS = 4
WRITTEN = 16  # tokens that the model adds after the first question
PROMPT = "\nWhat else is in this list:"
AGAIN = 1  # the turn that asks the first question again


@dataclass(frozen=True)
class Shared:
    """A context and what is asked of it.

    Attributes
    ----------
    context
        Read first.
    turns
        Questions whose contexts go on where the cache is.
    """

    context: str
    turns: tuple[Question, ...]


@dataclass(frozen=True)
class SharedContext:
    """Several turns on the cache of one context."""

    name: str = "sharing"

    def items(self, model: PackedModel, settings: Settings) -> list[Shared]:
        """Return contexts of the lengths in turn, with all turns inside the length.

        Raises
        ------
        InputError
            If a length is too short for the turns.
        """
        tokenizer = model.loaded.tokenizer

        def tokens(item: Shared) -> int:
            def count(text: str) -> int:
                return len(encode(tokenizer, text, more=True))

            turns = [count(x.pairs[0][0]) + max(count(ending) for _, ending in x.pairs) for x in item.turns]
            return len(encode(tokenizer, item.context)) + sum(turns) + count(PROMPT) + WRITTEN

        return [
            largest(
                partial(self._build, f"{self.name} {settings.seed} {i}"),
                tokens,
                settings.lengths[i % len(settings.lengths)],
            )
            for i in range(settings.items)
        ]

    def _build(self, seed: str, pieces: int) -> Shared | None:
        if pieces < CANDIDATES:
            return None
        rng = random.Random(seed)
        keys, values = hexadecimal(rng, pieces), hexadecimal(rng, pieces)
        places = rng.sample(range(pieces), TURNS - 1)
        places.insert(AGAIN, places[0])
        turns = tuple(ask("\n", keys, values, place, rng) for place in places)
        return Shared(listing(keys, values), turns)

    def measure(self, model: PackedModel, item: Shared, reference: Outcome | None) -> Outcome:
        """Let a model go through all turns; its score is the share of right answers.

        ``reused`` and ``last`` are the scores of the question asked again, and of the last one.
        """
        tokenizer = model.loaded.tokenizer
        reader = Reader(model)
        reader.read(encode(tokenizer, item.context))
        picks, right, likelihoods = [], [], []
        for number, turn in enumerate(item.turns):
            reader.read(encode(tokenizer, turn.pairs[0][0], more=True))
            rows = reader.rank([encode(tokenizer, ending, more=True) for _, ending in turn.pairs], keep=turn.right)
            scores = [float(x[0].sum()) for x in rows]
            picks.append(max(range(len(scores)), key=scores.__getitem__))
            right.append(float(picks[-1] == turn.right))
            likelihoods.append(float(rows[turn.right][0].mean()))
            if not number:
                reader.read(encode(tokenizer, PROMPT, more=True))
                reader.write(WRITTEN)
        score, likelihood = sum(right) / len(right), sum(likelihoods) / len(likelihoods)
        return Outcome(score, picks, likelihood, {"reused": right[AGAIN], "last": right[-1]})
