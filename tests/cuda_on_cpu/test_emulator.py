"""The emulator itself: that right kernels give right results, and that wrong ones are found."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # tests are no package

from cuda_on_cpu.build import (  # noqa: E402
    KERNELS,
    BuildFailed,
    CannotBuild,
    build,
    compiler,
    cuda_include_folders,
    sanitizer_environment,
)
from cuda_on_cpu.mutation import mutants  # noqa: E402

CASES = HERE / "kernels" / "cases.cu"
PIPELINE = HERE / "kernels" / "pipeline.cu"
SCHEDULES = range(6)

Run = Callable[..., None]


def load(path: Path) -> SimpleNamespace:
    """Open a library. Its functions take arrays and plain numbers: run("name", arguments…, schedule=, workers=)."""
    library = ctypes.CDLL(str(path))

    def run(name: str, *arguments: np.ndarray | int, schedule: int = 0, workers: int = 1) -> None:
        for argument in arguments:
            assert not isinstance(argument, np.ndarray) or argument.flags.c_contiguous
        library.emulator_set_schedule(schedule)
        library.emulator_set_workers(workers)
        getattr(library, f"run_{name}")(
            *(ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else ctypes.c_int(a) for a in arguments)
        )

    return SimpleNamespace(path=path, run=run)


def built(sources: list[Path], out: Path, sanitize: bool = False) -> Path:
    try:
        return build(sources, out, sanitize=sanitize)
    except CannotBuild as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return load(built([CASES], tmp_path_factory.mktemp("cases") / "cases.so"))


@pytest.fixture(scope="module")
def run(cases: SimpleNamespace) -> Run:
    return cases.run


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built([CASES], tmp_path_factory.mktemp("sanitized") / "cases.so", sanitize=True)


def misuse(library: Path, case: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a case that should stop its process."""
    code = f"import ctypes; ctypes.CDLL({str(library)!r}).run_misuse({case.encode()!r})"
    return subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, env=environment, timeout=60
    )


# ---- right kernels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warp_operations(run: Run, schedule: int) -> None:
    out = np.full((32, 16), -1, np.int32)
    run("warp_operations", out, schedule=schedule)
    lane = np.arange(32)
    low, high = lane < 16, lane >= 16
    expected = [
        np.full(32, 5),
        lane // 8 * 8 + (lane + 3) % 8,
        lane ^ 16,
        np.where(lane + 5 < 32, lane + 5, lane),
        np.where(lane % 16 >= 3, lane - 3, lane),
        np.full(32, sum(1 << i for i in range(0, 32, 3))),
        np.ones(32),
        np.zeros(32),
        np.array([sum(1 << j for j in range(i % 4, 32, 4)) for i in lane], np.uint32).view(np.int32),
        np.full(32, lane.sum()),
        np.full(32, -7),
        np.full(32, np.bitwise_xor.reduce(lane * 77)),
        np.where(low, lane ^ 1, 0) + np.where(high, lane ^ 2, 0),
        (lane ^ 1) * 4 + 1,
        np.minimum(lane + 1, 31),
        (lane ^ 3) + 100,
    ]
    np.testing.assert_array_equal(out.T, np.array(expected).astype(np.int32))


@pytest.mark.parametrize("schedule", [0, 1, 2])
def test_barriers_that_vote(run: Run, schedule: int) -> None:
    out = np.full((96, 4), -1, np.int32)
    run("block_votes", out, schedule=schedule)
    np.testing.assert_array_equal(out, np.tile([32, 1, 1, 0], (96, 1)))


@pytest.mark.parametrize("workers", [1, 3, 0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_grid_of_blocks_on_any_number_of_workers(run: Run, schedule: int, workers: int) -> None:
    x = np.random.default_rng(0).integers(0, 100, (3, 5, 128)).astype(np.float32)
    sums, done = np.full((3, 5), np.nan, np.float32), np.zeros(1, np.uint32)
    run("block_sums", x, sums, done, schedule=schedule, workers=workers)
    np.testing.assert_array_equal(sums, x.sum(2))
    assert done[0] == 15


@pytest.mark.parametrize("schedule", [0, 1, 2])
def test_threads_that_returned_are_not_waited_for(run: Run, schedule: int) -> None:
    out = np.full(128, -1, np.int32)
    run("early_exit", out, schedule=schedule)
    np.testing.assert_array_equal(out, [32] * 32 + [8] * 8 + [-1] * 88)


def test_dynamic_shared_memory_in_a_namespace_and_a_template(run: Run) -> None:
    x, y = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    run("reverse", x, y)
    np.testing.assert_array_equal(y, x[::-1])


@pytest.mark.parametrize(("schedule", "garbage"), [(0, 0xFFFFFFFF), (1, 0x7B7B7B7B)])
def test_shared_memory_starts_as_garbage_in_every_block(run: Run, schedule: int, garbage: int) -> None:
    out = np.zeros(64, np.uint32)
    run("fresh_shared", out, schedule=schedule)  # the second block sees no zeros of the first
    np.testing.assert_array_equal(out, garbage)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("schedule", [0, 1, 2])
def test_mma_is_a_matrix_product(run: Run, dtype: str, schedule: int) -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((16, 16)), rng.standard_normal((16, 8))
    if dtype == "f16":
        a_bits, b_bits = a.astype(np.float16), b.astype(np.float16)
        a, b = a_bits.astype(np.float64), b_bits.astype(np.float64)
    else:  # cut to the upper half of a float
        a_bits, b_bits = ((m.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) for m in (a, b))
        a, b = ((m.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for m in (a_bits, b_bits))
    c = np.full((16, 8), np.nan, np.float32)
    run(f"product_{dtype}", aligned(a_bits), aligned(b_bits), c, schedule=schedule)
    np.testing.assert_allclose(c, a @ b, rtol=0, atol=1e-5)


def test_ldmatrix_in_every_form(run: Run) -> None:
    x = np.random.default_rng(2).integers(0, 1 << 16, (4, 8, 8)).astype(np.uint16)
    out = np.zeros((3, 2, 4, 32), np.uint32)
    run("load_matrices", x, out)
    for form, count in enumerate((1, 2, 4)):
        for transposed in (0, 1):
            for i in range(count):
                matrix = np.ascontiguousarray(x[i].T if transposed else x[i])
                np.testing.assert_array_equal(out[form, transposed, i], matrix.view(np.uint32).ravel())


def test_arithmetic(run: Run) -> None:
    a, b, c = 0x89ABCDE8, 0x12345678, 0xDEADBEEF
    x, out = aligned(np.array([a, b, c, 7], np.uint32)), np.zeros(16, np.uint32)
    run("arithmetic", x, out)
    signed = np.array([a, b], np.uint32).view(np.int8).reshape(2, 4).astype(int)
    pair = b << 32 | a
    expected = [
        (a & 0x000F000F) | 0x64006400,
        _bytes_of(pair, (1, 3, 5, 7)),
        a ^ b ^ c,
        _bytes_of(pair, (6, 7, 2, 3)),
        (pair << 9 >> 32) & 0xFFFFFFFF,
        (pair >> 9) & 0xFFFFFFFF,
        int(f"{a:032b}"[::-1], 2),
        (int((signed[0] * signed[1]).sum()) + c) & 0xFFFFFFFF,
        5,
        4,
        int(np.float32(0.125).view(np.uint32)),
        int(np.float32(0.25).view(np.uint32)),
        a ^ b ^ c ^ 7,
        11,
        20,
        16,  # e4m3 has steps of 2 here, and ties go to even
    ]
    assert [hex(v) for v in out] == [hex(v) for v in expected]


def _bytes_of(pair: int, which: tuple[int, ...]) -> int:
    return sum((pair >> 8 * byte & 0xFF) << 8 * i for i, byte in enumerate(which))


def aligned(array: np.ndarray) -> np.ndarray:
    """Copy an array to an address that is a multiple of 16, as GPU allocations are."""
    store = np.zeros(array.nbytes + 16, np.uint8)
    start = -store.ctypes.data % 16
    out = store[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    out[...] = array
    return out


# ---- asynchronous copies ---------------------------------------------------------------------------------------------


def test_copies_arrive_at_the_wait_for_their_group(run: Run) -> None:
    x, out = aligned(np.arange(1, 13, dtype=np.uint32)), np.zeros((4, 12), np.uint32)
    run("visibility", x, out)
    garbage = [0xFFFFFFFF] * 4
    first, second, third = [1, 2, 3, 4], [5, 6, 7, 8], [9, 0, 11, 12]
    assert out[0].tolist() == garbage * 3
    assert out[1].tolist() == first + garbage * 2
    assert out[2].tolist() == first + second + garbage  # no commit followed the third
    assert out[3].tolist() == first + second + third


def pipeline_is_right(library: SimpleNamespace, schedule: int) -> bool:
    n, tiles = 1100, 5
    x = aligned(np.random.default_rng(3).integers(1, 100, n).astype(np.float32))
    y, sums = np.full((tiles, 256), np.nan, np.float32), np.full((tiles, 2), np.nan, np.float32)
    library.run("pipeline", x, y, sums, n, schedule=schedule)
    expected = np.pad(x, (0, tiles * 256 - n)).reshape(tiles, 256)[:, ::-1]
    return np.array_equal(y, expected) and np.array_equal(sums, expected.reshape(tiles, 2, 128).sum(2))


def test_a_pipeline_of_copies_is_right_in_every_schedule(tmp_path: Path) -> None:
    library = load(built([PIPELINE], tmp_path / "pipeline.so"))
    assert all(pipeline_is_right(library, schedule) for schedule in SCHEDULES)


@pytest.mark.parametrize(
    "mutant", list(mutants(PIPELINE.read_text(encoding="utf-8"))), ids=lambda m: f"{m.name}-{m.line}"
)
def test_each_barrier_and_wait_of_a_pipeline_is_missed(tmp_path: Path, mutant) -> None:
    source = tmp_path / "pipeline.cu"
    source.write_text(mutant.source, encoding="utf-8")
    library = load(built([source], tmp_path / "pipeline.so"))
    assert not all(pipeline_is_right(library, schedule) for schedule in SCHEDULES), f"nobody misses {mutant}"


# ---- wrong kernels ---------------------------------------------------------------------------------------------------


def test_some_schedule_shows_a_race_of_lanes(run: Run) -> None:
    out, right = np.zeros(32, np.int32), np.arange(32)[::-1]
    results = []
    for schedule in SCHEDULES:
        run("lanes_race", out, schedule=schedule)
        results.append(np.array_equal(out, right))
    assert not all(results)


def test_some_schedule_shows_a_race_of_warps(run: Run) -> None:
    out, right = np.zeros(64, np.int32), 4 * np.arange(64)[::-1] + 600
    results = []
    for schedule in SCHEDULES:
        run("warps_race", out, schedule=schedule)
        results.append(np.array_equal(out, right))
    assert not all(results)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("barrier_in_half_a_warp", r"deadlock.*\n(.*\n)*  threads 0 to 15: wait at __syncthreads \(.*cases\.cu:\d+\)"),
        ("two_barriers", r"divergent barrier.*cases\.cu:\d+.*cases\.cu:\d+"),
        ("not_in_mask", r"__shfl_xor_sync at .*cases\.cu:\d+: lane 16 is not in its own mask 0x0000ffff"),
        ("different_operations", r"different warp operations: lane 0 at __any_sync .* lane 16 at __all_sync"),
        ("different_products", r"different warp operations: lane 0 at mma_m16n8k16"),
        ("product_of_31_lanes", r"mma_m16n8k16: lane 31 of the warp does not take part"),
        ("deadlock", r"deadlock.*\n(.*\n)*  threads 1 to 1: wait at __syncwarp .* mask 0x00000006"),
        ("copy_misaligned", r"cp_async16 .*shared address .* not a multiple of 16"),
        ("copy_from_misaligned", r"cp_async16 .*global address .* not a multiple of 16"),
        ("copy_to_global", r"cp_async4 .*not all in shared memory"),
        ("past_dynamic_shared", r"wrote 0 bytes past the end of the 36 bytes of dynamic shared memory"),
        ("too_many_threads", r"a block of 1025 x 1 x 1 threads"),
        ("too_much_shared", r"232449 bytes of dynamic shared memory"),
    ],
)
def test_misuse_stops_with_a_message(cases: SimpleNamespace, case: str, message: str) -> None:
    done = misuse(cases.path, case)
    assert done.returncode == -6, done.stderr
    assert re.match(f"emulator: (.*){message}", done.stderr), done.stderr


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("past_dynamic_shared", "AddressSanitizer: use-after-poison"),
        ("past_static_shared", r"index 8 out of bounds for type 'int \[8\]'"),
        ("past_global", "AddressSanitizer: heap-buffer-overflow"),
        ("copy_past_global", "AddressSanitizer: heap-buffer-overflow"),
        ("misaligned_vector", "misaligned address"),
    ],
)
def test_the_sanitizers_find_bad_addresses(sanitized: Path, case: str, message: str) -> None:
    done = misuse(sanitized, case, sanitizer_environment())
    assert done.returncode, "not found"
    assert re.search(message, done.stderr), done.stderr


def test_the_sanitizers_accept_right_kernels(sanitized: Path) -> None:
    code = (
        f"import ctypes; L = ctypes.CDLL({str(sanitized)!r}); out = (ctypes.c_int * 512)();"
        "[(L.emulator_set_schedule(s), L.run_warp_operations(out), L.run_block_votes(out)) for s in range(3)];"
        "L.emulator_set_workers(2); x = (ctypes.c_float * 1920)(*range(1920)); sums = (ctypes.c_float * 15)();"
        "L.run_block_sums(x, sums, ctypes.byref(ctypes.c_uint(0))); print(sums[0])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, env=sanitizer_environment(), timeout=60
    )
    assert (done.returncode, done.stdout.strip()) == (0, "8128.0"), done.stderr


def test_too_much_static_shared_memory_does_not_build(tmp_path: Path) -> None:
    source = tmp_path / "large.cu"
    source.write_text(
        "template <int N> __global__ void large(float* x) {\n"
        "  __shared__ float a[N], b[N];\n"
        "  a[threadIdx.x] = b[threadIdx.x] = x[0];\n"
        "}\n"
        'extern "C" void run(float* x) { emulator::launch(large<7000>, 1, 1, 0, nullptr, x); }\n'
    )
    with pytest.raises(BuildFailed, match=r"large<7000>\(float\*\) has 56000 bytes of static shared memory"):
        built([source], tmp_path / "large.so")


# ---- tools -----------------------------------------------------------------------------------------------------------


def test_an_unchanged_source_is_not_compiled_again(tmp_path: Path) -> None:
    header, source = tmp_path / "answer.cuh", tmp_path / "answer.cu"
    header.write_text("constexpr int ANSWER = 41;\n")
    source.write_text('#include "answer.cuh"\nextern "C" int answer() { return ANSWER; }\n')

    def objects() -> set[str]:
        return {path.name for path in (tmp_path / "cache").glob("answer-*.o")}

    def answer(name: str) -> int:
        try:
            return ctypes.CDLL(str(build([source], tmp_path / name, cache_dir=tmp_path / "cache"))).answer()
        except CannotBuild as reason:
            pytest.skip(str(reason))

    assert answer("first.so") == 41
    before = objects()
    assert answer("second.so") == 41
    assert objects() == before
    header.write_text("constexpr int ANSWER = 42;\n")
    assert answer("third.so") == 42


def test_a_machine_that_cannot_build_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(CannotBuild, match=r"no g\+\+"):
        compiler.__wrapped__()
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    with pytest.raises(CannotBuild, match="no CUDA headers"):
        cuda_include_folders.__wrapped__()


def test_mutants_remove_one_call_each_and_keep_lines() -> None:
    source = """// __syncthreads();
    if (x) __syncthreads();
    const int n = __syncthreads_count(1); __syncwarp(0xFF & f(n));
    kvrt::ptx::cp_async_wait<1>(); puts("__syncwarp();");
    __threadfence(); ptx::cp_async_wait_all();
    """
    found = list(mutants(source))
    names = ["__syncthreads", "__syncwarp", "cp_async_wait", "__threadfence", "cp_async_wait_all"]
    assert [m.name for m in found] == names
    assert [m.line for m in found] == [2, 3, 4, 5, 5]
    assert [m.removed for m in found][1:3] == ["__syncwarp(0xFF & f(n));", "kvrt::ptx::cp_async_wait<1>();"]
    assert "    if (x) ;\n" in found[0].source
    assert all(m.source.count("\n") == source.count("\n") for m in found)
    assert [m.fence for m in found] == [False, False, False, True, False]


def test_the_cases_call_every_wrapper() -> None:
    wrappers = set(
        re.findall(r"__device__ __forceinline__ \w+ (\w+)\(", (KERNELS / "ptx.cuh").read_text(encoding="utf-8"))
    )
    called = set(re.findall(r"ptx::(\w+)", CASES.read_text(encoding="utf-8") + PIPELINE.read_text(encoding="utf-8")))
    assert len(wrappers) > 20
    assert wrappers - {"shared_address"} <= called


@pytest.mark.slow
@pytest.mark.parametrize("source", [CASES, PIPELINE], ids=lambda path: path.stem)
def test_nvcc_compiles_the_wrappers_without_warnings(tmp_path: Path, source: Path) -> None:
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("no nvcc")
    flags = ["-std=c++17", "-Xcompiler", "-Wall", "--Werror", "all-warnings", f"-I{KERNELS}"]
    for version in (80, 120):
        flags += ["-gencode", f"arch=compute_{version},code=sm_{version}"]
    done = subprocess.run(
        [nvcc, *flags, "-c", str(source), "-o", str(tmp_path / "out.o")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
