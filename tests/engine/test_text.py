"""Text as it comes: the same as decoded at once, never half a character, never part of a stop string."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from kvcli.engine.text import INCOMPLETE, Detokenizer, StopStrings, TokenText


def byte_tokenizer() -> Any:
    """A token is a byte; 256 is special; bytes that are no text show as decoders show them."""

    def decode(tokens: list[int], **_: Any) -> str:
        return bytes(x for x in tokens if x < 256).decode("utf-8", "replace")

    return SimpleNamespace(decode=decode)


@given(st.text(max_size=30), st.text(max_size=4))
def test_bytes_of_any_text_come_out_as_that_text(text: str, prompt: str) -> None:
    detokenizer, shown = Detokenizer(byte_tokenizer(), list(prompt.encode())), ""
    for token in text.encode():
        shown += detokenizer.add(token)
        assert text.startswith(shown.rstrip(INCOMPLETE))
        if INCOMPLETE not in text:
            assert INCOMPLETE not in shown
    assert shown + detokenizer.finish() == text


@given(st.lists(st.integers(0, 256), max_size=40))
def test_bytes_that_are_no_text_come_out_as_they_would_at_once(tokens: list[int]) -> None:
    detokenizer = Detokenizer(byte_tokenizer())
    shown = "".join(detokenizer.add(x) for x in tokens) + detokenizer.finish()
    assert shown == bytes(x for x in tokens if x < 256).decode("utf-8", "replace")


def test_an_incomplete_character_waits_and_what_stands_before_it_does_not() -> None:
    detokenizer = Detokenizer(byte_tokenizer())
    assert [detokenizer.add(x) for x in "a€b".encode()] == ["a", "", "", "€", "b"]
    assert [detokenizer.add(x) for x in "é".encode()[:1]] == [""]
    assert detokenizer.finish() == INCOMPLETE
    assert detokenizer.finish() == ""


def test_a_checkpoints_tokenizer_shows_what_it_decodes(tinystories: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tinystories)
    prompt = tokenizer("Once upon a time").input_ids
    answer = tokenizer(" there was a café. It cost 3 €!\nThe end", add_special_tokens=False).input_ids
    detokenizer = Detokenizer(tokenizer, prompt)
    shown = "".join(detokenizer.add(x) for x in answer) + detokenizer.finish()
    whole, before = (tokenizer.decode(x, skip_special_tokens=True) for x in (prompt + answer, prompt))
    assert shown == whole[len(before) :]


def test_single_tokens_have_text_and_bytes() -> None:
    pieces = {0: "Ġthe", 1: "âĤ", 2: "<0xE2>", 3: "▁the", 4: "???"}
    texts = {0: " the", 1: INCOMPLETE, 2: INCOMPLETE, 3: "the", 4: INCOMPLETE}
    tokenizer: Any = SimpleNamespace(
        decode=lambda tokens, **_: texts[tokens[0]], convert_ids_to_tokens=lambda token: pieces[token]
    )
    text = TokenText(tokenizer)
    assert text(0) == (" the", b" the")
    assert text(1) == (INCOMPLETE, b"\xe2\x82")
    assert text(2) == (INCOMPLETE, b"\xe2")
    assert text(3) == (" the", b" the")
    assert text(4) == (INCOMPLETE, b"???")


PIECES = st.lists(st.text(alphabet="abc", max_size=3), max_size=12)


@given(PIECES, st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3))
def test_a_stop_string_ends_the_text_wherever_it_is_cut(pieces: list[str], strings: list[str]) -> None:
    stops, shown, whole = StopStrings(strings), "", "".join(pieces)
    ended = False
    for piece in pieces:
        text, ended = stops.add(piece)
        shown += text
        if ended:
            break
    found = [whole.find(x) for x in strings if x in whole]
    assert ended == bool(found)
    if not ended:
        assert shown + stops.finish() == whole
        return
    assert not any(x in shown for x in strings)
    assert whole.startswith(shown)
    assert any(whole[len(shown) :].startswith(x) for x in strings)


@pytest.mark.parametrize(("text", "expected"), [("xa", "x"), ("xab", "x"), ("xabd", "xabd"), ("x", "x")])
def test_only_what_may_begin_a_stop_string_is_held_back(text: str, expected: str) -> None:
    assert StopStrings(["abc", "q"]).add(text) == (expected, False)
