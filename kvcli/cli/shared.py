"""What several commands do with an artifact or a plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcli.cli.console import progress

if TYPE_CHECKING:
    from kvcli.artifact.reader import Artifact
    from kvcli.plan import CachePlan
    from kvcli.runtime.packed_model import PackedModel


def open_with_progress(path: Path, *, verify: bool) -> Artifact:
    """Open an artifact, showing how far its files have been checked."""
    from kvcli.artifact.reader import open_artifact

    with progress("checking the artifact's files", total=100) as bar:
        seen = 0.0

        def report(done: int, total: int) -> None:
            nonlocal seen
            bar.advance(100 * done / max(1, total) - seen)
            seen = 100 * done / max(1, total)

        return open_artifact(path, verify=verify, progress=report)


def load_artifact(path: Path, *, verify: bool, trust_remote_code: bool = False) -> PackedModel:
    """Open an artifact and load its model, ready to run on its packed cache."""
    from kvcli.models.loading import load
    from kvcli.runtime.packed_model import PackedModel

    artifact = open_with_progress(path, verify=verify)
    loaded = load(str(path), dtype=artifact.plan.dtype, trust_remote_code=trust_remote_code)
    return PackedModel(loaded, artifact.plan, artifact.tensors())


def plan_summary(plan: CachePlan, context: int, capacity: CachePlan | None = None) -> dict[str, Any]:
    """Return the JSON keys that scripts rely on: bits, bytes at several contexts, and every layer's formats.

    The same of a capacity plan, where there is one, under ``capacity``.
    """
    contexts = sorted({1024, 2048, 4096, 8192, 32768, 131072, context})
    second = {} if capacity is None else {"capacity": plan_summary(capacity, context)}
    return {
        "effective_bits": plan.effective_bits(context),
        "effective_bits_with_model": plan.effective_bits_with_model(context),
        "nominal_bits": plan.nominal_bits,
        "context": context,
        "bytes_at": {str(n): plan.bytes_at(n) for n in contexts},
        "bytes_at_16_bits": {str(n): plan.as_exact().bytes_at(n) for n in contexts},
        "model_bytes": plan.model_bytes(),
        "block_size": plan.block_size,
        "sink_tokens": plan.sink_tokens,
        "residual_window": plan.residual_window,
        "dtype": plan.dtype,
        "layers": [x.to_json() for x in plan.layers],
        **second,
    }


def size(count: float) -> str:
    """Return a number of bytes for a person."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def show_plan(plan: CachePlan, context: int, capacity: CachePlan | None = None) -> None:
    """Print the summary of a plan, and of its capacity plan, for a person on stdout."""
    exact, bits = plan.as_exact().bytes_at(context), plan.effective_bits(context)
    mine = plan.bytes_at(context)
    print(f"effective bits {bits:.3f} at {context} tokens (nominal {plan.nominal_bits:.3f})")
    print(f"cache {size(mine)} at {context} tokens, {exact / mine:.2f} times smaller than {size(exact)} in 16 bits")
    print(f"page {plan.block_size} tokens, {plan.sink_tokens} exact sinks, {plan.residual_window} exact recent tokens")
    print(f"per model {size(plan.model_bytes())}")
    if capacity is not None:
        second, whole = capacity.effective_bits(context), capacity.effective_bits_with_model(context)
        print(
            f"idle sequences {second:.3f} effective bits at {context} tokens, {size(capacity.bytes_at(context))};"
            f" {whole:.3f} with predictors, per model {size(capacity.model_bytes())}"
        )
