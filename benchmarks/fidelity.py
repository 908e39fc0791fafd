"""What caches cost in quality per effective bit: kvcli beside llama.cpp, Transformers and plain KIVI, in one run.

SmolLM2-135M-Instruct, WikiText-2 raw test, windows of 2048 tokens with the second half scored, effective bits counted
at 2048 tokens. kvcli is calibrated on its built-in corpus, other text, once for all budgets; quality_peers.py says how
the others are read. Writes JSON after every row, and takes up where it was stopped: a rerun with the same settings
measures what is missing, ``--fresh`` everything. Who is not installed, or does not run, stands in ``skipped``. In the
end draws docs/evidence/fidelity.svg (needs ``kvcli[report]``).

    pip install llama-cpp-python hqq optimum-quanto
    python benchmarks/fidelity.py --data wiki.test.raw
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

from demo import model_file

GROUPS = ("kvcli", "llama.cpp", "KIVI", "Transformers")
PACKAGES = ("kvcli", "torch", "transformers", "llama-cpp-python", "hqq", "optimum-quanto")


def kvcli(*words: str) -> dict[str, Any]:
    """Run one command with ``--json`` and return what it prints."""
    done = subprocess.run([sys.executable, "-m", "kvcli", *words, "--json"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


class Rows:
    """The result file, written after every row.

    Parameters
    ----------
    path
        The JSON file.
    asked
        Everything that decides the figures; rows of a file that was asked something else are not taken over.
    fresh
        Take no rows over.
    """

    def __init__(self, path: Path, asked: dict[str, Any], *, fresh: bool) -> None:
        self.path = path
        self.result: dict[str, Any] = {**asked, "results": [], "skipped": {}}
        if path.exists() and not fresh:
            before = json.loads(path.read_text("utf-8"))
            if {x: before.get(x) for x in asked} == asked:
                self.result = before

    def has(self, name: str) -> bool:
        """Whether a row is there."""
        return any(x["name"] == name for x in self.result["results"])

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row, in the order of bits within its family."""
        rows = [*self.result["results"], row]
        families = list(dict.fromkeys(x["family"] for x in rows))
        rows.sort(key=lambda x: (x["kind"] != "kvcli", families.index(x["family"]), -x["effective_bits"]))
        self.result["results"] = rows
        self.result["skipped"].pop(row["name"], None)
        self.save()
        print(
            f"{row['name']:<32} {row['effective_bits']:6.3f} effective bits, mean KL {row['kl']['mean']:.4f}, "
            f"PPL {row['ppl']['delta_pct']:+.2f} %, flips {100 * row['flips']['rate']:.1f} %, {row['seconds']:.0f} s",
            flush=True,
        )

    def save(self) -> None:
        """Write the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.result, indent=1) + "\n", "utf-8")


def ours(args: argparse.Namespace, rows: Rows, folder: Path) -> None:
    """Calibrate once, solve for every budget that is missing, evaluate each."""
    budgets = {f"kvcli, {x} bits asked": x for x in args.bits.split(",")}
    base = folder / "base"
    for name, bits in budgets.items():
        if rows.has(name):
            continue
        if not base.exists():
            began = time.monotonic()
            kvcli(
                "calibrate", str(args.model), "--bits", bits, "--context", args.window, "--data", args.calibration,
                "--recipe", args.recipe, "-o", str(base),
            )  # fmt: skip
            rows.result["calibration_s"] = time.monotonic() - began
        out, began = str(folder / bits), time.monotonic()
        plan = kvcli("solve", str(base), "--bits", bits, "-o", out, "--force")
        found = kvcli("eval", out, "--data", args.data, "--window", args.window, "--limit", args.limit)
        shared = {x: plan[x] for x in ("block_size", "sink_tokens", "residual_window", "predicted_kl")}
        formats = " ".join(f"{x['k']['bits']}{x['v']['bits']}" for x in plan["layers"])
        kind = {"kind": "kvcli", "family": "kvcli", "name": name, "budget": float(bits)}
        seconds = time.monotonic() - began
        data = Path(args.data).name  # where it lies is nobody's business
        rows.add({**kind, **found, **shared, "data": data, "kv_bits_by_layer": formats, "seconds": seconds})


def theirs(args: argparse.Namespace, rows: Rows, groups: Sequence[str]) -> None:
    """Measure every peer that is missing, on the same windows."""
    from quality_peers import Absent, Judge, peers

    from kvcli.calibration import corpora
    from kvcli.models.loading import load

    loaded = load(str(args.model), dtype="float32")
    windows = corpora.windows(args.data, loaded.tokenizer, int(args.window), limit=int(args.limit))
    for peer in peers(Judge(loaded, args.model, windows)):
        if peer.group not in groups or rows.has(peer.name):
            continue
        began = time.monotonic()
        try:
            found = peer.measure()
        except Absent as error:
            why = str(error)
        except Exception as error:  # libraries raise what they like: it is written down, and the next one's turn
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        else:
            kind = {"kind": "peer", "family": peer.family, "name": peer.name}
            rows.add({**kind, **found, "seconds": time.monotonic() - began})
            continue
        print(f"{peer.name} is skipped: {why}", flush=True)
        rows.result["skipped"][peer.name] = why
        rows.save()


def versions() -> dict[str, str]:
    """Return the versions of what took part."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Measure what is missing, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="WikiText-2 raw test file")
    parser.add_argument("--model", type=Path, help="GGUF file or folder; default: the standing model")
    parser.add_argument("--bits", default="6,5,4.25,3.25,2.5,2.2", help="kvcli's budgets, effective bits at the window")
    parser.add_argument("--only", default=",".join(GROUPS), help="who takes part, with commas")
    parser.add_argument("--window", default="2048")
    parser.add_argument("--limit", default="4", help="windows")
    parser.add_argument("--calibration", default="builtin", help="calibration text")
    parser.add_argument("--recipe", default="balanced")
    parser.add_argument("--keep", help="folder to keep the artifacts in: base and one per budget")
    parser.add_argument("--fresh", action="store_true", help="measure again what the JSON already has")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fidelity.json"))
    parser.add_argument("--plot", type=Path, default=Path("docs/evidence/fidelity.svg"))
    args = parser.parse_args()
    args.model = args.model or model_file()
    groups = [x.strip() for x in args.only.split(",")]
    if unknown := set(groups) - set(GROUPS):
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(GROUPS)}.")
    asked = {
        "question": "what does a cache cost in quality per effective bit?", "model": args.model.name,
        "data": Path(args.data).name, "calibration": args.calibration, "recipe": args.recipe,
        "window": int(args.window), "windows": int(args.limit),
    }  # fmt: skip
    rows = Rows(args.out, asked, fresh=args.fresh)
    earlier = rows.result.get("machine", {}).get("versions", {})  # rows that are taken over may be of who is gone since
    rows.result["machine"] = {
        "processor": platform.machine(), "python": platform.python_version(), "versions": {**earlier, **versions()}
    }  # fmt: skip
    if "kvcli" in groups:
        with nullcontext(args.keep) if args.keep else tempfile.TemporaryDirectory() as folder:
            ours(args, rows, Path(folder))
    if set(groups) - {"kvcli"}:
        theirs(args, rows, groups)
    rows.save()
    print(f"written to {args.out}")
    try:
        from fidelity_plot import draw
    except ImportError:
        print("not drawn: that needs vl-convert-python (pip install 'kvcli[report]')")
    else:
        draw(rows.result, args.plot)
        print(f"drawn in {args.plot}")


if __name__ == "__main__":
    main()
