"""What the search is worth: ours against the best uniform plan, random plans and KVTuner's own search.

SmolLM2-135M-Instruct at equal effective bits, counted at 2048 tokens. Every arm chooses on kvcli's built-in corpus and
is judged on other text: windows of 2048 tokens with the second half scored. Arms:

``ours``
    ``kvcli calibrate`` at its defaults.
``uniform``
    One pair of formats for all layers: of all pairs and settings within the budget, the best of the few that the
    surrogate ranks first, by KL on calibration text. Its ranking is a gift: alone it would have to be measured.
``random``
    The best of 50 random plans of equal cost by KL on calibration text: a random setting, random pairs.
``kvtuner``, ``kvtuner-kivi``
    The paper's pipeline: relative errors, Pareto pruning, DBSCAN, then trials of NSGA-II against KL on one window of
    calibration text, capped at the budget. On our formats of 2, 4 and 8 bits, or on the paper's (KIVI: keys per
    channel, values per token, groups of 32, fp16 scale and zero point, window 32).

Forward tokens are tokens times the share of the layers they went through, in everything an arm ran. The paper's search
as published runs 200 trials of 200 prompts, which the trials here, of one window, are far from: ours takes a
twentieth of it if a prompt has as many tokens as the JSON says. Writes JSON, an entry at a time; a run that was killed
goes on where it was.

    python benchmarks/search.py --data wiki.test.raw --arms ours,uniform,random,kvtuner
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from demo import model_file

from kvcli.calibration import corpora, kvtuner, paper_search, pipeline, refine, sensitivity
from kvcli.calibration.measuring import PROBE_TOKENS, PROBE_WINDOWS, Measuring, check_probe
from kvcli.calibration.refine import predicted
from kvcli.calibration.relative_errors import measure
from kvcli.calibration.space import SearchSpace, Setting
from kvcli.calibration.stages import Stages
from kvcli.errors import BudgetError
from kvcli.evaluation.fidelity import compare, summarize
from kvcli.models.loading import LoadedModel, load
from kvcli.plan import CachePlan
from kvcli.quant.format import KVFormat
from kvcli.runtime.packed_cache import ATTENTION
from kvcli.runtime.packed_model import PackedModel

WINDOW = 2048
ARMS = ("ours", "uniform", "random", "kvtuner", "kvtuner-kivi")
UNIFORM = 6  # uniform plans that are measured
RANDOM = 50
PAPER = (200, 200)  # trials, and prompts of GSM8K in each, of KVTuner's search as published
SLACK = 0.05  # bits a random plan may leave unspent


class Bench:
    """The model, its calibration text, and what has been measured so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.loaded: LoadedModel = load(str(model_file()))
        self.loaded.model.set_attn_implementation(ATTENTION)
        self.corpus = corpora.tokens(args.calibration, self.loaded, num_tokens=8192, seed=args.seed, length=1024)
        self.geometry = pipeline.exact_layers(self.loaded)
        self.space = pipeline.search_space("balanced", self.geometry)
        self.layers_run = 0
        for layer in self.loaded.model.model.layers:
            layer.register_forward_pre_hook(self._count, with_kwargs=True)
        self.stages = Stages(Path(args.work))
        self.source = {"model": self.loaded.sha256, "dtype": self.loaded.dtype, "data": self.corpus.sha256}
        exact = CachePlan(tuple(self.geometry), dtype=self.loaded.dtype)
        with self.timed("moments"):
            self.tensors = self.stages.run(
                "moments", lambda step: pipeline.moments(self.loaded, exact, self.corpus.ids, step),
                description="", settings=self.source,
            )  # fmt: skip
        self.work = Measuring(
            self.loaded, self.tensors, self.space, self.geometry, self.stages, self.source, run=self._in_turn
        )
        self.check = check_probe(self.loaded, self.corpus.ids, self.tensors)
        self.trial = self.work.probe(self.check.ids[:1])
        with self.timed("costs"):
            self.costs = self.work.costs(self.corpus.ids)
        self._references: list[torch.Tensor] = []

    def _count(self, module: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.layers_run += hidden.shape[0] * hidden.shape[1]

    def _in_turn(self, work: Any, tasks: Any) -> Iterator[tuple[int, Any]]:
        for i, task in enumerate(tasks):
            began = time.monotonic()
            yield i, work(task)
            print(f"  {i + 1}/{len(tasks)} {time.monotonic() - began:.1f} s", flush=True)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the tokens and seconds of a step to those that earlier, killed runs spent on it."""
        file = self.stages.folder / f"spent-{name}.json"
        self.stages.folder.mkdir(parents=True, exist_ok=True)
        spent = json.loads(file.read_text()) if file.exists() else {"forward_tokens": 0.0, "wall_s": 0.0, "cpu_s": 0.0}
        layers, began, cpu = self.layers_run, time.monotonic(), time.process_time()
        try:
            yield
        finally:
            spent["forward_tokens"] += (self.layers_run - layers) / len(self.geometry)
            spent["wall_s"] += time.monotonic() - began
            spent["cpu_s"] += time.process_time() - cpu
            file.write_text(json.dumps(spent))

    def spent(self, *names: str) -> dict[str, float]:
        """Return tokens and seconds of these steps together; CPU seconds say more where a machine is shared."""
        each = [json.loads((self.stages.folder / f"spent-{x}.json").read_text()) for x in names]
        return {name: sum(x[name] for x in each) for name in each[0]}

    def measured(self, name: str, plans: list[CachePlan]) -> list[float]:
        """Return the KL of plans on calibration text."""
        with self.timed(name):
            return [x.kl for x in self.work.plans(name, self.check, plans, name)]

    # --- arms -------------------------------------------------------------------------------------------------------

    def ours(self, bits: float) -> tuple[CachePlan, dict[str, Any]]:
        """Calibrate as the command does; its stages are taken from this benchmark's."""
        name = f"ours-{bits:g}"
        with self.timed(name):
            tried, chosen = refine.search(self.work, self.costs, self.corpus.ids, bits, WINDOW, nominal=False)
        best = tried[chosen]
        rows = [{"kl": x.cost.kl, "predicted_kl": x.predicted_kl} for x in tried]
        return best.plan, {
            "calibration_kl": best.cost.kl,
            "tried": rows,
            "chosen": chosen,
            **self.spent("moments", "costs", name),
        }

    def uniform(self, bits: float) -> tuple[CachePlan, dict[str, Any]]:
        """Find the best pair for all layers."""
        plans = []
        for setting in self.space.settings():
            for k in self.space.k:
                for v in self.space.v:
                    plan = self.space.plan(
                        [self.space.layer(x, k, v) for x in self.geometry], setting, self.loaded.dtype
                    )
                    if plan.effective_bits(WINDOW) <= bits:
                        plans.append(plan)
        plans = sorted(plans, key=lambda x: predicted(self.costs, x))[:UNIFORM]
        return self._best(f"uniform-{bits:g}", plans)

    def random(self, bits: float) -> tuple[CachePlan, dict[str, Any]]:
        """Draw plans of equal cost."""
        rng, plans = random.Random(self.args.seed), []
        while len(plans) < RANDOM:
            plan = self._draw(rng, bits)
            if plan is not None:
                plans.append(plan)
        return self._best(f"random-{bits:g}", plans)

    def _draw(self, rng: random.Random, bits: float) -> CachePlan | None:
        """Draw formats at random, then again for random layers, keeping what brings the cost nearer to the budget."""
        setting = rng.choice(list(self.space.settings()))
        layers = [self.space.layer(x, rng.choice(self.space.k), rng.choice(self.space.v)) for x in self.geometry]
        plan = self.space.plan(layers, setting, self.loaded.dtype)
        for _ in range(1000):
            off = plan.effective_bits(WINDOW) - bits
            if -SLACK <= off <= 0:
                return plan
            i = rng.randrange(len(layers))
            other = plan.with_layer(
                i, self.space.layer(self.geometry[i], rng.choice(self.space.k), rng.choice(self.space.v))
            )
            if abs(other.effective_bits(WINDOW) - bits + SLACK / 2) < abs(off + SLACK / 2):
                plan = other
        return None

    def _best(self, name: str, plans: list[CachePlan]) -> tuple[CachePlan, dict[str, Any]]:
        kl = self.measured(name, plans)
        best = min(range(len(plans)), key=lambda i: kl[i])
        return plans[best], {"calibration_kl": kl[best], "measured": len(plans), **self.spent("moments", name)}

    def kvtuner(self, bits: float) -> tuple[CachePlan, dict[str, Any]]:
        """Search as the paper does, on our formats of 2, 4 and 8 bits."""
        fields = {"axis": "token", "group": self.geometry[0].head_dim, "scale_dtype": "e5m3"}
        formats = tuple(KVFormat(b, grid="uniform" if b == 8 else "gaussian", **fields) for b in (2, 4, 8))
        space = SearchSpace(
            formats, formats, self.space.block_sizes, self.space.sink_tokens, self.space.residual_windows,
            transform=self.space.transform, center=self.space.center,
        )  # fmt: skip
        return self._paper("kvtuner", space, paper_search.best_setting(self.costs, WINDOW), bits)

    def kvtuner_kivi(self, bits: float) -> tuple[CachePlan, dict[str, Any]]:
        """Search as the paper does, on its own formats."""
        space = pipeline.search_space("kivi", self.geometry)
        return self._paper("kvtuner-kivi", space, next(space.settings()), bits)

    def _paper(self, name: str, space: SearchSpace, setting: Setting, bits: float) -> tuple[CachePlan, dict[str, Any]]:
        ids = self.corpus.ids[:PROBE_WINDOWS, :PROBE_TOKENS]
        probe = sensitivity.Probe(self.loaded.model, ids, self.loaded.rope, self.tensors)
        with self.timed(f"{name}-errors"):
            errors = measure(probe, space, self.geometry, setting, self.loaded.dtype)
        groups = kvtuner.group(errors, space, self.geometry)
        step = f"{name}-{bits:g}"

        def evaluate(plan: CachePlan) -> float:
            with self.timed(step):
                return self.trial.cost_of(plan).kl

        front = kvtuner.search(
            groups, space, self.geometry, setting, self.loaded.dtype, WINDOW, evaluate, trials=self.args.trials,
            cap=bits, seed=self.args.seed, storage=self.stages.folder / f"{step}.sqlite",
            step=lambda: print("  trial", flush=True),
        )  # fmt: skip
        best = kvtuner.best(front, bits)
        facts = {
            "calibration_kl": best.loss, "trials": front.trials, "evaluations": front.evaluations,
            "groups": [len(x.layers) for x in groups], "candidates": [len(x.candidates) for x in groups],
        }  # fmt: skip
        return best.plan, {**facts, **self.spent("moments", f"{name}-errors", step)}

    # --- judging ----------------------------------------------------------------------------------------------------

    def judge(self, plan: CachePlan) -> dict[str, Any]:
        """Measure a plan on the text that no arm has seen."""
        windows = corpora.windows(self.args.data, self.loaded.tokenizer, WINDOW, limit=self.args.limit)
        scored = WINDOW - WINDOW // 2
        if not self._references:
            exact = PackedModel(self.loaded, plan.as_exact(), {})
            self._references = [exact.log_probs(x, scored=scored)[0] for x in windows]
        subject = PackedModel(self.loaded, plan, self.tensors)
        found = [
            compare(p, subject.log_probs(x, scored=scored)[0], x[-scored:])
            for p, x in zip(self._references, windows, strict=True)
        ]
        merged = {name: torch.cat([f[name] for f in found]) for name in found[0]}
        return {task: summarize(task, merged) for task in ("kl", "ppl", "flips")}


@torch.no_grad()
def main() -> None:
    """Run the arms that are missing from the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="text to judge on")
    parser.add_argument("--bits", default="3.25,4", help="budgets, effective bits at 2048 tokens, with commas")
    parser.add_argument("--arms", default=",".join(ARMS), help="with commas")
    parser.add_argument("--calibration", default="builtin", help="text to choose on")
    parser.add_argument("--limit", type=int, default=4, help="windows to judge on")
    parser.add_argument("--trials", type=int, default=200, help="of the paper's search")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", default="search.work", help="folder of what was measured")
    parser.add_argument("--out", default="benchmarks/results/search.json")
    args = parser.parse_args()
    out = Path(args.out)
    result = json.loads(out.read_text()) if out.exists() else {
        "question": "what is the search worth at equal effective bits?",
        "model": model_file().name, "data": Path(args.data).name, "calibration": args.calibration,
        "window": WINDOW, "windows": args.limit, "results": [],
        "machine": {"processor": platform.machine(), "python": platform.python_version(), "torch": torch.__version__,
                    "threads": torch.get_num_threads()},
    }  # fmt: skip
    bench = Bench(args)
    for bits in map(float, args.bits.split(",")):
        for arm in args.arms.split(","):
            if any((x["arm"], x["budget"]) == (arm, bits) for x in result["results"]):
                continue
            try:
                plan, facts = getattr(bench, arm.replace("-", "_"))(bits)
            except BudgetError as error:
                result["results"].append({"arm": arm, "budget": bits, "error": str(error)})
            else:
                row = {
                    "arm": arm, "budget": bits, "effective_bits": plan.effective_bits(WINDOW),
                    "nominal_bits": plan.nominal_bits, **bench.judge(plan), **facts,
                    "setting": asdict(Setting(plan.block_size, plan.sink_tokens, plan.residual_window)),
                    "kv_bits_by_layer": " ".join(f"{x.k.bits}{x.v.bits}" for x in plan.layers),
                }  # fmt: skip
                result["results"].append(row)
                print(f"{arm} at {bits:g}: {row['effective_bits']:.3f} bits, KL {row['kl']['mean']:.4f}", flush=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=1) + "\n")
    most = max((x["forward_tokens"] for x in result["results"] if x["arm"] == "ours"), default=0.0)
    result["twentieth_of_the_paper_from_tokens_a_prompt"] = 20 * most / math.prod(PAPER)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"a twentieth of the paper's tokens from {20 * most / math.prod(PAPER):.1f} tokens a prompt")


if __name__ == "__main__":
    main()
