"""What errors in keys and values cost, to second order, and the transforms that make that least in closed form.

To second order the KL divergence that an error e of one cached vector causes is ½ eᵀ F e, where F, the Fisher
information, is the mean of g gᵀ over g = ∂ log p(y) / ∂x with tokens y drawn from the model's own distribution: one
backward pass a window, for all layers at once. Gradients are taken only along the paths that read packed slots.

A quantiser with one scale a vector, after a rotation that evens channels out, errs by white noise of a variance in
proportion to the vector's own energy. If storage takes off a mean μ and maps a row x by A, so that noise comes back
through A⁻¹, the expected cost of a head is, up to a factor,

    C(μ, A) = Σ_s |(x_s - μ) A|² |g_s A⁻ᵀ|².

- **Mean.** For A = 1 it is least for μ = Σ w_s x_s / Σ w_s with w_s = |g_s|²: the mean of what matters, not of what is.
- **Map.** With S = Σ w_s x_s x_sᵀ and M = Σ |x_s|² g_s g_sᵀ, x centred, C is taken for tr(AᵀSA) tr(A⁻¹MA⁻ᵀ), which
  depends on G = AAᵀ alone and is least for the geometric mean G of S⁻¹ and M, the solution of G S G = M. Its
  eigenvectors are a rotation and its eigenvalues a scaling: R_ov and S_ov of OSTQuant's table. Keys after RoPE allow a
  factor per pair of channels only, S_qk: G_ii = √(M_ii / S_ii), summed over the pair.

S and M are drawn towards multiples of the identity, because few tokens carry most of either.

The Fisher information for calibration is an old tool (Hassibi & Stork, 1993; Frantar et al., arXiv:2210.17323, have its
layer-wise form); that transforms and means of a cache follow from it in closed form is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcli.calibration.capture import OnePassCache, embed, run_layers
from kvcli.calibration.ostquant import has_qk_norm, identity
from kvcli.calibration.straight_through import TrainingLayer
from kvcli.models.architectures import Rope
from kvcli.plan import CachePlan
from kvcli.protocols import Which

RIDGE = {"k": 0.3, "v": 1.0}  # of the mean diagonal, which is one
FIRST = 32  # the first tokens' own predictions are left out: little is packed that they read


@dataclass
class Importance:
    """Sums over the cached vectors of one layer's keys (before RoPE) or values, less their plain mean; float64.

    Attributes
    ----------
    weight
        [h]: Σ |g|².
    shift
        [h, d]: Σ |g|² x.
    spread
        [h, d, d]: Σ |g|² x xᵀ.
    gradient
        [h, d, d]: Σ |x|² g gᵀ.
    """

    weight: Tensor
    shift: Tensor
    spread: Tensor
    gradient: Tensor

    @classmethod
    def empty(cls, heads: int, dim: int) -> Importance:
        """Return the sums over nothing."""
        shapes = ((heads,), (heads, dim), (heads, dim, dim), (heads, dim, dim))
        return cls(*(torch.zeros(x, dtype=torch.float64) for x in shapes))

    def add(self, x: Tensor, g: Tensor) -> None:
        """Take in centred vectors and their gradients, [batch, h, n, d]."""
        x, g = (y.double().cpu().transpose(0, 1).flatten(1, 2) for y in (x, g))  # [h, vectors, d]
        weighted = x * g.square().sum(-1, keepdim=True)
        self.weight += g.square().sum((-1, -2))
        self.shift += weighted.sum(-2)
        self.spread += x.mT @ weighted
        self.gradient += g.mT @ (g * x.square().sum(-1, keepdim=True))

    @property
    def mean(self) -> Tensor:
        """The weighted mean, [h, d]: what to add to the plain one."""
        return self.shift / self.weight.clamp(min=1e-300)[:, None]

    def moments(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Return S about the weighted mean and M, [h, d, d], with a mean diagonal of one each before the ridge."""
        s = self.spread - self.shift[:, :, None] * self.mean[:, None]
        eye = torch.eye(s.shape[-1], dtype=s.dtype)
        sizes = (x.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-300)[:, None, None] for x in (s, self.gradient))
        first, second = (x / size + ridge * eye for x, size in zip((s, self.gradient), sizes, strict=True))
        return first, second


def gather(
    model: PreTrainedModel,
    rope: Rope,
    plan: CachePlan,
    means: Sequence[Mapping[Which, Tensor]],
    ids: Tensor,
    *,
    seed: int = 0,
    step: Callable[[], None] = lambda: None,
) -> list[dict[Which, Importance]]:
    """Return the importance of every layer's keys and values.

    Parameters
    ----------
    model
        With attention ``kvcli``.
    rope
        Its rotary embedding.
    plan
        Says which slots a query reads packed; what they are stored in does not matter.
    means
        Per layer the plain means of keys before RoPE and of values, [h, d].
    ids
        [windows, tokens]; run one at a time.
    seed
        Of the tokens drawn.
    step
        Called once a window.
    """
    found: list[dict[Which, Importance]] = [
        {"k": Importance.empty(x.num_kv_heads, x.head_dim), "v": Importance.empty(x.num_kv_heads, x.head_dim)}
        for x in plan.layers
    ]
    generator = torch.Generator().manual_seed(seed)
    for window in ids:
        seen = _backward(model, plan, window, generator)
        positions = torch.arange(len(window))
        for into, mean, own in zip(found, means, seen, strict=True):
            for which, importance in into.items():
                x, g = own[which].detach(), own[which, "gradient"].grad
                assert g is not None, "every layer's storage is on the way to the loss"
                if which == "k":
                    # a gradient goes back through RoPE's transpose: where that stretches (yarn), not its inverse
                    x, g = rope.unrotate(x, positions), rope.unrotate(g, positions) * rope.attention_scaling**2
                importance.add(x - mean[which][:, None].to(x), g)
        step()
    return found


@torch.enable_grad()
def _backward(
    model: PreTrainedModel, plan: CachePlan, window: Tensor, generator: torch.Generator
) -> list[dict[Any, Tensor]]:
    """Return per layer what was cached, and leaves whose gradients are those of what packed slots return."""
    seen: list[dict[Any, Tensor]] = [{} for _ in plan.layers]

    def storing(own: dict[Any, Tensor]) -> Callable[[Which, Tensor], Tensor]:
        def store(which: Which, x: Tensor) -> Tensor:
            own[which] = x
            own[which, "gradient"] = torch.zeros_like(x, requires_grad=True)
            return x + own[which, "gradient"]

        return store

    layers = [TrainingLayer(plan, i, storing(own)) for i, own in enumerate(seen)]
    hidden = run_layers(model, embed(model, window[None]), OnePassCache(list(layers)), 0)
    log_p = model.lm_head(hidden)[0, min(FIRST, len(window) // 2) :].float().log_softmax(-1)
    # by the inverse of the distribution: multinomial would draw a random number for every token of the vocabulary
    below = log_p.detach().exp().cumsum(-1)
    uniform = torch.rand((len(below), 1), generator=generator).to(below)
    drawn = torch.searchsorted(below, uniform * below[:, -1:]).clamp_(max=below.shape[-1] - 1)
    log_p.gather(-1, drawn).sum().backward()
    return seen


def closed_form(
    model: PreTrainedModel, importance: Sequence[Mapping[Which, Importance]], names: Sequence[str]
) -> dict[str, Tensor]:
    """Return the parameters that cost least, float64, as :func:`~kvcli.calibration.ostquant.identity` shapes them.

    Only ``s_qk``, ``r_ov`` and ``s_ov`` follow from the cache's importance; all others stay at the identity. Without
    ``s_ov`` no rotation helps (noise stays white), so ``r_ov`` stays too.
    """
    parameters = identity(model.config, names)
    for i, own in enumerate(importance):
        if "s_qk" in parameters:
            s, m = (x.diagonal(dim1=-2, dim2=-1).unflatten(-1, (2, -1)).sum(-2) for x in own["k"].moments(RIDGE["k"]))
            if has_qk_norm(model.config):
                s, m = s.mean(0, keepdim=True), m.mean(0, keepdim=True)
            parameters["s_qk"][i] = (m / s) ** 0.25  # keys times S: G = S²
        if "s_ov" not in parameters:
            continue
        s, m = own["v"].moments(RIDGE["v"])
        if "r_ov" in parameters:
            scale, rotation = torch.linalg.eigh(geometric_mean(s, m))
            parameters["r_ov"][i] = rotation
        else:
            scale = (m.diagonal(dim1=-2, dim2=-1) / s.diagonal(dim1=-2, dim2=-1)).sqrt()
        parameters["s_ov"][i] = scale**-0.5  # values R / S: G = R S⁻² Rᵀ
    return parameters


def geometric_mean(s: Tensor, m: Tensor) -> Tensor:
    """Return the positive definite G with G S G = M, [..., d, d]."""
    values, vectors = torch.linalg.eigh(s)
    root = (vectors * values.sqrt()[..., None, :]) @ vectors.mT
    inverse = (vectors / values.sqrt()[..., None, :]) @ vectors.mT
    values, vectors = torch.linalg.eigh(root @ m @ root)
    out: Tensor = inverse @ ((vectors * values.sqrt()[..., None, :]) @ vectors.mT) @ inverse
    return out
