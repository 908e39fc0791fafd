"""What kvcli's cache costs in quality per effective bit, on the standing case.

SmolLM2-135M-Instruct, WikiText-2 raw test, windows of 2048 tokens with the second half scored, effective bits counted
at 2048 tokens, calibrated on kvcli's built-in corpus: other text. Writes JSON; one calibration serves every budget.

    python benchmarks/fidelity.py --data wiki.test.raw --out benchmarks/results/fidelity.json

The figures of llama.cpp are its own cache types' on the same weights and windows, measured before (f16 as reference);
they stand in the JSON for comparison and are not measured by this run.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from demo import model_file

LLAMA_CPP = [
    {"cache": "q8_0", "effective_bits": 8.5, "delta_ppl_pct": 0.06, "kl": 0.0039, "flips": 0.048},
    {"cache": "q8_0 K, q4_0 V", "effective_bits": 6.5, "delta_ppl_pct": 0.62, "kl": 0.0096, "flips": 0.057},
    {"cache": "q5_1", "effective_bits": 6.0, "delta_ppl_pct": 1.27, "kl": 0.0128, "flips": 0.071},
    {"cache": "q4_1", "effective_bits": 5.0, "delta_ppl_pct": 4.48, "kl": 0.0417, "flips": 0.127},
    {"cache": "q4_0", "effective_bits": 4.5, "delta_ppl_pct": 5.44, "kl": 0.0469, "flips": 0.128},
]


def kvcli(*words: str) -> dict[str, Any]:
    """Run one command with ``--json`` and return what it prints."""
    done = subprocess.run([sys.executable, "-m", "kvcli", *words, "--json"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> None:
    """Calibrate once, solve for every budget, evaluate each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="WikiText-2 raw test file")
    parser.add_argument("--bits", default="5,4.25,3.25", help="budgets, effective bits at the window, with commas")
    parser.add_argument("--window", default="2048")
    parser.add_argument("--limit", default="4", help="windows")
    parser.add_argument("--calibration", default="builtin", help="calibration text")
    parser.add_argument("--recipe", default="balanced")
    parser.add_argument("--keep", help="folder to keep the artifacts in: base and one per budget")
    parser.add_argument("--out", default="benchmarks/results/fidelity.json")
    args = parser.parse_args()
    budgets = args.bits.split(",")
    rows = []
    with nullcontext(args.keep) if args.keep else tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        base = str(Path(folder) / "base")
        kvcli(
            "calibrate", str(model_file()), "--bits", budgets[0], "--context", args.window, "--data", args.calibration,
            "--recipe", args.recipe, "-o", base,
        )  # fmt: skip
        calibration_s = time.monotonic() - began
        for bits in budgets:
            out = str(Path(folder) / bits)
            plan = kvcli("solve", base, "--bits", bits, "-o", out)
            found = kvcli("eval", out, "--data", args.data, "--window", args.window, "--limit", args.limit)
            shared = {x: plan[x] for x in ("block_size", "sink_tokens", "residual_window", "predicted_kl")}
            formats = [f"{x['k']['bits']}{x['v']['bits']}" for x in plan["layers"]]
            rows.append({"budget": float(bits), **found, **shared, "kv_bits_by_layer": " ".join(formats)})
            print(
                f"budget {bits:>5}: {found['effective_bits']:.3f} effective bits, mean KL {found['kl']['mean']:.4f}, "
                f"PPL {found['ppl']['delta_pct']:+.2f} %, flips {100 * found['flips']['rate']:.1f} %"
            )
    result = {
        "question": "what does the cache cost in quality per effective bit?",
        "model": model_file().name, "data": Path(args.data).name, "calibration": args.calibration,
        "recipe": args.recipe, "calibration_s": calibration_s, "results": rows, "llama_cpp": LLAMA_CPP,
        "machine": {"processor": platform.machine(), "python": platform.python_version()},
    }  # fmt: skip
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
