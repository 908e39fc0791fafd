"""Compiles CUDA sources with g++ into libraries that run on the CPU."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
KERNELS = PROJECT / "kvcli" / "runtime" / "csrc" / "cuda"
EMULATOR = (HERE / "scheduler.cpp", HERE / "runtime_api.cpp")
HEADERS = ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h", "cuda_fp8.h")
STATIC_SHARED_LIMIT = 48 * 1024

COMPILE = (
    "-std=c++17 -g -fPIC -Wall -Wextra -Wno-unknown-pragmas"
    # kernels read memory through pointers of other types, as nvcc allows
    " -fno-strict-aliasing"
    # two libraries in one process keep their own data
    " -fno-gnu-unique"
    # a variable that was never set holds garbage, the same each time
    " -ftrivial-auto-var-init=pattern"
)
SANITIZE = "-fsanitize=address,bounds,alignment -fno-sanitize-recover=all -fno-omit-frame-pointer"


class CannotBuild(Exception):
    """This machine has no g++, or no CUDA headers. Tests skip with the message."""


class BuildFailed(Exception):
    """The compiler refused a source; the message is the compiler's."""


@cache
def cuda_include_folders() -> tuple[Path, ...]:
    """Find folders that hold NVIDIA's headers: of the toolkit, or of its pip packages.

    Raises
    ------
    CannotBuild
        Where there are none.
    """
    candidates = [Path(os.environ[name]) / "include" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc")
    if nvcc:
        dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
        tops = [line.removeprefix("#$ TOP=") for line in dry.stderr.splitlines() if line.startswith("#$ TOP=")]
        candidates += [Path(top) / "include" for top in tops]
    candidates.append(Path("/usr/local/cuda/include"))
    for folder in candidates:
        if all((folder / name).is_file() for name in HEADERS):
            return (folder.resolve(),)
    # pip packages spread the headers over several folders
    pip = [folder for entry in sys.path if entry for folder in sorted(Path(entry).glob("nvidia/*/include"))]
    if all(any((folder / name).is_file() for folder in pip) for name in (*HEADERS, "crt/host_defines.h")):
        return tuple(folder.resolve() for folder in pip)
    raise CannotBuild("no CUDA headers: set CUDA_HOME, or install a CUDA toolkit or the package nvidia-cuda-runtime")


@cache
def compiler() -> str:
    """Give the path of g++, or raise `CannotBuild`."""
    found = shutil.which("g++")
    if found is None:
        raise CannotBuild("no g++")
    if os.uname().machine != "x86_64":
        raise CannotBuild("the emulator runs on x86-64 only")
    return found


@cache
def _compiler_version() -> str:
    return subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout


def build(
    sources: Sequence[Path],
    out: Path,
    *,
    defines: Sequence[str] = (),
    sanitize: bool = False,
    optimize: str = "-O1",
    includes: Sequence[Path] = (),
    cache_dir: Path | None = None,
) -> Path:
    """Compile CUDA sources and the emulator into the shared library `out`.

    An object is taken from the cache while its source, every header it includes and the flags are unchanged.

    Parameters
    ----------
    sources
        ``.cu`` or ``.cpp`` files.
    out
        The library to write. Give each of several libraries in one process its own path.
    defines
        Macros, each ``NAME`` or ``NAME=value``.
    sanitize
        Find accesses out of bounds and misaligned ones. Load the library under `sanitizer_environment`.
    optimize
        g++'s optimisation flag.
    includes
        Folders to look for headers in, before the project's kernels and the emulator.
    cache_dir
        Where objects are kept; ``.pytest_cache/cuda_on_cpu`` of the project by default.

    Raises
    ------
    CannotBuild
        Without g++ or CUDA headers.
    BuildFailed
        If a source does not compile, or declares a shared variable larger than a GPU allows.
    """
    folders = [*includes, KERNELS, HERE]
    flags = [*shlex.split(COMPILE), optimize, *(shlex.split(SANITIZE) if sanitize else [])]
    flags += [f"-D{name}" for name in defines]
    flags += [f"-I{folder}" for folder in folders] + [f"-isystem{folder}" for folder in cuda_include_folders()]
    cache_dir = cache_dir or PROJECT / ".pytest_cache" / "cuda_on_cpu"
    cache_dir.mkdir(parents=True, exist_ok=True)
    # the emulator's own objects serve all defines and levels of optimisation
    own = [flag for flag in flags if not flag.startswith("-D") and flag != optimize] + ["-O2"]
    objects = [_object(Path(source), flags, cache_dir) for source in sources]
    for item, source in zip(objects, sources, strict=True):
        _check_static_shared(item, Path(source))
    objects += [_object(source, own, cache_dir) for source in EMULATOR]
    out.parent.mkdir(parents=True, exist_ok=True)
    link = [compiler(), "-shared", "-Wl,-Bsymbolic", *map(str, objects), "-lpthread"]
    if sanitize:
        link[1:1] = shlex.split(SANITIZE)
    _run_into(link, out)
    return out


def sanitizer_environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Give an environment in which a process, Python too, can load a sanitized library."""
    asan = subprocess.run([compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = dict(os.environ if base is None else base)
    environment["LD_PRELOAD"] = str(Path(asan.stdout.strip()).resolve())
    environment["ASAN_OPTIONS"] = "detect_leaks=0:abort_on_error=1:handle_abort=0"
    environment["PYTHONMALLOC"] = "malloc"  # so that bounds of Python's own buffers are known
    return environment


def _run_into(command: Sequence[str], out: Path) -> None:
    """Run a compiler that writes `out`, and put the file there in one step: other workers may build the same."""
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        part = Path(folder) / out.name
        done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildFailed(done.stderr)
        part.replace(out)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _object(source: Path, flags: Sequence[str], cache_dir: Path) -> Path:
    """Give the object of a source, from the cache if it can be.

    The source counts by its content, not by its place: mutants are written anew to a temporary folder in each test run.
    """
    source = source.resolve()
    key = json.dumps([_compiler_version(), _digest(source), *flags])
    name = f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:24]}"
    # one entry for a source and its flags: which headers it read, those beside it by their names, and what was in them
    entry = cache_dir / f"{name}.json"
    if entry.is_file():
        record = json.loads(entry.read_text())
        kept = cache_dir / record["object"]
        headers = {source.parent / path: digest for path, digest in record["read"].items()}
        if kept.is_file() and all(path.is_file() and _digest(path) == digest for path, digest in headers.items()):
            for path in (entry, kept):
                path.touch()
            return kept
    _forget_old(cache_dir)
    with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
        made, rule = Path(folder) / "made.o", Path(folder) / "made.d"
        command = [compiler(), *flags, "-x", "c++"]
        if source.name != "runtime_api.cpp":  # host code, in which CUDA's words keep their meaning
            command += ["-include", "emulator.h"]
        command += ["-MMD", "-MF", str(rule), "-c", str(source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildFailed(done.stderr)
        if done.stderr:
            print(done.stderr, file=sys.stderr)
        headers = {Path(word) for word in shlex.split(rule.read_text().replace("\\\n", " "))[1:]} - {source}
        read = {
            str(p.relative_to(source.parent) if p.is_relative_to(source.parent) else p): _digest(p) for p in headers
        }
        content = hashlib.sha256(json.dumps(sorted(read.items())).encode()).hexdigest()[:12]
        kept = cache_dir / f"{name}-{content}.o"
        made.replace(kept)
        part = Path(folder) / entry.name
        part.write_text(json.dumps({"object": kept.name, "read": read}))
        part.replace(entry)
    return kept


def _forget_old(cache_dir: Path) -> None:
    """Delete what no build has used for a week."""
    limit = time.time() - 7 * 24 * 3600
    for path in cache_dir.iterdir():
        with contextlib.suppress(OSError):  # another worker may be as quick
            if path.is_file() and path.stat().st_mtime < limit:
                path.unlink()


def _check_static_shared(item: Path, source: Path) -> None:
    """Refuse a function whose shared variables together pass 48 KiB."""
    objdump = shutil.which("objdump")
    if objdump is None:
        return
    table = subprocess.run([objdump, "-tC", str(item)], capture_output=True, text=True, check=True).stdout
    totals: dict[str, int] = {}
    for line in table.splitlines():
        place, _, symbol = line.partition("\t")  # … section, size in hexadecimal and name
        if ".tbss" in place or ".tdata" in place:
            size, _, name = symbol.partition(" ")
            function = name.strip().rpartition("::")[0]
            totals[function] = totals.get(function, 0) + int(size, 16)
    for function, total in totals.items():
        if total > STATIC_SHARED_LIMIT:
            raise BuildFailed(f"{source}: {function} has {total} bytes of static shared memory; 49152 is the most")
