"""OpenAI's endpoints, and tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response

from kvcli.engine.request import SamplingParams
from kvcli.server import replies, schemas
from kvcli.server.answers import Answers, gather
from kvcli.server.errors import ApiError
from kvcli.server.metrics import Metrics
from kvcli.server.replies import Reply
from kvcli.server.served import ServedModel, ServingEngine, Settings
from kvcli.server.streaming import EventStream, unless_gone

T = TypeVar("T")

DEFAULT_TOKENS = 16  # OpenAI's for completions

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.ErrorResponse} for status in (400, 401, 403, 404, 413, 429, 500, 503)
}
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}


@dataclass(frozen=True)
class _Face:
    """What the endpoints share."""

    engine: ServingEngine
    model: ServedModel
    settings: Settings
    metrics: Metrics

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.model.name):
            raise ApiError(
                404, f"The model {name!r} does not exist; this server has {self.model.name!r}.",
                code="model_not_found", param="model",
            )  # fmt: skip

    async def answer(
        self, request: Request, reply: Reply, prompts: list[list[int]], params: SamplingParams
    ) -> Response:
        """Compute an answer, as a stream if that is asked for."""
        count = len(prompts) * params.n
        if count > self.settings.max_choices:
            most = self.settings.max_choices
            raise ApiError(400, f"{count} answers are more than {most} in one request.", param="n")
        for prompt in prompts:
            self.model.check(prompt, "prompt")
        answers = Answers(self.engine, prompts, params, self.metrics)
        _note(request, prompts=len(prompts), choices=count, prompt_tokens=answers.usage.prompt_tokens)
        await unless_gone(request.receive, answers.start())
        if reply.stream:
            return EventStream(replies.events(reply, answers, count), answers)
        async with answers:
            choices = await unless_gone(request.receive, gather(answers, count))
        _note(request, completion_tokens=answers.usage.completion_tokens)
        body = reply.whole(choices, answers.usage)
        return Response(body.model_dump_json(), media_type="application/json")

    def describe(self) -> schemas.Model:
        stats = self.engine.stats()
        return schemas.Model(
            id=self.model.name, created=self.model.created, max_model_len=self.engine.max_context,
            effective_bits=stats.effective_bits, chat=self.model.has_chat,
        )  # fmt: skip


def _note(request: Request, **facts: object) -> None:
    """Add to the request's line in the log: counts, never text."""
    request.scope["state"].setdefault("log", {}).update(facts)


def api(engine: ServingEngine, model: ServedModel, settings: Settings, metrics: Metrics) -> APIRouter:
    """Return the endpoints that need the key."""
    router, face = APIRouter(responses=_ERRORS), _Face(engine, model, settings, metrics)

    @router.get("/v1/models", response_model=schemas.Models)
    async def models() -> schemas.Models:
        """List the one model."""
        return schemas.Models(data=[face.describe()])

    @router.get("/v1/models/{name:path}", response_model=schemas.Model)
    async def one_model(name: str) -> schemas.Model:
        """Describe it."""
        face.check_model(name)
        return face.describe()

    @router.post("/v1/completions", response_model=schemas.Completion, responses=_STREAM)
    async def completions(body: schemas.CompletionRequest, request: Request) -> Response:
        """Continue prompts."""
        face.check_model(body.model)
        prompts = await model.encode_all(body.prompts)
        echoed = [x if isinstance(x, str) else await model.decode(x) for x in body.prompts] if body.echo else []
        tokens = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
        params = body.params(
            model.sampling, max_tokens=tokens, logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
        )  # fmt: skip
        return await face.answer(request, replies.CompletionReply(model.name, body, echoed), prompts, params)

    @router.post("/v1/chat/completions", response_model=schemas.ChatCompletion, responses=_STREAM)
    async def chat_completions(body: schemas.ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        face.check_model(body.model)
        prompt = await model.encode_chat([x.plain() for x in body.messages])
        tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        params = body.params(model.sampling, max_tokens=tokens, logprobs=logprobs)
        return await face.answer(request, replies.ChatReply(model.name, body), [prompt], params)

    @router.post("/tokenize", response_model=schemas.TokenizeResponse)
    async def tokenize(body: schemas.TokenizeRequest) -> schemas.TokenizeResponse:
        """Return the tokens of a text or a conversation."""
        face.check_model(body.model)
        if body.messages is not None:
            ids = await model.encode_chat([x.plain() for x in body.messages])
        else:
            ids = await model.encode(body.prompt or "", special=body.add_special_tokens)
        pieces = await model.pieces(ids) if body.return_token_strs else None
        longest = engine.max_context
        return schemas.TokenizeResponse(tokens=ids, count=len(ids), max_model_len=longest, token_strs=pieces)

    @router.post("/detokenize", response_model=schemas.DetokenizeResponse)
    async def detokenize(body: schemas.DetokenizeRequest) -> schemas.DetokenizeResponse:
        """Return the text of tokens."""
        face.check_model(body.model)
        return schemas.DetokenizeResponse(prompt=await model.decode(body.tokens))

    return router
