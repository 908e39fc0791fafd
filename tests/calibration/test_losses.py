"""Losses by name: worked examples of both forms of KL-Top, and what every loss must do."""

from __future__ import annotations

import math
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvcli import plugins
from kvcli.calibration import losses
from kvcli.errors import InputError

DIVERGENCES = ("kl-top", "kl-top-renormalised", "forward-kl", "reverse-kl")


def logits(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log() + 3.7  # any constant may be added


def random(seed: int, tokens: int = 5, vocabulary: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randn(2, tokens, vocabulary, generator=generator) * 2
    return p, q


def test_kl_top_keeps_the_probabilities_of_the_whole_vocabulary() -> None:
    p, q = logits(0.5, 0.2, 0.3), logits(0.4, 0.2, 0.4)
    found = losses.KLTop(k=2)(p, q)
    assert found.tolist() == pytest.approx([0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.4)], rel=1e-5)


def test_kl_top_may_fall_below_zero_for_it_leaves_a_tail_out() -> None:
    found = losses.KLTop(k=2)(logits(0.4, 0.3, 0.3 - 1e-9), logits(0.45, 0.35, 0.2))
    assert found.tolist() == pytest.approx([0.4 * math.log(0.4 / 0.45) + 0.3 * math.log(0.3 / 0.35)], rel=1e-4)
    assert float(found) < 0


def test_renormalised_kl_top_is_a_divergence_within_the_top_tokens() -> None:
    p, q = logits(0.5, 0.2, 0.3), logits(0.4, 0.2, 0.4)
    found = losses.RenormalisedKLTop(k=2)(p, q)
    assert found.tolist() == pytest.approx([0.625 * math.log(0.625 / 0.5) + 0.375 * math.log(0.375 / 0.5)], rel=1e-5)


def test_the_top_tokens_are_the_teachers() -> None:
    p, q = logits(0.7, 0.2, 0.1), logits(0.1, 0.2, 0.7)
    assert losses.KLTop(k=1)(p, q).tolist() == pytest.approx([0.7 * math.log(7)], rel=1e-5)
    assert losses.RenormalisedKLTop(k=1)(p, q).tolist() == [0]  # one token holds all of what is left


def test_forward_and_reverse_kl_are_one_anothers_mirror() -> None:
    p, q = logits(0.5, 0.3, 0.2), logits(0.4, 0.4, 0.2)
    forward = 0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.4)
    reverse = 0.4 * math.log(0.4 / 0.5) + 0.4 * math.log(0.4 / 0.3)
    assert losses.load("forward-kl")(p, q).tolist() == pytest.approx([forward], rel=1e-5)
    assert losses.load("reverse-kl")(p, q).tolist() == pytest.approx([reverse], rel=1e-5)


def test_cross_entropy_takes_the_teachers_likeliest_token_for_the_label() -> None:
    found = losses.load("cross-entropy")(logits(0.5, 0.3, 0.2), logits(0.2, 0.4, 0.4))
    assert found.tolist() == pytest.approx([-math.log(0.2)], rel=1e-5)


@given(st.integers(0, 2**32 - 1), st.integers(0, 60))
def test_with_a_k_of_the_whole_vocabulary_both_forms_are_the_forward_kl(seed: int, more: int) -> None:
    p, q = random(seed)
    expected = losses.load("forward-kl")(p, q)
    for form in (losses.KLTop, losses.RenormalisedKLTop):
        torch.testing.assert_close(form(k=40 + more)(p, q), expected)


@given(st.integers(0, 2**32 - 1))
def test_a_divergence_from_itself_is_zero_and_pulls_nowhere(seed: int) -> None:
    p, _ = random(seed)
    for name in DIVERGENCES:
        q = p.clone().requires_grad_()
        loss = losses.load(name)(p, q)
        assert loss.abs().max() < 1e-5
        loss.sum().backward()
        assert q.grad is not None
        assert q.grad.abs().max() < 1e-5


@given(st.integers(0, 2**32 - 1))
def test_a_step_down_the_gradient_lowers_the_loss(seed: int) -> None:
    p, q = random(seed)
    for name in (*DIVERGENCES, "cross-entropy"):
        x = q.clone().requires_grad_()
        before = losses.load(name)(p, x).sum()
        before.backward()
        assert x.grad is not None
        assert losses.load(name)(p, q - 1e-3 * x.grad).sum() < before


def test_an_unknown_loss_is_refused_by_naming_those_there_are() -> None:
    with pytest.raises(InputError, match=r"no loss 'mse'; there are kl-top, kl-top-renormalised, forward-kl, reverse"):
        losses.load("mse")


def test_a_plug_in_adds_a_loss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a_loss_plug_in.py").write_text(
        'class Squared:\n    """Squared difference."""\n    family, name = "loss", "squared"\n'
        "    def __call__(self, reference, logits):\n        return (reference - logits).square().sum(-1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = EntryPoint("squared", "a_loss_plug_in:Squared", plugins.GROUP)
    monkeypatch.setattr(plugins, "_entries", lambda name=None: iter([entry] if name in (None, "squared") else []))
    assert losses.names()[-1] == "squared"
    p, q = random(0)
    torch.testing.assert_close(losses.load("squared")(p, q), (p - q).square().sum(-1))
    sys.modules.pop("a_loss_plug_in")
