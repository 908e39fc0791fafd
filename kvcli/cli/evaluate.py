"""``kvcli eval``: what an artifact's cache costs in quality."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kvcli.cli.console import emit, progress, say, table
from kvcli.cli.options import JsonFlag, NoVerify, SeedOption, TaskData, ThreadsOption, TrustRemoteCode, option
from kvcli.cli.shared import load_artifact
from kvcli.errors import UsageError


def evaluate(
    artifact: Annotated[Path, typer.Argument(help="Folder of the artifact.")],
    against: Annotated[
        str,
        option("--against", help="Model to measure against.", show_default="the artifact's own weights, 16-bit cache"),
    ] = "",
    tasks: Annotated[
        str,
        option(
            "--tasks",
            help="Any of ppl, kl, flips, passkey, kv_retrieval, sharing, generation, arc_easy, arc_challenge, "
            "hellaswag, piqa, winogrande, mmlu, gsm8k, with commas.",
            show_default="the suite's, else ppl,kl,flips",
        ),
    ] = "",
    suite: Annotated[
        Literal["quick", "standard", "long"] | None,
        option("--suite", help="Tasks, items and lengths that go together.", show_default="none"),
    ] = None,
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
    limit: Annotated[
        int | None,
        option(
            "--limit",
            min=0,
            help="Windows, and items of each task, at the most; 0 for all.",
            show_default="the suite's; 4 windows, 4 items",
        ),
    ] = None,
    lengths: Annotated[
        str,
        option(
            "--lengths",
            help="Tokens of the contexts that passkey, kv_retrieval and sharing build, with commas.",
            show_default="the suite's",
        ),
    ] = "",
    task_data: TaskData = None,
    resume: Annotated[
        Path | None,
        option("--resume", help="Keep each item's outcome in this file, and do not ask again what it holds."),
    ] = None,
    seed: SeedOption = 0,
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
    """Measure what an artifact's cache costs against the same model with a 16-bit cache: perplexity, KL, flips, tasks.

    The cache is read the way decoding reads it: every token attends to what the packed cache returns. Bits are counted
    at the window's length. Tasks report the score, how many answers flipped, a 95 % interval by bootstrap and an exact
    paired test.

    Raises
    ------
    UsageError
        For an unknown task.
    """
    from kvcli.evaluation import fidelity, suites

    plan = suites.SUITES[suite or "quick"]
    default = plan.tasks if suite else fidelity.TASKS
    chosen = tuple(dict.fromkeys(x.strip() for x in tasks.split(","))) if tasks else default
    known = (*fidelity.TASKS, *suites.TASKS)
    if unknown := [x for x in chosen if x not in known]:
        raise UsageError(f"there is no task {unknown[0]!r}; there are {', '.join(known)}.")
    if data == "-" and "generation" in chosen:
        raise UsageError("the task generation cannot read --data - as well; give a file.")
    if task_data is not None and not task_data.is_dir():
        raise UsageError(f"--task-data {task_data} is not a folder.")
    if resume is not None and (resume.is_dir() or not resume.absolute().parent.is_dir()):
        raise UsageError(f"--resume {resume} is not a file in a folder that exists.")
    if dump is not None and (dump.is_dir() or not dump.absolute().parent.is_dir()):
        raise UsageError(f"--dump {dump} is not a file in a folder that exists.")

    if rotate_down and not simulate_activations:
        raise UsageError("--rotate-down is for --simulate-activations, which is not given.")
    if simulate_activations == 1:
        raise UsageError("--simulate-activations 1 is too few: 2 to 8 bits.")

    import hashlib
    from contextlib import nullcontext

    from kvcli.artifact.schema import MANIFEST
    from kvcli.calibration import corpora
    from kvcli.calibration.pipeline import exact_layers
    from kvcli.evaluation.activations import simulating
    from kvcli.evaluation.tasks import Log, Settings, run
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
    wanted = _lengths(lengths, subject.loaded.max_context) or plan.lengths_of(subject.loaded.max_context)
    settings = Settings(limit or plan.items, wanted, plan.tokens, seed, data, task_data, limit or plan.questions)
    names = [x for x in chosen if x in suites.TASKS]
    items, skipped = suites.gather(names, subject, settings, everything=limit == 0, skip=not tasks)
    for name, why in skipped.items():
        say(f"{name} is left out: {why}")
    on_text = tuple(x for x in chosen if x in fidelity.TASKS)
    windows = plan.windows if suite else suites.WINDOWS
    windows = (windows if limit is None else limit) if on_text else 1  # one tells how many bits there are
    texts = corpora.windows(data, subject.loaded.tokenizer, length, limit=windows or None)
    bits, model = simulate_activations or None, subject.loaded.model
    with progress("evaluating", total=2 * len(texts)) as bar:
        result = fidelity.evaluate(
            subject, reference, texts, tasks=on_text, chunk=chunk, dump=dump, step=bar.advance, activations=bits,
            rotate_down=rotate_down,
        )  # fmt: skip
    own = (artifact / MANIFEST).read_text("utf-8")
    result |= {"artifact": hashlib.sha256(own.encode()).hexdigest(), "data": data}
    if items:
        sides = {
            "subject": f"{own} {bits} {rotate_down}",
            "reference": f"{other.sha256} {other.dtype}" if other else own,
        }
        log, result["tasks"] = Log(resume, sides), {}
        for name, asked in items.items():
            with progress(name, total=2 * len(asked)) as bar:
                result["tasks"][name] = run(
                    suites.TASKS[name], asked, subject, reference, seed=seed, log=log, step=bar.advance,
                    around=lambda: simulating(model, bits, rotate_down=rotate_down) if bits else nullcontext(),
                )  # fmt: skip
    if skipped:
        result["skipped"] = skipped
    if data.startswith("builtin"):
        say("The built-in text is what calibration reads by default: for a fair figure give other text with --data.")
    if subject.plan.dtype in ("float32", "float64"):
        say(f"Computed in {subject.plan.dtype}: the reference's K and V are rounded to {subject.plan.exact_dtype}.")
    if json:
        emit(result)
    else:
        _print(result)


def _lengths(given: str, max_context: int) -> tuple[int, ...]:
    """Return the lengths that the user gives."""
    found = [x.strip() for x in given.split(",")] if given else []
    for x in found:
        if not x.isdecimal() or not 0 < int(x) <= max_context:
            raise UsageError(f"--lengths {x!r} is not a number from 1 to the model's context of {max_context} tokens.")
    return tuple(sorted({int(x) for x in found}))


def _print(result: dict[str, Any]) -> None:
    ratio = result["reference_bytes"] / result["measured_bytes"]
    bits, context = result["effective_bits"], result["context"]
    print(f"effective bits {bits:.3f} at {context} tokens, {ratio:.2f} times smaller than 16 bits")
    if "ppl" in result:
        ppl = result["ppl"]
        low, high = ppl["interval_pct"]
        print(
            f"perplexity {ppl['value']:.3f} against {ppl['reference']:.3f} ({ppl['delta_pct']:+.2f} %, 95 % interval "
            f"{low:+.2f} to {high:+.2f})"
        )
    if "kl" in result:
        kl = result["kl"]
        low, high = kl["interval"]
        print(
            f"KL mean {kl['mean']:.5f} ({low:.5f} to {high:.5f}), 99th percentile {kl['p99']:.4f}, "
            f"99.9th {kl['p999']:.4f} nats a token"
        )
    if "flips" in result:
        low, high = (100 * x for x in result["flips"]["interval"])
        print(f"top-1 flips {100 * result['flips']['rate']:.2f} % ({low:.2f} to {high:.2f})")
    if "simulated_activations" in result:
        down = ", down's input rotated" if result["simulated_activations"]["rotate_down"] else ""
        print(f"simulated: activations of {result['simulated_activations']['bits']} bits a token{down}")
    print(f"{result['windows']} windows, {result['scored_tokens']} tokens scored")
    if "tasks" in result:
        _print_tasks(result["tasks"])


def _print_tasks(tasks: Mapping[str, Mapping[str, Any]]) -> None:
    rows = []
    for name, x in tasks.items():
        low, high = x["difference_interval"]
        rows.append(
            (
                name, x["items"], f"{x['score']:.3f}", f"{x['reference']:.3f}", f"{x['difference']:+.3f}",
                f"{low:+.3f} to {high:+.3f}", f"{100 * x['flips']:.1f} %", f"{x['p_value']:.3g}",
            )
        )  # fmt: skip
    table(("task", "items", "score", "reference", "difference", "95 % interval", "flips", "p"), rows)
