"""What predictors are worth: none, absorbed and always, at 2.5, 3.25 and 4.25 effective bits.

SmolLM2-135M-Instruct, windows of 2048 tokens with the second half scored, bits counted at 2048 tokens, calibrated on
the built-in corpus without one of its kinds; judged on WikiText-2 raw test and on the kind that was left out. The model
has the default recipe's transforms, in closed form, and the reference is the model as it was. Every arm searches
the default's space as ``kvcli solve`` does, from the same measurements of layers, and the best of three settings on
calibration text is taken. ``--rows text`` asks instead how much text predictors need: all layers in 2 bits, fitted on
the beginnings of the same windows, 512 tokens in all and more, so that every amount is of all kinds. ``--rows anchors``
asks from where to predict: how many layers, how far back, in a chain or from stars, in 2 bits again, and what that
costs in bytes and products. Writes JSON after every measurement, and takes up where it was stopped.

    python benchmarks/adapters.py --data wiki.test.raw
    python benchmarks/adapters.py --data wiki.test.raw --rows text
    python benchmarks/adapters.py --data wiki.test.raw --rows anchors --tokens 8192
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from demo import model_file
from torch import Tensor

from kvcli.calibration import aqua_kv, corpora, transforming
from kvcli.calibration.adapting import AdapterSettings, search
from kvcli.calibration.learn_settings import LearnSettings
from kvcli.calibration.measuring import Measuring, check_probe
from kvcli.calibration.pipeline import Budget, exact_layers, search_space
from kvcli.calibration.stages import Stages, in_turn
from kvcli.evaluation.fidelity import evaluate
from kvcli.models.loading import load
from kvcli.plan import CachePlan
from kvcli.quant.format import KVFormat
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
ANCHORS = {
    "none": None,
    "the layer's own keys, for values alone": AdapterSettings("absorbed"),
    "one layer, keys for keys and values for values": AdapterSettings("always", depth=1, both=False),
    "one layer": AdapterSettings("always", depth=1),
    "two layers": AdapterSettings("always", depth=2),
    "three layers": AdapterSettings("always", depth=3),
    "one layer, two back": AdapterSettings("always", depth=1, back=2),
    "stars of two": AdapterSettings("always", depth=1, back=2, star=True),
    "stars of four": AdapterSettings("always", depth=1, back=4, star=True),
}
TWO = KVFormat(2, grid="gaussian", scale_dtype="e5m3")
AMOUNTS = (0, 512, 1024, 2048, 4096, 8192, 16384, 65536)  # tokens that predictors are fitted on; without for 0


class Bench:
    """The model with the default's transforms, the texts, and the file that is written.

    Parameters
    ----------
    args
        Of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.out, self.work = Path(args.out), Path(args.work)
        self.work.mkdir(parents=True, exist_ok=True)
        self.result: dict[str, Any] = {
            "question": "what are predictors worth, in quality per effective bit?", "model": model_file().name,
            "calibration": LEARN, "transforms": "the default's", "tokens": args.tokens, "windows": args.limit,
            "results": [],
        }  # fmt: skip
        if self.out.exists():
            before = json.loads(self.out.read_text())
            if _asked(before) == _asked(self.result):
                self.result.update(before)
        self.loaded = loaded = load(str(model_file()))
        loaded.model.set_attn_implementation(ATTENTION)
        self.ids = corpora.tokens(LEARN, loaded, num_tokens=args.tokens, seed=0, length=WINDOW).ids
        self.texts = {
            name: corpora.windows(spec, loaded.tokenizer, WINDOW, limit=args.limit)
            for name, spec in (("WikiText-2", args.data), (LEFT_OUT, f"builtin:{LEFT_OUT}"))
        }
        self.geometry, self.space = exact_layers(loaded), search_space("balanced", exact_layers(loaded))
        self.reference = PackedModel(load(str(model_file())), CachePlan(tuple(self.geometry), dtype=loaded.dtype), {})
        self.short = corpora.tokens(LEARN, loaded, num_tokens=8192, seed=0, length=1024)
        learn = LearnSettings.of_recipe("balanced")
        assert learn is not None
        _, self.means, _ = transforming.apply(loaded, self.short, learn, self.work / "transforms")

    def judged(self, name: str, plan: CachePlan, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Print and return what a plan costs on every text."""
        subject, found = PackedModel(self.loaded, plan, {**self.means, **tensors}), {}
        for text, windows in self.texts.items():
            found[text] = measured = evaluate(subject, self.reference, windows)
            print(
                f"{name:<40} {text:<11} {measured['effective_bits']:.3f} bits "
                f"({measured['effective_bits_with_model']:.2f} with the model's), KL {measured['kl']['mean']:.4f}, "
                f"PPL {measured['ppl']['delta_pct']:+.2f} %, flips {100 * measured['flips']['rate']:.1f} %", flush=True,
            )  # fmt: skip
        return found

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.result["results"].append(row)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.result, indent=1) + "\n")

    def arms(self, budgets: list[float]) -> None:
        """Search and judge every arm at every budget that the file lacks."""
        widest = ARMS["always"].applied(self.plan(self.space.k[0], self.space.v[0]))
        with torch.no_grad():
            own = aqua_kv.statistics(self.loaded, widest, self.ids)
            measuring = Measuring(
                self.loaded, self.means, self.space, self.geometry, Stages(self.work),
                {"model": self.loaded.sha256, "dtype": self.loaded.dtype, "data": self.short.sha256}, in_turn,
            )  # fmt: skip
            costs = measuring.costs(self.short.ids)
            probe = check_probe(self.loaded, self.short.ids, self.means)
        for (name, arm), budget in product(ARMS.items(), budgets):
            if any((x["arm"], x["budget"]) == (name, budget) for x in self.result["results"]):
                continue
            with torch.no_grad():
                tried = search(costs, own, arm, Budget(budget, WINDOW))
                kl = [probe.using({**self.means, **x.fitted.tensors}).cost_of(x.plan).kl for x in tried]
            best = tried[kl.index(min(kl))]
            plan, fitted = best.plan, best.fitted
            self.add({
                "arm": name, "budget": budget, "model_bytes": plan.model_bytes(), "calibration_kl": min(kl),
                "sinks": plan.sink_tokens, "window": plan.residual_window,
                "variance_left": {w: _mean([x for n, x in fitted.left.items() if n.endswith(w)]) for w in "kv"},
                "kv_bits_by_layer": " ".join(f"{x.k.bits}{x.v.bits}" for x in plan.layers),
                "texts": self.judged(f"{budget:>5} {name}", plan, fitted.tensors),
            })  # fmt: skip

    def amounts(self) -> None:
        """Judge the same formats with predictors that saw more and more text."""
        settings, plain = ARMS["always"], replace(self.plan(TWO, TWO), sink_tokens=4, residual_window=32)
        for tokens in AMOUNTS:
            if any(x["tokens"] == tokens for x in self.result["results"]):
                continue
            plan, fitted = plain, None
            if tokens:
                plan = settings.applied(plain)
                ids = self.ids[:, : tokens // len(self.ids)]
                with torch.no_grad():
                    fitted = aqua_kv.fit(plan, aqua_kv.statistics(self.loaded, plan, ids))
            found = self.judged(f"2 bits, fitted on {tokens} tokens", plan, fitted.tensors if fitted else {})
            self.add({"tokens": tokens, "texts": found})

    def anchors(self) -> None:
        """Judge the same formats with predictors that read other layers."""
        plain = replace(self.plan(TWO, TWO), sink_tokens=4, residual_window=32)
        for name, settings in ANCHORS.items():
            if any(x["anchors"] == name for x in self.result["results"]):
                continue
            plan, fitted = plain, None
            if settings is not None:
                plan = settings.applied(plain)
                with torch.no_grad():
                    fitted = aqua_kv.fit(plan, aqua_kv.statistics(self.loaded, plan, self.ids))
            row: dict[str, Any] = {"anchors": name, "model_bytes": plan.model_bytes()}
            if fitted is not None:
                row["products_a_token"] = sum(x.numel() for n, x in fitted.tensors.items() if n.endswith("weight"))
                row["variance_left"] = {w: _mean([x for n, x in fitted.left.items() if n.endswith(w)]) for w in "kv"}
            self.add({**row, "texts": self.judged(name, plan, fitted.tensors if fitted else {})})

    def plan(self, k: KVFormat, v: KVFormat) -> CachePlan:
        """Return the plan that treats all layers alike."""
        return CachePlan(tuple(self.space.layer(x, k, v) for x in self.geometry), dtype=self.loaded.dtype)


def _asked(result: dict[str, Any]) -> dict[str, Any]:
    return {k: x for k, x in result.items() if k != "results"}


def main() -> None:
    """Collect moments once, then measure arm by arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="WikiText-2 raw test file")
    parser.add_argument("--rows", choices=("arms", "text", "anchors"), default="arms", help="which question to ask")
    parser.add_argument("--bits", default="2.5,3.25,4.25", help="effective bits at 2048 tokens, with commas")
    parser.add_argument("--tokens", type=int, default=65536, help="calibration tokens")
    parser.add_argument("--limit", type=int, help="most windows of each text (default: 2; 8 with --rows text)")
    parser.add_argument("--work", default="build/adapters", help="folder of what was measured")
    parser.add_argument("--out", help="default: adapters[_text|_anchors].json under benchmarks/results")
    args = parser.parse_args()
    args.limit = args.limit or (8 if args.rows == "text" else 2)
    args.out = args.out or f"benchmarks/results/adapters{'' if args.rows == 'arms' else f'_{args.rows}'}.json"
    bench = Bench(args)
    if args.rows == "arms":
        bench.arms([float(x) for x in args.bits.split(",")])
    else:
        (bench.amounts if args.rows == "text" else bench.anchors)()
    print(f"written to {bench.out}")


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


if __name__ == "__main__":
    main()
