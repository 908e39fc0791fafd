"""Stages are run once: resumed when nothing has changed, run again when anything has, and never taken half-written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcli.calibration import stages as module
from kvcli.calibration.stages import Stages
from kvcli.errors import UsageError

PLAIN = {"kl": [0.1, 1 / 3, 1e-300], "names": {"a": None}}
TENSORS = {"mean": torch.tensor([1.0, float("inf"), 0.1]), "count": torch.tensor([[3]])}


class Counter:
    """A stage's work that counts how often it is done."""

    def __init__(self, result: Any) -> None:
        self.result, self.calls = result, 0

    def __call__(self, step: Callable[[], None]) -> Any:
        self.calls += 1
        step()
        return self.result


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "artifact"


def run(stages: Stages, work: Any, name: str = "measure", **changed: Any) -> Any:
    return stages.run(name, work, **{"description": "measuring", "settings": {"tokens": 8}, **changed})


def same(a: Any, b: Any) -> bool:
    if a.keys() != b.keys():
        return False
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


@pytest.mark.parametrize("result", [PLAIN, TENSORS, {}], ids=["plain", "tensors", "empty"])
def test_a_finished_stage_is_resumed_bit_for_bit(out, result):
    work = Counter(result)
    first = Stages.beside(out)
    assert same(run(first, work), result)
    assert first.resumed == []
    second = Stages.beside(out)
    assert same(run(second, work), result)
    assert work.calls == 1
    assert second.resumed == ["measure"]
    assert second.record == first.record


def test_results_are_kept_beside_the_output_and_hidden(out):
    run(Stages.beside(out), Counter(PLAIN))
    assert [x.name for x in out.parent.iterdir()] == [".artifact.stages"]


def test_a_relative_output_keeps_its_stages_where_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(Stages.beside(Path("artifact")), Counter(PLAIN))
    monkeypatch.chdir("/")
    again = Stages.beside(tmp_path / "artifact")
    run(again, Counter(PLAIN))
    assert again.resumed == ["measure"]


@pytest.mark.parametrize("changed", [{"settings": {"tokens": 9}}, {"settings": {"tokens": 8, "seed": 0}}])
def test_a_changed_setting_misses(out, changed):
    work = Counter(PLAIN)
    run(Stages.beside(out), work)
    run(Stages.beside(out), work, **changed)
    assert work.calls == 2


def test_another_stage_with_the_same_settings_misses(out):
    work = Counter(PLAIN)
    run(Stages.beside(out), work)
    run(Stages.beside(out), work, name="other")
    assert work.calls == 2


def test_the_order_of_settings_does_not_matter(out):
    work = Counter(PLAIN)
    run(Stages.beside(out), work, settings={"a": 1, "b": 2})
    run(Stages.beside(out), work, settings={"b": 2, "a": 1})
    assert work.calls == 1


def test_a_change_runs_everything_that_follows_from_it_and_nothing_else(out):
    done: list[list[str]] = []
    for tokens in (8, 9):
        stages = Stages.beside(out)
        run(stages, Counter(PLAIN), "first", settings={"tokens": tokens})
        run(stages, Counter(PLAIN), "aside", settings={})
        run(stages, Counter(PLAIN), "second", settings={}, inputs=["first"])
        run(stages, Counter(PLAIN), "third", settings={}, inputs=["second", "aside"])
        done.append(stages.resumed)
    assert done == [[], ["aside"]]


def test_fresh_forgets(out):
    work = Counter(PLAIN)
    run(Stages.beside(out), work)
    fresh = Stages.beside(out, fresh=True)
    run(fresh, work)
    assert (work.calls, fresh.resumed) == (2, [])


def test_fresh_of_one_output_leaves_another_ones_stages(out):
    run(Stages.beside(out.with_name("other")), Counter(PLAIN))
    Stages.beside(out, fresh=True)
    other = Stages.beside(out.with_name("other"))
    run(other, Counter(PLAIN))
    assert other.resumed == ["measure"]


def test_interrupted_work_leaves_nothing(out):
    def interrupted(step: Callable[[], None]) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Stages.beside(out), interrupted)
    work = Counter(PLAIN)
    run(Stages.beside(out), work)
    assert work.calls == 1


@pytest.mark.parametrize("result", [PLAIN, TENSORS], ids=["plain", "tensors"])
@pytest.mark.parametrize("moment", ["while it is written", "before it is named"])
def test_a_half_written_result_is_never_taken(out, monkeypatch, result, moment):
    def half(data: bytes, path: Path) -> None:
        path.write_bytes(data[: len(data) // 2])
        raise KeyboardInterrupt

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if moment == "before it is named":
            patched.setattr(Path, "replace", interrupted)
            patched.setattr(os, "replace", interrupted)
        else:
            patched.setattr(module, "save_file", lambda _, path: half(b"x" * 64, path))
            patched.setattr(Path, "write_text", lambda path, text, *args: half(text.encode(), path))
        with pytest.raises(KeyboardInterrupt):
            run(Stages.beside(out), Counter(result))
    work = Counter(result)
    again = Stages.beside(out)
    assert same(run(again, work), result)
    assert (work.calls, again.resumed) == (1, [])


@pytest.mark.parametrize("result", [PLAIN, TENSORS], ids=["plain", "tensors"])
@pytest.mark.parametrize("left", [0, 10])
def test_a_result_that_the_disk_lost_is_computed_again(out, result, left):
    # a crash of the machine can leave a renamed file short
    run(Stages.beside(out), Counter(result))
    (kept,) = (out.parent / ".artifact.stages").iterdir()
    kept.write_bytes(kept.read_bytes()[:left])
    work = Counter(result)
    again = Stages.beside(out)
    assert same(run(again, work), result)
    assert (work.calls, again.resumed) == (1, [])


def test_discard_leaves_nothing_behind(out):
    stages = Stages.beside(out)
    run(stages, Counter(PLAIN))
    stages.discard()
    assert list(out.parent.iterdir()) == []
    stages.discard()  # nothing there is no error


def test_the_record_is_what_the_artifact_keeps(out):
    stages = Stages.beside(out)
    run(stages, Counter(TENSORS))
    run(stages, Counter(PLAIN), "search", inputs=["measure"])
    assert [x["name"] for x in stages.record] == ["measure", "search"]
    assert all(set(x) == {"name", "settings", "sha256"} and len(x["sha256"]) == 64 for x in stages.record)
    assert json.loads(json.dumps(stages.record)) == stages.record


def test_progress_is_shown_for_work_and_not_for_what_is_resumed(out):
    shown: list[Any] = []

    class Bar:
        def advance(self, steps: float = 1) -> None:
            shown.append(steps)

    @contextmanager
    def show(description: str, total: float | None) -> Iterator[Bar]:
        shown.append((description, total))
        yield Bar()
        shown.append("done")

    for _ in range(2):
        run(Stages.beside(out, show=show), Counter(PLAIN), steps=1)
    assert shown == [("measuring", 1), 1, "done"]


# --- independent tasks ------------------------------------------------------------------------------------------------


def run_tasks(stages: Stages, work: Any, tasks: Any = (0, 1, 2, 3), name: str = "layers", **changed: Any) -> Any:
    words = {"description": "measuring", "settings": {"tokens": 8}, **changed}
    return stages.map(name, work, list(tasks), **words)


def test_tasks_come_back_in_order_wherever_they_ran(out):
    def backwards(work: Any, tasks: Any) -> Iterator[tuple[int, Any]]:
        return ((i, work(tasks[i])) for i in reversed(range(len(tasks))))

    found = run_tasks(Stages.beside(out), lambda x: {"square": x * x / 3}, run=backwards)
    assert found == [{"square": x * x / 3} for x in range(4)]
    again = Stages.beside(out)
    assert run_tasks(again, None) == found
    assert again.resumed == ["layers"]


@pytest.mark.parametrize("killed", range(5))
def test_no_finished_task_is_repeated(out, killed):
    done: list[int] = []

    def work(task: int) -> int:
        if len(done) == killed and not again:
            raise KeyboardInterrupt
        done.append(task)
        return 10 * task

    again = killed == 4
    if not again:
        with pytest.raises(KeyboardInterrupt):
            run_tasks(Stages.beside(out), work)
    again = True
    stages = Stages.beside(out)
    assert run_tasks(stages, work) == [0, 10, 20, 30]
    assert done == [0, 1, 2, 3]
    assert stages.resumed == ([f"layers ({killed} of 4)"] if 0 < killed < 4 else [])


@pytest.mark.parametrize("cut", [1, 3, 9])
def test_a_torn_line_costs_one_task(out, cut):
    run_tasks(Stages.beside(out), lambda x: [x, "é"])
    (journal,) = (out.parent / ".artifact.stages").iterdir()
    journal.write_bytes(journal.read_bytes()[:-cut])
    done: list[int] = []
    stages = Stages.beside(out)
    assert run_tasks(stages, lambda x: done.append(x) or [x, "é"]) == [[x, "é"] for x in range(4)]
    assert done == ([] if cut == 1 else [3])  # the last byte is the newline
    assert run_tasks(Stages.beside(out), None) == [[x, "é"] for x in range(4)]


def test_other_tasks_are_another_stage(out):
    first = Stages.beside(out)
    run_tasks(first, lambda x: x)
    second = Stages.beside(out)
    run_tasks(second, lambda x: -x, tasks=(0, 1, 2, 4))
    assert second.resumed == []
    assert first.record[0]["sha256"] != second.record[0]["sha256"]


# --- several at once --------------------------------------------------------------------------------------------------


def test_who_finishes_first_leaves_the_folder_to_the_other(out):
    one, other = Stages.beside(out), Stages.beside(out)
    run(one, Counter(PLAIN))
    run(one, Counter(PLAIN), "mine")
    run(other, Counter(PLAIN), "other")
    one.discard()
    again = Stages.beside(out)
    run(again, Counter(PLAIN), "other")
    run(again, Counter(PLAIN), "mine")
    assert again.resumed == ["other"]
    other.discard()
    again.discard()
    assert list(out.parent.iterdir()) == []


def test_stages_in_use_are_not_forgotten(out):
    one = Stages.beside(out)
    run(one, Counter(PLAIN))
    with pytest.raises(UsageError, match="another calibration of"):
        Stages.beside(out, fresh=True)
    one.release()
    assert Stages.beside(out, fresh=True).resumed == []
    assert not (out.parent / ".artifact.stages").exists()


def test_a_folder_that_was_forgotten_meanwhile_is_made_again(out):
    one, other = Stages.beside(out), Stages.beside(out)
    run(one, Counter(PLAIN))
    one.discard()
    run(other, Counter(PLAIN), "other")
    run_tasks(one, lambda x: x)
    assert {x.name.split("-")[0] for x in (out.parent / ".artifact.stages").iterdir()} == {"other", "layers"}
