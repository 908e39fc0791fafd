"""What the model runner allocates is what it says: weights, the cache's bytes and a constant, however it is used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvcli.runtime import kvrt
from kvcli.runtime.arena import HUGE_PAGE

ROOT = Path(__file__).parents[2]
SLACK = 4 << 20  # of the allocator
PASSING = 16 << 20  # what a chunk of prefill takes and gives back: a layer's attention in float32
# what is freed goes back to the system, and counts no more
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

# A process of its own: the peak of resident memory is a process's. The cache takes 18 MB; in 16 bits it would take 66.
PROGRAM = """
import gc, json, sys
from types import SimpleNamespace
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from kvcli.evaluation.attention_speed import fill
from kvcli.models.architectures import Rope, geometry
from kvcli.models.loading import LoadedModel
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.runtime.runner import ModelRunner

DEPTH, CHUNK, TOKENS, KIND = 3200, 600, 200, sys.argv[1]
torch.set_num_threads(1)
torch.manual_seed(0)


def resident(peak=False):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("VmHWM" if peak else "VmRSS"))


def forget_peak():
    open("/proc/self/clear_refs", "w").write("5")


def storages():
    found = {}
    for x in gc.get_objects():
        if type(x) in (torch.Tensor, torch.nn.Parameter):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return found


def runner_of(capacity):
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, head_dim=128, max_position_embeddings=8192,
    )
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval().requires_grad_(False)
    shapes = geometry(config)
    fmt = KVFormat(4, scale_dtype="e5m3")
    plan = CachePlan(tuple(LayerPlan(4, 128, fmt, fmt) for _ in shapes), dtype="bfloat16", residual_window=32)
    loaded = LoadedModel(model, None, "tiny", shapes, Rope.from_model(model), ())
    return ModelRunner(loaded, plan, weights=KIND, capacity=capacity)


def use(runner, depth, chunk, tokens):
    ids = torch.arange(chunk + tokens) % 500
    fill(runner.cache, depth)
    forget_peak()
    runner.prefill(ids[:chunk])
    prefill, resting = resident(peak=True), resident()
    forget_peak()
    for token in ids[chunk:]:
        runner.decode(token[None])
    return prefill, resting, resident(peak=True)


use(runner_of(256), 100, 100, 20)  # libraries are loaded, buffers of theirs made
gc.collect()
before, held = resident(), storages()
runner = runner_of(DEPTH + CHUNK + TOKENS)
empty = runner.nbytes
prefill, resting, decoding = use(runner, DEPTH, CHUNK, TOKENS)
found = {
    "prefill": prefill - before, "decoding": decoding - before, "growth": decoding - resting,
    "full": runner.nbytes, "empty": empty,
    "tensors": sum(size for place, size in storages().items() if place not in held),
    "bytes_at": runner.plan.bytes_at(DEPTH + CHUNK + TOKENS),
    "of_decoding": runner.plan.bytes_at(DEPTH + CHUNK + TOKENS) - runner.plan.bytes_at(DEPTH + CHUNK),
}
print(json.dumps(found))
"""


@pytest.mark.parametrize("weights", ["none", "int4"])
def test_memory_is_weights_and_cache_and_a_constant(weights: str) -> None:
    try:
        kvrt.library("cpu")
    except kvrt.NativeError as error:
        pytest.skip(f"needs the native kernels: {error}")
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs Linux's account of a process's memory")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, weights],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **GIVEN_BACK},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    stated = sum(found["full"].values())
    assert found["full"]["cache"] == found["empty"]["cache"] == found["bytes_at"]
    assert stated <= found["tensors"] + 4096
    assert found["tensors"] <= stated + (1 << 20)  # masks, the means of keys and values
    assert found["prefill"] <= stated + PASSING
    assert found["decoding"] <= stated + SLACK + HUGE_PAGE  # the cache's memory ends with a whole huge page
    assert found["growth"] <= found["of_decoding"] + (1 << 20) + HUGE_PAGE  # pages written for the first time
