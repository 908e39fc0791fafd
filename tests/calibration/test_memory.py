"""Calibration of the standing model at the defaults stays within the model and 2 GiB."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# every kind of measurement once, on the windows that calibration uses: the others of a kind take as much
MEASURE = """
import json, resource, sys
import torch
from kvcli.calibration import corpora, pipeline, sensitivity
from kvcli.calibration.measuring import PROBE_TOKENS, PROBE_WINDOWS, check_probe
from kvcli.cli.calibrate import WINDOW
from kvcli.models.loading import load
from kvcli.plan import CachePlan
from kvcli.runtime.packed_cache import ATTENTION

torch.set_grad_enabled(False)
loaded = load(sys.argv[1])
loaded.model.set_attn_implementation(ATTENTION)
ids = corpora.tokens("builtin", loaded, num_tokens=6144, seed=0, length=WINDOW).ids
geometry = pipeline.exact_layers(loaded)
space = pipeline.search_space("balanced", geometry)
tensors = pipeline.moments(loaded, CachePlan(tuple(geometry), dtype=loaded.dtype), ids[:1], lambda: None)
probe = sensitivity.Probe(loaded.model, ids[:PROBE_WINDOWS, :PROBE_TOKENS], loaded.rope, tensors)
for layer in (0, len(geometry) - 1):
    sensitivity.measure_layer(probe, space, geometry, loaded.dtype, layer)
plans = sensitivity.setting_plans(space, geometry, loaded.dtype)
whole = sensitivity.Probe(loaded.model, ids[2:3], loaded.rope, tensors)
for probe in (whole, check_probe(loaded, ids, tensors)):
    probe.cost_of(list(plans.values())[-1])
weights = sum(x.nbytes for x in loaded.model.state_dict().values())
print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, weights]))
"""


@pytest.mark.slow
def test_calibrating_the_standing_model_takes_no_more_than_the_model_and_2_gib(smollm2, clean_env):
    done = subprocess.run([sys.executable, "-c", MEASURE, str(smollm2)], stdout=-1, text=True, env=clean_env)
    assert done.returncode == 0
    peak, weights = json.loads(done.stdout)
    assert weights > 500e6
    assert peak < weights + 2 * 2**30
