"""Concurrent load on an OpenAI-compatible server, and what its clients see of it."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import httpx

from kvcli.errors import KvcliError, UsageError

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Load:
    """What is asked of a server.

    Attributes
    ----------
    requests, concurrency
        How many in all, and how many at once.
    prompt_tokens, max_tokens
        In and out of each. The server is asked to go on after its own end.
    seed
        Of the choice of prompts, each another piece of the text.
    api_key
        If the server wants one.
    timeout_s
        Of one request.
    """

    requests: int = 32
    concurrency: int = 16
    prompt_tokens: int = 512
    max_tokens: int = 128
    seed: int = 0
    api_key: str = field(default="", repr=False)
    timeout_s: float = 600.0


@dataclass
class Outcome:
    """One request as its client saw it.

    Attributes
    ----------
    seconds
        From sending to the last byte.
    first_s
        From sending to the first text; None if none came.
    gaps_s
        Between one text and the next.
    prompt_tokens, tokens
        As the server counts.
    error
        What went wrong, if something did.
    """

    seconds: float = 0.0
    first_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0
    error: str = ""


@dataclass
class Round:
    """All requests of one go, and the seconds from the first one's start to the last one's end."""

    outcomes: list[Outcome]
    seconds: float


class Target:
    """A server under load.

    Parameters
    ----------
    url
        With or without ``/v1``.
    load
        What to ask.

    Attributes
    ----------
    name
        The model's name and where it is served.
    """

    def __init__(self, url: str, load: Load) -> None:
        self._url, self._load = url.rstrip("/").removesuffix("/v1"), load
        self.name, self._model = self._url, ""
        self._prompts: list[str] | list[list[int]] = []

    def _client(self) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {self._load.api_key}"} if self._load.api_key else {}
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(base_url=self._url, headers=headers, timeout=self._load.timeout_s, limits=limits)

    def prepare(self, text: str) -> None:
        """Ask for the model's name, and cut one prompt per request from a text.

        Prompts are tokens where the server has vLLM's or llama.cpp's ``/tokenize``, and else as many words.

        Raises
        ------
        KvcliError
            If the server cannot be reached, or refuses.
        UsageError
            If the URL is none, or the text is too short.
        """
        asyncio.run(self._prepare(text))

    async def _prepare(self, text: str) -> None:
        try:
            async with self._client() as client:
                models = await client.get("/v1/models")
                if models.status_code != 200:
                    raise KvcliError(f"{self._url} answers {models.status_code}: {_message(models.text)}.")
                self._model = str(models.json()["data"][0]["id"])
                self.name = f"{self._model} at {self._url.partition('://')[2]}"
                pieces: Sequence[Any] = await self._tokens(client, text) or text.split()
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise UsageError(f"{self._url} is no URL: {error}.") from None
        except httpx.HTTPError as error:
            raise KvcliError(f"{self._url} cannot be reached: {str(error) or type(error).__name__}.") from None
        except (ValueError, LookupError, TypeError):
            raise KvcliError(f"{self._url} does not speak OpenAI's API: /v1/models is not as it should be.") from None
        length = self._load.prompt_tokens
        if len(pieces) < length:
            raise UsageError(f"the text has {len(pieces)} tokens; prompts of {length} cannot be cut from it.")
        chance = random.Random(self._load.seed)
        starts = [chance.randint(0, len(pieces) - length) for _ in range(self._load.requests)]
        cuts = [list(pieces[x : x + length]) for x in starts]
        self._prompts = cuts if isinstance(pieces[0], int) else [" ".join(x) for x in cuts]

    async def _tokens(self, client: httpx.AsyncClient, text: str) -> list[int] | None:
        for body in ({"model": self._model, "prompt": text, "add_special_tokens": False}, {"content": text}):
            answer = await client.post("/tokenize", json=body)
            if answer.status_code == 200:
                return [int(x) for x in answer.json()["tokens"]]
        return None

    def run(self, step: Callable[[], None]) -> Round:
        """Send all requests, so many at a time; call ``step`` after each."""
        return asyncio.run(self._run(step))

    async def _run(self, step: Callable[[], None]) -> Round:
        left: Iterator[str | list[int]] = iter(self._prompts)
        outcomes: list[Outcome] = []

        async def worker() -> None:
            for prompt in left:
                outcomes.append(await self._one(client, prompt))
                step()

        async with self._client() as client:
            began = time.perf_counter()
            await asyncio.gather(*(worker() for _ in range(min(self._load.concurrency, self._load.requests))))
            return Round(outcomes, time.perf_counter() - began)

    async def _one(self, client: httpx.AsyncClient, prompt: str | list[int]) -> Outcome:
        body = {
            "model": self._model, "prompt": prompt, "max_tokens": self._load.max_tokens, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True,
        }  # fmt: skip
        found, began, last = Outcome(), time.perf_counter(), None
        try:
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                if answer.status_code != 200:
                    found.error = f"{answer.status_code}: {_message((await answer.aread()).decode(errors='replace'))}"
                    return found
                async for line in answer.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event, now = json.loads(line[6:]), time.perf_counter()
                    if "error" in event:
                        found.error = str(event["error"].get("message", "error"))
                    if event.get("usage"):
                        found.prompt_tokens = event["usage"]["prompt_tokens"]
                        found.tokens = event["usage"]["completion_tokens"]
                    if any(x.get("text") for x in event.get("choices", ())):
                        if last is None:
                            found.first_s = now - began
                        else:
                            found.gaps_s.append(now - last)
                        last = now
        except (httpx.HTTPError, ValueError) as error:
            found.error = str(error) or type(error).__name__
        found.seconds = time.perf_counter() - began
        return found


def summary(name: str, rounds: Sequence[Round]) -> dict[str, Any]:
    """Return one row of results.

    Throughput is the median over rounds; percentiles are over all requests that came to their end.
    """
    done = [x for r in rounds for x in r.outcomes if not x.error]
    errors = [x.error for r in rounds for x in r.outcomes if x.error]
    rates = [sum(x.tokens for x in r.outcomes if not x.error) / r.seconds for r in rounds]
    return {
        "name": name,
        "median_s": median(x.seconds for x in done) if done else None,
        "tokens_per_s": median(rates),
        "bytes_read": None,
        "threads": None,
        "requests_per_s": median(sum(not x.error for x in r.outcomes) / r.seconds for r in rounds),
        "ttft_s": percentiles([x.first_s for x in done if x.first_s is not None]),
        "itl_s": percentiles([g for x in done for g in x.gaps_s]),
        "prompt_tokens": median(x.prompt_tokens for x in done) if done else None,
        "completion_tokens": median(x.tokens for x in done) if done else None,
        "finished": len(done),
        "failed": len(errors),
        "errors": sorted(set(errors))[:5],
    }


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """Return the mean and percentiles of some seconds; null where there are none."""
    if not values:
        return {"mean": None, **{f"p{p}": None for p in PERCENTILES}}
    import numpy as np

    found = np.percentile(values, PERCENTILES)
    return {"mean": float(np.mean(values)), **{f"p{p}": float(x) for p, x in zip(PERCENTILES, found, strict=True)}}


def _message(text: str) -> str:
    """Return what an error's JSON says, or its beginning."""
    try:
        return str(json.loads(text)["error"]["message"]).rstrip(".")
    except (ValueError, LookupError, TypeError):
        return " ".join(text.split())[:200] or "nothing"
