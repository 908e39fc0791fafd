"""The Hadamard rotation against scipy's matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import block_diag
from scipy.linalg import hadamard as scipy_hadamard

from kvcli.errors import InputError
from kvcli.quant.transforms import apply, hadamard, invert

# head size and the largest power of two that divides it
HEADS = {1: 1, 2: 2, 16: 16, 64: 64, 128: 128, 256: 256, 80: 16, 96: 32, 24: 8, 7: 1}


def reference(size: int) -> np.ndarray:
    block = HEADS[size]
    return block_diag(*[scipy_hadamard(block)] * (size // block)) / np.sqrt(block)


@pytest.mark.parametrize("size", HEADS)
def test_matrix_is_scipys_in_blocks_of_the_largest_power_of_two(size: int) -> None:
    np.testing.assert_allclose(hadamard(torch.eye(size)).numpy(), reference(size), atol=1e-7)


@pytest.mark.parametrize("size", HEADS)
def test_rotation_is_the_product_with_the_matrix(size: int) -> None:
    x = torch.randn(3, 5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    np.testing.assert_allclose(hadamard(x).numpy(), x.numpy() @ reference(size), atol=1e-13)


@pytest.mark.parametrize("size", HEADS)
def test_rotation_is_its_own_inverse_and_keeps_lengths(size: int) -> None:
    x = torch.randn(4, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    torch.testing.assert_close(hadamard(hadamard(x)), x, atol=1e-13, rtol=0)
    torch.testing.assert_close(hadamard(x).norm(dim=-1), x.norm(dim=-1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", [64, 80, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_vectors_rotation_does_not_depend_on_its_batch(size: int, dtype: torch.dtype) -> None:
    # bit for bit: prefill and decoding must store the same codes
    x = torch.randn(2, 3, 7, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = hadamard(x)
    assert whole.dtype == dtype
    for index in np.ndindex(2, 3, 7):
        assert torch.equal(hadamard(x[index]), whole[index])
    assert torch.equal(hadamard(x.transpose(0, 2)), whole.transpose(0, 2))


def test_transforms_go_by_name() -> None:
    x = torch.randn(2, 16)
    assert torch.equal(apply("hadamard", x), hadamard(x))
    assert torch.equal(invert("hadamard", x), hadamard(x))
    assert torch.equal(apply("none", x), x)
    assert torch.equal(invert("none", x), x)


def test_an_unknown_transform_is_not_taken_for_none() -> None:
    for function in (apply, invert):
        with pytest.raises(InputError, match="no such"):
            function("no such", torch.zeros(4))
