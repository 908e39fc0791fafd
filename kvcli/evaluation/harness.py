"""Artifacts as a model of lm-evaluation-harness: ``--model kvcli --model_args artifact=FOLDER``, on the packed cache.

The harness knows models by registration only, so its command line is started through this module, under the name
``kvcli-lm-eval`` or as ``python -m kvcli.evaluation.harness``. Everything else is the harness's own. From Python,
``lm_eval.simple_evaluate(model="kvcli", …)`` works once this module is imported.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from kvcli.artifact.reader import open_artifact
from kvcli.errors import UsageError
from kvcli.evaluation.reading import ends, log_likelihoods, write_until
from kvcli.models.loading import load
from kvcli.runtime.packed_model import PackedModel

NEW_TOKENS = 256  # where a task does not say how many


# The harness registers its own models only while there is none.
import_module("lm_eval.models")


@register_model("kvcli")
class KvcliLM(TemplateLM):  # type: ignore[misc]
    """An artifact's model on its packed cache.

    Parameters
    ----------
    artifact
        Folder of the artifact.
    exact
        Use the 16-bit cache instead of the packed one, to compare.
    verify
        Check the sha256 of the artifact's files.
    trust_remote_code
        Run model code that the artifact brings along.
    batch_size, max_batch_size, device
        The harness passes them; one request is read at a time, on the CPU.
    """

    def __init__(
        self,
        artifact: str,
        exact: bool = False,
        verify: bool = True,
        trust_remote_code: bool = False,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        found = open_artifact(Path(artifact), verify=verify)
        loaded = load(str(artifact), dtype=found.plan.dtype, trust_remote_code=trust_remote_code)
        subject = PackedModel(loaded, found.plan, found.tensors())
        self.subject = replace(subject, plan=found.plan.as_exact(), tensors={}) if exact else subject
        self.tokenizer = loaded.tokenizer

    @property
    def tokenizer_name(self) -> str:
        """What the harness knows the tokenizer by."""
        return self.subject.loaded.source

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return min(ends(self.subject), default=self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return a text's tokens; special ones as the tokenizer adds them, unless the text begins with one."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        ids: list[int] = self.tokenizer(string, add_special_tokens=add_special_tokens).input_ids
        return ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is the greedy one.

        Continuations of one context that follow each other are read on one cache.
        """
        found: list[tuple[float, bool]] = []
        begin = 0
        while begin < len(requests):
            end = begin + 1
            while end < len(requests) and requests[end][1] == requests[begin][1]:
                end += 1
            for (what, _, _), row in zip(
                requests[begin:end], log_likelihoods(self.subject, [x[1:] for x in requests[begin:end]]), strict=True
            ):
                found.append((float(row[0].sum()), bool((row[0] == row[1]).all())))
                self.cache_hook.add_partial("loglikelihood", what, found[-1])
            begin = end
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, in windows of the model's context."""
        found = []
        for (text,) in (x.args for x in requests):
            windows = get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False),
                self.prefix_token_id,
                self.subject.loaded.max_context - 1,  # the last token of a window is read too
                1,
            )
            pairs = [make_disjoint_window(x) for x in windows]
            found.append(sum(float(log_likelihoods(self.subject, [x])[0][0].sum()) for x in pairs))
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return greedy texts, each up to the first of its stops.

        Raises
        ------
        UsageError
            If a task wants to draw tokens at random.
        """
        found = []
        for context, settings in (x.args for x in requests):
            if settings.get("do_sample") and settings.get("temperature", 1):
                raise UsageError("kvcli answers lm-evaluation-harness greedily; leave out do_sample.")
            until = settings.get("until") or []
            stops = [until] if isinstance(until, str) else list(until)
            count = int(settings.get("max_gen_toks", NEW_TOKENS))
            found.append(write_until(self.subject, self.tok_encode(context), count, stops))
            self.cache_hook.add_partial("generate_until", (context, settings), found[-1])
        return found

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )  # fmt: skip

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the tokenizer's own template, which is the only one."""
        return str(self.tokenizer.chat_template or "")


def main() -> None:
    """Run lm-evaluation-harness's command line with artifacts as a model."""
    cli_evaluate()


if __name__ == "__main__":
    main()
