"""Transforms fused into a model in memory, and the one rotation that cannot be fused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from kvcli.calibration.ostquant import ROTATIONS, transforms
from kvcli.errors import InputError
from kvcli.protocols import Transform
from kvcli.quant.transforms import hadamard

_ROUNDING = 0.1  # Frobenius norm of RᵀR - I that training may leave; more is taken for a mistake


def settle(config: PretrainedConfig, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return learned parameters as they are to be fused: detached, float64, rotations orthogonal to rounding.

    Training in float32 leaves a rotation a little off, and fusing it as it is would change the function. Newton's
    iteration for the polar decomposition takes it to the nearest orthogonal matrix.

    Raises
    ------
    InputError
        For an unknown name, a wrong shape, a value that is not finite, a scale of zero, or a matrix that is nowhere
        near orthogonal.
    """
    transforms(config, parameters)
    settled = {}
    for name, value in parameters.items():
        x = value.detach().double()
        if not x.isfinite().all():
            raise InputError(f"Transform {name} holds NaN or infinite values.")
        if name in ROTATIONS:
            eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
            if torch.linalg.matrix_norm(x.mT @ x - eye).max() > _ROUNDING:
                raise InputError(f"Transform {name} is not orthogonal.")
            for _ in range(5):  # the error squares each time: 1e-1, 1e-2, 1e-4, 1e-8, rounding
                x = x @ (1.5 * eye - 0.5 * (x.mT @ x))
        elif (x == 0).any():
            raise InputError(f"Transform {name} scales by zero, which has no inverse.")
        settled[name] = x
    return settled


def fused(weights: Mapping[str, Tensor], maps: Sequence[Transform]) -> dict[str, Tensor]:
    """Return those of ``weights`` that ``maps``, fused one after the other, change; differentiable."""
    changed: dict[str, Tensor] = {}
    for each in maps:
        changed.update(each.fuse({**weights, **changed}))
    return changed


@torch.no_grad()
def fuse(model: PreTrainedModel, maps: Sequence[Transform]) -> int:
    """Fuse transforms into a model's weights: in float64, one layer at a time, rounded once to the model's dtype.

    The result is an ordinary model. Its configuration is what it was, but for ``tie_word_embeddings`` where a transform
    maps the embedding and lm_head apart (:class:`~kvcli.calibration.ostquant.ResidualRotation`, or folding the last
    norm's gain).

    Parameters
    ----------
    model
        Unquantised and in memory; changed in place. If an error is raised, it may have been changed in part.
    maps
        In the order of :func:`~kvcli.calibration.ostquant.transforms`, whose parameters :func:`settle` has seen.

    Returns
    -------
    int
        Bytes that untying the embedding added.

    Raises
    ------
    InputError
        For weights that are quantised or not in memory, or that leave the range of the model's dtype.
    """
    if hasattr(model.config, "quantization_config"):
        raise InputError("Transforms fuse into unquantised weights, and the model's are quantised.")
    for name, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.is_floating_point():
            raise InputError(f"Transforms fuse into unquantised weights in memory, which {name} is not.")
    for i, layer in enumerate(model.model.layers):
        _write(dict(layer.named_parameters(prefix=f"model.layers.{i}")), maps)

    # What lies outside the layers. A tied matrix stands under both names, and stays one if both come out alike.
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    outside = {"model.embed_tokens.weight": embedding, "model.norm.weight": model.model.norm.weight}
    if head is not embedding:
        _write({**outside, "lm_head.weight": head}, maps)
        return 0
    changed = fused({**outside, "lm_head.weight": embedding}, maps)
    own = changed.pop("lm_head.weight", None)
    if own is None or torch.equal(own, changed.get("model.embed_tokens.weight", embedding.double())):
        added = 0
    else:
        untied = torch.nn.Parameter(_rounded("lm_head.weight", own, embedding), requires_grad=embedding.requires_grad)
        added = _untie(model, untied)
    for name, value in changed.items():
        outside[name].copy_(_rounded(name, value, outside[name]))
    return added


@contextmanager
def rotating_down(model: PreTrainedModel) -> Iterator[None]:
    """Rotate the input of every down_proj while the block runs: the online half of H_down, for simulated evaluation.

    The model must have :class:`~kvcli.calibration.ostquant.DownHadamard` fused. Hooks that quantise the input are to be
    registered inside the block, so that they see it rotated.
    """

    def rotate(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (hadamard(inputs[0]), *inputs[1:])

    handles = [layer.mlp.down_proj.register_forward_pre_hook(rotate) for layer in model.model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _write(parameters: dict[str, Tensor], maps: Sequence[Transform]) -> None:
    for name, value in fused(parameters, maps).items():
        parameters[name].copy_(_rounded(name, value, parameters[name]))


def _rounded(name: str, value: Tensor, like: Tensor) -> Tensor:
    out = value.to(like.dtype)
    if not out.isfinite().all():
        raise InputError(f"Weight {name} leaves the range of {str(like.dtype).removeprefix('torch.')} once fused.")
    return out


def _untie(model: PreTrainedModel, weight: torch.nn.Parameter) -> int:
    model.lm_head.weight = weight
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    return weight.numel() * weight.element_size()
