"""docs/evidence.md from the result files: a table for whatever they hold, and nothing for what they do not."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

NAME = "evidence.json"
RESULTS = "../benchmarks/results"
KIB, MIB = 2**10, 2**20

HEAD = """\
# The evidence

Made by `python benchmarks/evidence.py` from the files in [benchmarks/results](../benchmarks/results): a test holds it
to them. Every table names the command that measured it. The standing model is SmolLM2-135M-Instruct; every loss is
against the same weights with a 16-bit cache, and the cache is read the way decoding reads it. Bits are effective ones:
every byte that the cache holds of one sequence, by its cached scalars. Intervals are of 95 %, by bootstrap.
"""

_Row = Sequence[str]


def page(folder: Path) -> str:
    """Return the page.

    Parameters
    ----------
    folder
        Of the result files.
    """
    results = {x.stem: json.loads(x.read_text("utf-8")) for x in sorted(folder.glob("*.json"))}
    parts = [HEAD]
    for name, draw in _SECTIONS:
        if name in results:
            parts += list(draw(results[name]))
    return "\n".join(parts)


def table(columns: Sequence[str], rows: Sequence[_Row], *, left: int = 1) -> str:
    """Return a table in Markdown; all but the first ``left`` columns are aligned to the right."""
    rules = ["---"] * left + ["---:"] * (len(columns) - left)
    return "".join(f"| {' | '.join(x)} |\n" for x in (columns, rules, *rows))


def small(x: float) -> str:
    """Return a loss: four digits after the point, and two that count below a thousandth."""
    return "0" if x == 0 else f"{x:.4f}" if x >= 0.001 else f"{x:.2g}"


def signed(x: float, digits: int = 2) -> str:
    """Return a difference with its sign, which zero has none of."""
    shown = f"{x:+.{digits}f}"
    return shown[1:] if not float(shown) else shown


def size(count: float) -> str:
    """Return bytes for a person."""
    return f"{count / MIB:.1f} MiB" if count >= MIB else f"{count / KIB:.1f} KiB"


def prose(*sentences: str) -> str:
    """Return a paragraph, in lines of at most 120 characters."""
    return textwrap.fill(" ".join(sentences), 120, break_long_words=False, break_on_hyphens=False) + "\n"


def _made_by(command: str, name: str, more: str = "") -> str:
    return f"`{command}` → [{name}]({RESULTS}/{name}){more}.\n"


# --- the artifacts ----------------------------------------------------------------------------------------------------


def _evidence(found: Mapping[str, Any]) -> Iterator[str]:
    artifacts: Mapping[str, Any] = found["artifacts"]
    limits = {x: found.get(x) for x in ("limit", "questions", "windows")}
    limit = "".join(f" --{name} {x}" for name, x in limits.items() if x is not None)
    command = (
        f"python benchmarks/evidence.py --measure --data {found['data']} --suite {found['suite']}{limit} --keep FOLDER"
    )
    how = (
        f" ({found['model']}, calibrated on {found['calibration']} text with recipe {found['recipe']} at "
        f"{found['window']} tokens)"
    )
    yield "## Bits and bytes\n"
    plans = {name: x["plan"] for name, x in artifacts.items()}
    contexts = list(next(iter(plans.values()))["bytes_at"])
    exact = next(iter(plans.values()))["bytes_at_16_bits"]
    columns = ("artifact", "effective bits", "nominal bits", "page", "first and recent exact")
    yield table(
        (*columns, *(f"{n} tokens" for n in contexts)),
        [
            (
                name, f"{x['effective_bits']:.3f}", f"{x['nominal_bits']:.2f}", str(x["block_size"]),
                f"{x['sink_tokens']} + {x['residual_window']}", *(size(x["bytes_at"][n]) for n in contexts),
            )
            for name, x in plans.items()
        ]
        + [("16 bits", "16", "16", "", "", *(size(exact[n]) for n in contexts))],
    )  # fmt: skip
    yield prose(
        "Artifacts are named by the bits that were asked for.",
        "`exact` keeps all in 16 bits; `wrecked` keeps all in 2, one scale a token and head, nothing exact:",
        "they show that the measures can tell.",
    )
    yield _made_by(command, NAME, how)
    measured = {name: x["fidelity"] for name, x in artifacts.items() if "fidelity" in x}
    if measured:
        yield from _fidelity(measured, found["data"], command)
    yield from _tasks({name: x["tasks"] for name, x in artifacts.items() if x["tasks"]}, command)
    if found["skipped"]:
        yield "Not asked, for want of their data: " + ", ".join(sorted(found["skipped"])) + ".\n"


def _fidelity(measured: Mapping[str, Any], data: str, command: str) -> Iterator[str]:
    one = next(iter(measured.values()))
    yield "## Perplexity, KL and flips\n"
    yield prose(
        f"{data}, {one['windows']} windows of {one['context']} tokens, the second half of each scored:",
        f"{one['scored_tokens']} tokens. Perplexity with the 16-bit cache is {one['ppl']['reference']:.3f}.",
        "The bootstrap draws sixteenths of the scored halves.",
    )
    yield table(
        ("artifact", "perplexity", "change, %", "mean KL, nats", "KL 99 %", "KL 99.9 %", "top-1 flips, %"),
        [
            (
                name, f"{x['ppl']['value']:.3f}", _interval(x["ppl"]["delta_pct"], x["ppl"]["interval_pct"], signed),
                _interval(x["kl"]["mean"], x["kl"]["interval"], small), small(x["kl"]["p99"]), small(x["kl"]["p999"]),
                _interval(100 * x["flips"]["rate"], [100 * y for y in x["flips"]["interval"]], "{:.1f}".format),
            )
            for name, x in measured.items()
        ],
    )  # fmt: skip
    yield _made_by(command, NAME)
    yield "## KL along the sequence\n"
    yield "Mean KL of parts of the scored half, all windows together.\n"
    rows = []
    for i, x in enumerate(one["kl_by_position"]):
        losses = (small(y["kl_by_position"][i]["mean"]) for y in measured.values())
        rows.append((f"{x['first']} to {x['first'] + x['tokens'] - 1}", *losses))
    yield table(("tokens", *measured), rows)
    yield _made_by(command, NAME)


def _interval(value: float, interval: Sequence[float] | None, show: Callable[[float], str]) -> str:
    return show(value) if interval is None else f"{show(value)} ({show(interval[0])} to {show(interval[1])})"


def _tasks(artifacts: Mapping[str, Mapping[str, Any]], command: str) -> Iterator[str]:
    names, digits = list(dict.fromkeys(name for x in artifacts.values() for name in x)), "{:.3f}".format
    if not names:
        return
    yield "## Tasks\n"
    yield prose(
        "Answers of each artifact beside those of the 16-bit cache, item by item.",
        "A flip is another answer, for better or worse; p is of the exact sign test on items that got better or worse.",
        "`generation` scores the share of the reference's greedy text before the two part.",
    )
    rows = []
    for task in names:
        for name, tasks in artifacts.items():
            if task not in tasks:
                continue
            x = tasks[task]
            rows.append((
                task, name, str(x["items"]), f"{x['reference']:.3f}", _interval(x["score"], x["interval"], digits),
                _interval(x["difference"], x["difference_interval"], partial(signed, digits=3)),
                f"{x['won']} / {x['lost']}", f"{100 * x['flips']:.1f}", f"{x['p_value']:.2g}",
            ))  # fmt: skip
    yield table(
        ("task", "artifact", "items", "16 bits", "score", "difference", "better / worse", "flips, %", "p"), rows, left=2
    )
    yield _made_by(command, NAME)
    further = [
        (task, name, key.replace("_", " "), f"{x['reference']:.3f}", f"{x['value']:.3f}")
        for task in names
        for name, tasks in artifacts.items()
        if task in tasks
        for key, x in tasks[task].items()
        if isinstance(x, dict) and {"value", "reference"} <= set(x)
    ]
    if further:
        yield "What else they measure; log likelihoods are of right answers, nats a token:\n"
        yield table(("task", "artifact", "measure", "16 bits", "artifact's"), further, left=3)


# --- what others' scripts measured ------------------------------------------------------------------------------------


def _peers(found: Mapping[str, Any]) -> Iterator[str]:
    yield "## Beside other caches\n"
    yield "![mean KL against effective bits](evidence/fidelity.svg)\n"
    calibrated = found.get("calibration_s")
    yield prose(
        f"{found['data']}, {found['windows']} windows of {found['window']} tokens, the second halves scored; how each",
        "cache is read is said in [quality_peers.py](../benchmarks/quality_peers.py).",
        *([f"kvcli was calibrated once for all its rows, in {calibrated:.0f} seconds."] if calibrated else []),
    )
    rows = []
    for x in found["results"]:
        kl, ppl, flips = x["kl"], x["ppl"], x["flips"]
        rows.append((
            x["name"], f"{x['effective_bits']:.3f}",
            _interval(ppl["delta_pct"], ppl.get("interval_pct"), signed),
            _interval(kl["mean"], kl.get("interval"), small),
            *(small(kl[y]) if y in kl else "" for y in ("p99", "p999")), f"{100 * flips['rate']:.1f}",
        ))  # fmt: skip
    yield table(
        ("cache", "effective bits", "perplexity, %", "mean KL, nats", "KL 99 %", "KL 99.9 %", "top-1 flips, %"), rows
    )
    for name, why in found["skipped"].items():
        yield f"{name} did not take part: {why}.\n"
    yield _made_by(f"python benchmarks/fidelity.py --data {found['data']} --limit {found['windows']}", "fidelity.json")


def _adapters(found: Mapping[str, Any]) -> Iterator[str]:
    yield "## Predictors\n"
    texts = list(found["results"][0]["texts"])
    yield prose(
        "`--adapters absorbed` predicts values from their keys and reads codes only; `always` predicts all from the",
        f"layers before. Mean KL on {' and '.join(texts)}, {found['windows']} windows of each, calibrated on",
        f"{found['tokens']} tokens. Predictors are held once a model:",
        "the last column spreads them over one sequence of 2048 tokens.",
    )
    rows = []
    for x in sorted(found["results"], key=lambda x: x["budget"], reverse=True):
        one = x["texts"][texts[0]]
        losses = (small(x["texts"][y]["kl"]["mean"]) for y in texts)
        rows.append((
            x["arm"], f"{one['effective_bits']:.3f}", *losses, f"{100 * one['flips']['rate']:.1f}",
            size(x["model_bytes"]), f"{one['effective_bits_with_model']:.2f}",
        ))  # fmt: skip
    flips = f"top-1 flips on {texts[0]}, %"
    yield table(("predictors", "effective bits", *texts, flips, "predictors' bytes", "bits with them"), rows)
    yield _made_by("python benchmarks/adapters.py --data wiki.test.raw", "adapters.json")


def _amounts(found: Mapping[str, Any]) -> Iterator[str]:
    texts = list(found["results"][0]["texts"])
    counts = " and ".join(f"{x} ({found['results'][0]['texts'][x]['windows']} windows)" for x in texts)
    yield prose(
        "How much text they need: all layers in 2 bits, the same formats everywhere, predictors as `always` has",
        f"them, fitted on the beginnings of the same windows, of so many tokens in all. Mean KL on {counts}; the first",
        "row has none.",
    )
    rows = [
        (
            str(x["tokens"]),
            *(_interval(x["texts"][y]["kl"]["mean"], x["texts"][y]["kl"]["interval"], small) for y in texts),
        )
        for x in found["results"]
    ]
    yield table(("tokens", *texts), rows)
    yield _made_by("python benchmarks/adapters.py --data wiki.test.raw --rows text", "adapters_text.json")


def _anchors(found: Mapping[str, Any]) -> Iterator[str]:
    texts = list(found["results"][0]["texts"])
    yield prose(
        "From where to predict: all layers in 2 bits again, each from keys and values of so many layers before it,",
        "or of one two back, or all of a group from its first (a star). Values are predicted from their own keys too.",
        f"Mean KL on {' and '.join(texts)}, fitted on {found['tokens']} tokens; products are those of a token in all",
        "layers, which `always` pays for every token it reads.",
    )
    rows = []
    for x in found["results"]:
        left = x.get("variance_left", {})
        rows.append((
            x["anchors"], *(small(x["texts"][y]["kl"]["mean"]) for y in texts),
            *("" if left.get(w) is None else f"{left[w]:.2f}" for w in "kv"), size(x["model_bytes"]),
            f"{x['products_a_token'] / 1e6:.1f}" if "products_a_token" in x else "",
        ))  # fmt: skip
    columns = ("predicted from", *texts, "of keys' variance left", "of values'", "bytes a model", "million products")
    yield table(columns, rows)
    command = f"python benchmarks/adapters.py --data wiki.test.raw --rows anchors --tokens {found['tokens']}"
    yield _made_by(command, "adapters_anchors.json")


def _composition(found: Mapping[str, Any]) -> Iterator[str]:
    yield "## The methods alone and together\n"
    yield prose(
        "Search: KVTuner's pairs, layer by layer. Transforms: scales and means in closed form, Hadamard rotations.",
        "Predictors: `--adapters always`. Weights: 4 bits, pre-calibrated: then the loss is that of weights and",
        f"cache together. {found['results'][0]['windows']} windows of {found['data']}; the weights of all are rotated",
        "once, at random, before anything else. Decoding is that of one thread at 2048 tokens, calibration is",
        "processor time; a cache's bits do not count what is held once a model.",
        *found.get("notes", []),
    )
    rows = [
        (
            " + ".join({"adapters": "predictors"}.get(y, y) for y in x["methods"]) or "none",
            f"{x['effective_bits']:.3f}", small(x["kl"]["mean"]), small(x["kl"]["p99"]), small(x["kl"]["p999"]),
            signed(x["ppl"]["delta_pct"]), f"{100 * x['flips']['rate']:.1f}", size(x["model_bytes"]),
            f"{1e3 * x['decode_s']:.0f}", f"{x['calibration_s'] / 60:.0f}",
        )
        for x in sorted(found["results"], key=lambda x: (-x["budget"], len(x["methods"])))
    ]  # fmt: skip
    yield table(
        (
            "methods", "effective bits", "mean KL, nats", "KL 99 %", "KL 99.9 %", "perplexity, %", "top-1 flips, %",
            "bytes a model", "decode, ms", "calibration, min",
        ),
        rows,
    )  # fmt: skip
    yield _made_by(f"python benchmarks/composition.py --data {found['data']}", "composition.json")


def _capacity(found: Mapping[str, Any]) -> Iterator[str]:
    yield "## Idle sequences\n"
    yield prose(
        "`--adapters capacity` packs what nobody uses again, with full predictors, and expands it when it is resumed.",
        f"Text of {found['data']}, {found['windows']} windows of each length; the loss is that of the tokens after it,",
        f"against the sequence that was left alone. Medians of {found['rounds']} rounds,",
        f"{found['machine']['threads']} threads.",
    )
    rows = [
        (
            str(x["tokens"]), f"{x['bits']['running']:.2f}", f"{x['bits']['idle']:.2f}", small(x["kl"]["mean"]),
            f"{100 * x['flips']['rate']:.1f}", f"{x['seconds']['demote']:.2f}", f"{x['seconds']['promote']:.2f}",
            f"{x['ratios']['prefill / promote']:.1f}",
        )
        for x in found["results"]
    ]  # fmt: skip
    yield table(
        (
            "tokens", "bits running", "bits idle", "mean KL, nats", "top-1 flips, %", "packing, s", "resuming, s",
            "resuming is × as fast as prefill",
        ),
        rows,
    )  # fmt: skip
    yield _made_by("python benchmarks/capacity.py", "capacity.json")


def _soak(found: Mapping[str, Any]) -> Iterator[str]:
    yield "## A server under load\n"
    settings, checks = found["settings"], found["checks"]
    held = [x.replace("_", " ") for x, y in checks.items() if y]
    failed = [x.replace("_", " ") for x, y in checks.items() if not y]
    yield prose(
        f"{settings['clients']} clients stream for {settings['minutes']:g} minutes from a pool of",
        f"{settings['memory']}, and a fifth of them vanish half-way:",
        f"{found['finished']} answers finished, {found['different']} of them different from the answer",
        f"alone, {found['vanished']} left,",
        f"{found['last_metrics']['kvcli_preemptions_total']:.0f} preemptions; memory in the last quarter",
        f"{found['memory_growth']:.3f} times that in the second. Holds: {', '.join(held)}.",
        *([f"Does not hold: {', '.join(failed)}."] if failed else []),
    )
    yield _made_by(f"python benchmarks/soak.py ARTIFACT --minutes {settings['minutes']:g}", "soak.json")


def _decode(found: Mapping[str, Any]) -> Iterator[str]:
    yield "## Speed of decoding and prefill\n"
    yield prose(
        f"One sequence of {found['depth']} tokens, {found['threads']} threads ({found['machine']['processor']},",
        f"{found['variant']}), weights {found['weights']}; medians of {found['rounds']} rounds, everybody in turn.",
    )
    read = {x["name"]: x["tokens_per_s"] for x in found["prefill"]["results"]}
    yield table(
        ("", "prefill, tokens/s", "decode, tokens/s", f"{found['results'][0]['name']} is × as fast"),
        [
            (
                x["name"], f"{read[x['name']]:.0f}" if x["name"] in read else "", f"{x['tokens_per_s']:.1f}",
                f"{found['ratios'][x['name']]:.2f}" if x["name"] in found["ratios"] else "",
            )
            for x in found["results"]
        ],
    )  # fmt: skip
    yield _made_by("python benchmarks/decode.py --artifact OUT --data wiki.test.raw", "decode.json")


def _serving(found: Mapping[str, Any]) -> Iterator[str]:
    asked, theirs = found["settings"], found["ratios_ours_over_theirs"]
    yield "## Speed of serving\n"
    yield prose(
        f"{asked['requests']} requests of {asked['prompt_tokens']} tokens, {asked['tokens']} written to each,",
        f"{asked['concurrency']} at a time, {asked['threads']} threads; the cache may take {asked['memory']}.",
    )
    yield table(
        ("server", "tokens/s", "first token, s", "between tokens, median, ms", "kvcli's throughput is ×"),
        [
            (
                x["name"], f"{x['tokens_per_s']:.1f}", f"{x['median_ttft_s']:.2f}", f"{1e3 * x['itl_s']['p50']:.1f}",
                f"{theirs[x['name']]['throughput']:.2f}" if x["name"] in theirs else "",
            )
            for x in found["results"]
        ],
    )  # fmt: skip
    yield _made_by("python benchmarks/serving.py ARTIFACT --llama-server PROGRAM --vllm-model FOLDER", "serving.json")


def _attention(found: Mapping[str, Any]) -> Iterator[str]:
    yield "## Speed of attention\n"
    yield prose(
        f"One token over a cache of so many, microseconds a layer, {found['machine']['threads']} threads",
        f"({found['machine']['processor']}, {found['variant']}), caches emptied before each.",
    )
    names = [x["name"] for x in found["cases"][0]["results"]]
    yield table(
        ("shape", "tokens", *names),
        [
            (x["shape"], str(x["depth"]), *(f"{1e6 * y['per_layer_s']:.0f}" for y in x["results"]))
            for x in found["cases"]
        ],
    )  # fmt: skip
    yield _made_by(f"python benchmarks/attention.py --threads {found['machine']['threads']}", "attention.json")


_SECTIONS = (
    ("evidence", _evidence),
    ("fidelity", _peers),
    ("composition", _composition),
    ("adapters", _adapters),
    ("adapters_anchors", _anchors),
    ("adapters_text", _amounts),
    ("capacity", _capacity),
    ("decode", _decode),
    ("serving", _serving),
    ("soak", _soak),
    ("attention", _attention),
)
