"""``kvcli generate``: text from the packed cache."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kvcli.cli.console import emit
from kvcli.cli.options import JsonFlag, NoVerify, SeedOption, ThreadsOption, TrustRemoteCode, option
from kvcli.cli.shared import load_artifact
from kvcli.errors import InputError, UsageError


def generate(
    artifact: Annotated[Path, typer.Argument(help="Folder of the artifact.")],
    prompt: Annotated[str, typer.Argument(help="The prompt, or '-' for one prompt a line from stdin.")] = "-",
    max_tokens: Annotated[int, option("--max-tokens", min=1, help="Tokens to generate at the most.")] = 128,
    temperature: Annotated[float, option("--temperature", min=0, help="0 takes the likeliest token every time.")] = 0.0,
    top_p: Annotated[
        float, option("--top-p", min=0, max=1, help="Sample from the likeliest tokens of this mass.")
    ] = 1.0,
    top_k: Annotated[int, option("--top-k", min=0, help="Sample from so many of the likeliest tokens; 0 for all.")] = 0,
    chat: Annotated[bool, option("--chat", help="Apply the model's chat template to each prompt.")] = False,
    exact: Annotated[
        bool, option("--exact", help="Use the 16-bit cache instead of the packed one, to compare.")
    ] = False,
    backend: Annotated[
        Literal["reference", "cpu", "cuda", "auto"],
        option("--backend", help="What runs the model: Transformers, native kernels, or the fastest that is here."),
    ] = "auto",
    weights: Annotated[
        Literal["none", "int4"], option("--weights", help="Keep the weights as they are, or in 4 bits (on the CPU).")
    ] = "none",
    deterministic: Annotated[
        bool, option("--deterministic", help="Native backends: the same bits however a prompt is cut; slower prefill.")
    ] = False,
    seed: SeedOption = 0,
    threads: ThreadsOption = 0,
    trust_remote_code: TrustRemoteCode = False,
    no_verify: NoVerify = False,
    json: JsonFlag = False,
) -> None:
    r"""Continue a prompt, and print the completion only.

    With '-' every line of stdin is a prompt and gives one line, in which newlines are written \n; with --json each line
    is one JSON object.

    Raises
    ------
    UsageError
        If the model has no chat template, a prompt does not fit its context, or a setting does not fit the backend.
    KvcliError
        If the backend asked for is not there.
    """
    from dataclasses import replace

    from kvcli.runtime.generation import Generator, Sampling, check_reference

    if backend == "reference":
        check_reference(weights, deterministic)
    if prompt == "-" and sys.stdin.isatty():
        raise UsageError("give a prompt, or pipe one prompt a line into stdin.")
    try:
        prompt.encode()
    except UnicodeEncodeError:  # Python keeps bytes of arguments that are not UTF-8 as lone surrogates
        raise InputError("the prompt is not UTF-8.") from None
    subject = load_artifact(artifact, verify=not no_verify, trust_remote_code=trust_remote_code)
    if exact:
        subject = replace(subject, plan=subject.plan.as_exact(), tensors={})
    generator = Generator(
        subject, Sampling(max_tokens, temperature, top_p, top_k, seed), chat=chat,
        backend=backend, weights=weights, deterministic=deterministic,
    )  # fmt: skip
    if prompt != "-":
        stream = None if json else (lambda text: print(text, end="", flush=True))
        found = generator.complete(prompt, stream)
        emit(_facts(found)) if json else print()
        return
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            text = line.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            raise InputError(f"line {number} of stdin is not UTF-8.") from None
        if not text:
            print("" if not json else "{}", flush=True)
            continue
        found = generator.complete(text)
        emit(_facts(found)) if json else print(_escape(found.text), flush=True)


def _facts(found: Any) -> dict[str, Any]:
    return dict(vars(found))


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\r", "\\r").replace("\n", "\\n")
