"""What a plug-in of each family provides, as typed signatures.

A plug-in is a class found through the entry-point group ``kvcli.plugins`` (see :mod:`kvcli.plugins`). It states its
``family`` and ``name`` as class attributes, the first line of its docstring says what it does, and it has the methods
of its family's protocol; nothing has to be inherited. The core methods use the same interfaces.

Shapes: ``H`` query heads, ``h`` key/value heads, ``d`` head_dim, ``n`` tokens. Keys are after RoPE unless said
otherwise. Positions travel with tokens: once tokens have been evicted or merged, and heads hold different ones, an
index into a tensor says nothing about where in the sequence its token stood.

So far the core calls :class:`Quantizer` and :class:`Loss`; the other signatures are laid for what the cache can already
serve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.calibration.space import SearchSpace
    from kvcli.plan import LayerPlan
    from kvcli.runtime.packed_layer import PackedLayer

Which = Literal["k", "v"]
Shard = Literal["head", "tensor"]
"""What a tensor-parallel rank may own: a ``head``, or only the whole ``tensor``."""


@dataclass(frozen=True)
class Tokens:
    """Cached tokens of one layer of one sequence, with what is needed to judge them.

    Attributes
    ----------
    keys, values
        [h, n, d], floating point, as the cache returns them.
    positions
        [h, n] int64: where each token stood in the sequence. Heads may hold different tokens.
    attention
        [h, n] float32: softmax mass each token received since the last call, summed over the queries and over the
        query heads that share the key/value head; None unless the plug-in set ``needs_attention``.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    attention: Tensor | None = None


class Plugin(Protocol):
    """What every family shares.

    Attributes
    ----------
    family
        A key of :data:`FAMILIES`.
    name
        The name under which recipes and options choose it.
    """

    family: str
    name: str


@runtime_checkable
class Quantizer(Plugin, Protocol):
    """Offers storage formats for the search to choose from."""

    def search_space(self, geometry: Sequence[LayerPlan]) -> SearchSpace:
        """Return every candidate the search may weigh.

        Parameters
        ----------
        geometry
            The model's attention layers in order, in exact formats: only their geometry is meant.

        Raises
        ------
        kvcli.errors.InputError
            If the method has no format for such a model.
        """
        ...


@runtime_checkable
class Transform(Plugin, Protocol):
    """An orthogonal or scaling map with an exact inverse.

    Attributes
    ----------
    shard
        ``head`` if heads are mapped apart from one another.
    fused
        Names of the weight matrices that absorb the map, empty if none does.
    online
        Which of ``q``, ``k``, ``v``, ``o`` and ``down`` (down's input) are still mapped while the model runs.
    """

    shard: Shard
    fused: Sequence[str]
    online: Sequence[str]

    def forward(self, layer: int, which: Which, x: Tensor) -> Tensor:
        """Map [..., h, n, d] to what is quantised: same shape and dtype."""
        ...

    def inverse(self, layer: int, which: Which, x: Tensor) -> Tensor:
        """Undo :meth:`forward`, up to rounding."""
        ...

    def fuse(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the ``fused`` weights, [out, in], with the map multiplied in; computed in float64."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """Return what the artifact keeps for the online part, named ``layer.{i}.{k|v}.{what}``."""
        ...


@runtime_checkable
class Predictor(Plugin, Protocol):
    """Predicts a layer's keys or values from tensors already reconstructed; only the residual is quantised.

    Heads are laid side by side (width ``h * d``) and keys are before RoPE.

    Attributes
    ----------
    shard
        ``tensor`` if a prediction reads all heads.
    """

    shard: Shard

    def inputs(self, layer: int, which: Which) -> Sequence[tuple[int, Which]]:
        """Return the tensors a prediction reads, in the order in which they are laid side by side; empty for none.

        Each stands earlier in (layer, keys before values) order.
        """
        ...

    def fit(self, layer: int, which: Which, moments: Tensor) -> None:
        """Fit one prediction from streamed second moments.

        Parameters
        ----------
        layer, which
            The target.
        moments
            [w + 1 + t, w + 1 + t] float64: the sum over tokens of z zᵀ, z being the inputs (w wide, reconstructed),
            a one, and the target (t wide, exact).
        """
        ...

    def predict(self, layer: int, which: Which, inputs: Tensor) -> Tensor:
        """Return the prediction [n, h * d] from inputs [n, w], both float32."""
        ...

    def model_bytes(self) -> int:
        """Bytes of everything fitted, held once per model."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """Return what was fitted, named ``layer.{i}.{k|v}.{what}``."""
        ...


@runtime_checkable
class Selector(Plugin, Protocol):
    """Decides which tokens stay and at which precision.

    Attributes
    ----------
    needs_attention
        Whether :attr:`Tokens.attention` must be gathered.
    """

    needs_attention: bool

    def budgets(self, geometry: Sequence[LayerPlan], tokens: int) -> Sequence[Tensor]:
        """Share out a budget over layers and heads.

        Parameters
        ----------
        geometry
            The model's attention layers in order.
        tokens
            Mean number of tokens a head may keep.

        Returns
        -------
        Sequence[Tensor]
            Per layer, [h] int64: tokens each head may keep.
        """
        ...

    def select(self, layer: int, tokens: Tokens, budget: Tensor) -> Tensor:
        """Return the bits at which each token stays, [h, n] uint8; 0 evicts it.

        At most ``budget`` ([h] int64) tokens of a head may be above 0. The bits must be of formats in the layer's plan.
        """
        ...


@runtime_checkable
class Merger(Plugin, Protocol):
    """Folds tokens that leave into tokens that stay."""

    def merge(self, layer: int, kept: Tokens, leaving: Tokens) -> Tokens:
        """Return ``kept`` with ``leaving`` folded in: the same number of tokens, at positions the merger chooses."""
        ...


@runtime_checkable
class Retriever(Plugin, Protocol):
    """Decides which pages a query reads; the others stay stored but unread."""

    def summary_bytes(self, layer: LayerPlan, block_size: int) -> int:
        """Bytes kept beside each page for the choice; the plan counts them."""
        ...

    def summarize(self, layer: int, keys: Tensor, positions: Tensor) -> Tensor:
        """Summarise one full page: keys [h, block_size, d] and positions [h, block_size] int64 to [h, width]."""
        ...

    def pages(self, layer: int, query: Tensor, summaries: Tensor, budget: int) -> Tensor:
        """Choose pages for one query.

        Parameters
        ----------
        layer
            The layer's index.
        query
            [H, d] after RoPE; the query heads of a group are adjacent.
        summaries
            [h, pages, width].
        budget
            Pages a head may read.

        Returns
        -------
        Tensor
            [h, pages] bool.
        """
        ...


@runtime_checkable
class Loss(Plugin, Protocol):
    """Says how far one next-token distribution is from another."""

    def __call__(self, reference: Tensor, logits: Tensor) -> Tensor:
        """Return the loss of every token, [n] float32, from logits [n, vocabulary]; differentiable in ``logits``."""
        ...


@runtime_checkable
class WeightMethod(Plugin, Protocol):
    """Stores a weight matrix in few bits.

    Attributes
    ----------
    needs_moments
        Whether :meth:`quantize` wants the second moments of the matrix's inputs.
    """

    needs_moments: bool

    def quantize(self, name: str, weight: Tensor, moments: Tensor | None) -> Mapping[str, Tensor]:
        """Return what is stored for ``weight`` [out, in], given the inputs' second moments [in, in] float64 or None."""
        ...

    def dequantize(self, name: str, stored: Mapping[str, Tensor]) -> Tensor:
        """Return the weight [out, in] in float32 that ``stored`` stands for."""
        ...

    def stored_bytes(self, shape: tuple[int, int]) -> int:
        """Every byte a matrix of this shape takes: codes, scales, zero points, outliers and their indices."""
        ...


@runtime_checkable
class Stage(Plugin, Protocol):
    """One calibration step: reads earlier results, returns its own, and touches nothing else.

    :class:`kvcli.calibration.stages.Stages` runs it, hashes its name, settings and inputs, and keeps the result under
    that hash, so that a rerun resumes.

    Attributes
    ----------
    inputs
        Names of the earlier results it reads.
    """

    inputs: Sequence[str]

    def settings(self) -> Mapping[str, Any]:
        """Return all that the result depends on beside the inputs, as plain JSON."""
        ...

    def run(self, results: Mapping[str, Any]) -> Mapping[str, Any]:
        """Compute tensors by name, or plain JSON, from the inputs in ``results``."""
        ...


@runtime_checkable
class Backend(Plugin, Protocol):
    """The kernels that read and write packed pages; all backends agree with ``reference``."""

    def is_available(self) -> bool:
        """Whether this machine can run it."""
        ...

    def attend(self, layer: PackedLayer, row: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Append one sequence's new tokens and attend from them.

        Parameters
        ----------
        layer
            The storage; changed in place.
        row
            Which sequence of the batch.
        query
            [H, new, d] after RoPE.
        key, value
            [h, new, d], keys after RoPE.
        scaling
            Factor on the scores.

        Returns
        -------
        Tensor
            [H, new, d] in the query's dtype.
        """
        ...


FAMILIES: dict[str, type] = {
    "quantizer": Quantizer,
    "transform": Transform,
    "predictor": Predictor,
    "selector": Selector,
    "merger": Merger,
    "retriever": Retriever,
    "loss": Loss,
    "weights": WeightMethod,
    "stage": Stage,
    "backend": Backend,
}
"""The families by the name a plug-in's ``family`` states."""
