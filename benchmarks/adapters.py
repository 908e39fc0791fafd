"""What predictors are worth: none, absorbed and always, at 2.5, 3.25 and 4.25 effective bits.

SmolLM2-135M-Instruct, windows of 2048 tokens with the second half scored, bits counted at 2048 tokens, calibrated on
the built-in corpus without one of its kinds; judged on WikiText-2 raw test and on the kind that was left out. Plans are
alike in all arms: Gaussian tables on tokens after a Hadamard rotation, the same bits in every layer as far as they go,
a window of 16 and four sinks. Writes JSON after every measurement, and takes up where it was stopped.

    python benchmarks/adapters.py --data wiki.test.raw --out benchmarks/results/adapters.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from demo import model_file

from kvcli.calibration import aqua_kv, corpora
from kvcli.calibration.pipeline import exact_layers, moments
from kvcli.evaluation.fidelity import evaluate
from kvcli.models.loading import LoadedModel, load
from kvcli.plan import CachePlan
from kvcli.quant.format import KVFormat
from kvcli.runtime.packed_cache import ATTENTION
from kvcli.runtime.packed_model import PackedModel

WINDOW, LEFT_OUT = 2048, "narrative"
LEARN = ",".join(f"builtin:{x}" for x in ("arithmetic", "code", "dialogue", "everyday", "prose", "tables"))
ARMS: dict[str, dict[str, Any]] = {
    "none": {"mode": "none"},
    "absorbed": {"mode": "absorbed"},
    "always, as in the paper": {"mode": "always", "depth": 1, "both": False},
    "always": {"mode": "always"},
    "always, predictors in 8 bits": {"mode": "always", "bits": 8},
}
LEAST = {"none": (2, 2), "absorbed": (3, 2), "always": (2, 2)}  # keys are left more bits than values where they can be


def formats(bits: int) -> KVFormat:
    """Return the format of so many bits."""
    return KVFormat(bits, group=64, grid="gaussian" if bits <= 4 else "uniform", scale_dtype="e5m3")


def plan_for(loaded: LoadedModel, budget: float, arm: dict[str, Any]) -> CachePlan | None:
    """Return the plan that spends a budget evenly: keys of all layers get the next bit, then values, layer by layer."""
    layers = exact_layers(loaded)
    k, v = ([b] * len(layers) for b in LEAST[arm["mode"]])

    def plan() -> CachePlan:
        stored = [
            replace(x, k=formats(a), v=formats(b), transform="hadamard", center=True)
            for x, a, b in zip(layers, k, v, strict=True)
        ]
        made = tuple(aqua_kv.design(stored, **arm))
        return CachePlan(made, sink_tokens=4, residual_window=16, dtype=loaded.dtype)

    if plan().effective_bits(WINDOW) > budget:
        return None
    while True:
        low = min(min(k), min(v))
        bits, at = (k, k.index(min(k))) if min(k) == low else (v, v.index(low))
        if bits[at] == 4:
            return plan()
        bits[at] += 1
        if plan().effective_bits(WINDOW) > budget:
            bits[at] -= 1
            return plan()


def main() -> None:
    """Collect moments once, then measure arm by arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="WikiText-2 raw test file")
    parser.add_argument("--bits", default="2.5,3.25,4.25", help="effective bits at 2048 tokens, with commas")
    parser.add_argument("--tokens", type=int, default=65536, help="calibration tokens")
    parser.add_argument("--limit", type=int, default=2, help="windows of each text")
    parser.add_argument("--out", default="benchmarks/results/adapters.json")
    args = parser.parse_args()
    out = Path(args.out)
    result: dict[str, Any] = {
        "question": "what are predictors worth, in quality per effective bit?", "model": model_file().name,
        "calibration": LEARN, "tokens": args.tokens, "windows": args.limit, "results": [],
    }  # fmt: skip
    if out.exists():
        before = json.loads(out.read_text())
        if {k: x for k, x in before.items() if k != "results"} == {k: x for k, x in result.items() if k != "results"}:
            result = before
    loaded = load(str(model_file()))
    loaded.model.set_attn_implementation(ATTENTION)
    ids = corpora.tokens(LEARN, loaded, num_tokens=args.tokens, seed=0, length=WINDOW).ids
    texts = {
        name: corpora.windows(spec, loaded.tokenizer, WINDOW, limit=args.limit)
        for name, spec in (("WikiText-2", args.data), (LEFT_OUT, f"builtin:{LEFT_OUT}"))
    }
    widest = plan_for(loaded, 16, ARMS["always"])
    assert widest is not None
    with torch.no_grad():
        found = aqua_kv.statistics(loaded, widest, ids)
        means = moments(loaded, widest.as_exact(), ids, lambda: None)
    reference = PackedModel(loaded, widest.as_exact(), {})
    for budget in map(float, args.bits.split(",")):
        for name, arm in ARMS.items():
            plan = plan_for(loaded, budget, arm)
            if plan is None or any((x["arm"], x["budget"]) == (name, budget) for x in result["results"]):
                continue
            fitted = aqua_kv.fit(plan, found)
            subject = PackedModel(loaded, plan, {**means, **fitted.tensors})
            row: dict[str, Any] = {
                "arm": name, "budget": budget, "model_bytes": plan.model_bytes(),
                "variance_left": {w: _mean([x for n, x in fitted.left.items() if n.endswith(w)]) for w in "kv"},
                "kv_bits_by_layer": " ".join(f"{x.k.bits}{x.v.bits}" for x in plan.layers), "texts": {},
            }  # fmt: skip
            for text, windows in texts.items():
                row["texts"][text] = measured = evaluate(subject, reference, windows)
                print(
                    f"{budget:>5} {name:<30} {text:<11} {measured['effective_bits']:.3f} bits "
                    f"({measured['effective_bits_with_model']:.2f} with the model's), KL {measured['kl']['mean']:.4f}, "
                    f"PPL {measured['ppl']['delta_pct']:+.2f} %, flips {100 * measured['flips']['rate']:.1f} %"
                )
            result["results"].append(row)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {out}")


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


if __name__ == "__main__":
    main()
