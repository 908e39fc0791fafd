"""Whole models side by side: reading a text and decoding after it, beside llama.cpp and Transformers.

Everybody runs the same model on the same text in turn, in one process: kvcli with an artifact's packed cache and with
the exact 16-bit cache, llama.cpp with its f16, q8_0 and q4_0 caches, stock Transformers in float32 and bfloat16, and
its own quantised cache where the packages for that are installed. Beside the times stand the limit that memory sets
(bytes of weights and cache that a token has to read, over the bandwidth measured in the same rounds), where our own
step spends its time, and what weights and cache together cost in quality.

    python benchmarks/decode.py --artifact demo-out/smollm2-3.25 --data wiki.test.raw
    python benchmarks/decode.py --bits 3.25 --depth 4096 --weights int4 --threads 2
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from demo import LEARN, model_file
from peers import llama_cpp_decoders, transformers_decoders, write
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvcli.artifact.reader import Artifact, open_artifact
from kvcli.calibration import corpora
from kvcli.evaluation import decode_speed, fidelity, speed
from kvcli.models.loading import load
from kvcli.runtime import kvrt
from kvcli.runtime.runner import ModelRunner

# The calls of a decoder layer in the runner's order, and the part of a step that each belongs to.
PARTS = (
    "norms, RoPE, SiLU", "matmuls", "norms, RoPE, SiLU", "append", "attention", "matmuls", "norms, RoPE, SiLU",
    "matmuls", "norms, RoPE, SiLU", "matmuls",
)  # fmt: skip


def calibrate(model: Path, bits: str, out: Path) -> None:
    """Make an artifact, by the command line."""
    words = ["calibrate", str(model), "--bits", bits, "--data", LEARN, "-o", str(out)]
    if subprocess.run([sys.executable, "-m", "kvcli", *words], stdout=sys.stderr).returncode:
        raise SystemExit("calibration failed.")


def quality(runner: ModelRunner, model: Path, data: str, window: int, limit: int) -> dict[str, Any]:
    """Compare the runner with the stock model in float32: second halves of windows, as benchmarks/fidelity.py does."""
    stock = load(str(model), dtype="float32")
    stock.model.set_attn_implementation("sdpa")
    scored = window - window // 2
    found: list[dict[str, Tensor]] = []
    for ids in corpora.windows(data, stock.tokenizer, window, limit=limit):
        with torch.no_grad():
            logits = stock.model(ids[None], logits_to_keep=scored + 1).logits[0, :-1]
        ours, _ = runner.log_probs(ids, scored=scored)
        found.append(fidelity.compare(logits.log_softmax(-1), ours, ids[-scored:]))
    merged = {name: torch.cat([f[name] for f in found]) for name in found[0]}
    summary = {task: fidelity.summarize(task, merged) for task in fidelity.TASKS}
    return {"data": Path(data).name, "windows": len(found), "window": window, "scored": scored * len(found), **summary}


def profile(runner: ModelRunner, depth: int, ids: Tensor, rounds: int) -> dict[str, Any]:
    """Return median seconds of decoding steps and of what they consist of, by timers around the runner's own calls."""
    spent: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            began = time.perf_counter()
            result = work()
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - began
            return result

        return run

    kept = runner._layers, runner._head
    runner._layers = [
        tuple(timed(name, work) for name, work in zip(PARTS, layer, strict=True)) for layer in runner._layers
    ]
    runner._head = timed("matmuls", runner._head)
    steps: list[dict[str, float]] = []
    try:
        for _ in range(4 * rounds + 1):
            runner.cache.advance_to(depth)
            spent.clear()
            step = speed.wall(lambda: runner.decode(ids[depth : depth + 1]))
            steps.append({"step": step, **spent, "rest": step - sum(spent.values())})
    finally:
        runner._layers, runner._head = kept
    medians = {name: statistics.median(x[name] for x in steps[1:]) for name in steps[0]}
    return {"step_s": medians.pop("step"), "parts_s": medians}


def ours(path: Path, args: argparse.Namespace) -> list[decode_speed.RunnerDecoder]:
    """Enter the artifact, and its weights with the exact 16-bit cache."""
    artifact: Artifact = open_artifact(path)
    bits = artifact.plan.effective_bits(args.depth)
    plans = {f"kvcli {bits:.2f}-bit cache": artifact.plan, "kvcli 16-bit cache": artifact.plan.as_exact()}
    decoders = []
    for name, plan in plans.items():
        tensors = artifact.tensors() if plan is artifact.plan else {}
        loaded = load(str(path), dtype=plan.dtype)  # for each anew: int4 layers take the weights for good
        decoders.append(
            decode_speed.native(
                name, loaded, plan, tensors, backend="cpu", depth=args.depth, capacity=args.depth + args.tokens,
                weights=args.weights, threads=args.threads,
            )
        )  # fmt: skip
    return decoders


def show(decode: list[dict[str, Any]], prefill: list[dict[str, Any]]) -> None:
    """Print a table of tokens a second."""
    console = Console(highlight=False)
    table = Table(title="tokens a second, and how many times as fast the first row is", title_justify="left")
    for column in ("", "prefill", "×", "decode", "×", "limit by bytes"):
        table.add_column(column, justify="right" if column else "left")
    by_prefill, by_decode = speed.ratios(prefill), speed.ratios(decode)
    for p, d in zip(prefill, decode, strict=True):
        times = [f"{x[d['name']]:.2f}" if d["name"] in x else "" for x in (by_prefill, by_decode)]
        limit = f"{d['limit_tokens_per_s']:.0f}" if d["limit_tokens_per_s"] else ""
        table.add_row(d["name"], f"{p['tokens_per_s']:.1f}", times[0], f"{d['tokens_per_s']:.1f}", times[1], limit)
    console.print(table)


def main() -> None:
    """Race everybody, profile a step, measure quality, write it all down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="GGUF file or folder; the standing model by default")
    parser.add_argument("--artifact", type=Path, help="an artifact of that model; calibrated anew by default")
    parser.add_argument("--bits", default="3.25", help="to calibrate to")
    parser.add_argument("--depth", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=32, help="that are decoded")
    parser.add_argument("--rounds", type=int, default=5, help="of decoding")
    parser.add_argument("--prefill-rounds", type=int, default=5, help="of reading: minutes each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", choices=("none", "int4"), default="int4")
    parser.add_argument("--text", default="builtin", help="what is read")
    parser.add_argument("--data", help="text file to measure quality on; left out otherwise")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--limit", type=int, default=2, help="windows of that text")
    parser.add_argument("--only", default="llama.cpp,transformers", help="peers that take part")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        variant = kvrt.library("cpu").variant
    except kvrt.NativeError as error:
        raise SystemExit(str(error)) from None
    model: Path = args.model or model_file()
    facts = speed.machine(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = args.artifact or Path(folder) / "artifact"
        if args.artifact is None:
            calibrate(model, args.bits, path)
        plan = open_artifact(path).plan
        mine = ours(path, args)
        ids = decode_speed.text(args.text, mine[0].runner.loaded.tokenizer, args.depth + args.tokens)
        decoders: list[decode_speed.Decoder] = [*mine]
        absent: dict[str, str] = {}
        if "llama.cpp" in args.only:
            found, missing = llama_cpp_decoders(model, depth=args.depth, capacity=len(ids), threads=args.threads)
            decoders, absent = [*decoders, *found], absent | missing
        if "transformers" in args.only:
            stock = [load(str(path), dtype=dtype) for dtype in ("float32", "bfloat16")]
            others, missing = transformers_decoders(stock, args.depth)
            decoders, absent = [*decoders, *others], absent | missing
        races = [decode_speed.contestants(x, ids, args.depth) for x in decoders]
        readers, entered = [x[0] for x in races], [x[1] for x in races]
        began = time.monotonic()

        def step() -> None:
            print(".", end="", flush=True)

        read = speed.race(readers, rounds=args.prefill_rounds, warmup=0, step=step)
        seconds = speed.race([*entered, *speed.bandwidth_probes()], rounds=args.rounds, step=step)
        print(f" {time.monotonic() - began:.0f} s")
        limit = speed.bandwidth(seconds)
        decode = speed.rows(entered, seconds, "decode", threads=args.threads, bandwidth=limit["read"])
        prefill = speed.rows(readers, read, "prefill", threads=args.threads)
        for row in decode:
            row["limit_tokens_per_s"] = limit["read"] / row["bytes_read"] if row["bytes_read"] else None
        show(decode, prefill)
        result = {
            "question": "how fast are reading and decoding with a packed cache, beside others on the same machine?",
            "model": model.name, "depth": args.depth, "tokens": args.tokens, "rounds": args.rounds,
            "prefill_rounds": args.prefill_rounds,
            "threads": args.threads, "weights": args.weights, "variant": variant, "machine": facts,
            "effective_bits": plan.effective_bits(args.depth), "bandwidth": limit,
            "ratios": speed.ratios(decode), "results": decode,
            "prefill": {"ratios": speed.ratios(prefill), "results": prefill}, "absent": absent,
            "profile": {x.name: profile(x.runner, args.depth, ids, args.rounds) for x in mine},
        }  # fmt: skip
        for name, x in result["profile"].items():
            parts = ", ".join(f"{part} {1e3 * s:.2f}" for part, s in x["parts_s"].items())
            print(f"{name}: {1e3 * x['step_s']:.2f} ms a step: {parts}")
        if args.data:
            found_quality = {x.name: quality(x.runner, model, args.data, args.window, args.limit) for x in mine}
            result["quality"] = {"reference": "stock model, float32, exact cache", **found_quality}
            for name, x in found_quality.items():
                print(f"{name}: mean KL {x['kl']['mean']:.4f}, PPL {x['ppl']['delta_pct']:+.2f} %")
    write(result, args.out)


if __name__ == "__main__":
    main()
