"""``kvcli serve``: an OpenAI-compatible server on the packed cache."""

from __future__ import annotations

import logging
import re
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kvcli.cli.console import say
from kvcli.cli.options import NoVerify, ThreadsOption, TrustRemoteCode, option
from kvcli.cli.shared import open_with_progress, size
from kvcli.errors import InputError, KvcliError, UsageError

if TYPE_CHECKING:
    from kvcli.engine import EngineStats
    from kvcli.plan import CachePlan

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_INTERRUPTED = 130
_CHOICES = 128  # of one request


def parse_size(text: str) -> int:
    """Return a number of bytes given as ``1073741824``, ``1GiB`` or ``1.5G``.

    Raises
    ------
    UsageError
        If it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    if found is None or float(found[1]) == 0:
        raise UsageError(f"{text!r} is no size; write bytes, or a number with a unit, such as 1GiB or 512MB.")
    return int(float(found[1]) * (_UNITS | _BINARY)[found[2] or ""])


def serve(
    artifact: Annotated[Path, typer.Argument(help="Folder of the artifact.")],
    host: Annotated[str, option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str, option("--api-key", help="What clients must send; better given as the variable.", show_default="none")
    ] = "",
    insecure: Annotated[
        bool, option("--insecure", help="Listen on other addresses than this machine's own without a key.")
    ] = False,
    cors_origin: Annotated[
        list[str] | None, option("--cors-origin", help="Origin of web pages that may use the server; repeatable.")
    ] = None,
    memory: Annotated[
        str, option("--memory", help="Bytes of the cache, such as 1GiB.", show_default="half of what is free")
    ] = "",
    max_context: Annotated[
        int, option("--max-context", min=0, help="Tokens of the longest sequence.", show_default="the model's")
    ] = 0,
    max_num_seqs: Annotated[int, option("--max-num-seqs", min=1, help="Sequences decoded at once.")] = 64,
    queue: Annotated[int, option("--queue", min=1, help="Sequences that may wait; the next gets status 429.")] = 256,
    weights: Annotated[
        Literal["none", "int4"], option("--weights", help="Keep the weights as they are, or in 4 bits.")
    ] = "none",
    activations: Annotated[
        Literal["8", "16"],
        option("--activations", help="Bits that products of 4-bit weights round activations to; 8 is faster."),
    ] = "8",
    deterministic: Annotated[
        bool, option("--deterministic", help="Greedy answers are the same whatever else runs; slower.")
    ] = False,
    prefix_caching: Annotated[
        bool, option("--prefix-caching/--no-prefix-caching", help="Keep pages for prompts that begin alike.")
    ] = True,
    preemption: Annotated[
        Literal["swap", "recompute"], option("--preemption", help="What a full pool does with sequences put aside.")
    ] = "swap",
    idle_seconds: Annotated[
        float | None,
        option(
            "--idle-seconds",
            min=0,
            help="Pack what the prefix cache has again, in fewer bits, once it is unused for so long; lossy. Needs an "
            "artifact of --adapters capacity.",
            show_default="never",
        ),
    ] = None,
    capacity_memory: Annotated[
        str, option("--capacity-memory", help="Bytes that idle sequences may take, beside --memory.")
    ] = "4GiB",
    drain_seconds: Annotated[
        float, option("--drain-seconds", min=0, help="How long a signal to stop lets answers finish.")
    ] = 30.0,
    max_body: Annotated[str, option("--max-body", help="Bytes of one request.")] = "4MiB",
    model_name: Annotated[
        str, option("--model-name", help="What clients call the model.", show_default="the checkpoint's name")
    ] = "",
    json_logs: Annotated[bool, option("--json-logs", help="Log JSON objects, one a line.")] = False,
    threads: ThreadsOption = 0,
    trust_remote_code: TrustRemoteCode = False,
    no_verify: NoVerify = False,
) -> None:
    """Serve an artifact over HTTP, as OpenAI's API: completions, chat, streaming.

    SIGTERM lets what runs finish and exits with 0. The log, on stderr, holds no text of requests or answers.

    Raises
    ------
    UsageError
        If the address can be reached from elsewhere and there is neither a key nor --insecure, or a setting is wrong.
    KvcliError
        If the port is taken, or the engine fails.
    """
    for package in ("fastapi", "prometheus_client", "uvicorn"):
        if find_spec(package) is None:
            raise UsageError(f"serve needs the package {package}: pip install 'kvcli[serve]'.")
    from kvcli.server import logs, process

    logs.set_up(as_json=json_logs)
    body_bytes = parse_size(max_body)
    cache_bytes = parse_size(memory) if memory else 0
    capacity_bytes = parse_size(capacity_memory)
    if idle_seconds is not None and deterministic:
        raise UsageError("--idle-seconds loses a little of what was idle, so it cannot be --deterministic.")
    if idle_seconds is not None and not prefix_caching:
        raise UsageError("--idle-seconds is for what the prefix cache has: leave out --no-prefix-caching.")
    taken = process.bind(host, port)
    local = process.is_loopback(taken)
    if not (local or api_key or insecure):
        raise UsageError(f"--host {host} can be reached from elsewhere: set KVCLI_API_KEY, or say --insecure.")
    from kvcli.engine import AsyncEngine, EngineConfig
    from kvcli.models.loading import load
    from kvcli.runtime.packed_model import PackedModel
    from kvcli.server.app import create_app
    from kvcli.server.served import ServedModel, Settings

    opened = open_with_progress(artifact, verify=not no_verify)
    if idle_seconds is not None and opened.capacity is None:
        raise InputError(f"{artifact} has no plan for --idle-seconds: calibrate it with --adapters capacity.")
    loaded = load(str(artifact), dtype=opened.plan.dtype, trust_remote_code=trust_remote_code)

    model = ServedModel.of(model_name or opened.manifest["source"]["model"], loaded)
    idle = opened.capacity if idle_seconds is not None else None
    engine = AsyncEngine(
        PackedModel(loaded, opened.plan, opened.tensors()),
        EngineConfig(
            memory=cache_bytes or _half_of_what_is_free(), max_num_seqs=max_num_seqs, max_queue=queue,
            max_context=max_context or None, deterministic=deterministic, weights=weights,
            activations=8 if activations == "8" else 16, threads=threads, prefix_caching=prefix_caching,
            preemption=preemption, idle_seconds=idle_seconds, capacity_bytes=capacity_bytes,
        ),
        PackedModel(loaded, idle, opened.capacity_tensors()) if idle is not None else None,
    )  # fmt: skip
    stats = engine.stats()
    only_here = local and not (api_key or insecure)
    names = frozenset({"localhost", "127.0.0.1", "[::1]", host.lower()}) if only_here else None
    settings = Settings(
        api_key=api_key or None, allowed_hosts=names, cors_origins=tuple(cors_origin or ()), max_body_bytes=body_bytes,
        max_choices=min(_CHOICES, max(1, stats.full_sequences) + queue),  # more could be told to come back for ever
    )  # fmt: skip
    app = create_app(engine, model, settings)
    where = process.url(host, taken.getsockname()[1])
    _announce(model.name, opened.plan, stats, where, bool(api_key), json_logs, idle)
    ended = process.run(app, engine, taken, drain_seconds=drain_seconds)
    if ended == signal.SIGINT:
        interrupted = KvcliError("Interrupted; running answers were finished or cut off.")
        interrupted.exit_code = _INTERRUPTED
        raise interrupted


def _half_of_what_is_free() -> int:
    import psutil

    return int(psutil.virtual_memory().available // 2)


def _announce(
    name: str, plan: CachePlan, stats: EngineStats, where: str, key: bool, json_logs: bool, idle: CachePlan | None
) -> None:
    """Say what is served, how much fits, and how to try it."""
    facts: dict[str, Any] = {
        "model": name, "effective_bits": round(stats.effective_bits, 3), "nominal_bits": round(plan.nominal_bits, 3),
        "max_context": stats.max_context, "cache_bytes": stats.cache_bytes, "pool_tokens": stats.pool_tokens,
        "full_sequences": stats.full_sequences, "url": where,
    }  # fmt: skip
    if idle is not None:
        facts["idle_effective_bits"] = round(idle.effective_bits(stats.max_context), 3)
    if json_logs:
        logging.getLogger("kvcli.server").info("serving", extra={"facts": facts})
        return
    bits = f"{stats.effective_bits:.3f} effective bits at {stats.max_context} tokens, nominal {plan.nominal_bits:.3f}"
    exact = plan.as_exact().effective_bits(stats.max_context)
    fit = f"{stats.pool_tokens} tokens, {stats.full_sequences} sequences of {stats.max_context}"
    second = [] if idle is None else [f"idle     {facts['idle_effective_bits']} effective bits, beside --memory; lossy"]
    authorization = ' -H "Authorization: Bearer $KVCLI_API_KEY"' if key else ""
    for line in (
        f"model    {name}",
        f"plan     {bits} (16-bit cache {exact:.1f}); page {plan.block_size} tokens, {plan.sink_tokens} exact sinks,"
        f" {plan.residual_window} exact recent tokens",
        f"cache    {size(stats.cache_bytes)}: {fit}",
        *second,
        f"url      {where}",
        f"try      curl {where}/v1/completions{authorization} -H 'Content-Type: application/json'"
        ' -d \'{"prompt": "Once upon a time", "max_tokens": 32}\'',
    ):
        say(line)
