"""How long the suites of ``kvcli eval`` take: the whole command, loading included, wall-clock.

Each suite runs once, in a process of its own; nothing else should run. What it left out, for want of data, is written
down. Writes JSON after every suite, and keeps those of earlier runs.

    python benchmarks/suites.py --artifact OUT --data wiki.test.raw --suites quick,standard
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from fidelity import kvcli
from peers import write

from kvcli.evaluation import speed, suites


def main() -> None:
    """Time suites one by one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--data", required=True, help="WikiText-2 raw test file")
    parser.add_argument("--suites", default="quick", help=f"any of {', '.join(suites.SUITES)}, with commas")
    parser.add_argument("--task-data", help="folder of the data sets' files")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/suites.json"))
    args = parser.parse_args()
    chosen = [x.strip() for x in args.suites.split(",")]
    if unknown := set(chosen) - set(suites.SUITES):
        parser.error(f"there is no suite {', '.join(sorted(unknown))}.")
    before = json.loads(args.out.read_text("utf-8"))["results"] if args.out.exists() else []
    rows = [x for x in before if x["suite"] not in chosen]
    more = ["--task-data", args.task_data] if args.task_data else []
    for name in chosen:
        began = time.monotonic()
        found = kvcli("eval", str(args.artifact), "--suite", name, "--data", args.data, *more)
        seconds = time.monotonic() - began
        items = {task: x["items"] for task, x in found["tasks"].items()}
        rows.append({
            "suite": name, "seconds": seconds, "windows": found["windows"], "items": items,
            "left_out": sorted(found.get("skipped", {})), "effective_bits": found["effective_bits"],
            "dtype": found["dtype"],
        })  # fmt: skip
        print(f"{name}: {seconds:.0f} s, {found['windows']} windows, items {items}")
        write({
            "question": "how long do the suites take?", "data": Path(args.data).name,
            "machine": speed.machine(torch.get_num_threads()), "results": rows,
        }, args.out)  # fmt: skip


if __name__ == "__main__":
    main()
