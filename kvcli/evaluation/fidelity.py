"""How faithful a packed cache is: perplexity, KL divergence and top-1 flips against the 16-bit cache.

Teacher-forced on windows of text, the second half of each scored, with the cache read the way decoding reads it. The
reference is the same weights on the exact plan, run in the same chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from kvcli.errors import BudgetError, InputError
from kvcli.evaluation.activations import simulating
from kvcli.evaluation.intervals import bootstrap
from kvcli.runtime.packed_model import CHUNK, PackedModel

TASKS = ("ppl", "kl", "flips")
ROWS = 128  # tokens whose distributions are compared at once, in float64
BINS = 16  # parts of the scored half, for KL along the sequence, and what the bootstrap draws


def compare(reference: Tensor, other: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Per token, what two distributions have in common.

    Parameters
    ----------
    reference, other
        Log-probabilities [tokens, vocabulary].
    targets
        [tokens] the tokens that came.

    Returns
    -------
    dict
        ``kl`` (nats, reference‖other), ``nll`` and ``nll_reference`` (nats), ``flip`` (bool: another top-1 token), each
        [tokens], float64.
    """
    out: dict[str, list[Tensor]] = {"kl": [], "nll": [], "nll_reference": [], "flip": []}
    for p, q, t in zip(reference.split(ROWS), other.split(ROWS), targets.split(ROWS), strict=True):
        p, q = p.double(), q.double()
        out["kl"].append((p.exp() * (p - q)).sum(-1).clamp(min=0))
        out["nll"].append(-q.gather(-1, t[:, None])[:, 0])
        out["nll_reference"].append(-p.gather(-1, t[:, None])[:, 0])
        out["flip"].append(p.argmax(-1) != q.argmax(-1))
    return {name: torch.cat(parts) for name, parts in out.items()}


def evaluate(
    subject: PackedModel,
    reference: PackedModel,
    windows: list[Tensor],
    *,
    tasks: tuple[str, ...] = TASKS,
    chunk: int = CHUNK,
    dump: Path | None = None,
    step: Callable[[], None] = lambda: None,
    activations: int | None = None,
    rotate_down: bool = False,
) -> dict[str, Any]:
    """Measure a subject against a reference on windows of equal length.

    Parameters
    ----------
    subject, reference
        What is measured, and against what.
    windows
        [tokens] int64 each.
    tasks
        Any of ``ppl``, ``kl``, ``flips``.
    chunk
        Tokens of one forward pass.
    dump
        Safetensors file for the log-probabilities: ``reference`` and ``quantized`` [windows, scored, vocabulary] and
        ``targets`` [windows, scored].
    step
        Called once a window and side.
    activations, rotate_down
        Bits of simulated activations of the subject, and whether down's input is rotated first; see
        :func:`kvcli.evaluation.activations.simulating`.

    Returns
    -------
    dict
        ``effective_bits`` at the evaluated length (the larger of the plan's and the measured), ``measured_bytes``, and
        what :func:`measures` returns.

    Raises
    ------
    InputError
        If there is no window, or the two models do not share a vocabulary.
    BudgetError
        If the dump would not fit in memory.
    """
    if not windows:
        raise InputError("there is no window to evaluate.")
    tokens = len(windows[0])
    scored = tokens - tokens // 2
    vocabulary = reference.loaded.model.config.vocab_size
    if vocabulary != subject.loaded.model.config.vocab_size:
        raise InputError("the artifact and the reference model have different vocabularies.")
    if dump is not None:
        check_dump(len(windows) * scored * vocabulary * 8)
    found: list[dict[str, Tensor]] = []
    kept: dict[str, list[Tensor]] = {"reference": [], "quantized": [], "targets": []}
    nbytes, model = 0, subject.loaded.model
    for ids in windows:
        p, _ = reference.log_probs(ids, scored=scored, chunk=chunk)
        step()
        with nullcontext() if activations is None else simulating(model, activations, rotate_down=rotate_down):
            q, allocated = subject.log_probs(ids, scored=scored, chunk=chunk)
        step()
        nbytes = max(nbytes, allocated, subject.plan.bytes_at(tokens))
        found.append(compare(p, q, ids[-scored:]))
        if dump is not None:
            for name, x in (("reference", p), ("quantized", q), ("targets", ids[-scored:])):
                kept[name].append(x)
    if dump is not None:
        part = dump.with_name(f".{dump.name}.part")
        try:
            save_file({name: torch.stack(x).contiguous() for name, x in kept.items()}, part)
            part.replace(dump)
        finally:
            part.unlink(missing_ok=True)
    plan = subject.plan
    bits = max(plan.effective_bits(tokens), 8 * nbytes / (tokens * plan.scalars_per_token))
    result: dict[str, Any] = {
        "context": tokens, "windows": len(windows), "scored_tokens": scored * len(windows), "dtype": plan.dtype,
        "effective_bits": bits, "nominal_bits": plan.nominal_bits,
        "effective_bits_with_model": bits + plan.effective_bits_with_model(tokens) - plan.effective_bits(tokens),
        "measured_bytes": nbytes, "reference_bytes": plan.as_exact().bytes_at(tokens),
        "reference_cache": plan.exact_dtype,
    }  # fmt: skip
    if activations is not None:
        result["simulated_activations"] = {"bits": activations, "rotate_down": rotate_down}
    return result | measures(found, tokens - scored, tasks)


def measures(found: Sequence[Mapping[str, Tensor]], first: int, tasks: Sequence[str] = TASKS) -> dict[str, Any]:
    """Return the figures of windows of equal length, with 95 % intervals.

    Neighbouring tokens are alike, so the bootstrap draws whole parts of windows (blocks: Carlstein, 1986).

    Parameters
    ----------
    found
        What :func:`compare` returned for each window.
    first
        Position of the first scored token in its window.
    tasks
        Any of ``ppl``, ``kl``, ``flips``.

    Returns
    -------
    dict
        The tasks, each as :func:`summarize`, with ``interval``: of the mean KL, of the rate of flips, and of the
        change of perplexity (``interval_pct``). With ``kl`` also ``kl_by_position``, as :func:`along`.
    """
    merged = {name: torch.cat([x[name] for x in found]) for name in found[0]}
    result: dict[str, Any] = {task: {**summarize(task, merged)} for task in tasks}
    if "ppl" in result:
        worse = bootstrap(_parts([x["nll"] - x["nll_reference"] for x in found]))
        result["ppl"]["interval_pct"] = [100 * math.expm1(x) for x in worse]
    if "kl" in result:
        result["kl"]["interval"] = list(bootstrap(_parts([x["kl"] for x in found])))
        result["kl_by_position"] = along(torch.stack([x["kl"] for x in found]), first)
    if "flips" in result:
        result["flips"]["interval"] = list(bootstrap(_parts([x["flip"].double() for x in found])))
    return result


def _parts(values: Sequence[Tensor]) -> list[float]:
    """Return the means of up to :data:`BINS` parts of each window."""
    return [float(part.mean()) for x in values for part in x.tensor_split(min(BINS, len(x)))]


def along(kl: Tensor, first: int) -> list[dict[str, float]]:
    """Return the mean KL of up to :data:`BINS` parts of a window.

    Parameters
    ----------
    kl
        [windows, scored], nats.
    first
        Position of the first scored token in its window.

    Returns
    -------
    list of dict
        ``first`` (position), ``tokens`` (positions of the part) and ``mean`` (nats), in order.
    """
    found = []
    for part in kl.tensor_split(min(BINS, kl.shape[1]), dim=1):
        found.append({"first": first, "tokens": part.shape[1], "mean": float(part.mean())})
        first += part.shape[1]
    return found


def summarize(task: str, found: Mapping[str, Tensor]) -> dict[str, float]:
    """Return one task's figures from :func:`compare`'s per-token measures."""
    if task == "ppl":
        value, reference = (math.exp(float(found[x].mean())) for x in ("nll", "nll_reference"))
        return {"value": value, "reference": reference, "delta_pct": 100 * (value / reference - 1)}
    if task == "kl":
        p99, p999 = np.percentile(found["kl"].numpy(), (99, 99.9))
        return {"mean": float(found["kl"].mean()), "p99": float(p99), "p999": float(p999)}
    return {"rate": float(found["flip"].double().mean())}


def check_dump(size: int) -> None:
    """Raise :class:`BudgetError` unless ``size`` bytes of log-probabilities fit into free memory, twice over."""
    import psutil

    free = psutil.virtual_memory().available
    if 2 * size > free:
        raise BudgetError(
            f"--dump needs {2 * size / 2**30:.1f} GiB of memory and {free / 2**30:.1f} are free: lower --limit."
        )
