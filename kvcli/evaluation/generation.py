"""What a model writes: where it leaves the reference's text, how much it repeats, and whether its sums are right."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from kvcli.calibration import corpora
from kvcli.errors import InputError
from kvcli.evaluation import data_sets
from kvcli.evaluation.reading import Reader, encode, ends, write_until
from kvcli.evaluation.tasks import Outcome, Settings
from kvcli.runtime.packed_model import PackedModel

PROMPT = 64  # tokens of text that a model goes on from
GRAM = 4  # tokens that make a repetition
SHOTS = 4
SUM_TOKENS = 256  # of an answer to a sum


@dataclass(frozen=True)
class Start:
    """A text to go on from: token ids, and how many to write at the most."""

    ids: tuple[int, ...]
    tokens: int


@dataclass(frozen=True)
class Continuation:
    """Greedy text beside the reference's: the score is the share of the reference's tokens before they part."""

    name: str = "generation"

    def items(self, model: PackedModel, settings: Settings) -> list[Start]:
        """Return pieces of the text, spread over its beginning."""
        prompt = min(PROMPT, model.loaded.max_context // 4)
        tokens = min(settings.tokens, model.loaded.max_context - prompt)
        found = corpora.windows(settings.text, model.loaded.tokenizer, prompt, limit=8 * settings.items)
        chosen = found[:: max(1, len(found) // settings.items)][: settings.items]
        return [Start(tuple(x.tolist()), tokens) for x in chosen]

    def measure(self, model: PackedModel, item: Start, reference: Outcome | None) -> Outcome:
        """Let a model write; ``repetition`` is the share of its four-token pieces that it had written before."""
        reader = Reader(model, capacity=len(item.ids) + item.tokens)
        reader.read(item.ids)
        ids = reader.write(item.tokens, ends(model))
        expected = ids if reference is None else reference.answer
        return Outcome(common(ids, expected) / len(expected), ids, None, {"repetition": repetition(ids)})


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def repetition(ids: Sequence[int], gram: int = GRAM) -> float:
    """Return the share of a text's pieces of ``gram`` tokens that occurred before."""
    grams = [tuple(ids[i : i + gram]) for i in range(len(ids) - gram + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True)
class Sum:
    """A word problem: worked examples with the question, and the right number."""

    prompt: str
    right: str


@dataclass(frozen=True)
class Sums:
    """GSM8K (Cobbe et al., 2021) by generation, after the data set's first four, worked; those are not asked."""

    name: str = "gsm8k"

    def items(self, model: PackedModel, settings: Settings) -> list[Sum]:
        """Return problems drawn at random; of the examples, as many as leave half of the context.

        Raises
        ------
        InputError
            If the data set is nowhere, or has other fields.
        """
        rows = [x.get("doc", x) for x in data_sets.records(self.name, settings.folder)]
        try:
            pairs = [(str(x["question"]), str(x["answer"])) for x in rows]
        except KeyError as error:
            raise InputError(f"a record of {self.name} has no {error}.") from error
        shots = [f"Question: {q}\nAnswer: {_plain(a)}\n\n" for q, a in pairs[:SHOTS]]
        while shots and len(encode(model.loaded.tokenizer, "".join(shots))) > model.loaded.max_context // 2:
            shots.pop()
        asked = pairs[SHOTS:]
        if not asked:
            raise InputError(f"{self.name} holds {len(pairs)} problems; the first {SHOTS} are examples.")
        drawn = random.Random(f"{self.name} {settings.seed}").sample(range(len(asked)), min(settings.items, len(asked)))
        head = "".join(shots)
        found = [(q, number(a)) for q, a in (asked[i] for i in sorted(drawn))]
        return [Sum(f"{head}Question: {q}\nAnswer:", a) for q, a in found if a is not None]

    def measure(self, model: PackedModel, item: Sum, reference: Outcome | None) -> Outcome:
        """Let a model write until it begins another question; its answer is the last number."""
        ids = encode(model.loaded.tokenizer, item.prompt)
        said = number(write_until(model, ids, min(SUM_TOKENS, model.loaded.max_context // 2), ("Question:",)))
        return Outcome(float(said == item.right), said)


def _plain(answer: str) -> str:
    """Return a worked answer without the calculator's marks."""
    return re.sub(r"<<.*?>>", "", answer)


def number(text: str) -> str | None:
    """Return the number after the first ``####``, else the last of a text, without commas and trailing zeros."""
    marked = text.split("####", 1)[-1].split("\n")[0] if "####" in text else text
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", marked) or re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    if not found:
        return None
    chosen: str = (found[0] if "####" in text else found[-1]).replace(",", "")
    return chosen.rstrip("0").rstrip(".") if "." in chosen else chosen
