"""Recipes of one method and of all: calibrated, solved again, generated from and evaluated as users would."""

from __future__ import annotations

import json

import pytest
from cli_checks import accepted, generated, refused

BRIEF = ("--context", 512, "--tokens", 2048, "--json")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["search-only", "transforms-only", "predictors-only", "everything"])
def test_an_artifact_of_a_recipe_is_solved_again_read_and_evaluated(recipe, warm, tinystories, text, tmp_path):
    made, again = tmp_path / "made", tmp_path / "again"
    accepted(warm("calibrate", tinystories, "--bits", 5, *BRIEF, "--recipe", recipe, "-o", made))
    accepted(warm("solve", made, "--bits", 4.2, "-o", again, "--json"))
    alone = recipe in ("transforms-only", "predictors-only")
    for path, bits in ((made, 5), (again, 4.2)):
        found = json.loads((path / "kvcli.json").read_text())
        layers = found["plan"]["layers"]
        assert json.loads(accepted(warm("inspect", path, "--json")))["effective_bits"] <= bits
        assert len({json.dumps([x["k"], x["v"]], sort_keys=True) for x in layers}) == 1 or not alone
        assert {x["transform"] == "hadamard" for x in layers} == {recipe in ("transforms-only", "everything")}
        assert bool(layers[1]["predictor"]) == (recipe in ("predictors-only", "everything"))
        assert (path / "quantize_config.json").exists() == (recipe == "everything")
        assert generated(warm, path, "Once upon a time", "--max-tokens", 4)
        assert 0 < json.loads(accepted(warm("eval", path, *text, "--json")))["kl"]["mean"] < 0.5
    report = json.loads((again / "report.json").read_text())
    assert report["sensitivity"]["space"]["layerwise"] is not alone


def test_kvtuners_search_is_refused_where_all_layers_get_one_pair(warm, tinystories, tmp_path):
    pytest.importorskip("optuna")
    words = ("calibrate", tinystories, "--bits", 5, "--recipe", "transforms-only", "--transforms", "none")
    refused(warm(*words, "--search", "kvtuner-nsga2", "-o", tmp_path / "A"), 2, "gives each layer its own formats")
