"""Learning transforms: the student is the model itself, learning lowers the loss, and goes on where it was stopped."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package
from transform_models import ALL, build, random_parameters

from kvcli.calibration import learning
from kvcli.calibration.learn_settings import LearnSettings, Weights
from kvcli.calibration.learning import Learner, Student
from kvcli.calibration.ostquant import identity
from kvcli.calibration.pipeline import exact_layers
from kvcli.calibration.space import load_recipe
from kvcli.errors import InputError, KvcliError, UsageError
from kvcli.models.architectures import Rope, geometry
from kvcli.models.loading import LoadedModel, load
from kvcli.plan import CachePlan
from kvcli.quant.format import KVFormat
from kvcli.runtime.packed_cache import ATTENTION

TWO_BITS = KVFormat(2, grid="gaussian", scale_dtype="e5m3")
SETTINGS = LearnSettings(
    format=TWO_BITS, windows=6, tokens=64, held_out=2, steps=6, batch=2, check_every=3, loss="forward-kl",
    residual_window=0, start="identity",
)  # fmt: skip


@pytest.fixture(scope="module")
def loaded(tinystories: Path) -> LoadedModel:
    out = load(str(tinystories), dtype="float32")
    out.model.set_attn_implementation(ATTENTION)
    return out


def ids_of(vocabulary: int, tokens: int = 64, windows: int = 6) -> torch.Tensor:
    return torch.randint(3, vocabulary, (windows, tokens), generator=torch.Generator().manual_seed(0))


def zeros(loaded: Any) -> list[Any]:
    return [{w: torch.zeros(x.num_kv_heads, x.head_dim) for w in "kv"} for x in loaded.geometry]


def learner(loaded: LoadedModel, settings: LearnSettings = SETTINGS) -> Learner:
    plan = settings.plan(exact_layers(loaded), loaded.dtype)
    student = Student(loaded, plan, zeros(loaded), settings)
    start = identity(loaded.model.config, settings.maps)
    return Learner(student, start, ids_of(loaded.model.config.vocab_size), settings, seed=3)


@pytest.mark.parametrize("architecture", ["llama-biases", "llama-odd-tied", "llama-mqa-yarn", "mistral", "qwen3"])
def test_without_quantisation_the_student_is_its_teacher_whatever_the_transforms(architecture: str) -> None:
    model = build(architecture, torch.float32)
    model.set_attn_implementation(ATTENTION)
    loaded: Any = type(
        "Loaded", (), {"model": model, "rope": Rope.from_model(model), "geometry": geometry(model.config)}
    )
    exact = CachePlan(tuple(exact_layers(loaded)))
    student = Student(loaded, exact, zeros(loaded), SETTINGS)
    parameters = {
        name: x.float() if name.startswith("r_") else x.abs().float()
        for name, x in random_parameters(model, ALL).items()
    }
    ids = ids_of(96, 24, 2)
    with torch.no_grad():
        plain = student.hidden({}, ids)
        found = student.hidden(parameters, ids)
        model.set_attn_implementation("sdpa")
        expected = model.model(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-4)
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max()


def test_learning_lowers_the_loss_and_keeps_rotations_orthogonal(loaded: LoadedModel) -> None:
    settings = replace(SETTINGS, steps=24, rotation_rate=0.1, scale_rate=0.05, check_every=6, patience=9)
    found = learner(loaded, settings).run(None)
    losses = [x for _, x in found.held_out]
    assert min(losses[1:]) < 0.97 * losses[0]
    assert [at for at, _ in found.held_out] == [0, 6, 12, 18, 24]
    assert len(found.curve) == 24
    r = found.parameters["r_ov"]
    assert (r.mT @ r - torch.eye(r.shape[-1])).abs().max() < 1e-4
    assert (found.parameters["s_qk"] > 0).all()


def test_learning_that_was_stopped_goes_on_as_if_it_had_not_been(loaded: LoadedModel, tmp_path: Path) -> None:
    whole = learner(loaded).run(tmp_path / "whole")
    taken = 0

    def stop() -> None:
        nonlocal taken
        taken += 1
        if taken == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learner(loaded).run(tmp_path / "stopped", stop)
    steps = iter(range(99))
    resumed = learner(loaded).run(tmp_path / "stopped", lambda: next(steps) and None)
    assert next(steps) == 6  # those of the first run are counted as done
    assert resumed.curve == whole.curve
    assert resumed.held_out == whole.held_out
    for name, x in whole.parameters.items():
        assert torch.equal(x, resumed.parameters[name]), name


def test_a_torn_file_means_beginning_anew(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "torn").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    settings = replace(SETTINGS, steps=1)
    assert len(learner(loaded, settings).run(tmp_path / "torn").curve) == 1


def test_it_stops_once_held_out_windows_gain_nothing_and_keeps_the_best(loaded: LoadedModel, monkeypatch: Any) -> None:
    own = learner(loaded, replace(SETTINGS, steps=50, check_every=1, patience=2))
    start = {name: x.detach().clone() for name, x in own.best.items()}
    worse = iter(range(1, 99))
    monkeypatch.setattr(Learner, "_losses", lambda self, p, ids: sum(x.sum() for x in p.values()) * 0 + next(worse))
    found = own.run(None)
    assert len(found.curve) == 2
    for name, x in learning.values(start).items():
        assert torch.equal(x, found.parameters[name])


def test_a_loss_that_is_no_number_is_an_error(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    own = learner(loaded)
    own._judge()
    nan = torch.tensor(float("nan"))
    monkeypatch.setattr(Learner, "_losses", lambda self, p, ids: sum(x.sum() for x in p.values()) * nan)
    with pytest.raises(KvcliError, match="no longer finite after 0 steps"):
        own.run(None)


def test_every_window_is_read_once_before_any_is_read_again(loaded: LoadedModel) -> None:
    own = learner(loaded)
    picks = torch.cat([own._chosen(at) for at in range(6)])
    assert sorted(picks[:4].tolist()) == sorted(picks[4:8].tolist()) == [0, 1, 2, 3]


def test_weights_and_activations_are_quantised_too(loaded: LoadedModel) -> None:
    names = ("r_res", "r_ov", "s_attn", "s_ffn", "s_ud")
    base = replace(SETTINGS, maps=names, steps=1, format=KVFormat.exact(), center=False)
    losses = {}
    for weights, activations in ((None, None), (Weights(4, 32), None), (Weights(4, 32), 4)):
        own = learner(loaded, replace(base, weights=weights, activations=activations))
        found = own.run(None)
        losses[weights is not None, activations] = found.held_out[0][1]
        moved = [name for name, x in own.parameters.items() if not torch.equal(x, learning.leaves({
            name: identity(loaded.model.config, [name])[name]})[name])]  # fmt: skip
        assert bool(moved) == (weights is not None or activations is not None) or weights is None
    assert losses[False, None] < 1e-6 < losses[True, None] < losses[True, 4]


def test_geoopt_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "geoopt", None)
    with pytest.raises(UsageError, match=r"pip install 'kvcli\[learn\]'"):
        learning.check_installed()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"maps": ["r_ov", "r_all"]}, "no transform 'r_all' to learn"),
        ({"stepz": 3}, "learn has no 'stepz'"),
        ({"steps": -1}, "steps must be a whole number of at least 0"),
        ({"scale_rate": 2}, "scale_rate must lie between 0 and 1"),
        ({"tokens": 100}, "not whole pages of 16"),
        ({"windows": 2, "held_out": 2}, "leave none to learn from"),
        ({"start": "random"}, "start 'random' is not one of"),
        ({"format": {"bitz": 3}}, "the section learn is not valid"),
        ({"weights": {"bits": 5}}, "weights of 5 bits are not stored"),
        ({"means": "yes"}, "means must be true or false"),
        ({"transform": "none"}, "counts on the rotation"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        LearnSettings.from_json(change)


def test_settings_follow_what_the_search_does() -> None:
    assert LearnSettings.for_space(load_recipe("balanced")) == LearnSettings()
    for space in (load_recipe("kvtuner-token"), None):
        settings = LearnSettings.for_space(space)
        assert (settings.transform, settings.center, settings.means, settings.start) == ("none", False, False, "womi")


def test_settings_survive_json() -> None:
    settings = LearnSettings(weights=Weights(3, 64), activations=4, maps=("s_ud",))
    assert LearnSettings.from_json(settings.to_json()) == settings
    faithful = LearnSettings.of_recipe("faithful")
    assert faithful is not None
    assert LearnSettings.from_json(faithful.to_json()) == faithful
    assert LearnSettings.of_recipe("fast") is None
