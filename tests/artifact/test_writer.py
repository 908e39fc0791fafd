"""A write is whole or leaves nothing, whatever stops it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from kvcli.artifact import writer as module
from kvcli.artifact.reader import open_artifact, sha256_of
from kvcli.artifact.writer import ArtifactWriter, check_target
from kvcli.errors import InputError, KvcliError, UsageError

Fill = Callable[[ArtifactWriter], None]
Manifest = dict[str, Any]


def write(
    path: Path, manifest: Manifest, *steps: Fill, overwrite: bool = False, context: int = 2048, progress: Any = None
) -> Path:
    with ArtifactWriter(path, overwrite=overwrite) as writer:
        for step in steps:
            step(writer)
        return writer.commit({**manifest, "context": context}, progress=progress)


def snapshot(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): sha256_of(file) for file in folder.rglob("*") if file.is_file()}


# --- what is written --------------------------------------------------------------------------------------------


def test_every_file_is_listed_and_readable(pristine: Path) -> None:
    listed = json.loads((pristine / "kvcli.json").read_text())["files"]
    assert {name: entry["sha256"] for name, entry in listed.items()} | {
        "kvcli.json": sha256_of(pristine / "kvcli.json")
    } == snapshot(pristine)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in pristine.iterdir()}
    assert modes == {pristine.stat().st_mode & 0o666}  # the umask's, for every file
    assert [entry.name for entry in pristine.parent.iterdir()] == ["artifact"]


def test_tied_weights_are_stored_once(pristine: Path) -> None:
    names = load_file(pristine / "model.safetensors").keys()
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_the_index_names_all_weights_and_nothing_of_the_cache(pristine: Path) -> None:
    index = json.loads((pristine / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict.fromkeys(load_file(pristine / "model.safetensors"), "model.safetensors")


def test_slices_are_stored_whole_and_alone(tmp_path: Path) -> None:
    large = torch.arange(64.0).view(8, 8)
    weights = {"rows": large[2:4], "columns": large[:, :3], "empty": torch.zeros(0), "void": torch.zeros(0)}
    with ArtifactWriter(tmp_path / "out") as writer:
        writer.write_weights(iter(weights.items()))
        read = load_file(writer.path / "model.safetensors")
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name]) for name in weights)


def test_large_weights_are_sharded(
    tmp_path: Path, fill: Fill, manifest: Manifest, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_SHARD_BYTES", 20_000)
    path = write(tmp_path / "out", manifest, fill)
    shards = sorted(file.name for file in path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert re.fullmatch(r"model-00001-of-0000\d\.safetensors", shards[0])
    open_artifact(path)
    stock = AutoModelForCausalLM.from_pretrained(path).eval()
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(stock(tokens).logits, model(tokens).logits)


def test_parents_are_made(tmp_path: Path, fill: Fill, manifest: Manifest) -> None:
    assert write(tmp_path / "a" / "b" / "out", manifest, fill) == tmp_path / "a" / "b" / "out"
    open_artifact(tmp_path / "a" / "b" / "out")


def test_progress_ends_at_the_whole(tmp_path: Path, fill: Fill, manifest: Manifest) -> None:
    calls: list[tuple[int, int]] = []
    write(tmp_path / "out", manifest, fill, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1] > 0


# --- what would not be readable is not written ------------------------------------------------------------------


def test_tensors_that_are_not_the_plans(tmp_path: Path, fill: Fill, manifest: Manifest) -> None:
    with pytest.raises(InputError) as caught:
        write(tmp_path / "out", manifest, fill, lambda writer: writer.write_tensors({}))
    assert str(caught.value) == f"{tmp_path / 'out' / 'kv.safetensors'} lacks layer.0.k.mean, which the plan needs."
    assert not any(tmp_path.iterdir())


def test_means_that_are_not_finite(tmp_path: Path, fill: Fill, manifest: Manifest, kv: dict[str, torch.Tensor]) -> None:
    bad = kv | {"layer.0.v.mean": torch.full((2, 8), float("nan"))}
    with pytest.raises(InputError, match=r"layer\.0\.v\.mean holds a value that is not finite"):
        write(tmp_path / "out", manifest, fill, lambda writer: writer.write_tensors(bad))
    assert not any(tmp_path.iterdir())


def test_a_report_that_json_cannot_say(tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(KvcliError, match=r"report\.json cannot be written as JSON"):
        write(tmp_path / "out", manifest, lambda writer: writer.write_json("report.json", {"kl": float("nan")}))
    assert not any(tmp_path.iterdir())


# --- what is already there --------------------------------------------------------------------------------------


def test_an_artifact_is_replaced_only_on_request(artifact: Path, fill: Fill, manifest: Manifest) -> None:
    before = snapshot(artifact)
    with pytest.raises(UsageError, match="already holds an artifact"):
        write(artifact, manifest, fill)
    assert snapshot(artifact) == before
    write(artifact, manifest, fill, overwrite=True, context=4096)
    assert open_artifact(artifact).manifest["context"] == 4096
    assert os.listdir(artifact.parent) == ["artifact"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_is_no_artifact_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(UsageError, match="neither empty nor an artifact"):
        ArtifactWriter(tmp_path / "thesis", overwrite=overwrite).__enter__()
    with pytest.raises(UsageError, match="is a file"):
        check_target(tmp_path / "thesis" / "chapter.tex", overwrite=overwrite)
    assert os.listdir(tmp_path) == ["thesis"]
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


def test_an_empty_folder_is_filled(tmp_path: Path, fill: Fill, manifest: Manifest) -> None:
    (tmp_path / "out").mkdir()
    open_artifact(write(tmp_path / "out", manifest, fill))
    assert os.listdir(tmp_path) == ["out"]


def test_a_target_taken_in_the_meantime(tmp_path: Path, pristine: Path, fill: Fill, manifest: Manifest) -> None:
    with pytest.raises(UsageError, match="already holds an artifact"):
        write(tmp_path / "out", manifest, fill, lambda _: shutil.copytree(pristine, tmp_path / "out"))
    assert os.listdir(tmp_path) == ["out"]
    open_artifact(tmp_path / "out")


def test_a_linked_target_is_replaced_where_it_lies(artifact: Path, fill: Fill, manifest: Manifest) -> None:
    link = artifact.parent / "latest"
    link.symlink_to(artifact)
    write(link, manifest, fill, overwrite=True, context=4096)
    assert link.is_symlink()
    assert open_artifact(artifact).manifest["context"] == 4096


@pytest.mark.parametrize("target", ["file/out", "x" * 250, "x" * 300])
def test_a_target_that_cannot_be(tmp_path: Path, target: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(KvcliError, match="cannot be written: ") as caught:
        ArtifactWriter(tmp_path / target).__enter__()
    assert caught.value.exit_code == 1
    assert os.listdir(tmp_path) == ["file"]


# --- interruptions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, fill: Fill, manifest: Manifest, error: type[BaseException]
) -> None:
    def interrupt(writer: ArtifactWriter) -> None:
        assert any(writer.path.iterdir())
        raise error

    with pytest.raises(error):
        write(tmp_path / "a" / "out", manifest, fill, interrupt)
    assert not any(tmp_path.iterdir())


def test_leaving_without_a_commit_leaves_nothing(tmp_path: Path, fill: Fill) -> None:
    with ArtifactWriter(tmp_path / "out") as writer:
        fill(writer)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("call", range(2))
def test_an_interrupted_replacement_keeps_the_old(
    artifact: Path, fill: Fill, manifest: Manifest, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(artifact)
    rename, calls = os.rename, iter(range(10))

    def interrupted(*args: Any) -> None:
        if next(calls) == call:
            raise KeyboardInterrupt
        rename(*args)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(artifact, manifest, fill, overwrite=True)
    assert snapshot(artifact) == before
    assert os.listdir(artifact.parent) == ["artifact"]


def killed(script: str, *args: Path) -> None:
    """Run a script that kills itself as nothing can be caught."""
    prelude = """
        import json, os, signal, sys, torch
        from pathlib import Path
        from kvcli.artifact.reader import open_artifact
        from kvcli.artifact.writer import ArtifactWriter
        def die(*args): os.kill(os.getpid(), signal.SIGKILL)
    """
    code = textwrap.dedent(prelude) + textwrap.dedent(script)
    run = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=120)
    assert run.returncode == -signal.SIGKILL, run.stderr


def test_a_killed_write_leaves_no_target_and_is_cleaned_up(tmp_path: Path, fill: Fill, manifest: Manifest) -> None:
    target = tmp_path / "out"
    killed(
        """
        with ArtifactWriter(sys.argv[1]) as writer:
            writer.write_weights([("w", torch.zeros(100_000))])
            die()
        """,
        target,
    )
    assert not target.exists()
    (left,) = tmp_path.iterdir()
    assert re.fullmatch(r"\.out\.tmp-\d+-[0-9a-f]{8}", left.name)
    open_artifact(write(target, manifest, fill))
    assert os.listdir(tmp_path) == ["out"]


def test_a_replacement_killed_between_its_renames_is_undone(artifact: Path) -> None:
    before = snapshot(artifact)
    killed(
        """
        rename = os.rename
        def second(*args):
            os.rename = die
            rename(*args)
        old = open_artifact(sys.argv[1])
        with ArtifactWriter(old.path, overwrite=True) as writer:
            writer.link(old, "*")
            os.rename = second
            writer.commit({k: old.manifest[k] for k in old.manifest if k != "files"})
        """,
        artifact,
    )
    assert not artifact.exists()
    with pytest.raises(UsageError, match="already holds an artifact"):
        ArtifactWriter(artifact).__enter__()
    assert snapshot(artifact) == before
    assert os.listdir(artifact.parent) == ["artifact"]


def test_what_a_living_writer_writes_is_left_alone(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "out") as one, ArtifactWriter(tmp_path / "out") as two:
        assert one.path.exists()
        assert two.path.exists()
        # As another container sees it: a number that means no process here, and a lock that is held.
        foreign = one.path.rename(tmp_path / ".out.tmp-999999999-00000000")
        with ArtifactWriter(tmp_path / "out"):
            assert foreign.exists()
        foreign.rename(one.path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", [".out.tmp-notes", ".out.tmp-12-xyz", ".outer.tmp-999999999-00000000"])
def test_only_a_writers_own_folders_are_cleaned_up(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with ArtifactWriter(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == [name]


# --- room -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = [shutil.which("mount") or "false", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


FILLERS: dict[str, Fill] = {
    "weights": lambda writer: writer.write_weights([("w", torch.zeros(1_000_000))]),
    "tensors": lambda writer: writer.write_tensors({"w": torch.zeros(1_000_000)}),
    "json": lambda writer: writer.write_json("report.json", ["x" * 1000] * 2000),
}


def test_too_little_room_is_said_before_writing(small_disk: Path, manifest: Manifest) -> None:
    with pytest.raises(KvcliError, match=r"out needs 4\.0 MB more, and its disk has 1\.0 MB free") as caught:
        write(small_disk / "out", manifest, FILLERS["weights"])
    assert caught.value.exit_code == 1
    assert not any(small_disk.iterdir())


@pytest.mark.parametrize("what", FILLERS)
def test_a_full_disk_leaves_nothing(
    small_disk: Path, manifest: Manifest, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9))  # somebody else fills it meanwhile
    with pytest.raises(KvcliError) as caught:
        write(small_disk / "out", manifest, FILLERS[what])
    assert str(caught.value) == f"the disk is full while writing {small_disk / 'out'}; nothing was left behind."
    assert caught.value.exit_code == 1
    assert not any(small_disk.iterdir())


def test_a_mount_point_is_refused(small_disk: Path) -> None:
    with pytest.raises(UsageError, match="is a mount point"):
        check_target(small_disk)


# --- linking ----------------------------------------------------------------------------------------------------


def test_linked_weights_share_one_inode(
    artifact: Path, tmp_path: Path, manifest: Manifest, kv: dict[str, torch.Tensor]
) -> None:
    source = open_artifact(artifact)
    path = write(
        tmp_path / "solved",
        manifest,
        lambda writer: writer.link(source, "model*"),
        lambda writer: writer.link(source, "config.json"),
        lambda writer: writer.write_tensors(kv),
    )
    assert (path / "model.safetensors").samefile(artifact / "model.safetensors")
    assert not (path / "config.json").samefile(artifact / "config.json")
    shutil.rmtree(artifact)
    open_artifact(path)


def test_an_artifact_can_be_made_from_the_one_it_replaces(artifact: Path, manifest: Manifest) -> None:
    source = open_artifact(artifact)
    inode = (artifact / "model.safetensors").stat().st_ino
    write(artifact, manifest, lambda writer: writer.link(source, "*"), overwrite=True, context=4096)
    assert open_artifact(artifact).manifest["context"] == 4096
    assert (artifact / "model.safetensors").stat().st_ino == inode


def test_writing_over_a_link_leaves_its_source_alone(
    artifact: Path, tmp_path: Path, fill: Fill, manifest: Manifest, kv: dict[str, torch.Tensor]
) -> None:
    before, source = snapshot(artifact), open_artifact(artifact)
    anew = {name: mean + 1 for name, mean in kv.items()}
    path = write(
        tmp_path / "out",
        manifest,
        lambda writer: writer.link(source, "*"),
        lambda writer: writer.write_tensors(anew),
        lambda writer: writer.write_weights([("w", torch.zeros(3))]),
    )
    assert snapshot(artifact) == before
    assert torch.equal(open_artifact(path).tensors()["layer.0.k.mean"], anew["layer.0.k.mean"])


def test_weights_are_copied_where_links_are_not_possible(artifact: Path, small_disk: Path, manifest: Manifest) -> None:
    source = open_artifact(artifact)
    path = write(small_disk / "out", manifest, lambda writer: writer.link(source, "*"))
    assert snapshot(path).keys() == snapshot(artifact).keys()
    open_artifact(path)


def test_a_copy_that_does_not_fit(artifact: Path, small_disk: Path, manifest: Manifest) -> None:
    source = open_artifact(artifact)
    (small_disk / "ballast").write_bytes(bytes(1_000_000))
    with pytest.raises(KvcliError, match="MB more, and its disk has"):
        write(small_disk / "out", manifest, lambda writer: writer.link(source, "model*"))
    assert os.listdir(small_disk) == ["ballast"]
