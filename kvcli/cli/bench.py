"""``kvcli bench``: how fast an artifact is, with others beside it in the same run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kvcli.cli.bench_serve import serve
from kvcli.cli.console import emit, progress, say, table
from kvcli.cli.options import JsonFlag, NoVerify, ThreadsOption, TrustRemoteCode, option
from kvcli.cli.shared import open_with_progress
from kvcli.errors import InputError, KvcliError, UsageError

if TYPE_CHECKING:
    from kvcli.artifact.reader import Artifact
    from kvcli.evaluation.decode_speed import Decoder

Backend = Literal["auto", "cpu", "cuda", "reference"]
ArtifactArgument = Annotated[Path, typer.Argument(help="Folder of the artifact.")]
BackendOption = Annotated[
    Backend, option("--backend", help="What computes; auto takes a GPU, the native CPU kernels, plain torch, if there.")
]
DepthOption = Annotated[
    int, option("--depth", min=0, help="Tokens in the cache.", show_default="4096, or what the model takes")
]
RoundsOption = Annotated[int, option("--rounds", min=1, help="Turns of each contestant; medians are reported.")]


def attention(
    artifact: ArtifactArgument,
    depth: DepthOption = 0,
    batch: Annotated[int, option("--batch", min=1, help="Sequences at once.")] = 1,
    rounds: RoundsOption = 9,
    backend: BackendOption = "auto",
    threads: ThreadsOption = 0,
    no_verify: NoVerify = False,
    json: JsonFlag = False,
) -> None:
    """Time attention alone: one new token over a long cache in every layer, beside torch's own on dense tensors.

    Keys and values are random. Beside the artifact stand uniform plans of 16 to 2 bits, and everybody finds the
    processor's caches emptied.

    Raises
    ------
    UsageError
        If the model does not take so many tokens.
    """
    chosen = choose(backend)
    from kvcli.evaluation import attention_speed, speed

    opened = open_with_progress(artifact, verify=not no_verify)
    geometry, longest = _model_facts(opened)
    depth = _depth(depth, longest, 0)
    device = "cuda" if chosen == "cuda" else "cpu"
    entered = attention_speed.contestants(
        opened.plan, geometry, depth, backend=chosen, batch=batch, tensors=opened.tensors(), threads=threads
    )
    probes = speed.bandwidth_probes(device)
    with progress("measuring", total=(rounds + 1) * len(entered + probes)) as bar:
        seconds = speed.race([*entered, *probes], rounds=rounds, timer=speed.timer_for(device), step=bar.advance)
    limit = speed.bandwidth(seconds)
    results = speed.rows(entered, seconds, attention_speed.PHASE, threads=threads, bandwidth=limit["read"])
    facts = _facts(opened, chosen, depth, batch, threads, geometry)
    _show({**facts, "results": results, "ratios": speed.ratios(results), "bandwidth": limit}, json)


def decode(
    artifact: ArtifactArgument,
    depth: DepthOption = 0,
    tokens: Annotated[int, option("--tokens", min=1, help="Tokens that are decoded.")] = 16,
    rounds: RoundsOption = 5,
    fill: Annotated[
        Literal["text", "random"], option("--fill", help="Read text first, and time that too, or time decoding only.")
    ] = "text",
    prompt_file: Annotated[
        str, option("--prompt-file", help="Text to read: a file, or builtin; repeated if it is too short.")
    ] = "builtin",
    weights: Annotated[
        Literal["none", "int4"], option("--weights", help="How the native runner keeps the model's matrices.")
    ] = "none",
    backend: BackendOption = "auto",
    threads: ThreadsOption = 0,
    trust_remote_code: TrustRemoteCode = False,
    no_verify: NoVerify = False,
    json: JsonFlag = False,
) -> None:
    """Time the whole model: reading a text and decoding after it, beside the 16-bit cache and stock Transformers.

    The second row is the same runner with the exact 16-bit cache; the third is Transformers as it comes.

    Raises
    ------
    UsageError
        If the model does not take so many tokens, or the backend does not take such weights.
    """
    chosen = choose(backend)
    if chosen == "reference" and weights != "none":
        raise UsageError(f"--weights {weights} needs native kernels, not the reference.")
    from kvcli.evaluation import decode_speed, speed
    from kvcli.models.loading import load

    opened = open_with_progress(artifact, verify=not no_verify)
    if backend == "auto" and weights == "none":
        chosen = known(opened, chosen)
    device = "cuda" if chosen == "cuda" else "cpu"
    read = partial(
        load, str(artifact), dtype=opened.plan.dtype, trust_remote_code=trust_remote_code, device=device
    )  # fmt: skip
    loaded = read()
    depth = _depth(depth, loaded.max_context, tokens)
    ids = decode_speed.text(prompt_file, loaded.tokenizer, depth + tokens)
    stock = f"transformers {loaded.dtype} sdpa"
    decoders: list[Decoder] = []
    for name, plan in ((f"kvcli {chosen}", opened.plan), (f"kvcli {chosen}, 16-bit cache", opened.plan.as_exact())):
        held = opened.tensors() if plan is opened.plan else {}
        decoders.append(
            decode_speed.packed(
                name, loaded if weights == "none" else read(), plan, held,  # int4 layers take the weights for good
                backend=chosen, depth=depth, capacity=depth + tokens, weights=weights, threads=threads,
            )
        )  # fmt: skip
    decoders.append(decode_speed.TransformersDecoder(stock, loaded, depth))
    entered = [decode_speed.contestant(x, ids, depth, random=fill == "random") for x in decoders]
    probes = speed.bandwidth_probes(device)
    with progress("measuring", total=(rounds + 1) * len(entered + probes)) as bar:
        seconds = speed.race([*entered, *probes], rounds=rounds, timer=speed.timer_for(device), step=bar.advance)
    limit = speed.bandwidth(seconds)
    results = speed.rows(entered, seconds, "decode", threads=threads, bandwidth=limit["read"])
    found = {
        **_facts(opened, chosen, depth, 1, threads, loaded.geometry), "dtype": loaded.dtype, "weights": weights,
        "tokens": tokens, "fill": fill, "results": results, "ratios": speed.ratios(results), "bandwidth": limit,
    }  # fmt: skip
    if fill == "text":
        prefill = speed.rows(entered, seconds, "prefill", threads=threads)
        found["prefill"] = {"results": prefill, "ratios": speed.ratios(prefill)}
    _show(found, json)


bench = {"attention": attention, "decode": decode, "serve": serve}
"""How fast an artifact is, with others beside it in the same run."""


def choose(backend: Backend) -> Literal["cpu", "cuda", "reference"]:
    """Return the backend that computes.

    Raises
    ------
    NativeError
        If the one that was asked for is not there.
    UsageError
        If it needs a GPU and torch sees none.
    """
    import torch

    from kvcli.runtime import kvrt

    if backend == "reference":
        return backend
    if backend != "auto":
        kvrt.library(backend)
        if backend == "cuda" and not torch.cuda.is_available():
            raise UsageError("--backend cuda needs a GPU, and torch sees none.")
        return backend
    native: tuple[Literal["cpu", "cuda"], ...] = ("cuda", "cpu")
    for name in native:
        if name == "cuda" and not torch.cuda.is_available():
            continue
        try:
            kvrt.library(name)
        except KvcliError as error:
            say(f"Not on {name}: {error}")
        else:
            return name
    return "reference"


def known(artifact: Artifact, chosen: Literal["cpu", "cuda", "reference"]) -> Literal["cpu", "cuda", "reference"]:
    """Return what was chosen, or the reference for a model or a plan that native kernels do not compute."""
    from transformers import AutoConfig

    from kvcli.runtime.weights import check_runnable

    try:
        check_runnable(AutoConfig.from_pretrained(artifact.path), artifact.plan)
    except InputError as error:
        say(f"Not on {chosen}: {error}")
        return "reference"
    return chosen


def _model_facts(artifact: Artifact) -> tuple[Any, int]:
    """Return the layers' geometry and the longest context, from the configuration alone: no weights are loaded."""
    from transformers import AutoConfig

    from kvcli.models.architectures import check_supported, geometry

    config = AutoConfig.from_pretrained(artifact.path)
    check_supported(config)
    return geometry(config), int(config.max_position_embeddings)


def _depth(depth: int, longest: int, more: int) -> int:
    """Return how many tokens the cache is to hold, with room for more."""
    room = longest - more
    depth = depth or min(4096, room)
    if depth > room or depth < 1:
        raise UsageError(f"{depth} tokens and {more} more exceed the model's context of {longest} tokens.")
    return depth


def _facts(artifact: Artifact, backend: str, depth: int, batch: int, threads: int, geometry: Any) -> dict[str, Any]:
    from kvcli.evaluation import speed

    variant = None
    if backend != "reference":
        from kvcli.runtime import kvrt

        variant = kvrt.library(backend).variant
    shapes = {(x.num_heads, x.num_kv_heads, x.head_dim) for x in geometry}
    return {
        "backend": backend, "variant": variant, "depth": depth, "batch": batch, "threads": threads,
        "effective_bits": artifact.plan.effective_bits(depth), "layers": len(geometry),
        "shapes": [dict(zip(("num_heads", "num_kv_heads", "head_dim"), x, strict=True)) for x in sorted(shapes)],
        "machine": speed.machine(threads, "cuda" if backend == "cuda" else "cpu"),
    }  # fmt: skip


def _show(found: dict[str, Any], json: bool) -> None:
    if json:
        emit(found)
        return
    print(f"{found['depth']} tokens, {found['effective_bits']:.3f} effective bits, {found['threads']} threads")
    _table("decode" if "prefill" in found else "", found)
    if "prefill" in found:
        _table("prefill", found["prefill"])
    limit = found["bandwidth"]
    print(f"memory: reads {limit['read'] / 1e9:.1f} GB/s, copies {limit['copy'] / 1e9:.1f} GB/s (both directions)")


def _table(title: str, found: dict[str, Any]) -> None:
    shown = []
    for x in found["results"]:
        ratio, gb, share = (found["ratios"].get(x["name"]), x["gb_per_s"], x["fraction_of_read_bandwidth"])
        shown.append(
            (
                x["name"], f"{ratio:.2f}" if ratio else "", f"{1e3 * x['median_s']:.3f}", f"{x['tokens_per_s']:.1f}",
                f"{gb:.1f}" if gb else "", f"{100 * share:.0f} %" if share else "",
            )
        )  # fmt: skip
    table((title or "name", "ours is × as fast", "ms", "tokens/s", "GB/s", "of the limit"), shown)
