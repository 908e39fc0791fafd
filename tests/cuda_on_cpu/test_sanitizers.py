"""The CUDA kernels' tests once more under g++'s sanitizers: no access out of bounds, none misaligned."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # tests are no package

from cuda_on_cpu.build import sanitizer_environment  # noqa: E402
from kernel_checks import built  # noqa: E402


@pytest.mark.slow
def test_under_sanitizers(tmp_path: Path) -> None:
    path = built(tmp_path / "libkvrt_sanitized.so", sanitize=True)
    environment = {**sanitizer_environment(), "KVCLI_TEST_KVRT_EMULATED": str(path), "OMP_NUM_THREADS": "1"}
    chosen = "token_by_token or query_groups or borders or every_head_size or norms or rotary or expanding or predicted"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen]
    command += [str(HERE / f"test_{name}.py") for name in ("append", "attend", "expand_and_fused", "predicted")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
