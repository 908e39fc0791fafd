"""From tokens to text as they come: whole characters only, and no part of a stop string."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
CONTEXT = 6  # tokens decoded along, for tokenizers whose text depends on what stands before


class Detokenizer:
    """Text of a growing list of tokens.

    A token is shown once the text with it no longer ends inside a character. Some tokenizers drop the space that a text
    begins with, so new tokens are decoded together with a few before them.

    Parameters
    ----------
    tokenizer
        The model's.
    prompt
        Token ids that stand before.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._context = list(prompt[-CONTEXT:])
        if self._decode(self._context).endswith(INCOMPLETE):
            self._context = []
        self._shown = self._decode(self._context)
        self._new: list[int] = []

    def add(self, token: int) -> str:
        """Return what can be shown now."""
        self._new.append(token)
        whole = self._decode(self._context + self._new)
        if not whole.endswith(INCOMPLETE):
            return self._advance(whole)
        certain = len(whole)  # up to three bytes of a character may be there, shown as one mark or as one each
        while len(whole) - certain < 3 and whole[:certain].endswith(INCOMPLETE):
            certain -= 1
        text = whole[len(self._shown) : certain]
        self._shown += text
        return text

    def finish(self) -> str:
        """Return what is left, an incomplete character as a replacement character."""
        return self._advance(self._decode(self._context + self._new)) if self._new else ""

    def _advance(self, whole: str) -> str:
        text, self._shown = whole[len(self._shown) :], whole
        if text and len(self._new) >= CONTEXT:  # special tokens show nothing, and make no context
            self._context, self._new = self._new, []
            self._shown = self._decode(self._context)
        return text

    def _decode(self, tokens: list[int]) -> str:
        if not tokens:
            return ""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class StopStrings:
    """Holds back the end of a text while it may be the beginning of a stop string.

    Parameters
    ----------
    strings
        Any of which ends the text, and is not part of it.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings, self._held = tuple(strings), ""

    def add(self, text: str) -> tuple[str, bool]:
        """Return what can be shown now, and whether a stop string was found."""
        if not self._strings:
            return text, False
        whole = self._held + text
        found = [at for at in (whole.find(x) for x in self._strings) if at >= 0]
        if found:
            self._held = ""
            return whole[: min(found)], True
        longest = min(len(whole), max(map(len, self._strings)) - 1)
        keep = next((n for n in range(longest, 0, -1) if self._may_begin(whole[-n:])), 0)
        self._held = whole[len(whole) - keep :]
        return whole[: len(whole) - keep], False

    def finish(self) -> str:
        """Return what was held back."""
        held, self._held = self._held, ""
        return held

    def _may_begin(self, end: str) -> bool:
        return any(x.startswith(end) for x in self._strings)


class TokenText:
    """The text and the bytes of single tokens, for reports of log-probabilities.

    Parameters
    ----------
    tokenizer
        The model's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._known = tokenizer, dict[int, tuple[str, bytes]]()

    def __call__(self, token: int) -> tuple[str, bytes]:
        """Return a token's text, with replacement characters where it is only a part of some, and its bytes."""
        if token not in self._known:
            self._known[token] = self._look_up(token)
        return self._known[token]

    def _look_up(self, token: int) -> tuple[str, bytes]:
        text = str(self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        piece = self._tokenizer.convert_ids_to_tokens(token) or ""
        if piece.startswith("\N{LOWER ONE EIGHTH BLOCK}") and not text.startswith(" "):
            text = " " + text  # decoding a text drops the space that it begins with
        if INCOMPLETE not in text:
            return text, text.encode()
        if match := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return text, bytes.fromhex(match[1])
        table = _byte_of_character()
        if all(x in table for x in piece):
            return text, bytes(table[x] for x in piece)
        return text, text.encode()


@cache
def _byte_of_character() -> dict[str, int]:
    """Return the byte that each character of byte-level tokenizers stands for."""
    return {character: byte for byte, character in bytes_to_unicode().items()}
