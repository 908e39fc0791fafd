"""What the endpoints take and give: OpenAI's fields, with bounds, and a few that other engines share.

Requests are strict: no field of another name, no number as text, nothing infinite. Fields that mean something only to
OpenAI's own service are taken and ignored (:class:`_Ignored`); fields that would change the answer and are not
supported are refused by not being here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator
from typing_extensions import Self

from kvcli.engine.request import MAX_BIASES, MAX_LOGPROBS, MAX_SEED, MAX_STOP_LENGTH, MAX_STOPS, SamplingParams

MAX_TEXT = 4 * 2**20  # characters
MAX_TOKENS = 2**20
MAX_PROMPTS = 128
MAX_MESSAGES = 4096
GREEDY = 1e-5  # a temperature below it is 0: scores divided by it overflow

Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(min_length=1, max_length=MAX_TOKENS)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenKey = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Name = Annotated[str, StringConstraints(max_length=256)]


def _not_empty(text: str) -> str:
    if not text:
        raise ValueError("The prompt is empty")
    return text


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Ignored(_Strict):
    user: Name | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None
    store: bool | None = None
    service_tier: Name | None = None
    metadata: Annotated[dict[Name, Name], Field(max_length=16)] | None = None


class StreamOptions(_Strict):
    """What a stream carries beside the answer."""

    include_usage: bool = Field(False, description="Send one more event, with the usage of the whole request.")
    include_obfuscation: bool | None = Field(None, description="Ignored: nothing is padded.")


class _Sampling(_Ignored):
    model: Name | None = Field(None, description="The served model's name; it may be left out.")
    n: Annotated[int, Field(ge=1, le=MAX_PROMPTS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(None, description="0 or -1 for all.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-MAX_SEED, lt=MAX_SEED)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = None
    logit_bias: Annotated[dict[TokenKey, Bias], Field(max_length=MAX_BIASES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams; set stream to true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def params(
        self,
        recommended: dict[str, Any],
        *,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """Return the engine's parameters.

        What is left out is as the checkpoint recommends, or else as OpenAI has it.
        """
        chosen: dict[str, Any] = {"temperature": 1.0, **recommended}
        given = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
                 "frequency_penalty", "seed", "ignore_eos", "n")  # fmt: skip
        chosen |= {x: getattr(self, x) for x in given if getattr(self, x) is not None}
        if chosen["temperature"] < GREEDY:
            chosen["temperature"] = 0.0
        chosen["top_k"] = max(0, chosen.get("top_k", 0))
        return SamplingParams(
            **chosen,
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias={int(k): v for k, v in (self.logit_bias or {}).items()},
        )


class CompletionRequest(_Sampling):
    """``/v1/completions``."""

    prompt: (
        Annotated[Text, AfterValidator(_not_empty)]
        | Tokens
        | Annotated[list[Annotated[Text, AfterValidator(_not_empty)]], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]
    ) = Field(description="A text, its tokens, or several of either.")
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = Field(None, description="16 if left out.")
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = Field(
        None, description="Put the prompt before the answer; with logprobs, those of its tokens too."
    )
    best_of: Annotated[int, Field(ge=1, le=MAX_PROMPTS)] | None = Field(None, description="Only what n is.")
    suffix: Annotated[str, StringConstraints(max_length=0)] | None = None

    @model_validator(mode="after")
    def _refuse_what_is_not_done(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of other than n is not supported")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return cast(list[Any], self.prompt)


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES)]
    name: Name | None = None
    refusal: Literal[None] = None  # openai's own answers carry it

    def plain(self) -> dict[str, str]:
        """Return what chat templates take."""
        content = self.content if isinstance(self.content, str) else "".join(x.text for x in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content, **({"name": self.name} if self.name else {})}


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


class ResponseFormat(_Strict):
    """Text, and nothing else."""

    type: Literal["text"]


class ChatRequest(_Sampling):
    """``/v1/chat/completions``."""

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = Field(
        None, description="As max_tokens. Left out both: as many as fit the context."
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self


class TokenizeRequest(_Strict):
    """``/tokenize``: a text or a conversation."""

    model: Name | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("Give either prompt or messages")
        return self


class DetokenizeRequest(_Strict):
    """``/detokenize``."""

    model: Name | None = None
    tokens: Annotated[list[Token], Field(max_length=MAX_TOKENS)]


# --- answers ----------------------------------------------------------------------------------------------------------


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """OpenAI's error shape."""

    error: ErrorBody


class CachedTokens(BaseModel):
    """Of the prompt."""

    cached_tokens: int


class UsageBody(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(BaseModel):
    """One entry per token; offsets in characters of the choice's text. The first token of a prompt has no others."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(BaseModel):
    """The answer of ``/v1/completions``; an event of its stream is the same."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageBody | None = None


class TopLogprob(BaseModel):
    """A token and the natural logarithm of its probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    """The same with the likeliest tokens in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """One entry per token."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class AssistantMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class ChatCompletion(BaseModel):
    """The answer of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody


class Model(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "kvcli"
    max_model_len: int = Field(description="Tokens of the longest sequence.")
    effective_bits: float = Field(description="Bits of a cached scalar at that length, everything counted.")
    chat: bool = Field(description="Whether there is a chat template.")


class Models(BaseModel):
    """All served models."""

    object: Literal["list"] = "list"
    data: list[Model]


class TokenizeResponse(BaseModel):
    """Tokens of a text."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class DetokenizeResponse(BaseModel):
    """The text of tokens."""

    prompt: str


class Status(BaseModel):
    """Of ``/health`` and ``/ready``."""

    status: str
