from __future__ import annotations

import ctypes
import resource
import subprocess
import sys

import pytest

CODE = """
import resource, torch
{call}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(min(faults() for _ in range(3)))
"""
KEEP = "from kvcli.cli.allocator import keep_memory; keep_memory()"


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library than glibc")
def test_a_block_that_comes_again_is_not_asked_of_the_kernel_again():
    pages = (64 << 20) // resource.getpagesize()
    new, kept = (
        int(subprocess.run([sys.executable, "-c", CODE.format(call=call)], capture_output=True, check=True).stdout)
        for call in ("", KEEP)
    )
    assert kept < pages / 100
    assert kept < new
