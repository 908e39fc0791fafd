"""Choosing tokens for a batch, each sequence by parameters and a seed of its own.

The order is that of Transformers: penalties and biases, temperature, top_k, top_p, min_p. Its own processors take one
setting for a whole batch, so all but the repetition penalty are computed here, over rows with different settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from kvcli.engine.request import SamplingParams
from kvcli.errors import KvcliError

NEAR = 512  # likeliest tokens looked at first for top_p: sorting all of a vocabulary costs milliseconds
NOT_NUMBERS = "the model's scores are not numbers."


@dataclass(frozen=True)
class Sampled:
    """A token, and if asked for its log-probability and the likeliest tokens with theirs, best first."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class SamplerState:
    """What the sampler keeps of one sequence.

    Parameters
    ----------
    params
        How.
    prompt
        Its tokens.
    index
        Which choice of the request: each has a seed of its own.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], index: int = 0) -> None:
        self.params = params
        self.random: torch.Generator | None = None
        if params.temperature > 0:
            self.random = torch.Generator()
            if params.seed is None:
                self.random.seed()
            else:
                self.random.manual_seed((params.seed + index) % 2**64)
        self._counts: dict[int, int] = {}  # of generated tokens
        self._repeated: Any = None
        if params.repetition_penalty != 1:
            self._repeated = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
        self._seen = set(prompt) if self._repeated else set()
        self._biased = list(params.logit_bias), torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)

    @property
    def is_plain(self) -> bool:
        """Whether scores are taken as they are."""
        p = self.params
        return not (self._repeated or p.presence_penalty or p.frequency_penalty or p.logit_bias)

    def add(self, token: int) -> None:
        """Note a token that was chosen."""
        if self.params.presence_penalty or self.params.frequency_penalty:
            self._counts[token] = self._counts.get(token, 0) + 1
        if self._repeated:
            self._seen.add(token)

    def adjust(self, scores: Tensor) -> Tensor:
        """Return scores, float32 [vocabulary], with penalties and biases."""
        p = self.params
        if self._repeated:
            scores = self._repeated(torch.tensor([sorted(self._seen)]), scores[None])[0]
        else:
            scores = scores.clone()
        if self._counts:
            tokens = torch.tensor(list(self._counts))
            counts = torch.tensor(list(self._counts.values()), dtype=torch.float32)
            scores[tokens] -= p.presence_penalty + p.frequency_penalty * counts
        if self._biased[0]:
            scores[self._biased[0]] += self._biased[1]
        return scores


@torch.no_grad()
def sample(logits: Tensor, states: Sequence[SamplerState]) -> list[Sampled]:
    """Choose one token a row.

    Parameters
    ----------
    logits
        float32 [sequences, vocabulary], on the CPU; not changed.
    states
        Of the sequences; the caller notes what was chosen with :meth:`SamplerState.add`.

    Raises
    ------
    KvcliError
        If a row is not a number anywhere: the model broke down.
    """
    if torch.isnan(logits.sum()) and torch.isnan(logits).any():
        raise KvcliError(NOT_NUMBERS)
    scores = logits
    bent = [row for row, state in enumerate(states) if not state.is_plain]
    if bent:
        scores = logits.clone()
        for row in bent:
            scores[row] = states[row].adjust(logits[row])
    tokens = scores.argmax(-1)
    drawn = [row for row, state in enumerate(states) if state.random is not None]
    if drawn:
        tokens[drawn] = draw(scores[drawn], [states[row] for row in drawn])
    chosen: list[int] = tokens.tolist()
    asked = [row for row, state in enumerate(states) if state.params.logprobs is not None]
    found: dict[int, Sampled] = {}
    if asked:
        likeliest = [states[row].params.logprobs or 0 for row in asked]
        found = dict(zip(asked, scored(logits[asked], [chosen[row] for row in asked], likeliest), strict=True))
    return [found.get(row) or Sampled(token) for row, token in enumerate(chosen)]


def draw(scores: Tensor, states: Sequence[SamplerState]) -> Tensor:
    """Draw a token a row, int64 [rows], by one uniform number of each sequence's generator.

    Parameters
    ----------
    scores
        float32 [rows, vocabulary], penalties applied.
    states
        Of the rows.
    """
    probabilities = filtered([x.params for x in states], scores).softmax(-1, dtype=torch.float64)
    uniform = torch.stack([torch.rand(1, generator=x.random, dtype=torch.float64) for x in states])
    mass = probabilities.cumsum(-1)
    found = torch.searchsorted(mass, uniform * mass[:, -1:], right=True)[:, 0]
    # a uniform number next to 1 may fall behind the last token that has any mass
    last = probabilities.shape[1] - 1 - (probabilities > 0).flip(-1).int().argmax(-1)
    return torch.minimum(found, last)


def filtered(params: Sequence[SamplingParams], scores: Tensor) -> Tensor:
    """Return scores at their temperatures, with -infinity where a token may not be drawn.

    Parameters
    ----------
    params
        Of the rows; temperatures above 0.
    scores
        float32 [rows, vocabulary].
    """
    temperature = torch.tensor([x.temperature for x in params])
    # the best score becomes 0, so that no temperature overflows
    scores = (scores - scores.amax(-1, keepdim=True)) / temperature[:, None].clamp(min=1e-6)
    vocabulary = scores.shape[1]
    floor = torch.full((len(params), 1), -torch.inf)
    for row, p in enumerate(params):
        if 0 < p.top_k < vocabulary:
            floor[row] = scores[row].topk(p.top_k).values[-1]
        if p.top_p < 1:
            floor[row] = torch.maximum(floor[row], _nucleus_floor(scores[row], floor[row], p.top_p))
        if p.min_p > 0:
            floor[row] = torch.maximum(floor[row], torch.tensor(p.min_p).log())
    return scores.masked_fill(scores < floor, -torch.inf)


def _nucleus_floor(scores: Tensor, floor: Tensor, top_p: float) -> Tensor:
    """Return the score of the last of the likeliest tokens that together reach the mass ``top_p``."""
    scores = scores[scores >= floor]
    total = scores.logsumexp(-1)
    near = min(NEAR, len(scores))
    while True:
        values = scores.topk(near).values
        before = (values - total).exp().cumsum(-1) - (values - total).exp()
        inside = int((before < top_p).sum())
        if inside < near or near == len(scores):
            return values[max(inside, 1) - 1]
        near = min(near * 16, len(scores))


def scored(logits: Tensor, tokens: Sequence[int], likeliest: Sequence[int]) -> list[Sampled]:
    """Return given tokens with their log-probabilities.

    Parameters
    ----------
    logits
        float32 [rows, vocabulary].
    tokens
        One a row.
    likeliest
        How many of the likeliest tokens to report beside each.

    Raises
    ------
    KvcliError
        If the scores are not numbers.
    """
    if torch.isnan(logits).any():
        raise KvcliError(NOT_NUMBERS)
    out = []
    for line, token, count in zip(logits.log_softmax(-1), tokens, likeliest, strict=True):
        best = line.topk(min(count, len(line)))
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        out.append(Sampled(token, float(line[token]), top))
    return out
