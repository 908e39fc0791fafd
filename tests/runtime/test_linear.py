"""Linear layers: int4 against the weights it stands for, however many rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kvcli.errors import InputError
from kvcli.runtime import linear
from kvcli.runtime.linear import FEW_ROWS, Blocks, Dense, Int4, Scratch, quantise
from kvcli.runtime.weights import fuse


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(layer: linear.Linear, x: Tensor) -> Tensor:
    out = torch.full((len(x), layer.shape[0]), torch.nan, dtype=x.dtype)
    layer.bind(x, out)()
    return out


@pytest.mark.parametrize("bias", [None, random(80, seed=2)])
def test_dense_is_torchs_linear(bias: Tensor | None) -> None:
    weight, x = random(80, 64), random(5, 64, seed=1)
    layer = Dense(weight, bias)
    torch.testing.assert_close(run(layer, x), nn.functional.linear(x, weight, bias))
    assert layer.nbytes == 4 * 80 * 64 + (320 if bias is not None else 0)


def test_codes_are_the_nearest_of_sixteen_between_the_extremes() -> None:
    weight = random(48, 96)
    weight[3, :32], weight[4, 32:64] = 0.25, 0.0  # groups without a range
    codes, scale, zero = quantise(weight)
    assert (int(codes.min()), int(codes.max())) == (0, 15)
    step = scale.float().repeat_interleave(32, 1)
    back = codes * step + zero.float().repeat_interleave(32, 1)
    # half a step, and what rounding the scale and the zero to float16 moves the extremes by
    assert bool(((back - weight).abs() <= 0.51 * step + 0.002).all())
    assert torch.equal(back[3, :32], weight[3, :32])
    assert torch.equal(back[4, 32:64], weight[4, 32:64])


def test_weights_on_such_a_grid_are_kept_as_they_are() -> None:
    codes = torch.randint(0, 16, (8, 64), generator=torch.Generator().manual_seed(0))
    codes[:, ::32], codes[:, 1::32] = 0, 15
    scale, low = (random(8, 2, seed=i).abs().half().float().repeat_interleave(32, 1) for i in (1, 2))
    weight = codes * scale - low
    assert torch.equal(stored(weight).float(), weight)


def stored(weight: Tensor) -> Tensor:
    codes, scale, zero = (x.double() for x in quantise(weight))
    return codes * scale.repeat_interleave(32, 1) + zero.repeat_interleave(32, 1)


@pytest.mark.parametrize("rows", [1, 4, 64, 65, 100])
@pytest.mark.parametrize("outputs", [64, 80, 200])
def test_int4_multiplies_by_its_weights(rows: int, outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "SCRATCH", 128 * 96)  # in pieces
    weight, bias, x = random(outputs, 96), random(outputs, seed=2), random(rows, 96, seed=1).bfloat16()
    layer = Int4(weight, bias)
    expected = x.double() @ stored(weight).t() + bias
    assert float((run(layer, x) - expected).norm() / expected.norm()) < 0.01
    wide = torch.empty(rows, outputs)
    layer.bind(x, wide)()
    assert float((wide - expected).norm() / expected.norm()) < (0.002 if rows <= FEW_ROWS else 0.01)
    assert layer.nbytes < 0.66 * -(-outputs // 16) * 16 * 96 + 2 * outputs


def test_the_two_ways_to_multiply_agree() -> None:
    weight, x = random(128, 64), random(30, 64, seed=1).bfloat16()
    few, many = (run(Int4(weight, few_rows=n), x).float() for n in (100, 0))
    assert float((few - many).norm() / few.norm()) < 0.01


@pytest.mark.parametrize("rows", [1, 13, 100])
def test_with_activations_of_a_byte_no_row_depends_on_the_others(rows: int) -> None:
    weight, x = random(200, 96), random(rows, 96, seed=1).bfloat16()
    layer = Int4(weight, activations=8)
    expected, found = x.double() @ stored(weight).t(), run(layer, x)
    assert 0.001 < float((found - expected).norm() / expected.norm()) < 0.01
    assert torch.equal(torch.cat([run(layer, row[None]) for row in x]), found)


def test_layers_share_their_scratch() -> None:
    scratch = Scratch()
    for seed in range(3):
        run(Int4(random(128, 64, seed=seed), scratch=scratch), random(100, 64).bfloat16())
    assert scratch.nbytes == 128 * 64 * 2


def test_inputs_that_do_not_divide_into_groups_are_refused() -> None:
    with pytest.raises(InputError, match="groups of 32"):
        Int4(random(64, 48))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_blocks_no_row_depends_on_the_others(dtype: torch.dtype) -> None:
    weight, x = random(200, 96).to(dtype), random(48, 96, seed=1).to(dtype)
    layers: list[linear.Linear] = [Dense(weight)]
    if dtype == torch.bfloat16:
        layers.append(Int4(weight))
    for layer in layers:
        blocks = Blocks(layer, 16)
        whole = run(blocks, x)
        shuffled = torch.randperm(48, generator=torch.Generator().manual_seed(3))
        assert torch.equal(run(blocks, x[shuffled]), whole[shuffled])
        assert torch.equal(run(blocks, x[16:32]), whole[16:32])


def test_fused_weights_stay_the_modules_own() -> None:
    modules = [nn.Linear(8, n) for n in (6, 2, 2)]
    for module in modules:
        module.requires_grad_(False)
    before = torch.cat([m.weight for m in modules])
    fused = fuse([m.weight for m in modules])
    assert torch.equal(fused, before)
    fused[7] = 3
    assert torch.equal(modules[1].weight[1], torch.full((8,), 3.0))
    assert fuse([m.weight for m in modules]).data_ptr() == fused.data_ptr()
