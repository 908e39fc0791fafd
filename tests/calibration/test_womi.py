"""The closed-form start: orthogonal, repeatable, and no channel stands out."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package
from transform_models import ALL, build, difference, each_model, logits

from kvcli.calibration.fusing import fuse
from kvcli.calibration.ostquant import (
    NormGains,
    ValueRotation,
    shapes,
    transforms,
)
from kvcli.calibration.womi import rotation_from, womi


@each_model
@pytest.mark.parametrize("values_from", ["o", "v"])
def test_womi_is_orthogonal_repeatable_and_leaves_the_logits(architecture: str, values_from: Any) -> None:
    model = build(architecture)
    before = logits(model)
    start = womi(model, ALL, seed=1, values_from=values_from)
    again, other = (womi(model, ALL, seed=x, values_from=values_from) for x in (1, 2))
    for name, shape in shapes(model.config).items():
        assert tuple(start[name].shape) == shape
        assert torch.equal(start[name], again[name])
        if name.startswith("r_"):
            eye = torch.eye(shape[-1], dtype=torch.float64)
            assert (start[name].mT @ start[name] - eye).abs().max() < 1e-12
            assert not torch.allclose(start[name], other[name])
        else:
            assert torch.equal(start[name], torch.ones(shape, dtype=torch.float64))
    fuse(model, transforms(model.config, start))
    assert difference(logits(model), before) < 1e-11


def test_womi_gives_every_channel_of_wo_and_wv_the_same_energy() -> None:
    for values_from, module in (("o", "o_proj"), ("v", "v_proj")):
        model = build("llama")  # heads of 8
        fuse(model, [NormGains(final=False), ValueRotation(womi(model, ["r_ov"], values_from=values_from)["r_ov"])])
        for layer in model.model.layers:
            weight = getattr(layer.self_attn, module).weight
            rows = weight.view(48, 2, 3, 8).transpose(1, 2) if module == "o_proj" else weight.T.view(48, 1, 2, 8)
            energy = rows.square().sum((0, 1))  # [h, d]
            torch.testing.assert_close(energy, energy.mean(-1, keepdim=True).expand(-1, 8))


def test_womi_evens_out_the_stream() -> None:
    """48 channels are three blocks of 16: nearly even, although no Hadamard matrix of Sylvester's has that size."""
    model = build("qwen2")
    model.model.layers[0].mlp.up_proj.weight[:, 5] *= 30  # an outlier channel
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")

    def energy(model: PreTrainedModel) -> Tensor:
        rows = [x.get_submodule(p).weight for x in model.model.layers for p in parts]
        return torch.cat(rows).square().sum(0)

    start = womi(model, ["r_res"])
    plain = copy.deepcopy(model)
    fuse(plain, [NormGains()])
    fuse(model, transforms(model.config, start))
    before, after = energy(plain), energy(model)
    torch.testing.assert_close(after.sum(), before.sum())
    assert before.max() / before.mean() > 10
    assert after.max() / after.mean() < 1.1


@pytest.mark.parametrize("d", [1, 2, 16, 80, 96, 576, 45, 7])
def test_no_channel_of_a_random_hadamard_matrix_stands_out(d: int) -> None:
    """Every entry is at most √2 times 1/√d: an outlier is spread over all channels, whatever the size."""
    matrix = rotation_from(torch.diag(torch.arange(d, 0, -1, dtype=torch.float64)), torch.Generator().manual_seed(0))
    assert (matrix @ matrix.T - torch.eye(d, dtype=torch.float64)).abs().max() < 1e-12
    assert matrix.abs().max() * d**0.5 < 2**0.5 + 1e-12


def test_eigenvectors_are_dealt_out_to_the_blocks() -> None:
    """Of 48 energies from 1 to 48, each block of 16 gets as much as the others, and so does each channel, nearly."""
    moments = torch.diag(torch.arange(48, 0, -1, dtype=torch.float64))
    rotation = rotation_from(moments, torch.Generator().manual_seed(0))
    energy = (rotation.T @ moments @ rotation).diagonal()
    assert (energy / energy.mean() - 1).abs().max() < 0.03


def test_a_power_of_two_is_rotated_by_the_eigenvectors_and_a_random_hadamard_matrix() -> None:
    moments = torch.diag(torch.tensor([1.0, 4.0, 2.0, 3.0], dtype=torch.float64))
    rotation = rotation_from(moments, torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotation.abs(), torch.full((4, 4), 0.5, dtype=torch.float64))
    torch.testing.assert_close((rotation.T @ moments @ rotation).diagonal(), torch.full((4,), 2.5, dtype=torch.float64))
