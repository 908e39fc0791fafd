"""Servers side by side on one machine: ``kvcli serve``, llama.cpp's and vLLM's CPU build.

In each round every server is started, warmed up with other prompts, asked and stopped, one after the other. All get the
same texts. Beside the clock stand the CPU seconds that a server and its children took, which other work on the machine
disturbs less. What is not installed is skipped, with the reason in the JSON. Also says how many sequences of 4096
tokens fit 1 GiB of kvcli's cache.

    python benchmarks/serving.py ARTIFACT --gguf MODEL.gguf --llama-server PROGRAM --vllm-model FOLDER

llama.cpp's server is its own ``llama-server``, built for this machine (``GGML_NATIVE=ON``), with a slot for each
concurrent request. The one of llama-cpp-python is no match: it answers one request at a time, and reached 4 tokens/s
here. vLLM takes a folder in Hugging Face's layout and may have an environment of its own (``--vllm-python``). The JSON
is written anew after every server.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
import torch
from demo import model_file

from kvcli.calibration.texts import read
from kvcli.server.load import Load, Round, Target, summary

START_S = 900.0
PRINT_VERSION = "import vllm; print(vllm.__version__)"
RESIDENT = 4096  # tokens of the sequences that are counted in 1 GiB


def commands(args: argparse.Namespace, port: int) -> dict[str, list[str] | str]:
    """Return how to start each server, or why it is skipped."""
    context, at = args.prompt_tokens + args.tokens + 128, ["--host", "127.0.0.1", "--port", str(port)]
    found: dict[str, list[str] | str] = {
        "kvcli": [
            sys.executable, "-m", "kvcli", "serve", args.artifact, *at, "--memory", args.memory,
            "--weights", args.weights, "--activations", args.activations, "--max-context", str(context),
            "--max-num-seqs", str(args.concurrency),
        ]
    }  # fmt: skip
    if "llama.cpp" not in args.skip:
        program = shutil.which(args.llama_server)
        found["llama.cpp"] = "not installed: llama-server" if program is None else [
            program, *at, "--model", str(args.gguf or model_file()), "--parallel", str(args.concurrency),
            "--ctx-size", str(args.concurrency * context), "--threads", str(args.threads),
            "--threads-batch", str(args.threads), "--no-webui",
        ]  # fmt: skip
    if "vllm" not in args.skip:
        probe = [args.vllm_python, "-c", PRINT_VERSION]
        reason = None if args.vllm_model else "no --vllm-model"
        if subprocess.run(probe, capture_output=True, check=False).returncode:
            reason = "not installed: vllm"
        found["vllm"] = reason or [
            args.vllm_python, "-m", "vllm.entrypoints.openai.api_server", *at, "--model", args.vllm_model,
            "--dtype", "bfloat16", "--max-model-len", str(context), "--max-num-seqs", str(args.concurrency),
        ]  # fmt: skip
    return found


@contextlib.contextmanager
def started(command: list[str], port: int, threads: int) -> Iterator[tuple[str, psutil.Process]]:
    """Run a server; yields its log and itself. It has stopped when the block is left."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "VLLM_CPU_KVCACHE_SPACE": "4"}
    if command[0] != sys.executable:  # an environment of its own
        env.pop("PYTHONPATH", None)
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)

        def said() -> str:
            log.seek(0)
            return log.read().decode(errors="replace")

        try:
            end = time.monotonic() + START_S
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 200:
                        break
                if server.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"{' '.join(command)} did not start:\n{said()[-2000:]}")
                time.sleep(0.2)
            yield said(), psutil.Process(server.pid)
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def cpu_seconds(process: psutil.Process) -> float:
    """Return the CPU seconds of a process and all its children."""
    times = [x.cpu_times() for x in (process, *process.children(recursive=True))]
    return float(sum(x.user + x.system for x in times))


def free_port() -> int:
    """Return a port that nobody uses."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def texts(url: str, text: str, load: Load) -> list[str]:
    """Cut prompts of so many tokens by kvcli's tokenizer, as text."""
    target = Target(url, load)
    target.prepare(text)
    return [httpx.post(f"{url}/detokenize", json={"tokens": x}).json()["prompt"] for x in target._prompts]


def ask(url: str, load: Load, prompts: list[str]) -> Round:
    """Send the prompts; servers that say no usage have their events counted, one a token."""
    target = Target(url, load)
    target.prepare(" ".join(prompts))
    target._prompts = prompts
    found = target.run(lambda: None)
    for x in found.outcomes:
        x.tokens = x.tokens or len(x.gaps_s) + (x.first_s is not None)
    return found


def resident(said: str) -> dict[str, Any]:
    """Return how many sequences of 4096 tokens fit 1 GiB, and at how many effective bits, as the server says it."""
    fit, bits = re.search(r"(\d+) sequences of (\d+)", said), re.search(r"([\d.]+) effective bits", said)
    exact = re.search(r"16-bit cache ([\d.]+)", said)
    if fit is None or bits is None or exact is None:
        raise SystemExit(f"kvcli serve did not say what fits:\n{said}")
    return {
        "memory": "1GiB", "tokens": int(fit[2]), "sequences": int(fit[1]), "effective_bits": float(bits[1]),
        "exact_bits": float(exact[1]),
    }  # fmt: skip


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--gguf", default="", help="for llama.cpp; the standing model's if left out")
    parser.add_argument("--llama-server", default="llama-server", help="llama.cpp's server, a path or a name")
    parser.add_argument("--vllm-model", default="")
    parser.add_argument("--vllm-python", default=sys.executable)
    parser.add_argument("--skip", nargs="*", choices=["llama.cpp", "vllm"], default=[])
    parser.add_argument("--weights", choices=["none", "int4"], default="int4")
    parser.add_argument("--activations", choices=["8", "16"], default="8")
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--out", default="benchmarks/results/serving.json")
    args = parser.parse_args()
    port = free_port()
    servers = commands(args, port)
    url, text = f"http://127.0.0.1:{port}", read("builtin:prose")
    load = Load(args.requests, args.concurrency, args.prompt_tokens, args.tokens, seed=0)
    warm = Load(4, 4, args.prompt_tokens, 8, seed=1)
    full = [
        sys.executable, "-m", "kvcli", "serve", args.artifact, "--port", str(port), "--memory", "1GiB",
        "--max-context", str(RESIDENT), "--max-num-seqs", "64", "--weights", args.weights,
    ]  # fmt: skip
    with started(full, port, args.threads) as (said, _):
        fits, prompts, others = resident(said), texts(url, text, load), texts(url, text, warm)
    rounds: dict[str, list[Round]] = {name: [] for name, command in servers.items() if isinstance(command, list)}
    cpu: dict[str, list[float]] = {name: [] for name in rounds}
    for number in range(args.rounds):
        for name, done in rounds.items():
            command = servers[name]
            assert isinstance(command, list)
            with started(command, port, args.threads) as (_, process):
                ask(url, warm, others)
                before = cpu_seconds(process)
                done.append(ask(url, load, prompts))
                tokens = sum(x.tokens for x in done[-1].outcomes)
                cpu[name].append(tokens / (cpu_seconds(process) - before))
            rate = f"{tokens / done[-1].seconds:.1f} tokens/s, {cpu[name][-1]:.1f} a CPU second"
            print(f"round {number + 1}: {name} {rate}", flush=True)
            write(args, servers, {x: y for x, y in rounds.items() if y}, cpu, fits)
    show(args.out)


def write(
    args: argparse.Namespace,
    servers: dict[str, list[str] | str],
    rounds: dict[str, list[Round]],
    cpu: dict[str, list[float]],
    fits: dict[str, Any],
) -> None:
    """Write what was measured so far."""
    results = {name: summary(name, done) for name, done in rounds.items()}
    for name, done in rounds.items():  # of each round, then the median of rounds, as throughput
        firsts = [[x.first_s for x in r.outcomes if x.first_s is not None] for r in done]
        results[name]["median_ttft_s"] = median(median(x) for x in firsts if x) if any(firsts) else None
        results[name]["tokens_per_cpu_s"] = median(cpu[name])
        results[name]["threads"] = args.threads
    ours = results["kvcli"]
    ratios = {
        name: {
            "throughput": ours["tokens_per_s"] / x["tokens_per_s"] if x["tokens_per_s"] else None,
            "throughput_per_cpu_second": ours["tokens_per_cpu_s"] / x["tokens_per_cpu_s"],
            "time_to_first_token": ours["median_ttft_s"] / x["median_ttft_s"] if x["median_ttft_s"] else None,
        }
        for name, x in results.items()
        if name != "kvcli"
    }
    packages = {"torch": torch.__version__, "kvcli": version("kvcli")}
    for name, command in servers.items():  # llama-server writes its version to stderr
        if name != "kvcli" and isinstance(command, list):
            ask_it = [command[0], "--version"] if name == "llama.cpp" else [command[0], "-c", PRINT_VERSION]
            said = subprocess.run(ask_it, capture_output=True, text=True, check=False)
            packages[name] = (said.stdout + said.stderr).strip().splitlines()[-2 if name == "llama.cpp" else -1]
    found = {
        "ratios_ours_over_theirs": ratios,
        "skipped": {name: why for name, why in servers.items() if isinstance(why, str)},
        "resident": fits,
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), **packages},
        "settings": {x: y for x, y in vars(args).items() if x in (
            "weights", "activations", "memory", "threads",
            "rounds", "requests", "concurrency", "prompt_tokens", "tokens")},
        "artifact": Path(args.artifact).name, "rounds_done": len(cpu["kvcli"]), "results": list(results.values()),
    }  # fmt: skip
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")


def show(out: str) -> None:
    """Print what was written."""
    found = json.loads(Path(out).read_text())
    print(json.dumps({x: found[x] for x in ("ratios_ours_over_theirs", "skipped", "resident")}, indent=1))
    for x in found["results"]:
        first = "none" if x["median_ttft_s"] is None else f"{x['median_ttft_s']:.3f} s"
        print(f"{x['name']}: {x['tokens_per_s']:.1f} tokens/s, first token {first}, failed {x['failed']}")


if __name__ == "__main__":
    main()
