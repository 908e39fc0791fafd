"""Other budgets, and losses, from what one calibration measured; and what happens when the model may be run again."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvcli.artifact.reader import open_artifact
from kvcli.calibration import corpora, pipeline, solving, surrogate
from kvcli.calibration.corpora import Corpus
from kvcli.calibration.pipeline import Budget, Calibration
from kvcli.calibration.sensitivity import Probe, Sensitivity
from kvcli.calibration.solving import Solved, Solver
from kvcli.errors import BudgetError, InputError, UsageError
from kvcli.models.loading import LoadedModel, load

BUDGET = Budget(5.0, 512)


@pytest.fixture(scope="module")
def loaded(tinystories: Path) -> LoadedModel:
    return load(str(tinystories))


@pytest.fixture(scope="module")
def corpus(loaded: LoadedModel) -> Corpus:
    return corpora.tokens("builtin:narrative", loaded, num_tokens=1024, seed=0, length=256)


@pytest.fixture(scope="module")
def calibrated(
    loaded: LoadedModel, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Calibration]:
    out = tmp_path_factory.mktemp("solving") / "artifact"
    found = pipeline.calibrate(loaded, corpus, BUDGET, out)
    return pipeline.write(loaded, corpus, found, out, seed=0, overwrite=False), found


@pytest.fixture(scope="module")
def written(calibrated: tuple[Path, Calibration]) -> Path:
    return calibrated[0]


@pytest.fixture(scope="module")
def found(calibrated: tuple[Path, Calibration]) -> Calibration:
    return calibrated[1]


@pytest.fixture(scope="module")
def probe(written: Path, loaded: LoadedModel) -> Probe:
    artifact = open_artifact(written)
    return solving.probe_of(artifact, loaded, solving.calibration_text(artifact, loaded, 256))


def solve(source: Path, budget: Budget, out: Path, *, overwrite: bool = False) -> tuple[Path, Solved]:
    solver = Solver(open_artifact(source))
    solved = solver.within_bits(budget)
    return solver.write(solved, budget, out, overwrite=overwrite), solved


# --- another budget ---------------------------------------------------------------------------------------------------


def test_solving_for_the_same_budget_predicts_what_calibration_did(written, found, tmp_path):
    path, solved = solve(written, BUDGET, tmp_path / "same")
    assert solved.plan == surrogate.solve(Sensitivity.from_json(found.report["sensitivity"]), 5.0, 512)[0].plan
    best = found.report["verified"][0]
    assert solved.predicted_kl == pytest.approx(best["predicted_kl"] * found.report["scale"])
    assert solved.predicted_ppl_pct == pytest.approx(
        100 * math.expm1(solved.predicted_kl * found.report["nll_per_kl"])
    )  # fmt: skip
    assert solved.measured is None
    assert open_artifact(path).plan == solved.plan


@pytest.mark.parametrize("budget", [Budget(3.25, 512), Budget(4, 4096), Budget(2.5, 512, nominal=True)])
def test_solving_meets_another_budget_with_the_same_weights(written, tmp_path, budget):
    source = open_artifact(written)
    path, solved = solve(written, budget, tmp_path / "solved")
    plan = solved.plan
    spent = plan.nominal_bits if budget.nominal else plan.effective_bits(budget.context)
    assert budget.bits - 0.5 < spent <= budget.bits
    assert solved.predicted_kl > 0
    again = open_artifact(path)
    assert again.plan == plan
    assert again.manifest["context"] == budget.context
    assert again.manifest["budget"] == {"bits": budget.bits, "nominal": budget.nominal}
    assert [x["name"] for x in again.manifest["stages"]][-1] == "solve"
    assert (path / "model.safetensors").samefile(written / "model.safetensors")
    assert again.tensors().keys() == source.tensors().keys()


def test_an_artifact_that_was_solved_can_be_solved_again(written, found, tmp_path):
    down, _ = solve(written, Budget(3, 512), tmp_path / "down")
    _, up = solve(down, BUDGET, tmp_path / "up")
    assert up.plan == surrogate.solve(Sensitivity.from_json(found.report["sensitivity"]), 5.0, 512)[0].plan


def test_an_artifact_can_be_solved_in_its_own_place(written, tmp_path):
    path, _ = solve(written, Budget(4, 512), tmp_path / "a")
    solve(path, Budget(3, 512), path, overwrite=True)
    assert open_artifact(path).plan.effective_bits(512) <= 3
    assert [x.name for x in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("scope", ["unmet", "taken"])
def test_a_refusal_to_solve_writes_nothing(written, tmp_path, scope):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("kept")
    bits, out, error = (1, tmp_path / "new", BudgetError) if scope == "unmet" else (4, taken, UsageError)
    with pytest.raises(error):
        solve(written, Budget(bits, 512), out, overwrite=True)
    assert [x.name for x in tmp_path.iterdir()] == ["taken"]
    assert [x.name for x in taken.iterdir()] == ["mine.txt"]


DAMAGE: dict[str, Any] = {
    "nothing": lambda report: report.clear(),
    "no scale": lambda report: report.update(scale=None),
    "a scale of nothing": lambda report: report.update(scale=0),
    "perplexity without bounds": lambda report: report.update(nll_per_kl=math.inf),
    "no space": lambda report: report["sensitivity"].update(space=[]),
    "no settings": lambda report: report["sensitivity"].update(ratio=[]),
    "a layer too few": lambda report: report["sensitivity"]["geometry"].pop(),
    "a loss too few": lambda report: report["sensitivity"]["kl"]["k"][0].pop(),
    "a loss that is text": lambda report: report["sensitivity"]["kl"]["v"][1].__setitem__(0, "0.1"),
    "a loss that is null": lambda report: report["sensitivity"]["kl"]["v"][1].__setitem__(0, None),
    "another model's heads": lambda report: report["sensitivity"]["geometry"][0].update(head_dim=32),
    "another dtype": lambda report: report["sensitivity"].update(dtype="float64"),
    "a setting outside the space": lambda report: report["sensitivity"]["ratio"][0].update(sink_tokens=3),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_measurements_that_do_not_fit_the_artifact_are_refused(written, damage):
    # report.json is as foreign as any other file: with --no-verify, or rehashed, anything may stand there
    artifact = open_artifact(written)
    report = json.loads(json.dumps(artifact.report))
    DAMAGE[damage](report)
    with pytest.raises(InputError, match=r"holds no usable measurements in report\.json"):
        Solver(replace(artifact, report=report))


# --- within a loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nominal", [False, True])
def test_the_fewest_bits_within_a_loss_are_found(written, nominal):
    solver = Solver(open_artifact(written))
    spent = []
    for most in (0.1, 0.03, 0.01, 0.003):
        solved = solver.within_loss(most, 512, nominal=nominal)
        assert solved.predicted_kl <= most
        bits = surrogate.spent(solved.plan, 512, nominal=nominal)
        fewer = surrogate.Frontiers(solver.found, 512, nominal=nominal).best(bits - 2 * solving.STEP)
        assert fewer is None or fewer.predicted_kl * solver.scale > most
        spent.append(bits)
    assert all(a <= b for a, b in itertools.pairwise(spent))
    assert spent[0] < spent[-1] - 1


@pytest.mark.parametrize("measure", [False, True])
def test_a_loss_that_cannot_be_met_names_the_least(written, probe, measure):
    solver = Solver(open_artifact(written))
    kind = "measured" if measure else "predicted"
    with pytest.raises(BudgetError, match=rf"mean KL of 1e-09 cannot be met; the least {kind} is [0-9.e-]+\.$"):
        solving.find(solver, None, 1e-9, 512, probe if measure else None, nominal=False)


@pytest.mark.parametrize("most", [0.08, 0.03, 0.01])
@pytest.mark.parametrize("wrong", [0.3, 1.0, 3.0])
def test_where_the_model_may_run_the_measured_loss_is_within_the_bound(written, probe, most, wrong):
    solver = Solver(open_artifact(written))
    solver.scale *= wrong  # predictions that are far off
    solved = solving.find(solver, None, most, 512, probe, nominal=False)
    assert solved.measured is not None
    assert solved.measured.kl <= most
    assert solved.measured == probe.cost_of(solved.plan)


# --- measuring --------------------------------------------------------------------------------------------------------


def test_what_is_measured_for_a_plan_is_what_calibration_measured_for_it(written, found, probe):
    chosen = found.report["verified"][found.report["chosen"]]
    measured = probe.cost_of(found.plan)
    assert (measured.kl, measured.delta_nll) == (chosen["kl"], chosen["delta_nll"])


@pytest.mark.parametrize("objective", ["kl", "ppl"])
def test_of_the_best_plans_the_best_measured_is_taken(written, probe, objective):
    solver = Solver(open_artifact(written))
    solved = solving.find(solver, Budget(4.5, 512), None, 512, probe, nominal=False, objective=objective)
    tried = [probe.cost_of(x.plan) for x in surrogate.solve(solver.found, 4.5, 512)[: solving.CANDIDATES]]
    assert len(tried) == solving.CANDIDATES
    assert solved.measured in tried
    name = {"kl": "kl", "ppl": "delta_nll"}[objective]
    assert getattr(solved.measured, name) == min(getattr(x, name) for x in tried)
    shown = solved.to_json()
    assert shown["measured_kl"] == solved.measured.kl
    assert shown["measured_ppl_pct"] == pytest.approx(100 * math.expm1(solved.measured.delta_nll))


STATED: dict[str, dict[str, Any]] = {
    "a file that is gone": {"data": "notes.txt"},
    "standard input": {"data": "-"},
    "another text": {"sha256": "0" * 64},
}


@pytest.mark.parametrize("stated", STATED)
def test_text_that_cannot_be_read_again_has_to_be_named(written, loaded, stated):
    artifact = open_artifact(written)
    manifest = {**artifact.manifest, "calibration": {**artifact.manifest["calibration"], **STATED[stated]}}
    with pytest.raises(UsageError, match=r"name a text to measure on with --data\.$"):
        solving.calibration_text(replace(artifact, manifest=manifest), loaded, 256)
