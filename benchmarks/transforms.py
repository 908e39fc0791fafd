"""What OSTQuant's transforms are worth, at equal effective bits, on the standing case.

Learned on kvcli's built-in corpus, judged on other text: windows of 2048 tokens with the second half scored. The cache
is uniform over layers (one scale a token and head, e5m3, Gaussian grid; centred; 4 sinks, a window of 32), so that the
arms differ in nothing but their transforms and in which means are taken off. Transforms are learned at 3 bits and
judged at 4, 3 and 2. Weights are judged after one fixed random rotation of all arms, rounded to nearest.

    python benchmarks/transforms.py --data wiki.test.raw
    python benchmarks/transforms.py --data wiki.test.raw --rows sweep

Whatever the JSON holds already is not measured again, and learning goes on where it was stopped (``--work``).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from demo import model_file
from torch import Tensor
from weights import rotate

from kvcli.calibration import corpora, transforming
from kvcli.calibration.learn_settings import LearnSettings, Weights
from kvcli.calibration.straight_through import quantized_weight
from kvcli.evaluation.activations import simulating
from kvcli.evaluation.fidelity import compare, summarize
from kvcli.models.loading import LoadedModel, load
from kvcli.plan import CachePlan
from kvcli.quant.format import KVFormat
from kvcli.runtime.packed_model import PackedModel

BASE = LearnSettings(maps=(), start="identity", steps=0, means=False)
LEARNED = LearnSettings()
ARMS = {
    "no transform": replace(BASE, transform="none"),
    "hadamard": BASE,
    "hadamard, weighted means": replace(BASE, means=True),
    "r_ov learned": replace(LEARNED, maps=("r_ov",), means=False, start="identity"),
    "all, closed form": replace(LEARNED, steps=0),
    "all learned": LEARNED,
    "all learned, plain means": replace(LEARNED, means=False, start="identity"),
}
SLOW = replace(LEARNED, rotation_rate=0.002, scale_rate=0.002)
SWEEP = {
    "rotations 0.02, scales 0.01": replace(LEARNED, rotation_rate=0.02, scale_rate=0.01),
    "rotations 0.002, scales 0.002": SLOW,
    "rotations 0.0005, scales 0.0005": replace(LEARNED, rotation_rate=0.0005, scale_rate=0.0005),
    "rotations 0.002, scales 0.002, batch 4": replace(SLOW, batch=4, check_every=5),
    "rotations 0.002, scales 0.002, forward-kl": replace(SLOW, loss="forward-kl"),
    "rotations 0.002, scales 0.002, start womi": replace(SLOW, start="womi"),
    "rotations 0.002, scales 0.002, start identity": replace(SLOW, start="identity"),
}
FOUR = Weights(4, 128)
FOR_WEIGHTS = replace(
    LEARNED, maps=("r_ov", "s_attn", "s_ffn", "s_qk", "s_ov", "s_ud"), weights=FOUR,
    format=KVFormat(4, grid="gaussian", scale_dtype="e5m3"),
)  # fmt: skip
WEIGHT_ARMS = {"plain rotation": BASE, "all learned": FOR_WEIGHTS}
WEIGHT_ROWS = {  # bits of the cache and of activations, and whether down's input is rotated
    "W4": (16, None, False), "W4KV4": (4, None, False), "W4KV3": (3, None, False),
    "W4A4KV4": (4, 4, False), "W4A4KV4, down rotated": (4, 4, True),
}  # fmt: skip


def plan_of(loaded: LoadedModel, settings: LearnSettings, bits: int) -> CachePlan:
    fmt = KVFormat.exact() if bits == 16 else replace(settings.format, bits=bits)
    return replace(settings, format=fmt).plan(transforming.exact_layers(loaded), loaded.dtype)


class Bench:
    """The text, the reference's distributions, and the JSON.

    Parameters
    ----------
    args
        The command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, Path(args.out)
        self.result: dict[str, Any] = json.loads(self.out.read_text()) if self.out.exists() else {"results": []}
        self.texts: list[Tensor] = []
        self.references: dict[bool, list[Tensor]] = {}

    def model(self, rotated: bool) -> LoadedModel:
        """Load the model, and see to the text and the reference's distributions on it."""
        loaded = load(self.args.model)
        if rotated:
            rotate(loaded)
            loaded.changes["rotation"] = 1
        self.texts = corpora.windows(self.args.data, loaded.tokenizer, self.args.window, limit=self.args.limit)
        if rotated not in self.references:
            exact = CachePlan(tuple(transforming.exact_layers(loaded)), dtype=loaded.dtype)
            self.references[rotated] = self.log_probs(PackedModel(loaded, exact, {}))
        return loaded

    def log_probs(self, subject: PackedModel) -> list[Tensor]:
        """Return log-probabilities of the scored half of each window."""
        return [subject.log_probs(x, scored=self.args.window // 2)[0] for x in self.texts]

    def has(self, row: str, arm: str) -> bool:
        """Whether the JSON holds an entry already."""
        return any((x["row"], x["arm"], x["windows"]) == (row, arm, self.args.limit) for x in self.result["results"])

    def wants(self, arm: str) -> bool:
        """Whether an arm is asked for."""
        return self.args.arms is None or arm in self.args.arms.split(";")

    def add(
        self, row: str, arm: str, plan: CachePlan, reference: list[Tensor], found: list[Tensor], more: dict[str, Any]
    ) -> None:
        """Judge, keep and print one entry."""
        each = [compare(p, q, x[-len(p) :]) for p, q, x in zip(reference, found, self.texts, strict=True)]
        merged = {name: torch.cat([x[name] for x in each]) for name in each[0]}
        entry = {
            "row": row, "arm": arm, "windows": self.args.limit, "effective_bits": plan.effective_bits(self.args.window),
            **{task: summarize(task, merged) for task in ("ppl", "kl", "flips")}, **more,
        }  # fmt: skip
        self.result["results"].append(entry)
        self.result |= {
            "question": "what are learned transforms worth at equal effective bits?",
            "model": Path(self.args.model).name,
            "data": Path(self.args.data).name, "calibration": "builtin", "window": self.args.window,
            "machine": {"processor": platform.machine(), "python": platform.python_version()},
        }  # fmt: skip
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.result, indent=1) + "\n")
        print(
            f"{row:24} {arm:40} {entry['effective_bits']:.3f} bits  KL {entry['kl']['mean']:.5f}  "
            f"PPL {entry['ppl']['delta_pct']:+.2f} %  flips {100 * entry['flips']['rate']:.2f} %",
            flush=True,
        )

    def transformed(
        self, settings: LearnSettings, rotated: bool
    ) -> tuple[LoadedModel, dict[str, Tensor], dict[str, Any]]:
        """Return a model with transforms fused, the means that its cache takes off, and what the JSON says of it."""
        loaded = self.model(rotated)
        settings = settings.shortened(loaded.max_context)
        tokens, length = settings.windows * settings.tokens, settings.tokens
        length *= min(2, loaded.max_context // length)
        corpus = corpora.tokens("builtin", loaded, num_tokens=tokens, seed=0, length=length)
        began = time.monotonic()
        report, means, _ = transforming.apply(loaded, corpus, settings, Path(self.args.work) / "transforms")
        more = {x: report[x] for x in ("settings", "curve", "held_out", "logit_difference", "untied_bytes")}
        q = {side: report["qsur"][side] for side in ("before", "after")}
        more["qsur"] = {
            side: {w: math.fsum(x for layer in q[side] for x in layer[w]) / sum(len(layer[w]) for layer in q[side])
                   for w in ("k", "v")}
            for side in q
        }  # fmt: skip
        return loaded, means, {**more, "seconds": time.monotonic() - began}

    def cache(self, arms: dict[str, LearnSettings], bits: tuple[int, ...], row: Callable[[int], str]) -> None:
        """Judge each arm's cache at each width."""
        for arm, settings in arms.items():
            todo = [x for x in bits if not self.has(row(x), arm)]
            if not todo or not self.wants(arm):
                continue
            loaded, means, more = self.transformed(settings, rotated=False)
            for x in todo:
                plan = plan_of(loaded, settings, x)
                found = self.log_probs(PackedModel(loaded, plan, means))
                self.add(row(x), arm, plan, self.references[False], found, more)

    def weights(self) -> None:
        """Judge weights of 4 bits alone, with the cache, and with simulated activations."""
        for arm, settings in WEIGHT_ARMS.items():
            todo = [x for x in WEIGHT_ROWS if not self.has(x, arm)]
            if not todo or not self.wants(arm):
                continue
            loaded, means, more = self.transformed(settings, rotated=True)
            exact = [x.weight.data for x in linears(loaded)]
            for row in todo:
                bits, activations, down = WEIGHT_ROWS[row]
                for layer, weight in zip(linears(loaded), exact, strict=True):
                    layer.weight.data = quantized_weight(weight, FOUR.fitting(weight.shape[1]))
                plan = plan_of(loaded, settings, bits)
                simulated = nullcontext() if activations is None else simulating(
                    loaded.model, activations, rotate_down=down
                )  # fmt: skip
                with simulated:
                    found = self.log_probs(PackedModel(loaded, plan, means))
                self.add(row, arm, plan, self.references[True], found, more)


def linears(loaded: LoadedModel) -> list[torch.nn.Linear]:
    return [x for x in loaded.model.model.layers.modules() if isinstance(x, torch.nn.Linear)]


def main() -> None:
    """Measure the rows asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="WikiText-2 raw test file")
    parser.add_argument("--rows", default="kv3,kv4,kv2,weights", help="any of kv2, kv3, kv4, weights, sweep")
    parser.add_argument("--arms", help="names of arms, with semicolons; all if left out")
    parser.add_argument("--model", default=str(model_file()))
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--limit", type=int, default=2, help="windows")
    parser.add_argument("--work", default="build/transforms", help="folder for what is learned")
    parser.add_argument("--out", default="benchmarks/results/transforms.json")
    args = parser.parse_args()
    Path(args.work).mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    rows = args.rows.split(",")
    widths = tuple(int(x[2:]) for x in rows if x.startswith("kv"))
    if widths:
        bench.cache(ARMS, widths, lambda x: f"KV{x}")
    if "weights" in rows:
        bench.weights()
    if "sweep" in rows:
        bench.cache(SWEEP, (3,), lambda x: "sweep, KV3")


if __name__ == "__main__":
    main()
