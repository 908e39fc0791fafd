"""Generating text from a packed cache: through Transformers' ``generate``, or on the native runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor, TextStreamer, set_seed

from kvcli.errors import InputError, KvcliError, UsageError
from kvcli.runtime.packed_model import PackedModel

if TYPE_CHECKING:
    from kvcli.runtime.runner import ModelRunner

Backend = Literal["reference", "cpu", "cuda", "auto"]


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


class Sampler:
    """Chooses tokens one by one, as Transformers would.

    Parameters
    ----------
    sampling
        How.
    prompt
        [tokens] int64.
    repetition_penalty
        What the model's generation_config divides the scores of tokens by that were there before; 1 for nothing.
    """

    def __init__(self, sampling: Sampling, prompt: Tensor, repetition_penalty: float = 1.0) -> None:
        self.sampling, self._ids = sampling, prompt.cpu()
        self._random = torch.Generator().manual_seed(sampling.seed)
        penalty: Any = RepetitionPenaltyLogitsProcessor
        self._penalty: Any = None if repetition_penalty == 1.0 else penalty(repetition_penalty)

    def __call__(self, logits: Tensor) -> int:
        """Choose by logits, float32 [vocabulary]."""
        if self._penalty is not None:
            logits = self._penalty(self._ids[None], logits.cpu()[None])[0]
        if self.sampling.temperature == 0:
            chosen = int(logits.argmax())
        else:
            chosen = int(torch.multinomial(self.probabilities(logits.cpu()), 1, generator=self._random))
        if self._penalty is not None:
            self._ids = torch.cat((self._ids, torch.tensor([chosen])))
        return chosen

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return what a token is drawn from, [vocabulary]: temperature first, then the likeliest k, then the mass p."""
        s, logits = self.sampling, logits / self.sampling.temperature
        if 0 < s.top_k < len(logits):
            logits = logits.masked_fill(logits < logits.topk(s.top_k).values[-1], -torch.inf)
        if s.top_p < 1:
            values, order = logits.sort(descending=True)
            before = values.softmax(-1).cumsum(-1) - values.softmax(-1)
            before[0] = -1  # the likeliest always stays
            logits = logits.index_fill(0, order[before >= s.top_p], -torch.inf)
        return logits.softmax(-1)


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
    backend
        ``reference`` goes through Transformers; ``auto`` takes a GPU if there is one with kernels for it, else the
        CPU's kernels if they run here and know the model, else the reference. It is never ``auto`` once made.
    weights
        ``int4`` keeps linear layers in 4 bits; the model loses its own weights then.
    deterministic
        Native backends: the same bits whatever the batch and the chunks.

    Raises
    ------
    UsageError
        If ``chat`` is asked of a model without a template, or int4 weights of the reference.
    NativeError
        If the backend asked for is not there.
    InputError
        If it does not compute such a model.
    """

    model: PackedModel
    sampling: Sampling
    chat: bool = False
    backend: Backend = "reference"
    weights: Literal["none", "int4"] = "none"
    deterministic: bool = False
    _runner: ModelRunner | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.chat and not self.model.loaded.tokenizer.chat_template:
            raise UsageError("the model has no chat template; leave out --chat.")
        if self.backend == "auto":
            self.backend = choose_backend(self.model, self.weights)
        if self.backend == "reference":
            check_reference(self.weights, self.deterministic)
            return
        from kvcli.runtime.runner import ModelRunner

        if self.backend == "cuda" and not torch.cuda.is_available():
            raise KvcliError("there is no GPU that torch can use here; choose another --backend.")
        self._runner = ModelRunner(
            self.model.loaded, self.model.plan, self.model.tensors, backend=self.backend, weights=self.weights,
            capacity=1, deterministic=self.deterministic,
        )  # fmt: skip

    def encode(self, prompt: str) -> Tensor:
        """Return the prompt's tokens, [1, tokens] int64."""
        tokenizer = self.model.loaded.tokenizer
        if self.chat:
            messages = [{"role": "user", "content": prompt}]
            prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        ids: Tensor = tokenizer(prompt, return_tensors="pt", add_special_tokens=not self.chat).input_ids
        return ids

    @torch.no_grad()
    def complete(self, prompt: str, stream: Callable[[str], None] | None = None) -> Completion:
        """Complete one prompt, handing text to ``stream`` as it comes.

        Raises
        ------
        UsageError
            If the prompt is empty, or fills the model's context.
        """
        loaded = self.model.loaded
        ids = self.encode(prompt)
        room = loaded.max_context - ids.shape[1]
        if not ids.shape[1]:
            raise UsageError("the prompt is empty.")
        if room < 1:
            raise UsageError(f"a prompt of {ids.shape[1]} tokens leaves no room in a context of {loaded.max_context}.")
        count = min(self.sampling.max_tokens, room)
        streamer = _Stream(loaded.tokenizer, stream) if stream else None
        out, cache_bytes = (self._through_transformers if self._runner is None else self._natively)(
            ids, count, streamer
        )
        stopped = len(out) > 0 and int(out[-1]) in self._ends
        text = str(loaded.tokenizer.decode(out, skip_special_tokens=True))
        return Completion(text, ids.shape[1], len(out), "stop" if stopped else "length", cache_bytes)

    @property
    def _ends(self) -> set[int]:
        """Tokens that end an answer."""
        ended = self.model.loaded.model.generation_config.eos_token_id
        return {x for x in (ended if isinstance(ended, list) else [ended]) if x is not None}

    def _through_transformers(self, ids: Tensor, count: int, streamer: _Stream | None) -> tuple[Tensor, int]:
        loaded, s = self.model.loaded, self.sampling
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
            streamer=streamer,
            **chosen,
        )[0, ids.shape[1] :]
        return out, cache.nbytes

    def _natively(self, ids: Tensor, count: int, streamer: Any) -> tuple[Tensor, int]:
        from kvcli.runtime.rebuilding import rebuilds

        runner, prompt = self._runner, ids[0]
        assert runner is not None
        runner.resize(capacity=len(prompt) + count)
        penalty = getattr(self.model.loaded.model.generation_config, "repetition_penalty", None)
        choose, ends = Sampler(self.sampling, prompt, penalty or 1.0), self._ends
        if streamer:
            streamer.put(ids)
        if runner.device.type == "cuda" and count > 2 and not rebuilds(runner.plan):
            runner.capture()
        out = [choose(runner.prefill(prompt))]
        token = torch.zeros(1, dtype=torch.int64)
        while True:
            if streamer:
                streamer.put(torch.tensor(out[-1:]))
            if len(out) == count or out[-1] in ends:
                break
            token[0] = out[-1]
            out.append(choose(runner.decode(token)[0]))
        if streamer:
            streamer.end()
        return torch.tensor(out), runner.cache.nbytes


def check_reference(weights: str, deterministic: bool) -> None:
    """Raise :class:`UsageError` for what the path through Transformers does not do."""
    if weights != "none":
        raise UsageError("--weights int4 needs the native runtime: --backend cpu.")
    if deterministic:
        raise UsageError("--deterministic needs the native runtime: --backend cpu or cuda.")


def choose_backend(model: PackedModel, weights: str = "none") -> Literal["reference", "cpu", "cuda"]:
    """Return the fastest backend that runs this model here."""
    from kvcli.runtime import kvrt
    from kvcli.runtime.weights import check_runnable

    kinds: tuple[Literal["cuda", "cpu"], ...] = ("cuda", "cpu")
    for kind in kinds:
        if kind == "cuda" and (weights != "none" or not torch.cuda.is_available()):
            continue
        try:
            check_runnable(model.loaded.model.config, model.plan)
            kvrt.library(kind)
        except (InputError, kvrt.NativeError):
            continue
        return kind
    return "reference"
