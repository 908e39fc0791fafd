"""Quantised checkpoints: the weights they stand for, and one sentence for those that are broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvcli.errors import InputError
from kvcli.models.loading import copy_source_files, load, state_dict_for_saving
from kvcli.models.quantized import bnb_config
from kvcli.quant import stored
from kvcli.quant.weight_format import BITS, WeightFormat

Q = "model.layers.0.self_attn.q_proj"


def write(source: Path, folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], *, old: bool = False) -> Path:
    """Write a checkpoint with a quantization_config, in config.json or in the file of old."""
    shutil.copytree(source, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    described = json.loads((folder / "config.json").read_text())
    if old:
        (folder / "quantize_config.json").write_text(json.dumps(config))
    else:
        described["quantization_config"] = config
    (folder / "config.json").write_text(json.dumps(described))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def gptq(
    source: Path, bits: int = 4, *, group: int = 64, act_order: bool = False, sym: bool = False, v2: bool = False,
    indexed: bool = True,
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
    """Return the configuration, the tensors, and the weights [out, in] of a checkpoint with random codes."""
    random, fmt = torch.Generator().manual_seed(0), WeightFormat(bits, group)
    tensors, weights = {}, {}
    for name, x in load_file(source / "model.safetensors").items():
        if "proj" not in name:
            tensors[name] = x
            continue
        (out, width), module = x.shape, name.removesuffix(".weight")
        codes = torch.randint(0, fmt.levels + 1, x.shape, generator=random)
        scale = (torch.rand(out, width // group, generator=random) * 0.1 + 0.01).half().float()
        zero = torch.randint(1, fmt.levels + 1, scale.shape, generator=random).float()
        zero = torch.full_like(zero, 2 ** (bits - 1)) if sym else zero
        at = torch.arange(width) // group
        at = at[torch.randperm(width, generator=random)] if act_order else at
        packed = fmt.pack(codes, scale, zero + v2)
        if indexed:
            packed["g_idx"] = at.int()
        else:
            del packed["g_idx"]
        tensors |= {f"{module}.{suffix}": y for suffix, y in packed.items()}
        weights[name] = (codes - zero[:, at]) * scale[:, at]
    config = {"bits": bits, "group_size": group, "desc_act": act_order, "sym": sym, "damp_percent": 0.01}
    if v2:
        config["checkpoint_format"] = "gptq_v2"
    return {"quant_method": "gptq", **config}, tensors, weights


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", [{}, {"act_order": True}, {"sym": True, "indexed": False}], ids=str)
def test_the_model_holds_the_weights_that_the_codes_stand_for(bits, kind, tinystories, tmp_path):
    config, tensors, weights = gptq(tinystories, bits, **kind)
    loaded = load(str(write(tinystories, tmp_path / "model", config, tensors)), dtype="float32")
    state = loaded.model.state_dict()
    assert len(weights) == 14
    for name, weight in weights.items():
        assert torch.equal(state[name], weight), name
    assert loaded.quantized is not None
    assert loaded.quantized.bits > bits
    assert loaded.model.generation_config.eos_token_id == 2
    assert torch.equal(state["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"].float())


def test_an_old_file_describes_them_too_and_versions_of_the_layout_differ_in_zero_points(tinystories, tmp_path):
    config, tensors, weights = gptq(tinystories)
    del config["quant_method"]  # which such files do not have
    old = load(str(write(tinystories, tmp_path / "old", config, tensors, old=True)), dtype="float32")
    config, tensors, others = gptq(tinystories, v2=True)
    new = load(str(write(tinystories, tmp_path / "new", config, tensors)), dtype="float32")
    assert torch.equal(old.model.state_dict()[f"{Q}.weight"], weights[f"{Q}.weight"])
    assert torch.equal(new.model.state_dict()[f"{Q}.weight"], others[f"{Q}.weight"])


def test_a_short_last_group_and_one_group_for_all_are_read(tinystories, tmp_path):
    config, tensors, weights = gptq(tinystories, group=128)
    for module in {x.removesuffix(".qweight") for x in tensors if x.endswith(".qweight")}:
        if len(tensors[f"{module}.g_idx"]) == 384:  # groups 0 and 1 become one of 256, and 128 inputs stay for the last
            for suffix in ("scales", "qzeros"):
                x = tensors[f"{module}.{suffix}"]
                x[1] = x[0]
                tensors[f"{module}.{suffix}"] = x[1:].clone()
            tensors[f"{module}.g_idx"] = (torch.arange(384) // 256).int()
    loaded = load(str(write(tinystories, tmp_path / "short", {**config, "group_size": 256}, tensors)), dtype="float32")
    state = loaded.model.state_dict()
    down = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(state[f"{Q}.weight"], weights[f"{Q}.weight"])
    assert torch.equal(state[down][:, :128], weights[down][:, :128])
    assert torch.equal(state[down][:, 256:], weights[down][:, 256:])
    config, tensors, _ = gptq(tinystories, group=128)
    del tensors["model.layers.1.mlp.down_proj.qweight"]
    with pytest.raises(InputError, match="down_proj has qzeros and no qweight"):
        load(str(write(tinystories, tmp_path / "none", config, tensors)))


def test_what_is_written_again_is_what_was_read(tinystories, tmp_path):
    config, tensors, _ = gptq(tinystories, act_order=True)
    loaded = load(str(write(tinystories, tmp_path / "model", config, tensors)))
    state = dict(state_dict_for_saving(loaded))
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], x) for name, x in tensors.items() if "proj" in name)
    copy_source_files(loaded, tmp_path / "copy")
    assert json.loads((tmp_path / "copy/config.json").read_text())["quantization_config"] == config
    assert json.loads((tmp_path / "copy/quantize_config.json").read_text()) == config


def test_biases_of_zeros_that_the_model_has_no_place_for_are_left_out(tinystories, tmp_path):
    config, tensors, _ = gptq(tinystories)
    tensors[f"{Q}.bias"] = torch.zeros(128, dtype=torch.float16)
    assert load(str(write(tinystories, tmp_path / "zeros", config, tensors))).quantized is not None
    tensors[f"{Q}.bias"][3] = 1
    with pytest.raises(InputError, match=r"q_proj\.bias in the weights has no place"):
        load(str(write(tinystories, tmp_path / "ones", config, tensors)))


Tensors = dict[str, Tensor]


def without(name: str) -> Callable[[Tensors], object]:
    return lambda x: x.pop(name)


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], object]:
    return lambda x: x.update({name: change(x[name])})


BROKEN: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no zeros": (without(f"{Q}.qzeros"), "q_proj has no qzeros"),
    "no codes": (without(f"{Q}.qweight"), "and no qweight"),
    "short codes": (changed(f"{Q}.qweight", lambda x: x[1:].clone()), r"q_proj\.qweight has shape \[15, 128\]"),
    "wide scales": (changed(f"{Q}.scales", lambda x: x.repeat(2, 1)), r"q_proj\.scales has shape \[4, 128\]"),
    "no scales": (changed(f"{Q}.scales", lambda x: x * torch.nan), "q_proj has scales that are NaN"),
    "whole scales": (changed(f"{Q}.scales", lambda x: x.int()), "q_proj.scales is torch.int32"),
    "float codes": (changed(f"{Q}.qweight", lambda x: x.float()), "q_proj.qweight is torch.float32"),
    "far groups": (changed(f"{Q}.g_idx", lambda x: x + 1), "q_proj: a quantised layer's g_idx"),
    "negative groups": (changed(f"{Q}.g_idx", lambda x: x - 1), "q_proj: a quantised layer's g_idx"),
    "short index": (changed(f"{Q}.g_idx", lambda x: x[1:].clone()), r"q_proj\.g_idx has shape \[127\]"),
    "no norm": (without("model.norm.weight"), "model.norm.weight, which the configuration calls for, is missing"),
    "short norm": (changed("model.norm.weight", lambda x: x[1:].clone()), r"model\.norm\.weight has shape \[127\]"),
    "plain": (lambda x: [x.pop(y) for y in list(x) if "proj" in y], "no layer is"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_layers_are_named(case, tinystories, tmp_path):
    config, tensors, _ = gptq(tinystories)
    damage, message = BROKEN[case]
    damage(tensors)
    with pytest.raises(InputError, match=message):
        load(str(write(tinystories, tmp_path / "model", config, tensors)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 2}, "2 bits are not read"),
        ({"bits": "4"}, "4 bits are not read"),
        ({"group_size": 0}, "group_size of 0"),
        ({"group_size": 12}, "group of 12"),
        ({"checkpoint_format": "marlin"}, "'marlin' is not read"),
        ({"quant_method": "awq"}, "'awq' are not read"),
    ],
)
def test_other_formats_are_refused_by_name(change, message, tinystories, tmp_path):
    config, tensors, _ = gptq(tinystories)
    with pytest.raises(InputError, match=message):
        load(str(write(tinystories, tmp_path / "model", {**config, **change}, tensors)))


@pytest.mark.parametrize("make", [stored.nf4, stored.llm_int8], ids=["nf4", "llm-int8"])
def test_checkpoints_of_bitsandbytes_are_read(make, tinystories, tmp_path):
    pytest.importorskip("bitsandbytes")
    tensors, weights = {}, {}
    for name, x in load_file(tinystories / "model.safetensors").items():
        if "proj" in name:
            layer = make(x)
            tensors |= {f"{name.removesuffix('.weight')}.{suffix}": y for suffix, y in layer.tensors.items()}
            weights[name] = (layer.dequantize(), x.float())
        else:
            tensors[name] = x
    config = bnb_config(nf4=make is stored.nf4, dtype="bfloat16")
    folder = write(tinystories, tmp_path / "model", config, tensors)
    loaded = load(str(folder), dtype="float32")
    for name, (weight, original) in weights.items():
        assert torch.equal(loaded.model.state_dict()[name], weight)
        assert 0 < float((weight - original).norm() / original.norm()) < (0.12 if make is stored.nf4 else 0.02)
    if make is stored.nf4:
        tensors.pop(f"{Q}.weight.absmax")
    else:
        tensors.pop(f"{Q}.SCB")
    with pytest.raises(InputError, match="q_proj"):
        load(str(write(tinystories, tmp_path / "broken", config, tensors)))
