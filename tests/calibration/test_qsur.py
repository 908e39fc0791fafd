"""QSUR on Gaussians whose volumes are known, and on models before and after fusing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kvcli.calibration.fusing import fuse
from kvcli.calibration.ostquant import identity, transforms
from kvcli.calibration.qsur import Moments, chi2_quantile, kv_moments, log_qsur, qsur, report
from kvcli.errors import InputError, UsageError
from kvcli.models.architectures import Rope, geometry
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.quant.transforms import hadamard


def ball_in_cube(d: int) -> float:
    """Return the logarithm of a ball's volume beside its cube's."""
    return d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1) - d * math.log(2)


def eye(d: int) -> Tensor:
    return torch.eye(d, dtype=torch.float64)


def random_gaussian(d: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mean, root = (torch.randn(d, n, dtype=torch.float64, generator=generator) for n in (1, 2 * d))
    return mean[:, 0], root @ root.T


@pytest.mark.parametrize(("d", "value"), [(1, 1.0), (2, math.pi / 4), (3, math.pi / 6), (4, math.pi**2 / 32)])
@pytest.mark.parametrize("alpha", [0.5, 0.99])
def test_an_isotropic_gaussian_fills_a_balls_share_of_the_cube(d: int, value: float, alpha: float) -> None:
    out = log_qsur(torch.zeros(d), 7.0 * eye(d), alpha)
    assert math.exp(out) == pytest.approx(value, rel=1e-12)
    assert float(qsur(torch.zeros(d), 7.0 * eye(d), alpha)) == pytest.approx(value ** (1 / d), rel=1e-12)


@pytest.mark.parametrize("alpha", [0.9, 0.99])
@pytest.mark.parametrize("shift", [2.0, 20.0, -20.0])
def test_a_stretched_and_shifted_gaussian_by_hand(alpha: float, shift: float) -> None:
    # two channels, standard deviations 1 and 3, means 0 and shift: χ²_2's quantile is -2 log(1 - alpha)
    c = -2 * math.log(1 - alpha)
    one, three = math.sqrt(c), 3 * math.sqrt(c)
    side = max(one, shift + three) - min(-one, shift - three)
    expected = math.pi * c * 3 / side**2
    out = log_qsur(torch.tensor([0.0, shift]), torch.diag(torch.tensor([1.0, 9.0])), alpha)
    assert math.exp(out) == pytest.approx(expected, rel=1e-6)


def test_a_correlated_gaussian_by_hand() -> None:
    # correlation 3/5 leaves 4/5 of the area in the same square
    covariance = torch.tensor([[4.0, 2.4], [2.4, 4.0]], dtype=torch.float64)
    assert math.exp(log_qsur(torch.zeros(2), covariance)) == pytest.approx(math.pi / 4 * 0.8, rel=1e-12)


def test_the_volume_is_the_one_that_sampling_finds() -> None:
    mean, covariance = random_gaussian(3, 0)
    c = stats.chi2.ppf(0.99, 3)
    generator = torch.Generator().manual_seed(0)
    reach = (c * covariance.diagonal()).sqrt()
    low, high = (mean - reach).min(), (mean + reach).max()
    points = low + (high - low) * torch.rand(400_000, 3, dtype=torch.float64, generator=generator) - mean
    share = ((points @ covariance.inverse() * points).sum(-1) <= c).double().mean()
    assert math.exp(log_qsur(mean, covariance)) == pytest.approx(float(share), rel=0.03)


@pytest.mark.parametrize("d", [64, 128, 256, 1024])
@pytest.mark.parametrize("variance", [1e-8, 1.0, 1e8])
def test_large_heads_do_not_overflow(d: int, variance: float) -> None:
    out = qsur(torch.zeros(d), variance * eye(d))
    assert float(out) == pytest.approx(math.exp(ball_in_cube(d) / d), rel=1e-12)
    assert 0 < float(out) < 1


@given(d=st.integers(1, 40), seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3), alpha=st.floats(0.01, 0.9999))
def test_bounded_by_the_ball_and_blind_to_scale(d: int, seed: int, scale: float, alpha: float) -> None:
    mean, covariance = random_gaussian(d, seed)
    out = float(log_qsur(mean, covariance, alpha))
    assert out <= ball_in_cube(d) + 1e-9
    assert float(log_qsur(scale * mean, scale**2 * covariance, alpha)) == pytest.approx(out, abs=1e-6)
    assert float(log_qsur(torch.zeros(d), covariance.diagonal().diag(), alpha)) >= out - 1e-9


def test_an_outlier_channel_costs_and_a_hadamard_rotation_brings_back() -> None:
    variances = torch.ones(64, dtype=torch.float64)
    variances[3] = 400.0
    one = Moments(torch.zeros(1, 64, dtype=torch.float64), 999 * variances.diag()[None], 1000)
    rotated = one.mapped(hadamard)
    before, after = (float(qsur(x.mean, x.covariance)) for x in (one, rotated))
    # the volume stays; the cube's side falls from 20 to the root of the mean variance
    assert after / before == pytest.approx(20 / math.sqrt(463 / 64), rel=1e-9)


@given(d=st.integers(1, 1024), alpha=st.floats(1e-3, 0.99999))
def test_the_quantile_is_scipys(d: int, alpha: float) -> None:
    assert chi2_quantile(alpha, d) == pytest.approx(stats.chi2.ppf(alpha, d), rel=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -1.0, math.nan])
def test_a_confidence_outside_its_range_is_refused(alpha: float) -> None:
    with pytest.raises(UsageError, match="alpha"):
        log_qsur(torch.zeros(2), eye(2), alpha)


def test_a_flat_gaussian_fills_nothing() -> None:
    covariance = torch.stack((torch.zeros(2, 2), torch.ones(2, 2), torch.eye(2)))
    assert qsur(torch.zeros(3, 2), covariance).tolist() == pytest.approx([0, 0, math.sqrt(math.pi / 4)])


@given(splits=st.lists(st.integers(0, 7), min_size=1, max_size=6), shift=st.sampled_from([0.0, 1e6]))
def test_streamed_moments_are_those_of_all_at_once(splits: list[int], shift: float) -> None:
    pieces = [*splits, 9]
    x = torch.randn(2, 3, sum(pieces), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + shift
    moments = Moments.empty(3, 4)
    for piece in x.split(pieces, dim=2):
        moments.add(piece)
    rows = x.transpose(0, 1).flatten(1, 2)
    assert moments.count == rows.shape[1]
    torch.testing.assert_close(moments.mean, rows.mean(1))
    expected = torch.stack([torch.cov(head.T) for head in rows - shift])
    torch.testing.assert_close(moments.covariance, expected, rtol=1e-6, atol=1e-6)


def test_too_few_tokens_are_refused() -> None:
    moments = Moments.empty(2, 16)
    moments.add(torch.randn(2, 16, 16))
    with pytest.raises(InputError, match="16 tokens say nothing about 16 channels"):
        _ = moments.covariance


def tiny(model_type: str) -> tuple[PreTrainedModel, CachePlan]:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type=model_type, vocab_size=96, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, head_dim=8, initializer_range=0.2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="kvcli").double().eval().requires_grad_(False)
    rotary: Any = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.float()
    exact = KVFormat(16)
    layers = tuple(LayerPlan(x.num_kv_heads, x.head_dim, exact, exact) for x in geometry(config))
    return model, CachePlan(layers, dtype="float64")


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("before_rope", [False, True])
def test_the_report_foretells_the_fused_model(model_type: str, before_rope: bool) -> None:
    model, plan = tiny(model_type)
    batches = [torch.randint(1, 96, (2, 40), generator=torch.Generator().manual_seed(x)) for x in range(3)]
    rope = Rope.from_model(model) if before_rope else None
    moments = kv_moments(model, plan, batches, before=rope)
    assert moments[0]["k"].count == 240
    generator = torch.Generator().manual_seed(1)
    parameters = identity(model.config, ["r_ov", "s_qk", "s_ov"])
    for name, x in parameters.items():
        noise = torch.randn(x.shape, dtype=torch.float64, generator=generator)
        parameters[name] = torch.linalg.qr(noise).Q if name == "r_ov" else noise.exp()
    maps = transforms(model.config, parameters)
    plain, told, turned = report(moments), report(moments, maps), report(moments, maps, online=hadamard)
    fuse(model, maps)
    found = kv_moments(model, plan, batches, before=rope)
    for i in range(2):
        for which in ("k", "v"):
            assert report(found)[i][which] == pytest.approx(told[i][which], rel=1e-9)
            assert told[i][which] != pytest.approx(plain[i][which], rel=1e-3)
            assert report(found, online=hadamard)[i][which] == pytest.approx(turned[i][which], rel=1e-9)
            assert len(told[i][which]) == 2
            assert all(0 < x < 1 for x in told[i][which])


def test_keys_are_taken_on_the_side_of_rope_that_is_asked_for() -> None:
    model, plan = tiny("llama")
    ids = torch.randint(1, 96, (2, 40), generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda module, x, out: seen.append(out))
    before, after = (kv_moments(model, plan, [ids], before=x) for x in (Rope.from_model(model), None))
    for i in range(2):
        torch.testing.assert_close(before[i]["k"].mean, seen[i].view(-1, 2, 8).mean(0))
        assert not torch.allclose(after[i]["k"].mean, before[i]["k"].mean)
