"""What predictors are worth: none, absorbed and always, at 2.5, 3.25 and 4.25 effective bits.

SmolLM2-135M-Instruct, windows of 2048 tokens with the second half scored, bits counted at 2048 tokens, calibrated on
the built-in corpus without one of its kinds; judged on WikiText-2 raw test and on the kind that was left out. The model
has the default recipe's transforms, in closed form, and the reference is the model as it was. Every arm searches
the default's space as ``kvcli solve`` does, from the same measurements of layers, and the best of three settings on
calibration text is taken. Writes JSON after every measurement, and takes up where it was stopped.

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

from kvcli.calibration import aqua_kv, corpora, transforming
from kvcli.calibration.adapting import AdapterSettings, search
from kvcli.calibration.learn_settings import LearnSettings
from kvcli.calibration.measuring import Measuring, check_probe
from kvcli.calibration.pipeline import Budget, exact_layers, search_space
from kvcli.calibration.stages import Stages, in_turn
from kvcli.evaluation.fidelity import evaluate
from kvcli.models.loading import load
from kvcli.plan import CachePlan
from kvcli.runtime.packed_cache import ATTENTION
from kvcli.runtime.packed_model import PackedModel

WINDOW, LEFT_OUT = 2048, "narrative"
LEARN = ",".join(f"builtin:{x}" for x in ("arithmetic", "code", "dialogue", "everyday", "prose", "tables"))
ARMS = {
    "always": AdapterSettings("always"),
    "absorbed": AdapterSettings("absorbed"),
    "none": AdapterSettings(),
    "always, as in the paper": AdapterSettings("always", depth=1, both=False),
    "always, predictors in 4 bits": AdapterSettings("always", bits=4),
}


def main() -> None:
    """Collect moments once, then measure arm by arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="WikiText-2 raw test file")
    parser.add_argument("--bits", default="2.5,3.25,4.25", help="effective bits at 2048 tokens, with commas")
    parser.add_argument("--tokens", type=int, default=65536, help="calibration tokens")
    parser.add_argument("--limit", type=int, default=2, help="windows of each text")
    parser.add_argument("--work", default="build/adapters", help="folder of what was measured")
    parser.add_argument("--out", default="benchmarks/results/adapters.json")
    args = parser.parse_args()
    out = Path(args.out)
    result: dict[str, Any] = {
        "question": "what are predictors worth, in quality per effective bit?", "model": model_file().name,
        "calibration": LEARN, "transforms": "closed form", "tokens": args.tokens, "windows": args.limit, "results": [],
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
    geometry, space = exact_layers(loaded), search_space("balanced", exact_layers(loaded))
    exact = CachePlan(tuple(geometry), dtype=loaded.dtype)
    reference = PackedModel(load(str(model_file())), exact, {})
    widest = ARMS["always"].applied(
        replace(exact, layers=tuple(space.layer(x, space.k[0], space.v[0]) for x in geometry))
    )  # fmt: skip
    short = corpora.tokens(LEARN, loaded, num_tokens=8192, seed=0, length=1024)
    learn = LearnSettings.of_recipe("balanced")
    assert learn is not None
    Path(args.work).mkdir(parents=True, exist_ok=True)
    _, means, _ = transforming.apply(loaded, short, learn, Path(args.work) / "transforms")
    with torch.no_grad():
        own = aqua_kv.statistics(loaded, widest, ids)
        work = Measuring(
            loaded, means, space, geometry, Stages(Path(args.work)),
            {"model": loaded.sha256, "dtype": loaded.dtype, "data": short.sha256}, in_turn,
        )  # fmt: skip
        costs, probe = work.costs(short.ids), check_probe(loaded, short.ids, means)
    for name, arm in ARMS.items():
        for budget in map(float, args.bits.split(",")):
            if any((x["arm"], x["budget"]) == (name, budget) for x in result["results"]):
                continue
            with torch.no_grad():
                tried = search(costs, own, arm, Budget(budget, WINDOW))
                kl = [probe.using({**means, **x.fitted.tensors}).cost_of(x.plan).kl for x in tried]
            best = tried[kl.index(min(kl))]
            plan, fitted = best.plan, best.fitted
            subject = PackedModel(loaded, plan, {**means, **fitted.tensors})
            row: dict[str, Any] = {
                "arm": name, "budget": budget, "model_bytes": plan.model_bytes(), "calibration_kl": min(kl),
                "sinks": plan.sink_tokens, "window": plan.residual_window,
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
