"""Simulated activations: rounded per token, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcli.errors import UsageError
from kvcli.evaluation.activations import quantized, quantizing_inputs, simulating
from kvcli.models.loading import load


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 4, 8]), st.floats(-50, 50))
def test_each_token_keeps_its_range_and_is_off_by_half_a_step_at_most(seed: int, bits: int, shift: float) -> None:
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(seed)) + shift
    found = quantized(x, bits)
    step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / (2**bits - 1)
    assert ((found - x).abs() <= step / 2 + 1e-5 * (1 + abs(shift))).all()
    torch.testing.assert_close(found.amax(-1), x.amax(-1))
    torch.testing.assert_close(found.amin(-1), x.amin(-1))
    assert all(len(row.unique()) <= 2**bits for row in found)


def test_a_constant_token_stays_and_slopes_are_passed_through() -> None:
    assert torch.equal(quantized(torch.full((1, 8), 0.3), 4), torch.full((1, 8), 0.3))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (slope,) = torch.autograd.grad(quantized(x, 4).sum(), x)
    assert slope.sum(-1).tolist() == pytest.approx([8.0] * 3, rel=1e-4)


def test_the_model_is_what_it_was_when_the_block_ends(tinystories: Path) -> None:
    model = load(str(tinystories), dtype="float32").model
    ids = torch.arange(1, 33)[None]
    with torch.no_grad():
        before = model(ids).logits
        with simulating(model, 8, rotate_down=True):
            fine = (model(ids).logits - before).norm() / before.norm()
        with simulating(model, 3, rotate_down=True):
            coarse = (model(ids).logits - before).norm() / before.norm()
        assert torch.equal(model(ids).logits, before)
    assert 0 < fine < 0.05 < coarse


def test_rotating_down_alone_leaves_the_function(tinystories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcli.evaluation import activations

    monkeypatch.setattr(activations, "quantized", lambda x, bits: x)
    model = load(str(tinystories), dtype="float32").model
    ids = torch.arange(1, 33)[None]
    with torch.no_grad():
        before = model(ids).logits
        with simulating(model, 4, rotate_down=True):
            assert (model(ids).logits - before).abs().max() < 1e-4 * before.abs().max()


def test_a_model_is_put_right_after_an_error_too(tinystories: Path) -> None:
    model = load(str(tinystories), dtype="float32").model
    weight = model.model.layers[0].mlp.down_proj.weight.clone()
    with pytest.raises(ZeroDivisionError), simulating(model, 4, rotate_down=True):
        raise ZeroDivisionError
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, weight)


def test_widths_that_are_not_simulated_are_refused() -> None:
    with pytest.raises(UsageError, match="16 bits are not simulated"), quantizing_inputs(torch.nn.Linear(2, 2), 16):
        pass
