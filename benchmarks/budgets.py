"""Whether `kvcli solve` meets any budget, and whether more memory always buys a smaller loss.

Forty budgets from the least reachable to 8 effective bits, solved from one artifact's measurements and each measured
end to end on text that the calibration did not see. Effective bits must be at most the budget and within 0.1 of it; the
measured KL must fall, but for noise: a rise counts only if it is above two standard errors of the difference, over the
same stretches of text. Writes JSON, a budget at a time; a run that was killed goes on where it was.

    python benchmarks/budgets.py --artifact OUT --data wiki.test.raw
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

import torch

from kvcli.artifact.reader import open_artifact
from kvcli.calibration import corpora
from kvcli.calibration.pipeline import Budget
from kvcli.calibration.sensitivity import Cost, Probe
from kvcli.calibration.solving import Solver
from kvcli.calibration.surrogate import least_bits
from kvcli.models.loading import load
from kvcli.runtime.packed_cache import ATTENTION

MOST = 8.0
NEAR = 0.1  # bits a plan may leave unspent


def rises(cheaper: Cost, dearer: Cost) -> bool:
    """Whether the plan of more bits is worse beyond noise."""
    differences = [b - a for a, b in zip(cheaper.parts, dearer.parts, strict=True)]
    return fmean(differences) > 2 * stdev(differences) / math.sqrt(len(differences))


@torch.no_grad()
def main() -> None:
    """Solve and measure the budgets that are missing from the result, then judge them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", required=True)
    parser.add_argument("--data", required=True, help="text to measure on")
    parser.add_argument("--count", type=int, default=40, help="budgets")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--limit", type=int, default=2, help="windows")
    parser.add_argument("--context", type=int, default=2048, help="tokens at which bits are counted")
    parser.add_argument("--out", default="benchmarks/results/budgets.json")
    args = parser.parse_args()
    artifact = open_artifact(Path(args.artifact))
    solver = Solver(artifact)
    loaded = load(args.artifact, dtype=artifact.plan.dtype)
    loaded.model.set_attn_implementation(ATTENTION)
    windows = corpora.windows(args.data, loaded.tokenizer, args.window, limit=args.limit)
    probe = Probe(loaded.model, torch.stack(list(windows)), loaded.rope, artifact.tensors())
    least = least_bits(solver.found, args.context, nominal=False)
    out = Path(args.out)
    asked = {"artifact": loaded.sha256, "context": args.context, "window": args.window, "windows": args.limit}
    result = json.loads(out.read_text()) if out.exists() else {}
    if result.get("asked") != asked:
        result = {"question": "are budgets met, and does the loss fall?", "asked": asked, "results": []}
    for i in range(len(result["results"]), args.count):
        bits = round(least + (MOST - least) * i / (args.count - 1), 4)
        solved = solver.within_bits(Budget(bits, args.context))
        cost = probe.cost_of(solved.plan)
        row = {
            "budget": bits, "effective_bits": solved.plan.effective_bits(args.context),
            "predicted_kl": solved.predicted_kl, **vars(cost),
        }  # fmt: skip
        result["results"].append(row)
        print(f"{bits:.3f}: {row['effective_bits']:.3f} bits, KL {cost.kl:.5f}", flush=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    rows = result["results"]
    costs = [Cost(x["kl"], x["delta_nll"], x["parts"]) for x in rows]
    result["summary"] = {
        "over_budget": sum(x["effective_bits"] > x["budget"] + 1e-9 for x in rows),
        "most_left": max(x["budget"] - x["effective_bits"] for x in rows),
        "near": NEAR,
        "rises": sum(b.kl > a.kl for a, b in pairwise(costs)),
        "rises_beyond_noise": sum(rises(a, b) for a, b in pairwise(costs)),
    }
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["summary"]))


if __name__ == "__main__":
    main()
