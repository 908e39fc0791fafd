"""A server under load for a long time: clients that stay, clients that vanish, and a pool too small for all.

Starts ``kvcli serve ARTIFACT --deterministic``, asks every prompt once alone, and then from many clients at once, some
of which close their connection half-way. Checks that each finished answer equals its solo answer, that the pool returns
to empty, that memory stays flat, and that there was no 5xx. Exits with 1 if a check does not hold.

    python benchmarks/soak.py ARTIFACT --minutes 10 --clients 64 --memory 64MiB
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil

from kvcli.calibration.texts import read

VANISH = 5  # every so manieth request is left half-way
FLAT = 1.05  # the last quarter's memory against the second's
START_S, ANSWER_S = 300.0, 600.0


@dataclass
class Tally:
    """What clients saw."""

    finished: int = 0
    vanished: int = 0
    different: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)


def start(args: argparse.Namespace, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start the server; return it and its URL."""
    command = [
        sys.executable, "-m", "kvcli", "serve", args.artifact, "--port", "0", "--memory", args.memory,
        "--max-num-seqs", str(args.clients), "--queue", str(2 * args.clients), "--deterministic",
        "--max-context", str(args.max_context), "--preemption", args.preemption, "--weights", args.weights,
    ]  # fmt: skip
    with log.open("wb") as stderr:
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
    end = time.monotonic() + START_S
    while time.monotonic() < end and server.poll() is None:
        if found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text()):
            try:
                if httpx.get(f"{found[0]}/ready").status_code == 200:
                    return server, found[0]
            except httpx.TransportError:
                pass
        time.sleep(0.2)
    server.kill()
    raise SystemExit(f"the server did not start:\n{log.read_text()}")


def metrics(url: str) -> dict[str, float]:
    """Return the server's metrics without labels."""
    text = httpx.get(f"{url}/metrics", timeout=60).text
    return {name: float(value) for name, value in re.findall(r"^(kvcli_\w+) (\S+)$", text, re.MULTILINE)}


def prompts_of(url: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return requests of many lengths, some of which begin alike."""
    text = read("builtin:prose")
    tokens = httpx.post(f"{url}/tokenize", json={"prompt": text}, timeout=60).json()["tokens"]
    chance, out = random.Random(args.seed), []
    for number in range(args.prompts):
        shared = chance.choice([0, 0, 48, 96]) if args.max_context > 256 else 0
        length = chance.randint(4, args.max_context // 2 - shared)
        first = chance.randint(0, len(tokens) - length)
        prompt = tokens[:shared] + tokens[first : first + length]
        room = args.max_context - shared - length - 1  # long answers outgrow the room that they were admitted to
        answer = chance.randint(room // 2, room)
        out.append({"prompt": prompt, "max_tokens": answer, "temperature": 0, "ignore_eos": number % 4 > 0})
    return out


async def ask(client: httpx.AsyncClient, body: dict[str, Any], leave_after: int | None) -> tuple[int, str | None]:
    """Stream an answer; return the status, and the text, None if this client left before the end."""
    text, events = "", 0
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        if answer.status_code != 200:
            return answer.status_code, None
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                return 200, text
            if line.startswith("data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                text += event["choices"][0]["text"]
                events += 1
                if leave_after is not None and events >= leave_after:
                    return 200, None
    raise RuntimeError("the stream broke off")


async def one_client(
    client: httpx.AsyncClient, number: int, load: list[tuple[dict[str, Any], str]], end: float, tally: Tally
) -> None:
    """Ask until the time is over."""
    chance = random.Random(number)
    while time.monotonic() < end:
        body, expected = chance.choice(load)
        leaves = chance.randrange(VANISH) == 0
        try:
            status, text = await ask(client, body, body["max_tokens"] // 2 if leaves else None)
        except (httpx.HTTPError, RuntimeError) as error:
            tally.errors[f"{type(error).__name__}: {error}"] += 1
            continue
        tally.statuses[status] += 1
        if status == 429:
            await asyncio.sleep(1)
        elif status == 200 and text is None:
            tally.vanished += 1
        elif status == 200:
            tally.finished += 1
            tally.different += text != expected


async def watch(process: psutil.Process, url: str, end: float, rows: list[dict[str, float]]) -> None:
    """Note memory and the pool every second."""
    began = time.monotonic()
    while time.monotonic() < end:
        found = await asyncio.to_thread(metrics, url)
        row = {"s": time.monotonic() - began, "rss_bytes": float(process.memory_info().rss)}
        rows.append(row | {x: found[f"kvcli_{x}"] for x in ("running_sequences", "queue_length", "pages_used")})
        await asyncio.sleep(1)


async def soak(url: str, args: argparse.Namespace, process: psutil.Process) -> tuple[Tally, list[dict[str, float]]]:
    """Ask every prompt alone, then all at once for so many minutes."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=args.clients)
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_S, limits=limits) as client:
        bodies = await asyncio.to_thread(prompts_of, url, args)
        load = []
        for body in bodies:
            status, text = await ask(client, body, None)
            if text is None:
                raise SystemExit(f"a prompt alone was answered with {status}.")
            load.append((body, text))
        tally, rows, end = Tally(), list[dict[str, float]](), time.monotonic() + 60 * args.minutes
        clients = (one_client(client, i, load, end, tally) for i in range(args.clients))
        await asyncio.gather(watch(process, url, end, rows), *clients)
        return tally, rows


def settled(url: str) -> dict[str, float]:
    """Wait until nothing runs, at most a minute; return the metrics."""
    end = time.monotonic() + 60
    while (found := metrics(url))["kvcli_running_sequences"] and time.monotonic() < end:
        time.sleep(0.2)
    return found


def growth(rows: list[dict[str, float]]) -> float:
    """Return the memory of the last quarter over that of the second, medians of both."""
    quarter = max(1, len(rows) // 4)
    early = [x["rss_bytes"] for x in rows[quarter : 2 * quarter]] or [rows[0]["rss_bytes"]]
    return median(x["rss_bytes"] for x in rows[-quarter:]) / median(early)


def main() -> None:
    """Run, check, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=64, help="different requests")
    parser.add_argument("--memory", default="64MiB", help="of the pool; it must be too small for all clients")
    parser.add_argument("--max-context", type=int, default=512)
    parser.add_argument("--preemption", choices=["swap", "recompute"], default="swap")
    parser.add_argument("--weights", default="int4", help="as kvcli serve takes them; in 16 bits it takes longer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="benchmarks/results/soak.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        server, url = start(args, log)
        try:
            tally, rows = asyncio.run(soak(url, args, psutil.Process(server.pid)))
            last = settled(url)
        finally:
            server.send_signal(signal.SIGTERM)
            code = server.wait(120)
        said = log.read_text()
    checks = {
        "answers_equal_solo": tally.finished > 0 and tally.different == 0,
        "pool_returns_to_full": last["kvcli_pages_used"] == 0 and last["kvcli_pages_free"] == last["kvcli_pages_total"],
        "pool_was_too_small": last["kvcli_preemptions_total"] > 0,
        "memory_flat": growth(rows) <= FLAT,
        "some_vanished": tally.vanished > 0,
        "no_5xx": not any(x >= 500 for x in tally.statuses) and not tally.errors,
        "exit_code_0": code == 0 and "Traceback" not in said,
    }
    found = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                    "threads": os.environ.get("OMP_NUM_THREADS", "all"), "python": platform.python_version()},
        "settings": {x: y for x, y in vars(args).items() if x not in ("artifact", "out")},
        "artifact": Path(args.artifact).name, "checks": checks, "finished": tally.finished,
        "vanished": tally.vanished, "different": tally.different, "statuses": dict(tally.statuses),
        "errors": dict(tally.errors), "memory_growth": growth(rows), "last_metrics": last, "every_second": rows,
    }  # fmt: skip
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({x: found[x] for x in ("checks", "finished", "vanished", "statuses", "memory_growth")}, indent=1))
    print(f"preemptions {last['kvcli_preemptions_total']:.0f}; written to {out}")
    raise SystemExit(0 if all(checks.values()) else 1)


if __name__ == "__main__":
    main()
