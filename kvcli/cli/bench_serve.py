"""``kvcli bench serve``: concurrent load on servers."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kvcli.cli.console import emit, progress, table
from kvcli.cli.options import JsonFlag, SeedOption, option
from kvcli.errors import KvcliError, UsageError


def serve(
    urls: Annotated[
        list[str], typer.Argument(metavar="URL...", help="Servers that speak OpenAI's API; the first is compared.")
    ],
    requests: Annotated[int, option("--requests", min=1, help="Requests of one round.")] = 32,
    concurrency: Annotated[int, option("--concurrency", min=1, help="Requests at once.")] = 16,
    prompt_tokens: Annotated[int, option("--prompt-tokens", min=1, help="Tokens of each prompt.")] = 512,
    tokens: Annotated[int, option("--tokens", min=1, help="Tokens of each answer.")] = 128,
    rounds: Annotated[int, option("--rounds", min=1, help="Turns of each server; medians are reported.")] = 1,
    prompt_file: Annotated[
        str, option("--prompt-file", help="Text that prompts are cut from: a file, or builtin:NAME.")
    ] = "builtin:narrative",
    api_key: Annotated[str, option("--api-key", help="What the servers want to see.", show_default="none")] = "",
    seed: SeedOption = 0,
    json: JsonFlag = False,
) -> None:
    """Drive concurrent streams through running servers: throughput, time to first token, inter-token latency.

    Every request asks for another piece of a text. With several URLs the servers take turns.

    Raises
    ------
    UsageError
        If a URL is none, or the text is too short.
    KvcliError
        If a server cannot be reached, or no request came to its end.
    """
    try:
        from kvcli.server.load import Load, Target, summary
    except ImportError as error:
        raise UsageError(f"bench serve needs the package {error.name}: pip install 'kvcli[serve]'.") from None
    from kvcli.calibration.texts import read

    load = Load(requests, concurrency, prompt_tokens, tokens, seed, api_key)
    targets, text = [Target(x, load) for x in urls], read(prompt_file)
    for target in targets:
        target.prepare(text)
    done: list[list[Any]] = [[] for _ in targets]
    with progress("asking", total=rounds * requests * len(targets)) as bar:
        for _ in range(rounds):
            for target, results in zip(targets, done, strict=True):
                results.append(target.run(bar.advance))
    results = [summary(target.name, x) for target, x in zip(targets, done, strict=True)]
    for row in results:
        if not row["finished"]:
            raise KvcliError(f"{row['name']}: no request came to its end: {row['errors'][0]}.")
    first, *others = results
    found = {
        "requests": requests, "concurrency": concurrency, "rounds": rounds, "results": results,
        "ratios": {x["name"]: first["tokens_per_s"] / x["tokens_per_s"] for x in others if x["tokens_per_s"]},
    }  # fmt: skip
    emit(found) if json else _show(found)


def _show(found: dict[str, Any]) -> None:
    print(f"{found['requests']} requests, {found['concurrency']} at once, rounds: {found['rounds']}")
    shown = []
    for x in found["results"]:
        ratio = found["ratios"].get(x["name"])
        shown.append(
            (
                x["name"], f"{ratio:.2f}" if ratio else "", f"{x['tokens_per_s']:.1f}", f"{x['median_s']:.2f}",
                *(_ms(x[what][p]) for what in ("ttft_s", "itl_s") for p in ("p50", "p90", "p99")), x["failed"],
            )
        )  # fmt: skip
    times = [f"{what} {p}, ms" for what in ("first token", "between") for p in ("p50", "p90", "p99")]
    table(("server", "ours is × as fast", "tokens/s", "s a request", *times, "failed"), shown)


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.1f}"
