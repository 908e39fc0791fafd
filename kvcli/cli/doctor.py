"""``kvcli doctor``: what this machine can run, and what is missing."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any

import kvcli
from kvcli.cli.console import emit, table
from kvcli.cli.options import JsonFlag, option

REQUIRED = ("torch", "transformers", "safetensors", "numpy")
OPTIONAL = {
    "bitsandbytes": "8-bit and NF4 weights",
    "gptqmodel": "GPTQ weights",
    "datasets": "calibration data by name from a hub",
    "llama-cpp-python": "comparing with llama.cpp",
    "ray": "search and serving on several machines",
    "vllm": "serving past one machine",
}
SIMD = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "asimd")


def doctor(
    json: JsonFlag = False,
    network: Annotated[bool, option("--network", help="Also ask whether the model hub answers.")] = False,
) -> None:
    """Show what this machine can run, and what is missing."""
    report = examine(network=network)
    if json:
        emit(report)
    else:
        table(("what", "found", "for"), list(_rows(report)))


def examine(*, network: bool = False) -> dict[str, Any]:
    """Look the machine over and return the facts as plain JSON.

    Parameters
    ----------
    network
        Whether to ask the model hub for an answer; nothing leaves the machine otherwise.
    """
    import psutil

    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path.cwd())
    return {
        "kvcli": kvcli.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: _version(name) for name in REQUIRED},
        "cpu": {
            "physical_cores": psutil.cpu_count(logical=False),
            "logical_cores": psutil.cpu_count(),
            "simd": _simd(),
        },
        "memory": {"total_bytes": memory.total, "available_bytes": memory.available},
        "disk": {"folder": str(Path.cwd()), "free_bytes": disk.free},
        "torch": _torch(),
        "nvcc": _nvcc(),
        "backends": {"reference": {"kernels": None, "missing": None}, **{x: _backend(x) for x in ("cpu", "cuda")}},
        "optional": {name: {"version": _version(name), "for": use} for name, use in OPTIONAL.items()},
        "hub": _hub_answers() if network else None,
    }


def _version(distribution: str) -> str | None:
    try:
        return installed_version(distribution)
    except PackageNotFoundError:
        return None


def _simd() -> list[str]:
    """Return the vector instructions the kernels ask for that this CPU has; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    flags = next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set())
    return [name for name in SIMD if name in flags]


def _torch() -> dict[str, Any]:
    """Ask torch itself; an installation that does not import is a finding, not a crash."""
    try:
        import torch
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    devices = [
        {
            "name": torch.cuda.get_device_name(i),
            "compute_capability": ".".join(map(str, torch.cuda.get_device_capability(i))),
            "memory_bytes": torch.cuda.get_device_properties(i).total_memory,
        }
        for i in range(torch.cuda.device_count())
    ]
    return {
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "devices": devices,
    }


def _backend(kind: str) -> dict[str, Any]:
    """Return which kernels of a library would be used, and why not its others; or why there are none at all."""
    try:
        from kvcli.runtime import kvrt

        library = kvrt.library(kind)
    except Exception as error:  # torch that does not import, a library that does not load: findings, not crashes
        return {"kernels": None, "missing": str(error).rstrip(".") or type(error).__name__}
    others = {name: reason for name, reason in library.variants().items() if reason}
    return {"kernels": library.variant, "missing": None, "others": others}


def _nvcc() -> str | None:
    path = shutil.which("nvcc")
    if path is None:
        return None
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"release ([\d.]+)", said)
    return found.group(1) if found else None


def _hub_answers() -> bool:
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    from huggingface_hub.constants import ENDPOINT

    try:
        urlopen(Request(ENDPOINT, method="HEAD"), timeout=5).close()
    except HTTPError:
        return True  # an error page is an answer
    except (OSError, ValueError):
        return False
    return True


def _rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Lay the facts out for a person."""
    missing = "missing"
    cpu, torch = report["cpu"], report["torch"]
    rows = [("kvcli", report["kvcli"], ""), ("python", f"{report['python']} on {report['platform']}", "")]
    rows += [(name, found or missing, "") for name, found in report["libraries"].items()]
    rows += [
        ("cores", f"{cpu['physical_cores']} physical, {cpu['logical_cores']} logical", ""),
        ("SIMD", " ".join(cpu["simd"]) or "unknown", ""),
        ("memory", f"{_gib(report['memory']['available_bytes'])} free of {_gib(report['memory']['total_bytes'])}", ""),
        ("disk", f"{_gib(report['disk']['free_bytes'])} free in {report['disk']['folder']}", ""),
    ]
    if "error" in torch:
        rows.append(("torch does not import", torch["error"], ""))
    else:
        rows.append(("torch on CPU", f"{torch['cpu_capability']}, {torch['threads']} threads", ""))
        rows.append(("torch CUDA", torch["cuda"] or "a CPU build", ""))
        rows += [
            ("GPU", f"{x['name']}, compute {x['compute_capability']}, {_gib(x['memory_bytes'])}", "")
            for x in torch["devices"]
        ]
        if not torch["devices"]:
            rows.append(("GPU", "none", ""))
    rows.append(("nvcc", report["nvcc"] or missing, "building the CUDA kernels"))
    for name, found in report["backends"].items():
        kernels = f"ready, {found['kernels']} kernels" if found["kernels"] else "ready"
        rows.append((f"backend {name}", found["missing"] or kernels, ""))
        rows += [(f"  not {x}", why, "") for x, why in found.get("others", {}).items()]
    rows += [(name, x["version"] or missing, x["for"]) for name, x in report["optional"].items()]
    if report["hub"] is not None:
        rows.append(("hub", "answers" if report["hub"] else "does not answer", "models by id"))
    return rows


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
