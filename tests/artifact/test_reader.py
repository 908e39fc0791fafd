"""The reader takes what the writer wrote, and refuses everything else in one sentence."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from kvcli.artifact.reader import is_artifact, open_artifact, sha256_of
from kvcli.errors import InputError
from kvcli.plan import CachePlan

Damage = Callable[[Path], None]


def refusal(path: Path, *, verify: bool = True) -> str:
    """Open an artifact that cannot be, and return the one sentence that says why."""
    with pytest.raises(InputError) as caught:
        open_artifact(path, verify=verify)
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert re.fullmatch(r"\S[^\n]*\.", message), message
    return message


def relist(root: Path) -> None:
    """Make kvcli.json list what the folder holds now, as someone does who wants damage to go unnoticed."""
    path = root / "kvcli.json"
    manifest = json.loads(path.read_text())
    files = [file for file in root.rglob("*") if file.is_file() and file != path]
    manifest["files"] = {
        file.relative_to(root).as_posix(): {"sha256": sha256_of(file), "size": file.stat().st_size} for file in files
    }
    path.write_text(json.dumps(manifest))


def edit(root: Path, change: Callable[[dict[str, Any]], object], name: str = "kvcli.json") -> None:
    obj = json.loads((root / name).read_text())
    change(obj)
    (root / name).write_text(json.dumps(obj))


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# --- sound ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [True, False])
def test_it_returns_what_was_written(
    pristine: Path, plan: CachePlan, kv: dict[str, torch.Tensor], manifest: dict[str, Any], verify: bool
) -> None:
    artifact = open_artifact(str(pristine), verify=verify)
    assert artifact.path == pristine
    assert artifact.plan == plan
    assert artifact.report == {"kl": 0.25}
    assert manifest.items() <= artifact.manifest.items()
    read = artifact.tensors()
    assert read.keys() == kv.keys()
    assert all(torch.equal(read[name], kv[name]) for name in kv)


def test_stock_transformers_loads_it(pristine: Path, model: LlamaForCausalLM) -> None:
    stock = AutoModelForCausalLM.from_pretrained(pristine).eval()
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.equal(stock(tokens).logits, model(tokens).logits)


def test_progress_counts_every_listed_byte(pristine: Path) -> None:
    calls: list[tuple[int, int]] = []
    artifact = open_artifact(pristine, progress=lambda done, total: calls.append((done, total)))
    assert len(calls) == len(artifact.manifest["files"])
    assert calls[-1][0] == calls[-1][1] == sum(entry["size"] for entry in artifact.manifest["files"].values())


def test_notes_beside_it_are_nobodys_business(artifact: Path) -> None:
    (artifact / "README.md").write_text("# mine")
    open_artifact(artifact)


def test_a_folder_is_an_artifact_by_its_manifest(pristine: Path, tmp_path: Path) -> None:
    assert is_artifact(pristine)
    assert not is_artifact(tmp_path)
    assert not is_artifact(tmp_path / "none")


# --- not an artifact --------------------------------------------------------------------------------------------


def test_missing(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == f"{tmp_path / 'none'} does not exist."


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert refusal(tmp_path / "file") == f"{tmp_path / 'file'} is a file, and an artifact is a folder."


def test_no_manifest(artifact: Path) -> None:
    (artifact / "kvcli.json").unlink()
    assert refusal(artifact) == f"{artifact} is not a kvcli artifact: it has no kvcli.json."


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"a": NaN}', '{"a": 1e', "[" * 100_000, '{"schema_version": ' + "9" * 5000 + "}"],
    ids=range(8),
)
def test_bad_json(artifact: Path, text: str) -> None:
    (artifact / "kvcli.json").write_text(text)
    assert refusal(artifact).startswith(f"{artifact / 'kvcli.json'} ")


def test_json_that_is_not_text(artifact: Path) -> None:
    (artifact / "kvcli.json").write_bytes(b"\xff\xfe\xfa{}")
    assert "is not valid JSON" in refusal(artifact)


def test_an_absurdly_large_manifest_is_not_parsed(artifact: Path) -> None:
    os.truncate(artifact / "kvcli.json", 2**40)  # sparse: it takes no room
    assert refusal(artifact) == f"{artifact / 'kvcli.json'} is larger than 16 MiB."


# --- the plan ---------------------------------------------------------------------------------------------------


def test_newer_schema(artifact: Path) -> None:
    edit(artifact, lambda obj: obj.update(schema_version=4))
    where = artifact / "kvcli.json"
    assert refusal(artifact) == f"{where} was written by a newer kvcli (schema 4; this one reads 3)."


@pytest.mark.parametrize("size", [-1, 4097, 10**30, "8", 8.0, None])
def test_absurd_size(artifact: Path, size: object) -> None:
    edit(artifact, lambda obj: obj["plan"]["layers"][1].update(head_dim=size))
    assert "kvcli.json: plan.layers[1].head_dim: " in refusal(artifact)


def test_a_group_that_does_not_divide(artifact: Path) -> None:
    edit(artifact, lambda obj: obj["plan"]["layers"][0]["k"].update(group=3))
    assert refusal(artifact) == f"{artifact / 'kvcli.json'}: group 3 does not divide head_dim 8."


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_kv_heads": 4}, "config.json has num_key_value_heads 2, and the plan has 4."),
        ({"head_dim": 16}, "config.json has head_dim 8, and the plan has 16."),
    ],
)
def test_a_plan_for_another_model(artifact: Path, change: dict[str, int], sentence: str) -> None:
    edit(artifact, lambda obj: obj["plan"]["layers"][1].update(change))
    assert refusal(artifact).endswith(sentence)


def test_a_plan_for_more_layers(artifact: Path) -> None:
    edit(artifact, lambda obj: obj["plan"]["layers"].append(obj["plan"]["layers"][1]))
    assert refusal(artifact).endswith("config.json has num_hidden_layers 2, and the plan has 3.")


@pytest.mark.parametrize("config", ["{}", "[]", "{", '{"num_hidden_layers": 2, "num_attention_heads": 0}'])
def test_a_configuration_that_says_nothing(artifact: Path, config: str) -> None:
    (artifact / "config.json").write_text(config)
    relist(artifact)
    assert str(artifact / "config.json") in refusal(artifact)


def test_head_dim_follows_from_the_hidden_size(artifact: Path) -> None:
    edit(artifact, lambda config: config.update(head_dim=None), "config.json")
    relist(artifact)
    open_artifact(artifact)


# --- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "kv.safetensors", "config.json", "report.json"])
@pytest.mark.parametrize("verify", [True, False])
def test_a_missing_file(artifact: Path, name: str, verify: bool) -> None:
    (artifact / name).unlink()
    assert refusal(artifact, verify=verify) == f"{artifact / name} is missing."


@pytest.mark.parametrize("name", ["model.safetensors", "kv.safetensors"])
@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_file(artifact: Path, name: str, verify: bool) -> None:
    size = (artifact / name).stat().st_size
    os.truncate(artifact / name, size - 1)
    assert f"{artifact / name} has {size - 1} bytes where kvcli.json lists {size}" in refusal(artifact, verify=verify)


@pytest.mark.parametrize("name", ["model.safetensors", "kv.safetensors"])
def test_a_truncated_file_that_is_listed_so(artifact: Path, name: str) -> None:
    os.truncate(artifact / name, (artifact / name).stat().st_size - 1)
    relist(artifact)
    assert f"{artifact / name} is damaged" in refusal(artifact)


@pytest.mark.parametrize("name", ["model.safetensors", "kv.safetensors", "config.json", "report.json"])
@pytest.mark.parametrize("at", [0, 12, -1])
def test_one_flipped_bit(artifact: Path, name: str, at: int) -> None:
    flip(artifact / name, at)
    assert refusal(artifact) == f"{artifact / name} is damaged: its sha256 is not the one in kvcli.json."


def test_without_verification_only_hashes_are_skipped(artifact: Path) -> None:
    flip(artifact / "model.safetensors")
    open_artifact(artifact, verify=False)
    flip(artifact / "kv.safetensors", 0)
    assert f"{artifact / 'kv.safetensors'} is damaged" in refusal(artifact, verify=False)


@pytest.mark.parametrize("header", [0, 7, 2**40, 2**64 - 1])
def test_an_absurd_header(artifact: Path, header: int) -> None:
    path = artifact / "model.safetensors"
    path.write_bytes(struct.pack("<Q", header) + path.read_bytes()[8:])
    assert f"{path} is damaged" in refusal(artifact, verify=False)


def test_no_weights(artifact: Path) -> None:
    (artifact / "model.safetensors").unlink()
    relist(artifact)
    assert "has no weights" in refusal(artifact)


@pytest.mark.parametrize("name", ["extra.pkl", "pytorch_model.bin", "a/b/code.PY", "x.pt", "adapter_model.safetensors"])
@pytest.mark.parametrize("verify", [True, False])
def test_an_unlisted_loadable_file(artifact: Path, name: str, verify: bool) -> None:
    (artifact / name).parent.mkdir(parents=True, exist_ok=True)
    (artifact / name).write_bytes(b"x")
    assert f"{artifact / name} is not listed in kvcli.json" in refusal(artifact, verify=verify)


def test_a_pickle_is_refused_even_if_listed(artifact: Path) -> None:
    (artifact / "training_args.bin").write_bytes(b"x")
    relist(artifact)
    assert "training_args.bin may hold pickled code" in refusal(artifact)


@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "/etc/hostname", "C:\\x", "C:x", "..\\x", ".."])
def test_a_path_that_escapes(artifact: Path, name: str) -> None:
    (artifact.parent / "outside").write_bytes(b"x")
    edit(artifact, lambda obj: obj["files"].update({name: {"sha256": "0" * 64, "size": 1}}))
    assert "which is not a name inside the folder" in refusal(artifact)


@pytest.mark.parametrize("verify", [True, False])
def test_a_symbolic_link(artifact: Path, verify: bool) -> None:
    (artifact / "model.safetensors").rename(artifact.parent / "elsewhere")
    (artifact / "model.safetensors").symlink_to(artifact.parent / "elsewhere")
    expected = f"{artifact / 'model.safetensors'} is a symbolic link, and an artifact holds plain files only."
    assert refusal(artifact, verify=verify) == expected


def test_a_linked_folder(artifact: Path, tmp_path: Path) -> None:
    (artifact / "calibration").symlink_to(tmp_path)
    assert "calibration is a symbolic link" in refusal(artifact)


@pytest.mark.parametrize("name", ["kvcli.json", "notes"])
def test_a_pipe_does_not_hang(artifact: Path, name: str) -> None:
    (artifact / name).unlink(missing_ok=True)
    os.mkfifo(artifact / name)
    assert "device, pipe or socket" in refusal(artifact)


# --- kv.safetensors ---------------------------------------------------------------------------------------------


def retensor(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(root: Path) -> None:
        tensors = load_file(root / "kv.safetensors")
        change(tensors)
        save_file(tensors, root / "kv.safetensors")
        relist(root)

    return damage


MEAN = "layer.0.k.mean"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (retensor(lambda x: x.pop(MEAN)), f"lacks {MEAN}, which the plan needs."),
        (retensor(lambda x: x.update(extra=torch.zeros(1))), "holds 'extra', which the plan does not know."),
        (retensor(lambda x: x.update({MEAN: x[MEAN].half()})), f"{MEAN} is F16 [2, 8], and the plan needs F32 [2, 8]."),
        (retensor(lambda x: x.update({MEAN: torch.zeros(8)})), f"{MEAN} is F32 [8], and the plan needs F32 [2, 8]."),
    ],
    ids=["missing", "extra", "dtype", "shape"],
)
def test_tensors_that_are_not_the_plans(artifact: Path, damage: Damage, sentence: str) -> None:
    damage(artifact)
    for verify in (True, False):
        assert refusal(artifact, verify=verify).endswith(sentence)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_mean_that_is_not_finite(artifact: Path, value: float) -> None:
    retensor(lambda tensors: tensors[MEAN].view(-1)[3:4].fill_(value))(artifact)
    opened = open_artifact(artifact)
    with pytest.raises(InputError, match=rf"kv\.safetensors: {re.escape(MEAN)} holds a value that is not finite\."):
        opened.tensors()


# --- shards -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        (None, "model.safetensors.index.json is missing, and the weights are in several files."),
        ({}, "model.safetensors.index.json has no weight_map."),
        ({"weight_map": {"w": "../model.safetensors"}}, "places 'w' in '../model.safetensors', where it is not."),
        ({"weight_map": {"w": "model-00001-of-00001.safetensors"}}, "safetensors', where it is not."),
        ({"weight_map": {"w": ["x"]}}, "places 'w' in ['x'], where it is not."),
    ],
)
def test_an_index_that_does_not_match_its_shards(artifact: Path, index: object, sentence: str) -> None:
    (artifact / "model.safetensors").rename(artifact / "model-00001-of-00001.safetensors")
    file = artifact / "model.safetensors.index.json"
    file.unlink()
    if index is not None:
        file.write_text(json.dumps(index))
    relist(artifact)
    assert refusal(artifact).endswith(sentence)


def test_an_index_that_does_not_match_the_one_file(artifact: Path) -> None:
    (artifact / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "model.safetensors"}}))
    relist(artifact)
    assert refusal(artifact).endswith("places 'w' in 'model.safetensors', where it is not.")
