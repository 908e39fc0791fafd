"""What the four methods are worth, alone and together, at 2.5, 3.25 and 4.25 effective bits.

None, each alone, each pair, and all four. *transforms*: the default recipe's closed forms, Hadamard and centring;
without them nothing is turned and nothing is taken off. *search*: KVTuner's layer-wise pairs; without it one format for
all keys and one for all values, the pair and the window that the measurements favour. *adapters*: AQUA-KV's predictors,
mode ``always``. *weights*: linear layers in 4 bits, statistically pre-calibrated, without GPTQ.

SmolLM2-135M-Instruct in float32 with one fixed random rotation of its residual stream in all arms, since its weights
lie on a 4-bit grid; the reference is that model. Calibrated on the built-in corpus, judged on WikiText-2 raw test,
windows of 2048 tokens with the second half scored, bits counted at 2048 tokens. Calibration time is processor time of
what an arm needs, decoding that of one thread, in bfloat16, at 2048 tokens. Writes JSON after every arm, and takes up
where it was stopped.

    python benchmarks/composition.py --data wiki.test.raw
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path

import torch
from demo import model_file
from torch import Tensor

from kvcli.calibration import aqua_kv, corpora, quantized_weights, transforming
from kvcli.calibration.adapting import TOKENS, AdapterSettings, Candidate, search
from kvcli.calibration.fusing import fuse, settle
from kvcli.calibration.learn_settings import LearnSettings
from kvcli.calibration.measuring import Measuring, check_probe
from kvcli.calibration.ostquant import NormGains, shapes, transforms
from kvcli.calibration.pipeline import Budget, exact_layers, moments, search_space
from kvcli.calibration.refine import predicted
from kvcli.calibration.sensitivity import Probe, Sensitivity
from kvcli.calibration.space import fits
from kvcli.calibration.stages import Stages, in_turn
from kvcli.calibration.surrogate import solve
from kvcli.evaluation import decode_speed, speed
from kvcli.evaluation.fidelity import compare, summarize
from kvcli.models.loading import LoadedModel, load
from kvcli.plan import CachePlan
from kvcli.runtime.packed_cache import ATTENTION
from kvcli.runtime.packed_model import PackedModel
from kvcli.runtime.runner import ModelRunner

WINDOW, SEED, DECODED = 2048, 1, 4
LEADING = 3  # plans that are compared on calibration text
METHODS = ("transforms", "search", "adapters", "weights")
ALWAYS = AdapterSettings("always")


class Clock(dict[str, float]):
    """Processor seconds of the parts of a calibration, kept in a file: parts that are taken up again take no time."""

    def __init__(self, path: Path) -> None:
        super().__init__(json.loads(path.read_text("utf-8")) if path.exists() else {})
        self.path = path

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what runs under a name."""
        began = time.process_time()
        yield
        self[name] = max(self.get(name, 0.0), time.process_time() - began)
        self.path.write_text(json.dumps(self), "utf-8")


def rotated() -> LoadedModel:
    """Return the standing model with its residual stream rotated."""
    loaded = load(str(model_file()), dtype="float32")
    config = loaded.model.config
    random = torch.randn(shapes(config)["r_res"], generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
    fuse(loaded.model, [NormGains(), *transforms(config, settle(config, {"r_res": torch.linalg.qr(random).Q}))])
    loaded.changes["rotation"] = SEED
    loaded.model.set_attn_implementation(ATTENTION)
    return loaded


@dataclass
class Prepared:
    """One model, with or without transforms and stored weights, and what was measured of it."""

    loaded: LoadedModel
    means: dict[str, Tensor]
    costs: Sensitivity
    ids: Tensor
    own: aqua_kv.Statistics
    clock: Clock

    @cached_property
    def probe(self) -> Probe:
        """Return what plans are compared by, with the exact model's answers."""
        found = check_probe(self.loaded, self.ids, self.means)
        with self.clock("reference"):
            found.reference(CachePlan(tuple(exact_layers(self.loaded)), dtype=self.loaded.dtype))
        return found

    def uniform(self, budget: Budget) -> list[Candidate]:
        """Return the best plans with one format for all keys and one for all values."""
        space, geometry = self.costs.space, exact_layers(self.loaded)
        plans = [
            space.plan([space.layer(x, k, v) for x in geometry], setting, self.loaded.dtype)
            for setting in space.settings()
            for k, v in product(space.k, space.v)
            if fits(k, setting.block_size) and fits(v, setting.block_size)
        ]
        found = [Candidate(x, aqua_kv.Fitted({}, {}, {}), predicted(self.costs, x))
                 for x in plans if x.effective_bits(budget.context) <= budget.bits]  # fmt: skip
        return sorted(found, key=lambda x: x.predicted_kl)[:LEADING]

    def plans(self, methods: dict[str, bool], budget: Budget) -> list[Candidate]:
        """Return the candidates of an arm; none if its search space has no plan of so few bits."""
        if methods["search"] and methods["adapters"]:
            return search(self.costs, self.own, ALWAYS, budget)
        if methods["search"]:
            return [Candidate(x.plan, aqua_kv.Fitted({}, {}, {}), x.predicted_kl)
                    for x in solve(self.costs, budget.bits, budget.context)[:LEADING]]  # fmt: skip
        found = self.uniform(budget)
        if not methods["adapters"]:
            return found
        plans = [ALWAYS.applied(x.plan) for x in found]
        return [Candidate(p, aqua_kv.fit(p, self.own), x.predicted_kl) for p, x in zip(plans, found, strict=True)]

    def best(self, found: list[Candidate]) -> tuple[CachePlan, dict[str, Tensor]]:
        """Return the plan that does best on calibration text, and its tensors."""
        measured = [self.probe.using({**self.means, **x.fitted.tensors}).cost_of(x.plan).kl for x in found]
        chosen = found[measured.index(min(measured))]
        return chosen.plan, {**self.means, **chosen.fitted.tensors}


def prepare(methods: dict[str, bool], work: Path) -> Prepared:
    """Make one model and measure it."""
    loaded, clock = rotated(), Clock(work / "clock.json")
    corpus = corpora.tokens("builtin", loaded, num_tokens=8192, seed=0, length=1024)
    space = search_space("balanced", exact_layers(loaded))
    means: dict[str, Tensor] = {}
    if methods["transforms"]:
        learn = LearnSettings.of_recipe("balanced")
        assert learn is not None
        with clock("transforms"):
            _, means, _ = transforming.apply(loaded, corpus, learn, work / "t")
    else:
        space = replace(space, transform="none", center=False)
    if methods["weights"]:
        settings = quantized_weights.WeightSettings("int4", "precalibrated")
        with clock("weights"):
            loaded, _, _ = quantized_weights.quantize(loaded, corpus, settings, work / "w")
        loaded.model.set_attn_implementation(ATTENTION)
    geometry, exact = exact_layers(loaded), CachePlan(tuple(exact_layers(loaded)), dtype=loaded.dtype)
    if space.center and not means:
        means = moments(loaded, exact, corpus.ids, lambda: None)
    source = {"model": loaded.sha256, "dtype": loaded.dtype, "data": corpus.sha256, **methods, "search": None}
    measuring = Measuring(loaded, means, space, geometry, Stages(work / "s"), source, in_turn)
    with clock("layers"):
        costs = measuring.costs(corpus.ids)
    ids = corpora.tokens("builtin", loaded, num_tokens=TOKENS, seed=0, length=1024).ids
    widest = ALWAYS.applied(replace(exact, layers=tuple(space.layer(x, space.k[0], space.v[0]) for x in geometry)))
    with clock("predictors"):
        own = aqua_kv.statistics(loaded, widest, ids)
    return Prepared(loaded, means, costs, corpus.ids, own, clock)


def decoding(loaded: LoadedModel, plan: CachePlan, tensors: dict[str, Tensor], rounds: int) -> tuple[float, int]:
    """Return processor seconds a token, and the bytes of weights that a step reads."""
    room = WINDOW + DECODED
    loaded = replace(loaded, model=deepcopy(loaded.model))  # the runner takes weights that are stored in few bits
    runner = ModelRunner(loaded, plan, tensors, dtype=torch.bfloat16, capacity=room, threads=1)
    ids = torch.randint(0, 1000, (room,), generator=torch.Generator().manual_seed(0))
    entered = decode_speed.contestant(
        decode_speed.RunnerDecoder("decode", runner, WINDOW), ids, WINDOW, random=True
    )  # fmt: skip
    timer = partial(speed.wall, clock=time.process_time)
    rows = speed.rows([entered], speed.race([entered], rounds=rounds, timer=timer), "decode", threads=1)
    return float(rows[0]["median_s"]), decode_speed.weight_bytes(runner)


def log_probs(subject: PackedModel, windows: list[Tensor]) -> list[Tensor]:
    """Return log-probabilities of the scored half of each window."""
    return [subject.log_probs(x, scored=WINDOW // 2)[0] for x in windows]


@torch.no_grad()
def main() -> None:
    """Measure arm by arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="WikiText-2 raw test file")
    parser.add_argument("--bits", default="2.5,3.25,4.25", help="effective bits at 2048 tokens, with commas")
    parser.add_argument("--limit", type=int, default=2, help="windows")
    parser.add_argument("--rounds", type=int, default=3, help="of decoding")
    parser.add_argument("--work", default="build/composition", help="folder of what was measured")
    parser.add_argument("--out", default="benchmarks/results/composition.json")
    args = parser.parse_args()
    out, base = Path(args.out), rotated()
    windows = corpora.windows(args.data, base.tokenizer, WINDOW, limit=args.limit)
    exact = CachePlan(tuple(exact_layers(base)), dtype=base.dtype)
    reference = log_probs(PackedModel(base, exact, {}), windows)
    rows = list(json.loads(out.read_text())["results"]) if out.exists() else []
    done = {(x["budget"], x["windows"], *x["methods"]) for x in rows}
    for first in product((False, True), repeat=2):
        model = dict(zip(("transforms", "weights"), first, strict=True))
        todo = [
            (budget, names, own)
            for second in product((False, True), repeat=2)
            for own in [{**model, **dict(zip(("search", "adapters"), second, strict=True))}]
            for names in [[x for x in METHODS if own[x]]]
            if len(names) != 3  # none, each alone, each pair, all
            for budget in map(float, args.bits.split(","))
            if (budget, args.limit, *names) not in done
        ]
        if not todo:
            continue
        folder = Path(args.work) / "-".join(x for x in model if model[x])
        folder.mkdir(parents=True, exist_ok=True)
        prepared = prepare({**model, "search": True, "adapters": True}, folder)
        for budget, names, methods in todo:
            _ = prepared.probe  # every arm counts it
            began = time.process_time()
            found = prepared.plans(methods, Budget(budget, WINDOW))
            plan, tensors = prepared.best(found)
            own_s = time.process_time() - began
            step_s, weight_bytes = decoding(prepared.loaded, plan, tensors, args.rounds)
            judged = log_probs(PackedModel(prepared.loaded, plan, tensors), windows)
            each = [compare(p, q, x[-len(p) :]) for p, q, x in zip(reference, judged, windows, strict=True)]
            merged = {name: torch.cat([x[name] for x in each]) for name in each[0]}
            needed = {"layers", "reference", *names} | ({"predictors"} if methods["adapters"] else set())
            row = {
                "methods": names, "budget": budget, "windows": args.limit,
                "effective_bits": plan.effective_bits(WINDOW), "nominal_bits": plan.nominal_bits,
                **{task: summarize(task, merged) for task in ("ppl", "kl", "flips")},
                "model_bytes": plan.model_bytes(), "weight_bytes": weight_bytes, "decode_s": step_s,
                "calibration_s": own_s + sum(prepared.clock[x] for x in needed if x in prepared.clock),
                "sinks": plan.sink_tokens, "window": plan.residual_window,
                "kv_bits_by_layer": " ".join(f"{x.k.bits}{x.v.bits}" for x in plan.layers),
            }  # fmt: skip
            rows.append(row)
            print(
                f"{budget:>5} {'+'.join(names) or 'none':<38} {row['effective_bits']:.3f} bits, "
                f"KL {row['kl']['mean']:.4f}, PPL {row['ppl']['delta_pct']:+.2f} %, "
                f"flips {100 * row['flips']['rate']:.1f} %, {1e3 * step_s:.1f} ms",
                flush=True,
            )
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps({
                "question": "what are the four methods worth, alone and together?", "model": model_file().name,
                "data": Path(args.data).name, "calibration": "builtin", "window": WINDOW,
                "machine": {"processor": platform.machine(), "python": platform.python_version()}, "results": rows,
            }, indent=1) + "\n")  # fmt: skip
    print(f"written to {out}")


if __name__ == "__main__":
    main()
