"""Evaluations on Ray's workers give what one process gives, and losing a worker costs time only."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from kvcli.calibration import workers
from kvcli.calibration.sensitivity import Probe, measure_plan
from kvcli.calibration.stages import in_turn
from kvcli.calibration.workers import ModelSource, RayPool
from kvcli.errors import InputError, KvcliError, UsageError
from kvcli.models.loading import LoadedModel, load
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.runtime.packed_cache import ATTENTION

if find_spec("ray") is None:
    pytest.skip("needs Ray", allow_module_level=True)

Pool = Callable[..., RayPool]


@pytest.fixture(scope="module")
def loaded(tinystories: Path) -> LoadedModel:
    found = load(str(tinystories))
    found.model.set_attn_implementation(ATTENTION)
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray = workers._import_ray()
    before = psutil.Process().children(recursive=True)
    ray.init(
        address="local", num_cpus=4, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False,
        logging_level="ERROR",
    )  # fmt: skip
    yield
    ray.shutdown()
    deadline = time.monotonic() + 60
    while left := [x for x in psutil.Process().children(recursive=True) if x not in before and x.status() != "zombie"]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.fixture(scope="module")
def pool(loaded: LoadedModel, tinystories: Path, cluster: None) -> Iterator[RayPool]:
    """Two workers of one thread each."""
    with RayPool("auto", loaded.model, ModelSource(str(tinystories)), loaded.sha256, threads=1, workers=2) as found:
        yield found


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def results(pairs: Any) -> list[Any]:
    """What was yielded, in the order of the tasks, each of which came once."""
    found = list(pairs)
    by_task = dict(found)
    assert len(by_task) == len(found)
    assert sorted(by_task) == list(range(len(found)))
    return [by_task[i] for i in sorted(by_task)]


# --- what a task sees -------------------------------------------------------------------------------------------------


def look(model: Any, more: dict[str, Any], task: int) -> list[Any]:
    weight = model.model.embed_tokens.weight[task].double().sum()
    return [task, float(weight), os.getpid(), torch.get_num_threads(), torch.is_grad_enabled(), more["ids"].tolist()]


def linger(task: int) -> int:
    time.sleep(0.5 if task == 0 else 0)
    return task


def pid_of(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def count(seen: list[int], task: int) -> int:
    seen.append(task)
    return len(seen)


# First, while no other cluster runs here that `auto` would join.
@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_calibration_that_is_stopped_takes_its_cluster_along(clean_env, tinystories, tmp_path, how):
    before, folders = set(psutil.pids()), set(Path(tempfile.gettempdir()).glob("kvray-*"))
    run = [sys.executable, "-m", "kvcli", "calibrate", tinystories, *CALIBRATE, "-o", tmp_path / "out"]
    process = subprocess.Popen(
        [*map(str, run), "--ray", "auto", "--workers", "2", "--tokens", "100000"],  # more than it gets to read
        env=clean_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait(lambda: process.poll() is not None or any(x.startswith("ray::Worker") for x in titles(process.pid)))
        process.send_signal(how)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, out) == (130, "")
    assert err == "kvcli: Interrupted; finished stages are kept.\n"
    assert {x.name for x in tmp_path.iterdir()} <= {".out.stages"}
    assert set(Path(tempfile.gettempdir()).glob("kvray-*")) == folders
    gone(before)


@pytest.mark.slow
def test_a_task_sees_the_workers_own_model_and_what_the_function_holds(pool, loaded):
    more = {"ids": torch.arange(3)}
    found = results(pool.run(partial(look, loaded.model, more), list(range(8))))
    here = [look(loaded.model, more, i) for i in range(8)]
    assert [x[:2] for x in found] == [x[:2] for x in here]
    assert os.getpid() not in {x[2] for x in found}
    assert {(x[3], x[4]) for x in found} == {(1, False)}
    assert found[0][5] == [0, 1, 2]


@pytest.mark.slow
def test_results_come_as_they_are_finished_and_keep_their_numbers(pool):
    wait(lambda: len({pid for _, pid in pool.run(pid_of, [0.2] * 4)}) == 2)  # both workers have loaded the model
    found = list(pool.run(linger, [0, 1, 1, 1]))
    assert found[-1] == (0, 0)
    assert sorted(found) == [(0, 0), (1, 1), (2, 1), (3, 1)]


@pytest.mark.slow
def test_what_the_function_holds_is_kept_by_a_worker_and_is_another_ones_in_the_next_run(pool):
    seen: list[int] = []
    for _ in range(2):
        found = results(pool.run(partial(count, seen), list(range(6))))
        # each of at most two workers counted its own tasks
        assert sorted(found) in ([1, 1, 2, 2, 3, 3], [1, 1, 2, 2, 3, 4], [1, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6])
    assert seen == []


@pytest.mark.slow
def test_the_model_does_not_travel(loaded):
    size = sum(x.nbytes for x in loaded.model.parameters())
    probe = Probe(loaded.model, torch.arange(64)[None], loaded.rope, {})
    data = workers._dump(partial(measure_plan, probe), loaded.model)
    assert len(data) < size / 4
    again = workers._Unpickler(io.BytesIO(data), loaded.model).load()
    assert again.args[0].model is loaded.model


@pytest.mark.slow
def test_plans_measured_on_workers_cost_what_they_cost_here_bit_for_bit(pool, loaded):
    fmt = [KVFormat(bits, group=16) for bits in (2, 3, 4, 8)]
    tasks = [CachePlan((LayerPlan(4, 16, a, b),) * 2, dtype=loaded.dtype).to_json() for a in fmt for b in fmt[:2]]
    work = partial(measure_plan, Probe(loaded.model, torch.arange(200)[None] * 3 % 2000, loaded.rope, {}))
    found = results(pool.run(work, tasks))
    assert found == results(in_turn(work, tasks))
    assert all(x["kl"] > 0 for x in found)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def die_once(mark: Path, task: int) -> int:
    """Kill the worker that is first given task 3."""
    if task == 3 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return task * task


def die(task: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return task


def refuse(error: type[Exception], task: int) -> int:
    if task == 2:
        raise error("the words of the task.")
    return task


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(pool, tmp_path, capfd):
    assert results(pool.run(partial(die_once, tmp_path / "died"), list(range(12)))) == [x * x for x in range(12)]
    assert (tmp_path / "died").exists()
    assert results(pool.run(linger, [1] * 6)) == [1] * 6
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_task_that_kills_every_worker_is_given_up_in_one_sentence(pool):
    with pytest.raises(KvcliError, match=r"^task 1 lost its Ray worker 3 times: [^\n]*\.$"):
        list(pool.run(die, [0]))
    assert results(pool.run(linger, [1, 1])) == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("error", [InputError, ZeroDivisionError])
def test_what_a_task_raises_is_raised_here(pool, error):
    with pytest.raises(error, match=r"^the words of the task\.$"):
        list(pool.run(partial(refuse, error), list(range(4))))
    assert results(pool.run(linger, [1, 1])) == [1, 1]


@pytest.mark.slow
def test_a_run_that_is_left_leaves_nothing_running(pool):
    for at, _ in pool.run(linger, [1, 0, 0, 0, 0]):
        assert at == 0
        break
    assert results(pool.run(linger, [1, 1, 1])) == [1, 1, 1]


@pytest.mark.slow
def test_a_worker_that_finds_other_weights_is_refused(loaded, tinystories, cluster):
    source = ModelSource(str(tinystories))
    with (
        RayPool("auto", loaded.model, source, "0" * 64, threads=1, workers=1) as other,
        pytest.raises(InputError, match="holds other weights on"),
    ):
        list(other.run(linger, [1]))


@pytest.mark.slow
def test_workers_larger_than_any_machine_are_refused(loaded, tinystories, cluster):
    with pytest.raises(UsageError, match=r"no machine of the Ray cluster has 5 CPUs .* the largest has 4; lower"):
        RayPool("auto", loaded.model, ModelSource(str(tinystories)), loaded.sha256, threads=5)


@pytest.mark.slow
def test_as_many_workers_as_there_are_cpus(loaded, tinystories, cluster):
    with RayPool("auto", loaded.model, ModelSource(str(tinystories)), loaded.sha256, threads=1) as found:
        assert found.workers == 4


# --- reaching a cluster -----------------------------------------------------------------------------------------------


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_an_address_that_nothing_answers_is_one_sentence(closed_port):
    with pytest.raises(KvcliError, match=rf"^the Ray cluster at 127.0.0.1:{closed_port} cannot be reached: [^\n]*\.$"):
        workers.check_ray(f"127.0.0.1:{closed_port}")


@pytest.mark.parametrize("address", ["nonsense", "", ":6379", "host:", "host:port", "host:99999", "[::1", "ray://x"])
def test_what_is_no_address_is_wrong_usage(address):
    with pytest.raises(UsageError, match="give auto or HOST:PORT"):
        workers.check_ray(address)


def test_without_ray_the_user_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"^Ray is not installed: pip install 'kvcli\[ray\]'\.$"):
        workers.check_ray("auto")


def test_the_command_line_says_so_at_once(run_kvcli, tinystories, closed_port, tmp_path):
    start = ("calibrate", tinystories, "--bits", 4, "-o", tmp_path / "out")
    done = run_kvcli(*start, "--ray", f"127.0.0.1:{closed_port}")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "cannot be reached" in done.stderr
    done = run_kvcli(*start, "--workers", 2)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert list(tmp_path.iterdir()) == []


# --- the whole --------------------------------------------------------------------------------------------------------

CALIBRATE = ("--bits", 4, "--context", 512, "--tokens", 2048, "--threads", 1, "--transforms", "none")


@pytest.mark.slow
def test_two_ray_workers_give_the_same_artifact_as_one_process(run_kvcli, tinystories, tmp_path):
    before = set(psutil.pids())
    done = [
        run_kvcli("calibrate", tinystories, *CALIBRATE, "--json", "-o", tmp_path / name, *more)
        for name, more in (("one", ()), ("two", ("--ray", "auto", "--workers", 2)))
    ]
    assert [(x.returncode, x.stderr) for x in done] == [(0, "")] * 2
    one, two = (json.loads(x.stdout) for x in done)
    assert {**one, "path": ""} == {**two, "path": ""}
    for name in ("report.json", "kv.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert sorted(x.name for x in tmp_path.iterdir()) == ["one", "two"]
    gone(before)


def titles(pid: int) -> list[str]:
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            found.append(" ".join(child.cmdline()))
        except psutil.Error:
            continue
    return found


def wait(until: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 120
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def gone(before: set[int]) -> None:
    """Wait until no process of Ray is left that was not there before."""

    def ours() -> list[str]:
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            words = " ".join(process.info["cmdline"] or ())
            if (
                process.pid not in before
                and process.info["status"] != "zombie"
                and "kvcli-" in words
                and "ray" in words
            ):
                found.append(words)
        return found

    wait(lambda: not ours())
