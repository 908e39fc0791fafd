"""OSTQuant's closed-form start of its rotations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from kvcli.calibration.ostquant import ROTATIONS, NormGains, identity
from kvcli.models.architectures import geometry
from kvcli.quant.transforms import hadamard


@torch.no_grad()
def womi(
    model: PreTrainedModel, names: Sequence[str], *, seed: int = 0, values_from: Literal["o", "v"] = "o"
) -> dict[str, Tensor]:
    """Return OSTQuant's closed-form start (weight outlier minimisation initialisation) for the named parameters.

    A rotation is ``U H``. U holds the eigenvectors of the second moments (about zero, for quantisers scale raw weights)
    of the weights' rows, and H is a random Hadamard matrix, which gives every channel the same energy. R_res takes the
    rows of q, k, v, gate and up of all layers, with the norms' gains folded in; R_ov those of the KV head's part of
    W_o, one set for each query head of its group. Scales start at one.

    A random Hadamard matrix is Sylvester's with random signs. Sizes m · 2^k with an odd m have none; there H is the
    Kronecker product of the discrete Hartley matrix of size m and Sylvester's of size 2^k, whose entries are at most √2
    times as large. Eigenvectors are dealt out to the m blocks in turn, so that each gets its share of the large ones;
    channels' energies are then nearly equal.

    Parameters
    ----------
    names
        Of :func:`~kvcli.calibration.ostquant.shapes`.
    seed
        Of the signs.
    values_from
        Start R_ov from W_o, as the paper does, or from W_v, whose outputs are the values that get quantised.

    Returns
    -------
    dict
        float64, on the CPU, as :func:`~kvcli.calibration.ostquant.identity` shapes them.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = identity(model.config, names)
    for name in (x for x in ROTATIONS if x in parameters):
        if name == "r_res":
            moments = _stream_moments(model)
        else:
            moments = torch.stack([_value_moments(layer, model.config, values_from) for layer in model.model.layers])
        parameters[name] = rotation_from(moments, generator)
    return parameters


def rotation_from(moments: Tensor, generator: torch.Generator) -> Tensor:
    """Return U H for second moments [..., d, d], of weights as in :func:`womi` or of the data itself."""
    d = moments.shape[-1]
    block = d & -d
    vectors = torch.linalg.eigh(moments).eigenvectors.flip(-1)  # the largest first
    dealt = torch.arange(d).view(block, -1).T.reshape(-1)
    signs = torch.randint(0, 2, (*moments.shape[:-2], 1, d), generator=generator, dtype=moments.dtype) * 2 - 1
    blocks = hadamard(vectors[..., dealt] * signs).unflatten(-1, (-1, block))
    odd = torch.arange(d // block, dtype=moments.dtype)
    angles = 2 * torch.pi / len(odd) * torch.outer(odd, odd)
    hartley = (angles.cos() + angles.sin()) / len(odd) ** 0.5
    return torch.einsum("...ab,ac->...cb", blocks, hartley).flatten(-2)


def _stream_moments(model: PreTrainedModel) -> Tensor:
    total = torch.zeros(model.config.hidden_size, model.config.hidden_size, dtype=torch.float64)
    for layer in model.model.layers:
        plain = NormGains().fuse(dict(layer.named_parameters(prefix="model.layers.0")))
        for weight in (x.cpu() for x in plain.values() if x.ndim == 2):
            total.addmm_(weight.T, weight)
    return total


def _value_moments(layer: Any, config: PretrainedConfig, values_from: str) -> Tensor:
    """Return [h, d, d] float64."""
    kv = geometry(config)[0]
    if values_from == "o":
        rows = layer.self_attn.o_proj.weight.double()
    else:
        rows = (layer.self_attn.v_proj.weight.double() * layer.input_layernorm.weight.double()).T
    heads = rows.cpu().unflatten(-1, (kv.num_kv_heads, -1, kv.head_dim)).transpose(0, 1).flatten(1, 2)
    moments: Tensor = heads.mT @ heads
    return moments
