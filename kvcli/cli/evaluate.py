"""``kvcli eval``: what an artifact's cache costs in quality."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvcli.cli.console import emit, progress, say
from kvcli.cli.options import JsonFlag, NoVerify, ThreadsOption, TrustRemoteCode, option
from kvcli.cli.shared import load_artifact
from kvcli.errors import UsageError


def evaluate(
    artifact: Annotated[Path, typer.Argument(help="Folder of the artifact.")],
    against: Annotated[
        str,
        option("--against", help="Model to measure against.", show_default="the artifact's own weights, 16-bit cache"),
    ] = "",
    tasks: Annotated[str, option("--tasks", help="Any of ppl, kl, flips, with commas.")] = "ppl,kl,flips",
    data: Annotated[
        str,
        option(
            "--data", help="Text to measure on: a .txt or .jsonl file, '-' for stdin, builtin, builtin:NAME, hub:NAME."
        ),
    ] = "builtin",
    window: Annotated[
        int,
        option(
            "--window",
            min=0,
            help="Tokens of a window; the second half is scored.",
            show_default="model's, at most 2048",
        ),
    ] = 0,
    limit: Annotated[int, option("--limit", min=0, help="Windows at the most; 0 for all.")] = 4,
    chunk: Annotated[
        int, option("--chunk", min=1, help="Tokens of one forward pass; changes speed and memory only.")
    ] = 512,
    dump: Annotated[
        Path | None, option("--dump", help="Write all log-probabilities to this safetensors file, to recompute from.")
    ] = None,
    simulate_activations: Annotated[
        int,
        option(
            "--simulate-activations",
            min=0,
            max=8,
            metavar="2-8",
            help="Round what linear layers read to so many bits a token: simulated, nothing runs faster.",
            show_default="off",
        ),
    ] = 0,
    rotate_down: Annotated[
        bool, option("--rotate-down", help="With simulated activations: rotate what down projections read first.")
    ] = False,
    threads: ThreadsOption = 0,
    trust_remote_code: TrustRemoteCode = False,
    no_verify: NoVerify = False,
    json: JsonFlag = False,
) -> None:
    """Measure perplexity, KL divergence and top-1 flips of an artifact against the same model with a 16-bit cache.

    The cache is read the way decoding reads it: every token attends to what the packed cache returns. Bits are counted
    at the window's length.

    Raises
    ------
    UsageError
        For an unknown task.
    """
    from kvcli.evaluation import fidelity

    chosen = tuple(dict.fromkeys(x.strip() for x in tasks.split(",")))
    if unknown := [x for x in chosen if x not in fidelity.TASKS]:
        raise UsageError(f"there is no task {unknown[0]!r}; there are {', '.join(fidelity.TASKS)}.")
    if dump is not None and (dump.is_dir() or not dump.absolute().parent.is_dir()):
        raise UsageError(f"--dump {dump} is not a file in a folder that exists.")

    if rotate_down and not simulate_activations:
        raise UsageError("--rotate-down is for --simulate-activations, which is not given.")
    if simulate_activations == 1:
        raise UsageError("--simulate-activations 1 is too few: 2 to 8 bits.")

    from kvcli.calibration import corpora
    from kvcli.calibration.pipeline import exact_layers
    from kvcli.models.loading import load
    from kvcli.plan import CachePlan
    from kvcli.runtime.packed_model import PackedModel

    with progress("loading the model"):
        subject = load_artifact(artifact, verify=not no_verify, trust_remote_code=trust_remote_code)
        other = load(against, dtype=subject.plan.dtype, trust_remote_code=trust_remote_code) if against else None
        exact = CachePlan(tuple(exact_layers(other)), dtype=other.dtype) if other else subject.plan.as_exact()
        reference = PackedModel(other or subject.loaded, exact, {})
    length = window or min(2048, subject.loaded.max_context)
    if length < 4:
        raise UsageError(f"--window {length} is too short: 4 tokens at least.")
    if length > subject.loaded.max_context:
        raise UsageError(f"--window {length} exceeds the model's context of {subject.loaded.max_context} tokens.")
    texts = corpora.windows(data, subject.loaded.tokenizer, length, limit=limit or None)
    with progress("evaluating", total=2 * len(texts)) as bar:
        result = fidelity.evaluate(
            subject, reference, texts, tasks=chosen, chunk=chunk, dump=dump, step=bar.advance,
            activations=simulate_activations or None, rotate_down=rotate_down,
        )  # fmt: skip
    if data.startswith("builtin"):
        say("The built-in text is what calibration reads by default: for a fair figure give other text with --data.")
    if subject.plan.dtype in ("float32", "float64"):
        say(f"Computed in {subject.plan.dtype}: the reference's K and V are rounded to {subject.plan.exact_dtype}.")
    if json:
        emit(result)
    else:
        _print(result)


def _print(result: dict[str, Any]) -> None:
    ratio = result["reference_bytes"] / result["measured_bytes"]
    bits, context = result["effective_bits"], result["context"]
    print(f"effective bits {bits:.3f} at {context} tokens, {ratio:.2f} times smaller than 16 bits")
    if "ppl" in result:
        ppl = result["ppl"]
        print(f"perplexity {ppl['value']:.3f} against {ppl['reference']:.3f} ({ppl['delta_pct']:+.2f} %)")
    if "kl" in result:
        kl = result["kl"]
        print(f"KL mean {kl['mean']:.5f}, 99th percentile {kl['p99']:.4f}, 99.9th {kl['p999']:.4f} nats a token")
    if "flips" in result:
        print(f"top-1 flips {100 * result['flips']['rate']:.2f} %")
    if "simulated_activations" in result:
        down = ", down's input rotated" if result["simulated_activations"]["rotate_down"] else ""
        print(f"simulated: activations of {result['simulated_activations']['bits']} bits a token{down}")
    print(f"{result['windows']} windows, {result['scored_tokens']} tokens scored")
