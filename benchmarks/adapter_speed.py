"""What decoding pays for predictors: none, absorbed and always, at 1k, 4k and 8k tokens.

The standing model with 16-bit weights on native kernels, its cache as calibration writes it at about 3.25 bits, filled
with random tokens; the three take turns. One thread, and seconds of processor time: what else runs on the machine
counts for little. Predictors are random, for speed does not depend on what they say.

    python benchmarks/adapter_speed.py --out benchmarks/results/adapter_speed.json
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from demo import model_file
from peers import write
from torch import Tensor

from kvcli.calibration.aqua_kv import MODES, Mode, design
from kvcli.evaluation import decode_speed, speed
from kvcli.models.loading import LoadedModel, load
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.runtime.runner import ModelRunner


def plan_of(loaded: LoadedModel, mode: Mode) -> CachePlan:
    """Return a plan as calibration writes it: rotated, centred, a table for a grid, sinks and a window."""
    fmt = partial(KVFormat, axis="token", grid="gaussian", scale_dtype="e5m3")
    layers = [
        LayerPlan(
            g.num_kv_heads,
            g.head_dim,
            fmt(4, group=g.head_dim),
            fmt(2, group=g.head_dim),
            kind=g.kind,
            window=g.window,
            transform="hadamard",
            center=True,
        )
        for g in loaded.geometry
    ]
    return CachePlan(tuple(design(layers, mode)), sink_tokens=4, residual_window=64)


def tensors_of(plan: CachePlan) -> dict[str, Tensor]:
    """Return random predictors and means, small enough for values to stay finite."""
    generator = torch.Generator().manual_seed(0)
    dtypes = {"F16": torch.float16, "F32": torch.float32}
    return {
        name: (0.01 * torch.randn(shape, generator=generator)).to(dtypes[dtype])
        for name, (dtype, shape) in plan.model_tensors().items()
    }


def race(loaded: LoadedModel, depth: int, args: argparse.Namespace) -> dict[str, Any]:
    """Let the three decode at one depth."""
    room, entered, memory = depth + args.tokens, [], {}
    ids = torch.randint(0, 1000, (room,), generator=torch.Generator().manual_seed(0))
    for mode in MODES:
        plan = plan_of(loaded, mode)
        runner = ModelRunner(
            loaded, plan, tensors_of(plan), weights="none", dtype=torch.bfloat16, capacity=room, threads=1
        )  # fmt: skip
        decoder = decode_speed.RunnerDecoder(mode, runner, depth)
        entered.append(decode_speed.contestant(decoder, ids, depth, random=True))
        memory[mode] = runner
    seconds = speed.race(entered, rounds=args.rounds, timer=partial(speed.wall, clock=time.process_time))
    rows = speed.rows(entered, seconds, "decode", threads=1)
    found: dict[str, Any] = {}
    for row in rows:
        size = memory[row["name"]].nbytes
        found[row["name"]] = {
            "seconds_per_token": row["median_s"], "quartiles_s": row["quartiles_s"],
            "speed_of_none": rows[0]["median_s"] / row["median_s"],
            "cache_bytes": size["cache"], "buffer_bytes": size["constant"],
        }  # fmt: skip
        print(f"{depth} tokens, {row['name']}: {1e3 * row['median_s']:.2f} ms, "
              f"{found[row['name']]['speed_of_none']:.2f} of none's speed")  # fmt: skip
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="by default the standing model")
    parser.add_argument("--depths", default="1024,4096,8192")
    parser.add_argument("--tokens", type=int, default=6, help="that are decoded in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/adapter_speed.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load(str(args.model or model_file()), dtype="bfloat16")
    depths = [int(x) for x in args.depths.split(",")]
    result = {
        "question": "what does decoding pay for predictors, in processor time of one thread?",
        "model": Path(args.model or model_file()).name, "machine": speed.machine(1), "tokens": args.tokens,
        "rounds": args.rounds, "results": {str(d): race(loaded, d, args) for d in depths},
    }  # fmt: skip
    write(result, args.out)


if __name__ == "__main__":
    main()
