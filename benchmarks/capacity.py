"""What an idle sequence takes packed again, what it loses, and how fast it is back against prefilling it again.

SmolLM2-135M-Instruct on the engine's pool: a text is prefilled, packed by the capacity plan, expanded, and continued;
the untouched sequence is continued by the same tokens. KL is of the next tokens' distributions, untouched against
resumed, on text of a kind that calibration has not seen. Times are medians of alternating rounds. Without an artifact
in ``--artifact`` one is calibrated there, at 3.25 bits running and 2.5 idle.

    python benchmarks/capacity.py --lengths 1024,4096,8192 --data wiki.test.raw --out benchmarks/results/capacity.json
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from demo import LEARN, kvcli, model_file
from peers import write
from torch import Tensor

from kvcli.artifact.reader import Artifact, open_artifact
from kvcli.calibration import corpora
from kvcli.engine.capacity import Repacker
from kvcli.engine.config import EngineConfig
from kvcli.engine.geometry import Geometry
from kvcli.engine.pool import page_bytes, slot_bytes
from kvcli.engine.runner import EngineRunner
from kvcli.evaluation import speed
from kvcli.evaluation.fidelity import compare, summarize
from kvcli.models.loading import LoadedModel, load
from kvcli.runtime.packed_model import PackedModel


class Bench:
    """One sequence on a pool, and what packs it again.

    Parameters
    ----------
    loaded, artifact
        The model, and an artifact with a capacity plan.
    tokens
        Of the longest sequence.
    threads
        CPU threads.
    """

    def __init__(self, loaded: LoadedModel, artifact: Artifact, tokens: int, threads: int) -> None:
        assert artifact.capacity is not None
        plan = artifact.plan
        self.geometry, self.size = Geometry.of(plan), plan.block_size
        memory = (self.geometry.needed(tokens) + 1) * page_bytes(plan) + 2 * slot_bytes(plan)
        config = EngineConfig(memory, max_num_seqs=1, max_context=tokens, threads=threads, prefix_caching=False)
        self.runner = EngineRunner(PackedModel(loaded, plan, artifact.tensors()), config)
        self.repacker = Repacker(self.runner.cache, artifact.capacity, artifact.capacity_tensors(), rope=loaded.rope)

    def place(self, held: int, tokens: int) -> list[int]:
        """Let the sequence hold ``held`` tokens, with pages for ``tokens``; return its pages."""
        pages = list(range(self.geometry.needed(tokens)))
        self.runner.cache.place(0, pages, held)
        return pages

    def feed(self, ids: Tensor, held: int, *, scored: bool = False) -> Tensor | None:
        """Run tokens through the model; return their log-probabilities if they are scored."""
        self.place(held, held + len(ids))
        found = []
        for part in ids.split(self.runner.chunk):
            logits = self.runner.extend(0, part.tolist(), logits=len(part) if scored else 0)
            if logits is not None:
                found.append(logits.log_softmax(-1))
        return torch.cat(found) if found else None

    def measure(self, ids: Tensor, prefix: int, rounds: int) -> dict[str, Any]:
        """Prefill ``prefix`` tokens, put them aside and resume them, and score what comes after them."""
        cache, complete = self.runner.cache, self.geometry.complete(prefix)
        rest, seconds = ids[prefix:], {"prefill": [], "demote": [], "promote": []}  # type: dict[str, list[float]]
        kept: Any = None
        for _ in range(rounds):
            start = time.perf_counter()
            self.feed(ids[:prefix], 0)
            prefilled = time.perf_counter()
            pages = self.place(prefix, prefix)
            untouched = cache.save(0, pages)
            began = time.perf_counter()
            packed = self.repacker.demote(0, pages[:complete])
            kept = cache.save(0, pages[complete:])
            demoted = time.perf_counter()
            for store in cache.layers:
                store.pages.zero_()
            again = time.perf_counter()
            self.repacker.promote(0, packed, pages[:complete])
            cache.load(kept, 0, list(enumerate(pages[complete:])))
            seconds["promote"].append(time.perf_counter() - again)
            seconds["prefill"].append(prefilled - start)
            seconds["demote"].append(demoted - began)
        resumed = self.feed(rest, prefix, scored=True)
        cache.load(untouched, 0, list(enumerate(pages)))
        expected = self.feed(rest, prefix, scored=True)
        assert resumed is not None
        assert expected is not None
        idle = sum(x.nbytes for x in packed) + kept.nbytes
        return {
            "seconds": seconds, "bytes": {"idle": idle, "running": untouched.nbytes},
            "compared": compare(expected[:-1], resumed[:-1], rest[1:]),
        }  # fmt: skip


def measured(bench: Bench, artifact: Artifact, windows: list[Tensor], prefix: int, rounds: int) -> dict[str, Any]:
    """Measure one length on every window, print it, and return it as plain JSON."""
    found = [bench.measure(x, prefix, rounds) for x in windows]
    compared = {name: torch.cat([x["compared"][name] for x in found]) for name in found[0]["compared"]}
    seconds = {name: median(s for x in found for s in x["seconds"][name]) for name in found[0]["seconds"]}
    exact, plan = artifact.plan.as_exact().bytes_at(prefix), artifact.plan
    size = {**found[0]["bytes"], "16 bits": exact}
    row: dict[str, Any] = {
        "tokens": prefix, "scored_tokens": len(compared["kl"]),
        **{task: summarize(task, compared) for task in ("kl", "flips", "ppl")},
        "bytes": size, "bits": {name: 8 * x / (prefix * plan.scalars_per_token) for name, x in size.items()},
        "seconds": seconds,
        "ratios": {
            "prefill / promote": seconds["prefill"] / seconds["promote"],
            "running / idle bytes": size["running"] / size["idle"], "16 bits / idle bytes": exact / size["idle"],
        },
    }  # fmt: skip
    print(
        f"{prefix} tokens: KL {row['kl']['mean']:.5f}, flips {100 * row['flips']['rate']:.1f} %; idle "
        f"{row['bits']['idle']:.2f} bits, running {row['bits']['running']:.2f}; prefill {seconds['prefill']:.2f} s, "
        f"demote {seconds['demote']:.3f} s, promote {seconds['promote']:.3f} s: resumed "
        f"{row['ratios']['prefill / promote']:.1f} times faster than prefilled"
    )
    return row


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, default=Path("build/capacity"), help="of --adapters capacity")
    parser.add_argument("--model", help="to calibrate, by default the standing model")
    parser.add_argument("--lengths", default="1024,4096,8192", help="tokens of the idle sequence; cut to what fits")
    parser.add_argument("--tokens", type=int, default=128, help="that continue it and are scored")
    parser.add_argument("--limit", type=int, default=2, help="windows of each length")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", default="builtin:narrative", help="text of another kind than calibration's")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/capacity.json"))
    args = parser.parse_args()
    if not args.artifact.exists():
        kvcli(
            "calibrate", str(args.model or model_file()), "--bits", "3.25", "--adapters", "capacity", "--data", LEARN,
            "-o", str(args.artifact),
        )  # fmt: skip
    artifact = open_artifact(args.artifact, verify=False)
    if artifact.capacity is None:
        raise SystemExit(f"{args.artifact} has no capacity plan: calibrate it with --adapters capacity.")
    torch.set_num_threads(args.threads)
    loaded = load(str(args.artifact), dtype=artifact.plan.dtype)
    lengths = [min(int(x), loaded.max_context - args.tokens) for x in args.lengths.split(",")]
    bench = Bench(loaded, artifact, max(lengths) + args.tokens, args.threads)
    result: dict[str, Any] = {
        "question": "what does an idle sequence take, lose, and cost to resume?",
        "model": Path(artifact.manifest["source"]["model"]).name, "machine": speed.machine(args.threads),
        "rounds": args.rounds, "data": Path(args.data).name, "windows": args.limit,
        "plan": {
            "running_bits": artifact.plan.effective_bits(max(lengths)),
            "idle_bits": artifact.capacity.effective_bits(max(lengths)),
            "predictor_bytes": artifact.capacity.model_bytes(), "sinks": artifact.plan.sink_tokens,
            "window": artifact.plan.residual_window,
        },
        "results": [],
    }  # fmt: skip
    for prefix in lengths:
        windows = corpora.windows(args.data, loaded.tokenizer, prefix + args.tokens, limit=args.limit)
        with torch.no_grad():
            result["results"].append(measured(bench, artifact, windows, prefix, args.rounds))
        write(result, args.out)


if __name__ == "__main__":
    main()
