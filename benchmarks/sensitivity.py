"""Are a model's sensitivities shaped as KVTuner's paper says? Keys before values, less error with more bits.

Measures the relative errors of every layer and pair of 2, 4 and 8 bits in the paper's two quantiser modes, prunes and
groups the layers as the paper does, and checks three of its statements. The first is checked a second time, end to
end: by the KL of each pair in all layers alike. Writes JSON.

    python benchmarks/sensitivity.py --out benchmarks/results/sensitivity.json

Attention is captured on the text of `--data`; the queries of the second half of each window are counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import re
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from demo import model_file

from kvcli.calibration import corpora, kvtuner
from kvcli.calibration.pipeline import exact_layers, search_space
from kvcli.calibration.relative_errors import RelativeErrors, measure
from kvcli.calibration.sensitivity import Probe
from kvcli.calibration.space import SearchSpace
from kvcli.models.loading import LoadedModel, load
from kvcli.runtime.packed_cache import ATTENTION

MODES = ("kvtuner-token", "kvtuner-kivi")
WIDTHS = (2, 4, 8)
UNEQUAL = tuple(itertools.combinations(WIDTHS, 2))
DIGITS = 4  # that are written
STATEMENTS = (
    "keys_cost_more_than_values", "e_o_falls_with_bits", "kept_pairs_are_k_heavy", "keys_cost_more_end_to_end",
)  # fmt: skip


def errors_by_name(found: RelativeErrors, space: SearchSpace) -> list[dict[str, dict[str, float]]]:
    """Return for every layer and pair, named as in K4V2, the four errors."""
    names = [f"K{space.k[k].bits}V{space.v[v].bits}" for k, v in found.pairs]
    tables = {"e_k": found.key, "e_v": found.value, "e_a": found.attention, "e_o": found.output}
    return [
        {name: {e: float(f"{table[i][j]:.{DIGITS}g}") for e, table in tables.items()} for j, name in enumerate(names)}
        for i in range(len(found.output))
    ]


def keys_against_values(layers: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Which costs more at equal bits: few for the keys or few for the values."""
    out: dict[str, Any] = {}
    for low, high in UNEQUAL:
        ratios = [x[f"K{low}V{high}"]["e_o"] / x[f"K{high}V{low}"]["e_o"] for x in layers]
        out[f"K{low}V{high} against K{high}V{low}"] = {
            "share_of_layers": sum(x > 1 for x in ratios) / len(ratios), "median_ratio": statistics.median(ratios),
        }  # fmt: skip
    out["holds"] = all(x["share_of_layers"] > 0.5 for x in out.values())
    return out


def keys_against_values_end_to_end(kl: dict[str, float]) -> dict[str, Any]:
    """Which costs more in KL where all layers are alike."""
    out: dict[str, Any] = {
        f"K{low}V{high} against K{high}V{low}": kl[f"K{low}V{high}"] / kl[f"K{high}V{low}"] for low, high in UNEQUAL
    }
    out["holds"] = all(x > 1 for x in out.values())
    return out


def falls_with_bits(layers: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Whether e_o falls where one of the two tensors gets more bits and the other keeps its own."""
    rises = [(low, high, kept) for low, high in itertools.pairwise(WIDTHS) for kept in WIDTHS]
    steps = [(f"K{low}V{kept}", f"K{high}V{kept}") for low, high, kept in rises]
    steps += [(f"K{kept}V{low}", f"K{kept}V{high}") for low, high, kept in rises]
    both = [f"K{x}V{x}" for x in WIDTHS]
    falling = [x[more]["e_o"] < x[less]["e_o"] for x in layers for less, more in steps]
    uniform = all(x[more]["e_o"] < x[less]["e_o"] for x in layers for less, more in itertools.pairwise(both))
    share = sum(falling) / len(falling)
    return {"share_of_steps": share, "in_every_layer_at_equal_widths": uniform, "holds": uniform and share > 0.95}


def kept_pairs(kept: list[list[str]]) -> dict[str, Any]:
    """Which pairs the layers keep, and how many of the unequal ones give the keys more bits."""
    counts = {f"K{k}V{v}": sum(f"K{k}V{v}" in x for x in kept) for k in WIDTHS for v in WIDTHS}
    heavy = sum(n for name, n in counts.items() if name[1] > name[3])
    light = sum(n for name, n in counts.items() if name[1] < name[3])
    share = heavy / max(heavy + light, 1)
    return {"layers_that_keep": counts, "share_of_unequal_that_are_k_heavy": share, "holds": share > 0.5}


def study(loaded: LoadedModel, ids: torch.Tensor, mode: str) -> dict[str, Any]:
    """Measure, prune, group and judge one mode."""
    geometry = exact_layers(loaded)
    space = search_space(mode, geometry)
    setting = next(space.settings())
    began = time.monotonic()
    probe = Probe(loaded.model, ids, loaded.rope, {})
    found = measure(probe, space, geometry, setting, loaded.dtype)
    seconds = time.monotonic() - began
    layers = errors_by_name(found, space)
    named = dict(zip(found.pairs, layers[0], strict=True))
    kept = [[named[p] for p in kvtuner.prune(found, space, x, i)] for i, x in enumerate(geometry)]
    groups = kvtuner.group(found, space, geometry)
    plans = {named[k, v]: space.plan([space.layer(x, space.k[k], space.v[v]) for x in geometry], setting, loaded.dtype)
             for k, v in found.pairs}  # fmt: skip
    kl = {name: probe.cost_of(plan).kl for name, plan in plans.items()}
    means = {p: {e: statistics.fmean(x[p][e] for x in layers) for e in layers[0][p]} for p in layers[0]}
    return {
        "mode": mode, "block_size": setting.block_size, "residual_window": setting.residual_window, "seconds": seconds,
        "keys_cost_more_than_values": keys_against_values(layers), "e_o_falls_with_bits": falls_with_bits(layers),
        "kept_pairs_are_k_heavy": kept_pairs(kept),
        "keys_cost_more_end_to_end": keys_against_values_end_to_end(kl), "mean_over_layers": means,
        "mean_kl_of_all_layers_alike": kl,
        "groups": [{"layers": x.layers, "candidates": [named[p] for p in x.candidates]} for x in groups],
        "plans_before_pruning": f"{len(found.pairs)}^{len(geometry)}",
        "plans_after_grouping": f"{math.prod(len(x.candidates) for x in groups):.3g}",
        "kept": kept, "layers": layers,
    }  # fmt: skip


@torch.no_grad()
def main() -> None:
    """Measure both modes and print how the statements fare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="folder, hub id or GGUF; by default the standing model")
    parser.add_argument("--data", default="builtin:arithmetic", help="text, as for kvcli calibrate")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window")
    parser.add_argument("--limit", type=int, default=4, help="windows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="benchmarks/results/sensitivity.json")
    args = parser.parse_args()
    loaded = load(args.model or str(model_file()))
    loaded.model.set_attn_implementation(ATTENTION)
    corpus = corpora.tokens(
        args.data, loaded, num_tokens=args.window * args.limit, seed=args.seed, length=args.window
    )  # fmt: skip
    results = [study(loaded, corpus.ids, mode) for mode in MODES]
    for x in results:
        print(x["mode"])
        for name in STATEMENTS:
            print(f"  {name}: {json.dumps(x[name])}")
        print(f"  {len(x['groups'])} groups, {x['plans_before_pruning']} plans fall to {x['plans_after_grouping']}")
    result = {
        "question": "are the sensitivities shaped as KVTuner's paper says?",
        "model": loaded.source, "data": corpus.name, "windows": len(corpus.ids), "window": args.window,
        "results": results,
        "machine": {"processor": platform.machine(), "python": platform.python_version(), "torch": torch.__version__},
    }  # fmt: skip
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    # what holds nothing but numbers and names stands in one line
    text = re.sub(r"[{[][^][{}]+[]}]", lambda found: " ".join(found[0].split()), json.dumps(result, indent=1))
    out.write_text(text + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
