"""What int4 products cost in fidelity, by the bits that they round activations to.

The same artifact with its weights as they are and a 16-bit cache is the reference: the KL divergence is that of the
products alone. ``activations`` 16 is what ``kvcli generate`` does, 8 what ``kvcli serve`` does.

    python benchmarks/activations.py ARTIFACT --data wiki.test.raw
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcli.artifact.reader import open_artifact
from kvcli.models.loading import load
from kvcli.runtime.runner import ModelRunner


def log_probs(runner: ModelRunner, ids: Tensor, window: int) -> Tensor:
    """Return log-probabilities of the second half of each window, [scored, vocabulary]."""
    return torch.cat([runner.log_probs(part, scored=window // 2)[0] for part in ids.split(window)])


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--data", required=True)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--out", default="benchmarks/results/activations.json")
    args = parser.parse_args()
    opened = open_artifact(Path(args.artifact))
    arms: dict[str, dict[str, Any]] = {
        "reference": {},
        "int4, activations 16": {"weights": "int4", "activations": 16},
        "int4, activations 8": {"weights": "int4", "activations": 8},
    }
    reference, results = torch.empty(0), []
    for name, settings in arms.items():
        loaded = load(args.artifact, dtype=opened.plan.dtype)
        ids = loaded.tokenizer(Path(args.data).read_text(), return_tensors="pt").input_ids[0]
        ids = ids[: args.windows * args.window]
        found = log_probs(ModelRunner(loaded, opened.plan.as_exact(), capacity=1, **settings), ids, args.window)
        reference = reference if len(reference) else found
        kl = (reference.exp() * (reference - found)).sum(-1)
        targets = torch.cat([part[args.window // 2 :] for part in ids.split(args.window)])
        results.append(
            {
                "arm": name,
                "ppl": float((-found.gather(1, targets[:, None]).mean()).exp()),
                "kl": {"mean": float(kl.mean()), "p99": float(kl.quantile(0.99))},
                "flips": float((found.argmax(-1) != reference.argmax(-1)).float().mean()),
            }
        )
        print(json.dumps(results[-1]), flush=True)
    facts = {
        "artifact": Path(args.artifact).name, "data": Path(args.data).name, "windows": args.windows,
        "window": args.window, "machine": {"processor": platform.machine(), "torch": torch.__version__},
        "results": results,
    }  # fmt: skip
    Path(args.out).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
