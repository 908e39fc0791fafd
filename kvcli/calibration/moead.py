"""MOEA/D as an Optuna sampler: one scalar problem per weight vector, solved together by neighbours.

After Zhang and Li, "MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition", IEEE Transactions on
Evolutionary Computation 11(6), 2007, with the Tchebycheff approach on normalised objectives. Three departures:

- a problem's solution is the best finished trial for its weights, wherever it came from (global replacement, after
  Wang et al., 2016), so the finished trials are all there is to the state but the random numbers;
- a child that has been tried already is drawn again: on a small discrete problem most children would be repeats;
- trials that break a constraint rank behind all that keep it, the less they break it the better.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

AUGMENTATION = 1e-6  # without it, of two trials alike in the worse objective either would do
NEIGHBOUR_MATING = 0.9  # probability that parents come from the neighbourhood
ATTEMPTS = 50  # to find a child that has not been tried


def weight_vectors(count: int) -> NDArray[np.float64]:
    """Return evenly spread weights of two objectives: [count, 2], each row of sum 1, from (0, 1) to (1, 0)."""
    first = np.linspace(0, 1, count)
    return np.stack((first, 1 - first), axis=1)


def neighbourhoods(weights: NDArray[np.float64], size: int) -> NDArray[np.int64]:
    """Return for each weight vector the ``size`` nearest, itself first: [count, size] indices."""
    distance = np.linalg.norm(weights[:, None] - weights[None], axis=2).round(9)  # or rounding decides between equals
    return np.argsort(distance, axis=1, kind="stable")[:, :size]


def tchebycheff(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return max_i λ_i·|f_i − z*_i| / (z^nad_i − z*_i) of every trial for every weight vector: [weights, trials].

    z* is the least of each objective, z^nad the greatest among the trials that no other dominates; ``values`` is
    [trials, 2], to be minimised. A millionth of the sum of both is added.
    """
    below = (values[:, None] <= values[None]).all(2) & (values[:, None] < values[None]).any(2)
    front = values[~below.any(0)]
    ideal, nadir = front.min(0), front.max(0)
    scaled = (values - ideal) / np.where(nadir > ideal, nadir - ideal, 1)
    worst: NDArray[np.float64] = (weights[:, None] * scaled[None]).max(2) + AUGMENTATION * scaled.sum(1)
    return worst


class Moead(optuna.samplers.BaseSampler):
    """Sampler for two objectives, both minimised.

    Parameters
    ----------
    population
        How many weight vectors there are, at least 2; as many first trials are random.
    neighbours
        Size of a neighbourhood, at least 2; by default a fifth of the population, as in the paper's experiments.
    seed
        Of the random numbers.
    """

    def __init__(self, *, population: int = 50, neighbours: int | None = None, seed: int | None = None) -> None:
        self.weights = weight_vectors(population)
        self.neighbours = neighbourhoods(self.weights, neighbours or max(2, population // 5))
        first, second = np.random.SeedSequence(seed).spawn(2)
        self._rng = np.random.default_rng(first)
        self._random = optuna.samplers.RandomSampler(seed=int(second.generate_state(1)[0]))
        self._space = optuna.search_space.IntersectionSearchSpace()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the parameters that all finished trials share."""
        return self._space.calculate(study)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return a child of two neighbouring problems' solutions; the problems take turns."""
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if len(done) < len(self.weights) or not search_space:
            return {}
        turn = len(done) % len(self.weights)
        near = self._rng.random() < NEIGHBOUR_MATING
        pool = self.neighbours[turn] if near else np.arange(len(self.weights))
        solutions = self._solutions(done)
        mother, father = (done[solutions[i]].params for i in self._rng.choice(pool, 2, replace=False))
        tried = [x.params for x in done]
        for _ in range(ATTEMPTS):
            child = {x: (mother if self._rng.random() < 0.5 else father)[x] for x in search_space}
            for name, distribution in search_space.items():
                if self._rng.random() < 1 / len(search_space):
                    child[name] = self._random.sample_independent(study, trial, name, distribution)
            if child not in tried:
                break
        return child

    def _solutions(self, done: list[FrozenTrial]) -> list[int]:
        """Return for each weight vector the index of the best finished trial; of equals the earlier."""
        broken = [sum(max(x, 0.0) for x in trial.constraints.values()) for trial in done]
        costs = tchebycheff(np.array([trial.values for trial in done]), self.weights)
        return [min(range(len(done)), key=lambda i: (broken[i], row[i])) for row in costs]

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return a random value: the first population is random."""
        return self._random.sample_independent(study, trial, param_name, param_distribution)
