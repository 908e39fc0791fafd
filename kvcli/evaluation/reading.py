"""A model that reads, ranks endings and writes on one cache, the way decoding does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvcli.runtime.packed_model import CHUNK, PackedModel

BLOCK = 16  # tokens written before looking for the end


class Reader:
    """One sequence on one fresh cache.

    Parameters
    ----------
    model
        Model and plan.
    capacity
        Tokens for which pages are allocated at once.

    Attributes
    ----------
    length
        Tokens read so far.
    nbytes
        The most bytes that the cache of this one sequence had allocated.
    """

    def __init__(self, model: PackedModel, *, capacity: int = 0) -> None:
        self.model = model
        self.cache = model.new_cache(capacity=capacity, keep_decoded=True)
        self.length = 0
        self._next: Tensor | None = None  # [vocabulary] log-probabilities of the token to come

    def read(self, ids: Sequence[int], chunk: int = CHUNK) -> None:
        """Append tokens."""
        for begin in range(0, len(ids), chunk):
            part = torch.tensor([ids[begin : begin + chunk]])
            hidden = self._forward(part, None)
            self._next = self._log_probs(hidden[0, -1:])[0]

    def rank(self, endings: Sequence[Sequence[int]], keep: int | None = None) -> list[Tensor]:
        """Return the log-probability of every token of each ending, [tokens] each, and whatever was read before.

        Parameters
        ----------
        endings
            Token ids, at least one each.
        keep
            Which ending the sequence goes on with; without it the reader is used up.

        Returns
        -------
        list of Tensor
            [2, tokens] each: the tokens' log-probabilities, and those of the likeliest tokens at their places.
        """
        if self._next is None:
            raise ValueError("nothing was read before the endings.")
        width = max(map(len, endings))
        ids = torch.tensor([[*x, *[x[-1]] * (width - len(x))] for x in endings])
        mask = torch.tensor([[1] * len(x) + [0] * (width - len(x)) for x in endings])
        self.cache.batch_repeat_interleave(len(endings))
        hidden = self._forward(ids, mask if width > min(map(len, endings)) else None)
        found = []
        for row, ending in enumerate(endings):
            after = self._log_probs(hidden[row, : len(ending)])
            before = torch.cat((self._next[None], after[:-1]))
            chosen = before.gather(-1, torch.tensor(ending, device=before.device)[:, None])[:, 0]
            found.append(torch.stack((chosen, before.amax(-1))).double().cpu())
            if row == keep:
                last = after[-1]
        if keep is not None:
            self.cache.batch_select_indices(torch.tensor([keep]))
            self._next, self.length = last, self.length - width + len(endings[keep])
        return found

    def write(self, count: int, ends: frozenset[int] = frozenset()) -> list[int]:
        """Append the likeliest tokens, ``count`` at the most, ending with one of ``ends``; return them."""
        if self._next is None:
            raise ValueError("nothing was read before writing.")
        out: list[int] = []
        while len(out) < count:
            out.append(int(self._next.argmax()))
            if out[-1] in ends:
                break
            self.read(out[-1:])
        return out

    @torch.no_grad()
    def _forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Run tokens [rows, tokens] through the layers; positions go on from what was really read."""
        model, device = self.model.loaded.model, self.model.loaded.model.device
        places = torch.arange(self.length, self.length + ids.shape[1], device=device)[None].expand(len(ids), -1)
        hidden: Tensor = model.model(
            ids.to(device), position_ids=places, past_key_values=self.cache,
            attention_mask=None if mask is None else mask.to(device),
        ).last_hidden_state  # fmt: skip
        self.length += ids.shape[1]
        return hidden

    @torch.no_grad()
    def _log_probs(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.loaded.model.lm_head(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def ends(model: PackedModel) -> frozenset[int]:
    """Return the tokens that end an answer."""
    found = model.loaded.model.generation_config.eos_token_id
    return frozenset(x for x in (found if isinstance(found, list) else [found]) if x is not None)


def write_until(model: PackedModel, ids: Sequence[int], count: int, stops: Sequence[str]) -> str:
    """Return greedy text after a prompt: ``count`` tokens at the most, and nothing from the first of ``stops`` on."""
    room = model.loaded.max_context
    count = min(count, room - 1)
    reader, last = Reader(model), ends(model)
    reader.read(ids[-(room - count) :])
    out: list[int] = []
    text = ""
    while len(out) < count and not any(x in text for x in stops) and not last & set(out[-1:]):
        out += reader.write(min(BLOCK, count - len(out)), last)
        text = str(model.loaded.tokenizer.decode(out, skip_special_tokens=True))
    return text[: min((text.index(x) for x in stops if x in text), default=len(text))]


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, more: bool = False) -> list[int]:
    """Return a text's tokens; ``more`` of a text that goes on gets no special tokens."""
    found: list[int] = tokenizer(text, add_special_tokens=not more).input_ids
    return found


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, ending: str) -> tuple[list[int], list[int]]:
    """Split the tokens of context and ending, tokenised as one text, as lm-evaluation-harness does.

    Spaces at the end of the context belong to the ending.
    """
    bare = context.rstrip()
    whole = encode(tokenizer, context + ending)
    before = encode(tokenizer, bare)
    after = whole[len(before) :]
    return (before, after) if after else (before, encode(tokenizer, ending, more=True))


def log_likelihoods(model: PackedModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Tensor]:
    """Return what :meth:`Reader.rank` does for each ending after its own context.

    What all have in common is read once. Contexts that are too long for the model lose their beginning.

    Parameters
    ----------
    pairs
        Token ids of context and ending; a context of one token at least.
    """
    room = model.loaded.max_context
    whole = [[*context, *ending][-room:] for context, ending in pairs]
    scored = [min(len(ending), len(x) - 1) for (_, ending), x in zip(pairs, whole, strict=True)]
    shared = 0
    limit = min(len(x) - n for x, n in zip(whole, scored, strict=True))
    while shared < limit and all(x[shared] == whole[0][shared] for x in whole):
        shared += 1
    if not shared:  # nothing in common: one by one
        return [log_likelihoods(model, [pair])[0] for pair in pairs]
    reader = Reader(model, capacity=max(map(len, whole)))
    reader.read(whole[0][:shared])
    rows = reader.rank([x[shared:] for x in whole])
    return [row[:, -n:] for row, n in zip(rows, scored, strict=True)]
