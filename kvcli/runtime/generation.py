"""Generating text from a packed cache, through Transformers' ``generate``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer, set_seed

from kvcli.errors import UsageError
from kvcli.runtime.packed_model import PackedModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes
    ----------
    max_tokens
        Tokens to generate at the most.
    temperature
        0 takes the likeliest token.
    top_p, top_k
        Sample only from the likeliest tokens of this mass, or so many; 1 and 0 for all.
    seed
        Of the sampling; every prompt starts from it.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes
    ----------
    text
        The completion, without the prompt.
    prompt_tokens, completion_tokens
        How long both were.
    finish_reason
        ``stop`` if the model ended, ``length`` if it was cut.
    cache_bytes
        What the cache had allocated at the end.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    cache_bytes: int


class _Stream(TextStreamer):
    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)


@dataclass
class Generator:
    """Completes prompts, each on a fresh cache.

    Attributes
    ----------
    model
        Model and plan.
    sampling
        How tokens are chosen.
    chat
        Apply the chat template to each prompt.

    Raises
    ------
    UsageError
        If ``chat`` is asked of a model without a template.
    """

    model: PackedModel
    sampling: Sampling
    chat: bool = False

    def __post_init__(self) -> None:
        if self.chat and not self.model.loaded.tokenizer.chat_template:
            raise UsageError("the model has no chat template; leave out --chat.")

    def encode(self, prompt: str) -> torch.Tensor:
        """Return the prompt's tokens, [1, tokens] int64."""
        tokenizer = self.model.loaded.tokenizer
        if self.chat:
            messages = [{"role": "user", "content": prompt}]
            prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        ids: torch.Tensor = tokenizer(prompt, return_tensors="pt", add_special_tokens=not self.chat).input_ids
        return ids

    @torch.no_grad()
    def complete(self, prompt: str, stream: Callable[[str], None] | None = None) -> Completion:
        """Complete one prompt, handing text to ``stream`` as it comes.

        Raises
        ------
        UsageError
            If the prompt is empty, or fills the model's context.
        """
        loaded, s = self.model.loaded, self.sampling
        ids = self.encode(prompt)
        room = loaded.max_context - ids.shape[1]
        if not ids.shape[1]:
            raise UsageError("the prompt is empty.")
        if room < 1:
            raise UsageError(f"a prompt of {ids.shape[1]} tokens leaves no room in a context of {loaded.max_context}.")
        count = min(s.max_tokens, room)
        cache = self.model.new_cache(capacity=ids.shape[1] + count)
        set_seed(s.seed)
        chosen: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if s.temperature > 0:
            chosen = {"do_sample": True, "temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k}
        model: Any = loaded.model
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=count,
            max_length=None,
            pad_token_id=loaded.tokenizer.pad_token_id or loaded.tokenizer.eos_token_id,
            streamer=_Stream(loaded.tokenizer, stream) if stream else None,
            **chosen,
        )[0, ids.shape[1] :]
        ended = loaded.model.generation_config.eos_token_id
        ends = set(ended if isinstance(ended, list) else [ended])
        stopped = len(out) > 0 and int(out[-1]) in ends
        text = str(loaded.tokenizer.decode(out, skip_special_tokens=True))
        return Completion(text, ids.shape[1], len(out), "stop" if stopped else "length", cache.nbytes)
