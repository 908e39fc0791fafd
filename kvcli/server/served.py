"""What is served and how: the model's text side, the engine as the server sees it, the settings."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from kvcli.engine.request import Output, Request
from kvcli.server.errors import ApiError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kvcli.engine.config import EngineStats
    from kvcli.models.loading import LoadedModel

T = TypeVar("T")

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class ServingEngine(Protocol):
    """What the server asks of an engine; :class:`kvcli.engine.AsyncEngine` is one."""

    @property
    def failed(self) -> BaseException | None:
        """What stopped the engine, if something did."""
        ...

    @property
    def max_context(self) -> int:
        """Tokens of the longest sequence, prompt and answer together."""
        ...

    def start(self) -> None:
        """Start computing."""
        ...

    async def submit(self, request: Request) -> AsyncIterator[Output]:
        """Queue a request; the iterator ends after the last event of the last choice."""
        ...

    def abort(self, request_id: str) -> None:
        """End a request; unknown ids are ignored."""
        ...

    def stats(self) -> EngineStats:
        """Return what the engine is doing."""
        ...

    async def drain(self, seconds: float) -> bool:
        """Take no more requests, wait for those there are, abort the rest; whether there was no rest."""
        ...

    def stop(self) -> None:
        """End."""
        ...


@dataclass(frozen=True)
class Settings:
    """How the server behaves.

    Attributes
    ----------
    api_key
        What clients must send; None to let everybody in.
    allowed_hosts
        Names that a request's Host header may carry, None for any. A page on the web can point its own name at this
        machine and so reach a server without a key; it cannot change the name it sends.
    cors_origins
        Origins of web pages that may read answers.
    max_body_bytes
        Of one request.
    max_choices
        Answers that one request may ask for: prompts times ``n``.
    """

    api_key: str | None = field(default=None, repr=False)
    allowed_hosts: frozenset[str] | None = None
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 4 * 2**20
    max_choices: int = 128


class ServedModel:
    """A model's name and its text side.

    Parameters
    ----------
    name
        What clients call it.
    tokenizer
        Copied, for the engine decodes with it in another thread.
    vocabulary
        Rows of the embedding: prompt tokens lie below.
    sampling
        What the checkpoint recommends, for requests that do not say: temperature, top_p, top_k, min_p,
        repetition_penalty.

    Attributes
    ----------
    created
        Unix time of its loading.
    """

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: int,
        sampling: Mapping[str, float] | None = None,
    ) -> None:
        self.name, self.vocabulary, self.created = name, vocabulary, int(time.time())
        self.sampling: dict[str, Any] = dict(sampling or {})
        self._tokenizer: Any = copy.deepcopy(tokenizer)
        # long texts take seconds: not in the event loop, and one at a time
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    @classmethod
    def of(cls, name: str, loaded: LoadedModel) -> ServedModel:
        """Return the text side of a loaded model."""
        model: Any = loaded.model
        said = model.generation_config.to_diff_dict()
        sampling = {x: said[x] for x in _SAMPLING if isinstance(said.get(x), (int, float))}
        return cls(name, loaded.tokenizer, int(model.config.vocab_size), sampling)

    @property
    def has_chat(self) -> bool:
        """Whether the checkpoint brings a chat template."""
        return bool(self._tokenizer.chat_template)

    async def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return a text's tokens, with those that the tokenizer adds by itself if ``special``."""
        return await self._away(lambda: list(self._tokenizer(text, add_special_tokens=special).input_ids))

    async def encode_all(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """Return the tokens of several prompts; those that are tokens already stay as they are."""
        return await self._away(
            lambda: [x if isinstance(x, list) else list(self._tokenizer(x).input_ids) for x in prompts]
        )

    async def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Return the tokens of a conversation, up to where the assistant's answer begins.

        Raises
        ------
        ApiError
            If there is no chat template, or it refuses the messages.
        """
        if not self.has_chat:
            raise ApiError(400, f"{self.name} has no chat template; use /v1/completions.", code="no_chat_template")
        return await self._away(lambda: self._chat(messages))

    def _chat(self, messages: list[dict[str, Any]]) -> list[int]:
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates are programs: they fail in any way
            raise ApiError(400, f"The chat template refused the messages: {error}.", param="messages") from None
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    async def decode(self, tokens: list[int]) -> str:
        """Return the tokens' text, special ones too.

        Raises
        ------
        ApiError
            If a token is outside the vocabulary.
        """
        self.check(tokens, "tokens")
        return await self._away(lambda: str(self._tokenizer.decode(tokens)))

    async def pieces(self, tokens: list[int]) -> list[str]:
        """Return each token's text."""
        return await self._away(lambda: [str(self._tokenizer.decode([x])) for x in tokens])

    def check(self, tokens: list[int], param: str) -> None:
        """Raise :class:`ApiError` for a token outside the vocabulary."""
        for token in tokens:
            if not 0 <= token < self.vocabulary:
                last = self.vocabulary - 1
                raise ApiError(400, f"Token {token} is outside the vocabulary, which ends at {last}.", param=param)

    async def _away(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)
