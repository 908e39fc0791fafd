"""Commands that are interrupted, or run out of room, keep what they finished and leave nothing half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from cli_checks import KVCLI, Run, accepted, names, refused

# --- interruptions ----------------------------------------------------------------------------------------------------

EVERYTHING = ["moments", "sensitivity", "settings", "verify", "refine"]
WRITER = ("kvcli.artifact.writer", "ArtifactWriter")
MOMENTS = {
    "while stages run": (("kvcli.calibration.sensitivity", "", "setting_plans"), EVERYTHING[:2]),
    "while the artifact is written": ((*WRITER, "write_json"), EVERYTHING),
    "before it is moved into place": ((*WRITER, "_move"), EVERYTHING),
}


@pytest.fixture(scope="module")
def whole(warm: Run, tinystories: Path, small: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What an uninterrupted calibration prints."""
    out = tmp_path_factory.mktemp("whole") / "A"
    return json.loads(accepted(warm("calibrate", tinystories, "--bits", 4, *small, "--json", "-o", out)))


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupted_calibration_keeps_its_stages_and_goes_on_from_them(
    whole, moment, tinystories, warm, tmp_path, small
):
    where, finished = MOMENTS[moment]
    folder = tmp_path / "results"
    words = ("calibrate", tinystories, "--bits", 4, *small, "--json", "-o", folder / "A")
    done = warm(*words, interrupt=where)
    assert (done.returncode, done.stderr) == (130, "kvcli: Interrupted; finished stages are kept.\n")
    assert json.loads(done.stdout)["error"]["code"] == 130
    assert names(folder) == [".A.stages"]
    assert sorted({x.name.rsplit("-", 1)[0] for x in (folder / ".A.stages").iterdir()}) == sorted(finished)
    again = warm(*words)
    assert (again.returncode, again.stderr) == (0, f"Resumed: {', '.join(finished)} taken from an earlier run.\n")
    assert names(folder) == ["A"]
    assert {**json.loads(again.stdout), "path": ""} == {**whole, "path": ""}


def test_fresh_forgets_an_interrupted_run(tinystories, warm, tmp_path, small):
    words = ("calibrate", tinystories, "--bits", 4, *small, "-o", tmp_path / "results/A")
    assert warm(*words, interrupt=MOMENTS["while stages run"][0]).returncode == 130
    accepted(warm(*words, "--fresh"))  # nothing on stderr: nothing was resumed
    assert names(tmp_path / "results") == ["A"]


def test_an_interrupted_replacement_leaves_the_older_artifact(tinystories, warm, artifact, small):
    before = {x.name: x.read_bytes() for x in artifact.iterdir()}
    words = ("calibrate", tinystories, "--bits", 3.5, *small, "-o", artifact, "--force")
    assert warm(*words, interrupt=(*WRITER, "_move")).returncode == 130
    assert {x.name: x.read_bytes() for x in artifact.iterdir()} == before
    assert names(artifact.parent) == [".artifact.stages", "artifact"]
    accepted(warm("inspect", artifact))


def test_ctrl_c_from_outside_stops_a_calibration(tinystories, clean_env, tmp_path):
    # sixty settings, so that there is time to be interrupted in
    recipe = tmp_path / "long.yaml"
    recipe.write_text(
        "search:\n  center: true\n  k: [{bits: [2, 4], group: 16}]\n  v: [{bits: [2, 4], group: 16}]\n"
        f"  residual_windows: {list(range(60))}\n"
    )
    folder = tmp_path / "results"
    words = [*KVCLI.split(), "calibrate", tinystories, "--bits", "9", "--recipe", recipe, "-o", folder / "A"]
    started = subprocess.Popen(list(map(str, words)), stdout=-1, stderr=-1, text=True, env=clean_env)
    kept = folder / ".A.stages"
    deadline = time.monotonic() + 300
    while not (kept.exists() and any(x.name.startswith("sensitivity-") for x in kept.iterdir())):
        assert started.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started.send_signal(signal.SIGINT)
    said = started.communicate(timeout=60)
    assert (started.returncode, *said) == (130, "", "kvcli: Interrupted; finished stages are kept.\n")
    assert names(folder) == [".A.stages"]
    assert not [x for x in kept.iterdir() if x.suffix == ".part"]


# --- full disks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount a file system of so many KiB."""
    mounted = []

    def mount(size: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
            pytest.skip("needs the right to mount a tmpfs")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_too_small_for_the_weights(warm, tinystories, small_disk, small):
    folder = small_disk(1024)  # the weights alone have 1284
    done = warm("calibrate", tinystories, "--bits", 4, *small, "-o", folder / "A")
    refused(done, 1, str(folder / "A"))
    assert re.search(r"disk (is full|has)", done.stderr)
    assert names(folder) == [".A.stages"]


def test_a_disk_too_small_for_the_stages(warm, tinystories, small_disk, small):
    folder = small_disk(4)
    refused(warm("calibrate", tinystories, "--bits", 4, *small, "-o", folder / "A"), 1, "space")
    assert names(folder) in ([], [".A.stages"])


def test_a_disk_too_small_for_what_follows_the_weights(warm, pristine, small_disk):
    # another file system, so that weights are copied: room for them, and for little else
    folder = small_disk(1340)
    refused(warm("solve", pristine, "--bits", 4, "-o", folder / "A"), 1, str(folder / "A"))
    assert names(folder) == []


def test_a_disk_too_small_for_a_dump(warm, pristine, text, small_disk):
    folder = small_disk(64)
    refused(warm("eval", pristine, *text, "--dump", folder / "dump.safetensors"), 1, "space")
    assert names(folder) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(warm, pristine, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(warm("solve", pristine, "--bits", 4, "-o", tmp_path / "locked/A"), 1, "locked")


def test_an_output_that_cannot_be_a_folder_is_refused_before_any_work(warm, tinystories, tmp_path, small):
    (tmp_path / "file").write_text("kept")
    done = warm("calibrate", tinystories, "--bits", 4, *small, "-o", tmp_path / "file/A")
    refused(done, 1, str(tmp_path / "file"))
    assert names(tmp_path) == ["file"]
