"""How speed is measured: everything that is compared runs in turn, in one process, and medians are reported.

A machine that other programs share is fast in one minute and slow in the next. Contestants therefore alternate, round
by round, and so does the probe of the memory's bandwidth that their figures are held against: what disturbs one
disturbs all, and ratios hold where times do not.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Work = Callable[[], object]
Timer = Callable[[Work], float]
"""Runs something and returns how many seconds it took."""

PROBE_BYTES = 256 * 2**20
UNKNOWN_CACHE = 64 * 2**20  # where the system does not tell how large its last level of cache is
LIBRARIES = ("kvcli", "torch", "transformers", "llama-cpp-python")


@dataclass(frozen=True)
class Contestant:
    """Something whose speed is measured.

    Attributes
    ----------
    name
        As it stands in the results.
    phases
        What is timed, one after the other, by name.
    tokens
        How many tokens each phase handles.
    steps
        How often a phase does what ``bytes_read`` and the reported seconds are for, as in 32 steps of decoding.
    bytes_read
        Bytes that one step of a phase has to read, where that is known.
    prepare
        Done before each round, untimed.
    """

    name: str
    phases: Mapping[str, Work]
    tokens: Mapping[str, float]
    steps: Mapping[str, int] = field(default_factory=dict)
    bytes_read: Mapping[str, int] = field(default_factory=dict)
    prepare: Work = lambda: None


def wall(work: Work, clock: Callable[[], float] = time.perf_counter, sync: Work = lambda: None) -> float:
    """Time by the clock on the wall, from when the device is idle to when it is idle again."""
    sync()
    began = clock()
    work()
    sync()
    return clock() - began


def timer_for(device: torch.device | str) -> Timer:
    """Return what times work on a device."""
    if torch.device(device).type == "cuda":
        return lambda work: wall(work, sync=torch.cuda.synchronize)
    return wall


def race(
    contestants: Sequence[Contestant],
    *,
    rounds: int = 5,
    warmup: int = 1,
    timer: Timer = wall,
    step: Work = lambda: None,
) -> dict[str, dict[str, list[float]]]:
    """Run contestants in turn, and return the seconds of each contestant's phases.

    Parameters
    ----------
    contestants
        Their names must differ.
    rounds, warmup
        Rounds that count, and rounds before them that do not. Every other round goes backwards, so that nobody always
        runs after the same neighbour.
    timer
        What times a phase.
    step
        Called after each contestant's turn.
    """
    seconds: dict[str, dict[str, list[float]]] = {c.name: {phase: [] for phase in c.phases} for c in contestants}
    if len(seconds) < len(contestants):
        raise ValueError("two contestants share a name.")
    for number in range(-warmup, rounds):
        for contestant in contestants if number % 2 == 0 else reversed(contestants):
            contestant.prepare()
            for phase, work in contestant.phases.items():
                took = timer(work)
                if number >= 0:
                    seconds[contestant.name][phase].append(took)
            step()
    return seconds


def rows(
    contestants: Sequence[Contestant],
    seconds: Mapping[str, Mapping[str, Sequence[float]]],
    phase: str,
    *,
    threads: int,
    bandwidth: float | None = None,
) -> list[dict[str, Any]]:
    """Lay out what was measured of one phase.

    Returns
    -------
    list of dict
        ``name``, ``median_s`` of one step, ``tokens_per_s``, ``bytes_read`` and ``threads``, for those who have the
        phase; beside them the quartiles, GB/s, and the share of ``bandwidth`` (bytes a second) that they reach.
    """
    found = []
    for c in contestants:
        if phase not in c.phases:
            continue
        steps = c.steps.get(phase, 1)
        times = sorted(x / steps for x in seconds[c.name][phase])
        median, read = statistics.median(times), c.bytes_read.get(phase)
        speed = None if read is None or not median else read / median
        tokens = c.tokens[phase] / steps
        found.append(
            {
                "name": c.name, "median_s": median, "tokens_per_s": tokens / median if median else None,
                "bytes_read": read, "threads": threads, "rounds": len(times),
                "quartiles_s": [times[len(times) // 4], times[(3 * len(times)) // 4]] if times else [],
                "gb_per_s": None if speed is None else speed / 1e9,
                "fraction_of_read_bandwidth": None if speed is None or not bandwidth else speed / bandwidth,
            }
        )  # fmt: skip
    return found


def ratios(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return how many times as fast the first row is as each of the others."""
    first, *others = results
    return {
        x["name"]: first["tokens_per_s"] / x["tokens_per_s"]
        for x in others
        if x["tokens_per_s"] and first["tokens_per_s"]
    }


# --- the limit --------------------------------------------------------------------------------------------------------


def bandwidth_probes(device: torch.device | str = "cpu", nbytes: int = PROBE_BYTES) -> list[Contestant]:
    """Contestants that read memory, and copy it, as fast as torch can: what everybody else is held against."""
    x = torch.ones(nbytes // 4, dtype=torch.float32, device=device)
    y = torch.empty_like(x)
    # several, because each is limited by something else on some machine; the fastest is the limit
    read: dict[str, Work] = {"dot": lambda: torch.dot(x, x), "max": x.amax, "sum": x.sum}
    probes = [Contestant(f"read ({name})", {"read": work}, {"read": 0}) for name, work in read.items()]
    return [*probes, Contestant("copy", {"copy": lambda: y.copy_(x)}, {"copy": 0})]


def bandwidth(seconds: Mapping[str, Mapping[str, Sequence[float]]], nbytes: int = PROBE_BYTES) -> dict[str, float]:
    """Return bytes a second from what the probes took: ``read``, and ``copy`` with both directions counted."""
    fastest: dict[str, float] = {}
    for phase, moved in (("read", nbytes), ("copy", 2 * nbytes)):
        medians = [statistics.median(x[phase]) for x in seconds.values() if x.get(phase)]
        fastest[phase] = moved / min(medians) if medians and min(medians) > 0 else 0.0
    return fastest


class Flush:
    """Drives what the processor's caches hold out of them, so that the next reader goes to memory."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._junk: Tensor = torch.ones(last_level_cache(device), dtype=torch.float32, device=device)  # four times it

    def __call__(self) -> None:
        """Read and write four times the last level of cache."""
        self._junk.add_(1)


def last_level_cache(device: torch.device | str = "cpu") -> int:
    """Bytes of the last level of cache."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        unit = {"K": 2**10, "M": 2**20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM")) * unit)
    return max(sizes, default=UNKNOWN_CACHE)


# --- where it was measured --------------------------------------------------------------------------------------------


def machine(threads: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return what a reader of the figures needs to know of the machine they were measured on."""
    import psutil

    facts: dict[str, Any] = {
        "processor": _processor(), "architecture": platform.machine(), "system": platform.system(),
        "physical_cores": psutil.cpu_count(logical=False), "logical_cores": psutil.cpu_count(),
        "last_level_cache_bytes": last_level_cache(), "memory_bytes": psutil.virtual_memory().total,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # others at work make times, not ratios, lie
        "threads": threads, "python": platform.python_version(),
        "versions": {name: _version(name) for name in LIBRARIES},
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
    if torch.device(device).type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts["gpu"] = {
            "name": gpu.name, "memory_bytes": gpu.total_memory, "multiprocessors": gpu.multi_processor_count,
            "l2_bytes": last_level_cache(device), "cuda": torch.version.cuda,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
        }  # fmt: skip
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.processor())


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
