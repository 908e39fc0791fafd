"""KVTuner's own search: relative errors, pruning within layers, clustering across them, a multi-objective search.

After Li et al., "KVTuner: Sensitivity-Aware Layer-Wise Mixed-Precision KV Cache Quantization for Efficient and Nearly
Lossless LLM Inference", arXiv:2502.04420. Its four steps are :func:`kvcli.calibration.relative_errors.measure`,
:func:`prune`, :func:`group` and :func:`search`; :mod:`kvcli.calibration.surrogate` is what kvcli does instead.
Departures: bits are effective bits unless nominal ones are asked for, the loss is whatever ``evaluate`` measures, and
the pairs may be of any formats.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from kvcli.calibration import knapsack
from kvcli.calibration.relative_errors import Pair, RelativeErrors
from kvcli.calibration.space import SearchSpace, Setting
from kvcli.errors import BudgetError, KvcliError, UsageError
from kvcli.plan import CachePlan, LayerPlan

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.study import Study

Genome: TypeAlias = tuple[int, ...]  # for every group, which of its candidates
Sampler = Literal["nsga2", "moead"]

EPS, MIN_SAMPLES = 0.05, 2  # DBSCAN's, the paper's own
TRIALS = 200  # the paper's
POPULATION = 50  # Optuna's default, and the best of 10, 20 and 50 on invented losses


# --- pruning within a layer -------------------------------------------------------------------------------------------


def prune(found: RelativeErrors, space: SearchSpace, layer: LayerPlan, index: int) -> tuple[Pair, ...]:
    """Return the layer's pairs on the Pareto front of bytes and e_o, lightest first (the paper's intra-layer pruning).

    Bytes are those of a page, scales and padding included; on the paper's own pairs they order as bits do.
    """
    pages = [space.layer(layer, space.k[k], space.v[v]).page_bytes(found.setting.block_size) for k, v in found.pairs]
    return tuple(found.pairs[i] for i in knapsack.pareto(pages, found.output[index]))


# --- clustering across layers -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Layers that the search treats as one.

    Attributes
    ----------
    layers
        Their indices, ascending.
    candidates
        The pairs that each of them kept, lightest first.
    """

    layers: tuple[int, ...]
    candidates: tuple[Pair, ...]


def group(found: RelativeErrors, space: SearchSpace, geometry: list[LayerPlan]) -> list[Group]:
    """Cluster the layers that kept the same pairs by their e_o vectors (the paper's inter-layer clustering).

    DBSCAN with eps 0.05 and min_samples 2. What it calls noise becomes a group of its own, which the paper leaves open.
    Groups are ordered by their first layers.

    Raises
    ------
    UsageError
        If scikit-learn is not installed.
    """
    cluster = _need("sklearn.cluster", "scikit-learn")
    kept: dict[tuple[Pair, ...], list[int]] = {}
    for i, layer in enumerate(geometry):
        kept.setdefault(prune(found, space, layer, i), []).append(i)
    groups = []
    for candidates, layers in kept.items():
        at = [found.pairs.index(pair) for pair in candidates]
        vectors = [[found.output[i][j] for j in at] for i in layers]
        labels = cluster.DBSCAN(eps=EPS, min_samples=MIN_SAMPLES).fit_predict(vectors)
        clusters: dict[int, list[int]] = {}
        for i, label in zip(layers, labels.tolist(), strict=True):
            clusters.setdefault(label if label >= 0 else -1 - i, []).append(i)
        groups += [Group(tuple(members), candidates) for members in clusters.values()]
    return sorted(groups, key=lambda x: x.layers)


def _need(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise UsageError(f"KVTuner's search needs the package {package}: pip install 'kvcli[search]'.") from None


# --- multi-objective search -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A plan that was measured, with its bits and its loss."""

    plan: CachePlan
    bits: float
    loss: float


@dataclass(frozen=True)
class Front:
    """The Pareto front of a search.

    Attributes
    ----------
    context, nominal
        How bits were counted: effective ones at ``context`` tokens, or nominal ones.
    points
        Plans that no other measured plan beats in both bits and loss, by ascending bits.
    trials, evaluations
        Genomes that the search asked for, and how many different ones there were: only these are evaluated.
    """

    context: int
    nominal: bool
    points: list[Point]
    trials: int
    evaluations: int

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON; a layer's plan that many points share is written once."""
        layers = list(dict.fromkeys(x for p in self.points for x in p.plan.layers))
        number = {x: i for i, x in enumerate(layers)}
        rows = [
            {**vars(p), "plan": {**p.plan.to_json(), "layers": [number[x] for x in p.plan.layers]}} for p in self.points
        ]
        return {**vars(self), "layers": [x.to_json() for x in layers], "points": rows}

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> Front:
        """Rebuild from :meth:`to_json`; raise ValueError, TypeError, KeyError or IndexError if it is none."""
        points = []
        for row in obj["points"]:
            plan = CachePlan.from_json({**row["plan"], "layers": [obj["layers"][i] for i in row["plan"]["layers"]]})
            if not (math.isfinite(row["bits"]) and math.isfinite(row["loss"])):
                raise ValueError("bits or a loss are not a number")
            points.append(Point(plan, row["bits"], row["loss"]))
        return cls(obj["context"], obj["nominal"], points, obj["trials"], obj["evaluations"])


def best(front: Front, bits: float) -> Point:
    """Return the point of least loss within a budget, counted as the search counted.

    Raises
    ------
    BudgetError
        Naming the least that the search reached.
    """
    within = [p for p in front.points if p.bits <= bits + 1e-9]
    if not within:
        kind = "nominal" if front.nominal else "effective"
        least = math.ceil(min(p.bits for p in front.points) * 1000 - 1e-6) / 1000
        raise BudgetError(
            f"{bits:g} {kind} bits at {front.context} tokens cannot be met; the least that the search reached is "
            f"{least:.3f}."
        )
    return min(within, key=lambda p: (p.loss, p.bits))


def search(
    groups: Sequence[Group], space: SearchSpace, geometry: list[LayerPlan], setting: Setting, dtype: str, context: int,
    evaluate: Callable[[CachePlan], float], *, trials: int = TRIALS, cap: float | None = None, nominal: bool = False,
    sampler: Sampler = "nsga2", population: int = POPULATION, seed: int = 0, storage: Path | None = None,
    step: Callable[[], None] = lambda: None,
) -> Front:  # fmt: skip
    """Search one pair per group for the least end-to-end loss and the fewest bits (the paper's last step).

    Parameters
    ----------
    groups, space, geometry, setting, dtype
        What plans are made of.
    context
        Tokens of one sequence at which effective bits are counted.
    evaluate
        The loss of a plan, finite and to be minimised: mean KL in nats a token, or 1 - accuracy.
    trials
        Genomes to ask for. Equal ones are evaluated once.
    cap
        Soft cap on bits, as the paper sets at 4 and 6: plans above it rank behind all others, but are not forbidden.
    nominal
        Count nominal bits, as the paper does.
    sampler
        ``nsga2``, as in the paper's code, or ``moead``, as in the paper.
    population, seed
        Of the sampler.
    storage
        An SQLite file that keeps what was evaluated, as an Optuna study, so that a search that was killed goes on; None
        keeps nothing. It must not be shared by searches with different models, texts or losses.
    step
        Called once a trial.

    Raises
    ------
    UsageError
        If Optuna is not installed.
    KvcliError
        If a loss is not finite, or the storage cannot be used.
    """
    optuna = _need("optuna", "optuna")

    def plan_of(genome: Genome) -> CachePlan:
        layers = list(geometry)
        for members, choice in zip(groups, genome, strict=True):
            k, v = members.candidates[choice]
            for i in members.layers:
                layers[i] = space.layer(geometry[i], space.k[k], space.v[v])
        return space.plan(layers, setting, dtype)

    names = [f"group {i}" for i in range(len(groups))]
    choices = {n: optuna.distributions.IntDistribution(0, len(x.candidates) - 1)
               for n, x in zip(names, groups, strict=True)}  # fmt: skip
    points: dict[Genome, Point] = {}
    with _quiet(optuna):
        shapes = [x.to_json() for x in geometry]
        problem = [space.to_json(), shapes, asdict(setting), dtype, [asdict(x) for x in groups]]
        kept = _kept(optuna, storage, problem)
        known: dict[Genome, float] = {tuple(t.params[n] for n in names): t.values[0] for t in kept.trials}
        # a sampler's random state is not kept: what was evaluated before is gone through again, and costs nothing
        study = optuna.create_study(directions=["minimize"] * 2, sampler=_sampler(optuna, sampler, population, seed))
        for _ in range(trials):
            trial = study.ask(choices)
            genome = tuple(trial.params[n] for n in names)
            if genome not in points:
                plan = plan_of(genome)
                if genome not in known:
                    known[genome] = loss = evaluate(plan)
                    if not math.isfinite(loss):
                        raise KvcliError(f"the loss of a plan came out as {loss}, which is not a number.")
                    with _storing(storage):
                        kept.add_trial(optuna.create_trial(params=trial.params, distributions=choices, value=loss))
                bits = plan.nominal_bits if nominal else plan.effective_bits(context)
                points[genome] = Point(plan, bits, known[genome])
            point = points[genome]
            if cap is not None:
                trial.set_constraint("bits", point.bits - cap)
            study.tell(trial, (point.loss, point.bits))
            step()
    measured = list(points.values())
    front = knapsack.pareto([p.bits for p in measured], [p.loss for p in measured])
    return Front(context, nominal, [measured[i] for i in front], trials, len(points))


def _sampler(optuna: Any, name: Sampler, population: int, seed: int) -> BaseSampler:
    if name == "moead":
        from kvcli.calibration.moead import Moead

        return Moead(population=population, seed=seed)
    found: BaseSampler = optuna.samplers.NSGAIISampler(population_size=population, seed=seed)
    return found


def _kept(optuna: Any, storage: Path | None, problem: Any) -> Study:
    """Return the study of everything evaluated so far; its name tells one problem from another."""
    name = hashlib.sha256(json.dumps(problem, sort_keys=True).encode()).hexdigest()
    where = None if storage is None else f"sqlite:///{storage}"
    with _storing(storage):
        if storage is not None:
            storage.parent.mkdir(parents=True, exist_ok=True)
        found: Study = optuna.create_study(storage=where, study_name=name, load_if_exists=True)
    return found


@contextmanager
def _storing(storage: Path | None) -> Iterator[None]:
    """Answer for Optuna and its database, which raise whatever they like."""
    try:
        yield
    except Exception as error:
        raise KvcliError(f"{storage} cannot keep the search: {str(error).splitlines()[0].rstrip('.')}.") from error


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Keep Optuna off stderr."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)
