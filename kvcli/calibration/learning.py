"""Learning OSTQuant's transforms: Riemannian Adam through a model whose cache is quantised.

After Hu et al., arXiv:2501.13987. The student is the model with its transforms fused anew in every step, reading its
cache as decoding reads it (:mod:`kvcli.calibration.straight_through`); the teacher is the model as it was. Rotations
move on the Stiefel manifold (geoopt); scales are learned by their logarithms. Weights and activations may be quantised
too. Departures: the start (:mod:`kvcli.calibration.fisher` beside the paper's), rates that fall to zero along half a
cosine, and early stopping on windows that are not learned from; the start itself is among what may be kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from kvcli.calibration import losses
from kvcli.calibration.capture import embed, plain_cache, run_layers
from kvcli.calibration.fusing import fused
from kvcli.calibration.learn_settings import LearnSettings
from kvcli.calibration.ostquant import ROTATIONS, transforms
from kvcli.calibration.straight_through import Storage, TrainingLayer, quantized_weight
from kvcli.errors import KvcliError, UsageError
from kvcli.evaluation.activations import quantizing_inputs
from kvcli.models.architectures import Rope
from kvcli.models.loading import LoadedModel
from kvcli.plan import CachePlan
from kvcli.protocols import Transform, Which

ROWS = 128  # tokens whose logits are held at once
SKIPPED = 8  # of a window's tokens, one in so many, the first, is not scored: what they read is hardly packed


@dataclass
class Learned:
    """What learning found.

    Attributes
    ----------
    parameters
        As :func:`~kvcli.calibration.ostquant.shapes` shapes them.
    curve
        The loss of every step, in the loss's own unit a token.
    held_out
        ``[step, loss]`` on the held-out windows; step 0 is the start.
    """

    parameters: dict[str, Tensor]
    curve: list[float]
    held_out: list[tuple[int, float]]


def check_installed() -> None:
    """Raise :class:`UsageError` unless geoopt is installed."""
    try:
        import geoopt  # noqa: F401
    except ImportError:
        raise UsageError("Learning transforms needs geoopt: pip install 'kvcli[learn]'.") from None


def leaves(start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what is optimised: rotations on their manifold, and the logarithms of scales; float32."""
    import geoopt

    stiefel = geoopt.Stiefel(canonical=False)
    return {
        name: geoopt.ManifoldParameter(x.float().clone(), manifold=stiefel)
        if name in ROTATIONS
        else torch.nn.Parameter(x.log().float())
        for name, x in start.items()
    }


def values(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return rotations and scales from :func:`leaves`; differentiable."""
    return {name: x if name in ROTATIONS else x.exp() for name, x in parameters.items()}


class Student:
    """The model with transforms fused and its cache (and weights and activations, if asked) quantised.

    Parameters
    ----------
    loaded
        The model, unquantised, with attention ``kvcli``; not changed.
    plan
        How the cache is stored.
    means
        Per layer the means of keys before RoPE and of values that storage takes off, of the model as it is.
    settings
        What else is quantised.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        plan: CachePlan,
        means: Sequence[Mapping[Which, Tensor]],
        settings: LearnSettings,
    ) -> None:
        self.model: PreTrainedModel = loaded.model
        self.rope: Rope = loaded.rope
        self.plan, self.means, self.settings = plan, means, settings

    def hidden(self, parameters: Mapping[str, Tensor], ids: Tensor) -> Tensor:
        """Return what lm_head reads, [batch, tokens, hidden_size], in the teacher's basis; differentiable."""
        maps = transforms(self.model.config, parameters, dtype=torch.float32)
        hidden = embed(self.model, ids)
        rotation = parameters.get("r_res")
        if rotation is not None:
            hidden = hidden @ rotation.to(hidden)
        for i in range(len(self.plan.layers)):

            def run(x: Tensor, i: int = i) -> Tensor:
                return self._layer(i, x, maps)

            hidden = checkpoint(run, hidden, use_reentrant=False, preserve_rng_state=False)
        if rotation is not None:  # the last norm's gain stays where it is: neither it nor lm_head is quantised
            hidden = hidden @ rotation.to(hidden).mT
        out: Tensor = self.model.model.norm(hidden)
        return out

    def _layer(self, index: int, hidden: Tensor, maps: Sequence[Transform]) -> Tensor:
        layer = self.model.model.layers[index]
        prefix = f"model.layers.{index}."
        weights = {prefix + name: x for name, x in layer.named_parameters()}
        changed = fused(weights, maps)
        if self.settings.weights is not None:
            for name, x in {**weights, **changed}.items():
                if x.ndim == 2:
                    changed[name] = quantized_weight(x, self.settings.weights.fitting(x.shape[1]))
        means: dict[Which, Tensor] = dict(self.means[index])
        for which, mean in means.items():
            x = mean[:, None]
            for each in maps:
                x = each.forward(index, which, x)
            means[which] = x[:, 0]
        cache = plain_cache(self.plan)
        cache.layers[index] = TrainingLayer(self.plan, index, Storage(self.plan, index, self.rope, means))
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        with quantizing_inputs(layer, self.settings.activations):
            out: Tensor = functional_call(
                layer,
                {name.removeprefix(prefix): x.to(weights[name].dtype) for name, x in changed.items()},
                (hidden,),
                {
                    "attention_mask": None, "position_ids": positions, "past_key_values": cache,
                    "position_embeddings": self.model.model.rotary_emb(hidden, positions),
                },
            )  # fmt: skip
        return out


class Learner:
    """Parameters, their optimiser, and how far they have come.

    Parameters
    ----------
    student
        The model to be.
    start
        Parameters, as :func:`~kvcli.calibration.ostquant.shapes` shapes them; scales positive.
    ids
        [windows, tokens]; the last ``settings.held_out`` of them are held out.
    settings
        Loss, steps, rates.
    seed
        Of the order of the windows.
    """

    def __init__(
        self, student: Student, start: Mapping[str, Tensor], ids: Tensor, settings: LearnSettings, *, seed: int = 0
    ) -> None:
        import geoopt

        self.student, self.settings, self.seed = student, settings, seed
        self.train, self.check = ids[: len(ids) - settings.held_out], ids[len(ids) - settings.held_out :]
        self.loss = losses.load(settings.loss)
        self.parameters = leaves(start)
        self.best = {name: x.detach().clone() for name, x in self.parameters.items()}
        groups = [{"params": [x], "lr": self._rate(name)} for name, x in self.parameters.items()]
        self.optimizer: Any = geoopt.optim.RiemannianAdam(groups)
        self.curve: list[float] = []
        self.held_out: list[tuple[int, float]] = []
        self._teacher: dict[bytes, Tensor] = {}

    def _rate(self, name: str) -> float:
        return self.settings.rotation_rate if name in ROTATIONS else self.settings.scale_rate

    # --- one step -----------------------------------------------------------------------------------------------

    def run(self, path: Path | None, step: Callable[[], None] = lambda: None) -> Learned:
        """Learn to the end, or until the held-out loss has not fallen for ``settings.patience`` checks.

        Parameters
        ----------
        path
            File in which to keep what was reached after every step, and from which to go on.
        step
            Called once a step, those taken by an earlier run included.

        Raises
        ------
        KvcliError
            If the loss is no longer a finite number.
        """
        if path is not None:
            self._resume(path)
        for _ in self.curve:
            step()
        if not self.held_out:
            self._judge()
        while len(self.curve) < self.settings.steps and not self._stalled():
            self._step()
            if len(self.curve) % self.settings.check_every == 0 or len(self.curve) == self.settings.steps:
                self._judge()
            if path is not None:
                self._save(path)
            step()
        return Learned({k: x.detach() for k, x in values(self.best).items()}, self.curve, self.held_out)

    def _step(self) -> None:
        at = len(self.curve)
        factor = (1 + math.cos(math.pi * at / self.settings.steps)) / 2
        for group, name in zip(self.optimizer.param_groups, self.parameters, strict=True):
            group["lr"] = self._rate(name) * factor
        self.optimizer.zero_grad()
        batch = self.train[self._chosen(at)]
        parts = batch.split(self._at_once())
        total = sum(self._backward(part, len(batch)) for part in parts)
        if not math.isfinite(total):
            raise KvcliError(f"The loss is no longer finite after {at} steps: learn with lower rates.")
        self.optimizer.step()
        self.curve.append(total)

    def _chosen(self, at: int) -> Tensor:
        """Return which windows a step reads: every window once before any is read again."""
        picks = range(at * self.settings.batch, (at + 1) * self.settings.batch)
        orders = {
            x: torch.randperm(len(self.train), generator=torch.Generator().manual_seed(self.seed + x))
            for x in {i // len(self.train) for i in picks}
        }
        return torch.stack([orders[i // len(self.train)][i % len(self.train)] for i in picks])

    def _at_once(self) -> int:
        """Return how many windows of a batch fit into a quarter of the memory that is free."""
        import psutil

        config, tokens = self.student.model.config, self.train.shape[1]
        wide = 8 * config.hidden_size + 4 * config.intermediate_size  # of one layer, kept for its backward pass
        scores = 4 * config.num_attention_heads * tokens
        inputs = config.num_hidden_layers * config.hidden_size
        size = 4 * (tokens * (inputs + wide + scores) + 6 * ROWS * config.vocab_size)
        return max(1, int(psutil.virtual_memory().available / 4 / size))

    def _backward(self, ids: Tensor, count: int) -> float:
        with torch.enable_grad():
            loss = self._losses(values(self.parameters), ids) / count
            loss.backward()
        return float(loss.detach())

    def _losses(self, parameters: Mapping[str, Tensor], ids: Tensor) -> Tensor:
        """Return the sum over windows of the mean loss of a token."""
        first = ids.shape[1] // SKIPPED
        student = self.student.hidden(parameters, ids)[:, first:].flatten(0, 1)
        teacher = torch.cat([self._taught(x) for x in ids])
        parts = [
            checkpoint(self._tokens, p, q, use_reentrant=False, preserve_rng_state=False)
            for p, q in zip(teacher.split(ROWS), student.split(ROWS), strict=True)
        ]
        return torch.stack(parts).sum() / (ids.shape[1] - first)

    def _tokens(self, teacher: Tensor, student: Tensor) -> Tensor:
        head = self.student.model.lm_head
        return self.loss(head(teacher), head(student)).sum()

    @torch.no_grad()
    def _taught(self, window: Tensor) -> Tensor:
        """Return the final norm's output of the model as it is, for the scored tokens of one window."""
        key = window.numpy().tobytes()
        if key not in self._teacher:
            model = self.student.model
            hidden = run_layers(model, embed(model, window[None]), plain_cache(self.student.plan), 0)
            self._teacher[key] = hidden[0, len(window) // SKIPPED :]
        return self._teacher[key]

    # --- held-out windows, and what is kept -----------------------------------------------------------------------

    @torch.no_grad()
    def _judge(self) -> None:
        parts = self.check.split(self._at_once())
        found = float(sum(self._losses(values(self.parameters), x) for x in parts)) / len(self.check)
        if not self.held_out or found < min(x for _, x in self.held_out):
            self.best = {name: x.detach().clone() for name, x in self.parameters.items()}
        self.held_out.append((len(self.curve), found))

    def _stalled(self) -> bool:
        lowest = min(range(len(self.held_out)), key=lambda i: self.held_out[i][1])
        return len(self.held_out) - 1 - lowest >= self.settings.patience

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        for name, x in self.parameters.items():
            yield f"now.{name}", x.detach()
            yield f"best.{name}", self.best[name]
            for key in ("exp_avg", "exp_avg_sq"):
                yield f"{key}.{name}", self.optimizer.state[x][key]
        yield "curve", torch.tensor(self.curve, dtype=torch.float64)
        yield "held_out", torch.tensor(self.held_out, dtype=torch.float64)

    def _save(self, path: Path) -> None:
        part = path.with_suffix(".part")
        save_file({name: x.contiguous() for name, x in self._state()}, part)
        part.replace(path)

    def _resume(self, path: Path) -> None:
        try:
            kept = load_file(path)
        except (OSError, SafetensorError):  # none yet, or torn by a crash: begin anew
            return
        self.curve = kept["curve"].tolist()
        self.held_out = [(int(at), x) for at, x in kept["held_out"].tolist()]
        for name, x in self.parameters.items():
            x.data.copy_(kept[f"now.{name}"])
            self.best[name] = kept[f"best.{name}"]
            self.optimizer.state[x] = {
                "step": len(self.curve), **{key: kept[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq")}
            }  # fmt: skip
