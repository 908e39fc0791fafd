"""Each barrier and each wait of the kernels is needed: without it, a small check fails under some schedule."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE.parent / "runtime" / "native")]  # tests are no package

import cpu_store  # noqa: E402
import kernel_checks as kernels  # noqa: E402
from cuda_on_cpu.build import KERNELS, CannotBuild, build  # noqa: E402
from cuda_on_cpu.mutation import Mutant, mutants  # noqa: E402

from kvcli.plan import CachePlan, LayerPlan  # noqa: E402
from kvcli.quant.format import KVFormat  # noqa: E402

SCHEDULES = (0, 1, 7, 2)
SECONDS = 60  # more, and a mutant counts as hanging
Check = Callable[[int, kernels.Emulated], None]
TEAM_SYNC = re.compile(r"\bteam\.sync\(\);")  # of functions that a warp or a block may run


def appends(schedule: int, library: kernels.Emulated) -> None:
    two = KVFormat(2, "token", 24)
    for k, v in (
        (KVFormat(3, "token", 32, grid="gaussian"), two),
        (KVFormat(4, "channel", 8, False), two),
        (KVFormat(16), two),
    ):
        layer = LayerPlan(1, 96, k, v, transform="hadamard", center=True)
        plan = CachePlan((layer,), residual_window=3, sink_tokens=2)
        store, plain = kernels.pair(plan, 1, 128)
        for i, count in enumerate((45, 10, 1, 1)):  # the second overwrites ring entries that leave in the same step
            kv = kernels.tokens(layer, count, i)
            store.append([kv])
            kernels.feed(plain, 0, kv)
        kernels.assert_same_storage(store, plain)
    kernels.check_token_by_token(0, schedule, library)


def attends(schedule: int, library: kernels.Emulated) -> None:
    del library
    three = KVFormat(3, "token", 32, grid="gaussian")
    for variant, (dim, fmt, rope, group) in product(
        (kernels.SCALAR, kernels.TENSOR),
        ((64, three, "after", 3), (96, KVFormat(8, "token", 96), "after", 1), (64, KVFormat(16), "after", 1),
         (16, KVFormat(4, "token", 16), "before", 2)),
    ):  # fmt: skip
        for center in (True, False):
            layer = LayerPlan(1, dim, fmt, fmt, transform="hadamard", center=center, rope=rope)
            exact = kernels.SCALAR if rope == "before" else variant
            kernels.check_attention(CachePlan((layer,), sink_tokens=1, residual_window=1), (380 if center else 90,),
                                    group=group, variant=exact, split_pages=21, schedule=schedule,
                                    capacity=512)  # fmt: skip


def expands(schedule: int, library: kernels.Emulated) -> None:
    del schedule, library
    kernels.check_expanding(KVFormat(4), "before")
    kernels.check_expanding(KVFormat(4), "after")


def predicts(schedule: int, library: kernels.Emulated) -> None:
    del library
    # heads of 24 channels do not divide a block's threads: who made an element does not use it
    wide, odd = (
        (KVFormat(3, "token", 32), KVFormat(4, "channel", 32)),
        (KVFormat(4, "token", 8), KVFormat(4, "token", 24)),
    )
    for dim, (k, v) in ((32, wide), (24, odd)):
        layer = LayerPlan(2, dim, k, v, transform="hadamard", center=True)
        plan = CachePlan((layer,), residual_window=1, block_size=32)
        kernels.check_predicted(plan, ((70,), (30,)), group=5, schedule=schedule)


def fuses(schedule: int, library: kernels.Emulated) -> None:
    del schedule
    kernels.check_hadamard(64, library)
    kernels.check_norms_and_gates(torch.float32, library)


# In which order checks are most likely to find a mutant of a file.
CHECKS: dict[str, tuple[Check, ...]] = {
    "append.cu": (appends,), "attend.cu": (attends,), "attend.cuh": (attends,), "scalar_engine.cuh": (attends,),
    "combine.cu": (attends, predicts), "expand.cu": (attends, expands), "fused.cu": (fuses,),
    "predict.cuh": (predicts,), "vector.cuh": (fuses, expands, attends, appends),
}  # fmt: skip


def all_mutants() -> Iterator[tuple[str, Mutant]]:
    """Yield each file's mutants; ptx.cuh defines the waits and has none of its own."""
    for path in sorted(KERNELS.iterdir()):
        if path.suffix not in (".cu", ".cuh") or path.name in ("ptx.cuh", "launch.cuh"):
            continue
        source = path.read_text()
        yield from ((path.name, mutant) for mutant in mutants(source))
        for match in TEAM_SYNC.finditer(source):
            without = source[: match.start()] + ";" + source[match.end() :]
            yield path.name, Mutant("team.sync", source.count("\n", 0, match.start()) + 1, match[0], without)


def run_check(library: Path, check: Check, schedule: int) -> None:
    """Run a check in a forked process and end that: 0 if it passes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the emulator says what it stopped at
    try:
        emulated = kernels.Emulated(library)
        emulated.schedule(schedule)
        cpu_store.cpu_library = lambda: emulated
        check(schedule, emulated)
    except BaseException:
        os._exit(1)
    os._exit(0)


def failing_schedule(library: Path, checks: tuple[Check, ...]) -> int | None:
    """Return a schedule under which a check fails, aborts or hangs, or None."""
    for check, schedule in product(checks, SCHEDULES):
        child = os.fork()
        if not child:
            run_check(library, check, schedule)
        end = time.monotonic() + SECONDS
        while not (done := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.005)
        if done[1]:
            return schedule
    return None


def library_of(folder: Path, name: str | None = None, source: str = "") -> Path:
    """Build the kernels, one file replaced."""
    own = folder / "csrc" / "cuda"
    shutil.copytree(KERNELS, own)
    for header in KERNELS.parent.glob("*.h"):
        shutil.copy(header, own.parent)
    if name:
        (own / name).write_text(source)
    try:
        # a header is looked for beside the file that includes it first, so that the flags, and the cache, stay the same
        return build(sorted(own.glob("*.cu")), folder / "libkvrt_mutant.so")
    except CannotBuild as reason:
        pytest.skip(str(reason))


@pytest.mark.slow
def test_the_checks_pass_without_mutation(tmp_path: Path) -> None:
    library = library_of(tmp_path)
    assert failing_schedule(library, (appends, attends, expands, predicts, fuses)) is None


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mutant"), [pytest.param(n, m, id=f"{n}:{m.line}") for n, m in all_mutants()])
def test_every_barrier_is_missed(name: str, mutant: Mutant, tmp_path: Path) -> None:
    library = library_of(tmp_path, name, mutant.source)
    assert failing_schedule(library, CHECKS[name]) is not None, f"{name} passes: {mutant}"
