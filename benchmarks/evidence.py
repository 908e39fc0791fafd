"""The evidence: everything that is measured of the standing model at a few budgets, and the page that shows it.

    python benchmarks/evidence.py --measure --data wiki.test.raw --keep FOLDER   # hours; then renders
    python benchmarks/evidence.py                                                # renders docs/evidence.md

Measuring calibrates once, solves for every budget, and runs ``kvcli eval --suite`` on each artifact. ``--bits`` also
takes ``exact``, all in 16 bits, which must lose nothing, and ``wrecked``, all in 2 bits without exact tokens, which
must lose visibly: they show that the tasks can tell. All artifacts are judged against the model file itself, whose
answers are asked for once. Whatever is finished stays in the JSON and in FOLDER, item by item, and is not asked again.

Rendering reads the files in benchmarks/results, and leaves out what none of them holds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo import model_file
from evidence_page import NAME, page
from fidelity import kvcli
from peers import write

from kvcli.calibration.presets import dump
from kvcli.errors import InputError
from kvcli.evaluation import data_sets, fidelity, suites

FIXED = {"exact": 16, "wrecked": 2}  # bits of all keys and values


class Evidence:
    """Artifacts, what was measured of them, and the file that keeps it.

    Parameters
    ----------
    args
        Of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.file: Path = args.results / NAME
        self.keep: Path = args.keep
        self.keep.mkdir(parents=True, exist_ok=True)
        asked = {
            "question": "what do caches of few bits cost, all in all?", "model": args.model.name,
            "data": Path(args.data).name, "suite": args.suite, "limit": args.limit, "questions": args.questions,
            "windows": args.windows, "window": args.window, "calibration": args.calibration, "recipe": args.recipe,
        }  # fmt: skip
        self.result: dict[str, Any] = {**asked, "artifacts": {}, "skipped": {}}
        if self.file.exists():
            before = json.loads(self.file.read_text("utf-8"))
            if {x: before.get(x) for x in asked} == asked:
                self.result = before

    def artifact(self, name: str) -> Path:
        """Return the folder of an artifact, made if it is not there."""
        out = self.keep / name
        if (out / "kvcli.json").exists():
            return out
        if name in FIXED:
            preset = self.keep / f"{name}.yaml"
            layers = len(kvcli("inspect", str(self.base()))["layers"])
            preset.write_text(dump([(FIXED[name], FIXED[name])] * layers), "utf-8")
            self._calibrate(out, "--recipe", f"kvtuner:{preset}:token")
        else:
            kvcli("solve", str(self.base()), "--bits", name, "-o", str(out))
        return out

    def base(self) -> Path:
        """Return the folder of the calibrated artifact that budgets are solved from."""
        out = self.keep / "base"
        if not (out / "kvcli.json").exists():
            budget = max((x for x in self.args.bits.split(",") if x not in FIXED), key=float, default="4.25")
            self._calibrate(out, "--recipe", self.args.recipe, "--bits", budget)
        return out

    def _calibrate(self, out: Path, *how: str) -> None:
        kvcli(
            "calibrate", str(self.args.model), *how, "--context", str(self.args.window), "--data",
            self.args.calibration, "-o", str(out),
        )  # fmt: skip

    def measure(self, name: str) -> None:
        """Measure what is missing of an artifact."""
        path = self.artifact(name)
        sha256 = hashlib.sha256((path / "kvcli.json").read_bytes()).hexdigest()
        row = self.result["artifacts"].get(name)
        if row is None or row["artifact"] != sha256:
            plan = kvcli("inspect", str(path), "--context", str(self.args.window))
            formats = " ".join(f"{x['k']['bits']}{x['v']['bits']}" for x in plan.pop("layers"))
            shown = (
                "effective_bits", "effective_bits_with_model", "nominal_bits", "context", "bytes_at",
                "bytes_at_16_bits", "model_bytes", "block_size", "sink_tokens", "residual_window", "dtype",
            )  # fmt: skip
            longest = json.loads((path / "config.json").read_text("utf-8"))["max_position_embeddings"]
            plan = {**{x: plan[x] for x in shown}, "kv_bits_by_layer": formats}
            for key in ("bytes_at", "bytes_at_16_bits"):
                plan[key] = {n: x for n, x in plan[key].items() if int(n) <= longest}
            row = {"artifact": sha256, "plan": plan, "tasks": {}, "seconds": {}}
            self.result["artifacts"][name] = row
        if "fidelity" not in row:
            found, row["seconds"]["fidelity"] = self._eval(path, fidelity.TASKS, self.args.windows)
            row["fidelity"] = found | {"data": Path(self.args.data).name}  # where it lies is nobody's business
            self._save()
        missing = [x for x in self._tasks() if x not in row["tasks"]]
        choices = [x for x in missing if x in suites.CHOICES]
        others = [x for x in missing if x not in choices]
        for kind, wanted, limit in (("choices", choices, self.args.questions), ("tasks", others, self.args.limit)):
            if wanted:
                found, row["seconds"][kind] = self._eval(path, wanted, limit)
                row["tasks"] |= found["tasks"]
                self._save()
        bits, loss = row["plan"]["effective_bits"], row["fidelity"]
        print(
            f"{name:>8}: {bits:.3f} effective bits, mean KL {loss['kl']['mean']:.4f}, "
            f"flips {100 * loss['flips']['rate']:.1f} %"
        )

    def _tasks(self) -> list[str]:
        """Return the suite's tasks, but those whose items cannot be had, which are written down."""
        chosen = [x for x in suites.SUITES[self.args.suite].tasks if x in suites.TASKS]
        if self.args.tasks:
            chosen = [x for x in chosen if x in self.args.tasks.split(",")]
        for name in [x for x in chosen if x in data_sets.HUB]:
            try:
                data_sets.records(name, self.args.task_data)
            except InputError as error:
                self.result["skipped"][name] = str(error)
                chosen.remove(name)
            else:
                self.result["skipped"].pop(name, None)
        return chosen

    def _eval(self, path: Path, tasks: Sequence[str], limit: int | None) -> tuple[dict[str, Any], float]:
        args = self.args
        words = [
            "--against", str(args.model), "--suite", args.suite, "--tasks", ",".join(tasks), "--data", args.data,
            "--resume", str(self.keep / "outcomes.jsonl"),
        ]  # fmt: skip
        # for tasks alone a window only tells how many bits there are
        words += ["--window", str(args.window if set(tasks) & set(fidelity.TASKS) else 16)]
        words += [] if limit is None else ["--limit", str(limit)]
        words += [] if args.task_data is None else ["--task-data", str(args.task_data)]
        began = time.monotonic()
        return kvcli("eval", str(path), *words), time.monotonic() - began

    def _save(self) -> None:
        write(self.result, self.file)


def main() -> None:
    """Measure if asked to, and render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure what is missing first")
    parser.add_argument("--data", help="with --measure: WikiText-2 raw test file")
    parser.add_argument("--keep", type=Path, help="with --measure: folder of artifacts and answers")
    parser.add_argument("--model", type=Path, help="GGUF file or folder; default: the standing model")
    parser.add_argument("--bits", default="4.25,3.25,2.5,exact,wrecked", help="effective bits, with commas")
    parser.add_argument("--suite", default="standard", choices=tuple(suites.SUITES))
    parser.add_argument("--tasks", help="of the suite only these, with commas, beside ppl, kl and flips")
    parser.add_argument("--task-data", type=Path, help="folder of the data sets' files")
    parser.add_argument("--limit", type=int, help="items of each task; default: the suite's")
    parser.add_argument("--questions", type=int, help="of each data set of multiple choice; default: the suite's")
    parser.add_argument("--windows", type=int, help="of perplexity, KL and flips; default: the suite's")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--calibration", default="builtin", help="calibration text")
    parser.add_argument("--recipe", default="balanced")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--out", type=Path, default=Path("docs/evidence.md"))
    args = parser.parse_args()
    if args.measure:
        if args.data is None or args.keep is None:
            parser.error("--measure needs --data and --keep.")
        args.model = args.model or model_file()
        evidence = Evidence(args)
        for name in args.bits.split(","):
            evidence.measure(name)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page(args.results), "utf-8")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
