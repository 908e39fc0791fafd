"""Losses by name: how far a model's next-token distributions are from its teacher's.

All are differentiable in the student's logits and give one number for every token. KL-Top is OSTQuant's (Hu et al.,
arXiv:2501.13987): the forward KL over the teacher's k likeliest tokens only, so that the long tail of the vocabulary,
which few calibration tokens say anything about, does not steer. Two forms of it are in use, which differ in what the
softmax runs over, and so in whether the mass that lies outside the k tokens counts:

- ``kl-top``: softmax over the whole vocabulary, then the k terms of Σ p (log p - log q). Both sides keep their tails,
  so the sum is no divergence: it may fall below zero.
- ``kl-top-renormalised``: softmax within the k tokens on both sides; a divergence between the two conditionals.

With k of at least the vocabulary, both are the forward KL.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from kvcli import plugins
from kvcli.errors import InputError
from kvcli.protocols import Loss

K = 1000  # of the paper: 5 and 10 000 are worse


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


class ForwardKL:
    """KL(teacher‖student) over the whole vocabulary."""

    family: str = "loss"
    name: str = "forward-kl"

    def __call__(self, reference: Tensor, logits: Tensor) -> Tensor:
        """Return nats a token [n] from logits [n, vocabulary]."""
        return _kl(reference.float().log_softmax(-1), logits.float().log_softmax(-1))


class ReverseKL:
    """KL(student‖teacher) over the whole vocabulary."""

    family: str = "loss"
    name: str = "reverse-kl"

    def __call__(self, reference: Tensor, logits: Tensor) -> Tensor:
        """Return nats a token [n] from logits [n, vocabulary]."""
        return _kl(logits.float().log_softmax(-1), reference.float().log_softmax(-1))


class CrossEntropy:
    """Cross-entropy with the teacher's likeliest token as the label."""

    family: str = "loss"
    name: str = "cross-entropy"

    def __call__(self, reference: Tensor, logits: Tensor) -> Tensor:
        """Return nats a token [n] from logits [n, vocabulary]."""
        return cross_entropy(logits.float(), reference.argmax(-1), reduction="none")


class KLTop:
    """Forward KL over the teacher's 1000 likeliest tokens, probabilities over the whole vocabulary.

    Parameters
    ----------
    k
        How many tokens.
    """

    family: str = "loss"
    name: str = "kl-top"
    renormalised: ClassVar[bool] = False

    def __init__(self, k: int = K) -> None:
        self.k = k

    def __call__(self, reference: Tensor, logits: Tensor) -> Tensor:
        """Return nats a token [n] from logits [n, vocabulary]."""
        reference, logits = reference.float(), logits.float()
        top = reference.topk(min(self.k, reference.shape[-1]), dim=-1).indices
        if self.renormalised:
            return _kl(reference.gather(-1, top).log_softmax(-1), logits.gather(-1, top).log_softmax(-1))
        return _kl(reference.log_softmax(-1).gather(-1, top), logits.log_softmax(-1).gather(-1, top))


class RenormalisedKLTop(KLTop):
    """Forward KL over the teacher's 1000 likeliest tokens, probabilities within them."""

    name = "kl-top-renormalised"
    renormalised = True


_OWN: dict[str, type[Loss]] = {
    x.name: x for x in (KLTop, RenormalisedKLTop, ForwardKL, ReverseKL, CrossEntropy)
}  # fmt: skip


def names() -> list[str]:
    """Return the names of all losses, plug-ins' included."""
    return [*_OWN, *(x.name for x in plugins.discover() if x.family == "loss" and x.error is None)]


def load(name: str) -> Loss:
    """Return a loss by its name, kvcli's own or a plug-in's of the family ``loss``.

    Raises
    ------
    InputError
        If there is none of that name.
    """
    if name in _OWN:
        return _OWN[name]()
    if name not in names():
        raise InputError(f"there is no loss {name!r}; there are {', '.join(names())}.")
    loss: Loss = plugins.load(name, family="loss")()
    return loss
