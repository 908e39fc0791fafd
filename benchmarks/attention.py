"""Attention alone: how its speed rises as bits fall, and where it stands beside torch's on dense tensors.

One new token over 2048, 8192 and 32768, in the shapes of SmolLM2-135M and Llama-3.1-8B, uniform formats of 16 to 2 bits
against SDPA in float32 and bfloat16, all in turn, with the processor's caches emptied before each. Bytes that must be
read are held against the bandwidth at which torch reads plain memory in the same rounds.

    python benchmarks/attention.py --threads 2 --out benchmarks/results/attention.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from peers import write

from kvcli.evaluation import attention_speed as attention
from kvcli.evaluation import speed
from kvcli.models.architectures import LayerGeometry
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.runtime import kvrt

SHAPES = {"SmolLM2-135M": LayerGeometry(3, 9, 64), "Llama-3.1-8B": LayerGeometry(8, 32, 128)}
# What calibration chooses for the standing model at 3.25 bits, in every layer.
CALIBRATED = KVFormat(3, "token", 64, grid="gaussian", scale_dtype="e5m3")


def num_layers(g: LayerGeometry, depth: int, megabytes: float) -> int:
    """Return how many layers make ``megabytes`` in 16 bits, so that short caches too take measurable time."""
    return max(1, round(megabytes * 2**20 / (4 * g.num_kv_heads * g.head_dim * depth)))


def calibrated(geometry: tuple[LayerGeometry, ...]) -> CachePlan:
    """Return a plan as calibration writes it: rotated, centred, a table for a grid, sinks and a window."""
    layers = [
        LayerPlan(g.num_kv_heads, g.head_dim, CALIBRATED, CALIBRATED, transform="hadamard", center=True)
        for g in geometry
    ]
    return CachePlan(tuple(layers), block_size=16, sink_tokens=4, residual_window=64)


def case(shape: str, depth: int, args: argparse.Namespace) -> dict[str, Any]:
    """Race everybody at one shape and depth."""
    g = SHAPES[shape]
    geometry = (g,) * num_layers(g, depth, args.megabytes)
    flush, entered = speed.Flush(), []
    plans = {
        f"kvcli {bits} bits": attention.uniform(geometry, bits, block_size=args.block)
        for bits in map(int, args.bits.split(","))
    }
    plans["kvcli 3 bits, as calibrated"] = calibrated(geometry)
    for name, plan in plans.items():
        means = {
            f"layer.{i}.{which}.mean": torch.zeros(x.num_kv_heads, x.head_dim)
            for i, x in enumerate(plan.layers)
            for which in "kv"
            if x.center
        }
        if args.backend == "reference":
            step: attention.Step = attention.ReferenceAttention(plan, geometry, depth, tensors=means)
        else:
            step = attention.NativeAttention(plan, geometry, depth, tensors=means, threads=args.threads)
        entered.append(attention.contestant(name, step, 1, flush))
    ours = len(entered)
    dense = {
        f"torch sdpa {str(x)[6:]}": attention.Sdpa(geometry, depth, dtype=x) for x in (torch.float32, torch.bfloat16)
    }
    dense["torch sdpa bfloat16, enable_gqa"] = dense["torch sdpa bfloat16"].as_gqa()  # as Transformers calls it
    entered += [attention.contestant(name, x, 1, flush) for name, x in dense.items()]
    seconds = speed.race([*entered, *speed.bandwidth_probes()], rounds=args.rounds)
    limit = speed.bandwidth(seconds)
    rows = speed.rows(entered, seconds, attention.PHASE, threads=args.threads, bandwidth=limit["read"])
    for row in rows:
        row["per_layer_s"] = row["median_s"] / len(geometry)
    ratios = {row["name"]: speed.ratios([row, *rows[ours:]]) for row in rows[:ours]}
    print(f"{shape}, {depth} tokens, {len(geometry)} layers; memory reads {limit['read'] / 1e9:.1f} GB/s")
    for row in rows:
        times = "".join(f"  × {x:5.2f}" for x in ratios.get(row["name"], {}).values())
        share = 100 * (row["fraction_of_read_bandwidth"] or 0)
        print(f"  {row['name']:32} {1e6 * row['per_layer_s']:9.1f} µs a layer  {share:4.0f} % of the limit{times}")
    return {
        "shape": shape, "num_heads": g.num_heads, "num_kv_heads": g.num_kv_heads, "head_dim": g.head_dim,
        "depth": depth, "layers": len(geometry), "ratios": ratios, "results": rows, "bandwidth": limit,
    }  # fmt: skip


def main() -> None:
    """Race at every shape and depth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", default="2048,8192,32768")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--bits", default="16,8,4,3,2")
    parser.add_argument("--block", type=int, default=64, help="tokens of a page")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--megabytes", type=float, default=128, help="of the layers in 16 bits, together")
    parser.add_argument("--backend", choices=("cpu", "reference"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/attention.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts = speed.machine(args.threads)
    variant = None
    if args.backend == "cpu":
        try:
            variant = kvrt.library("cpu").variant
        except kvrt.NativeError as error:
            raise SystemExit(str(error)) from None
    cases = [case(shape, depth, args) for shape in args.shapes.split(",") for depth in map(int, args.depths.split(","))]
    question = "how fast is attention of one token over a cache of so many bits, beside torch's?"
    backend = {"backend": args.backend, "variant": variant, "rounds": args.rounds, "block_size": args.block}
    write({"question": question, **backend, "machine": facts, "cases": cases}, args.out)


if __name__ == "__main__":
    main()
