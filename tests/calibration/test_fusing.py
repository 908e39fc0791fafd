"""A fused model is an ordinary one: saved, loaded, tied or untied, and run by the packed cache."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package
from transform_models import ALL, IDS, build, difference, each_model, logits, random_parameters

from kvcli.calibration.fusing import fuse, rotating_down, settle
from kvcli.calibration.ostquant import (
    KV,
    DownHadamard,
    NormGains,
    transforms,
)
from kvcli.calibration.womi import womi
from kvcli.errors import InputError
from kvcli.models.architectures import Rope, geometry
from kvcli.models.loading import copy_source_files, load, state_dict_for_saving
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.quant.transforms import hadamard
from kvcli.runtime.packed_cache import ATTENTION, PackedCache


def plan_of(model: PreTrainedModel, bits: int) -> CachePlan:
    exact = KVFormat(bits)
    layers = [LayerPlan(x.num_kv_heads, x.head_dim, exact, exact, kind=x.kind, window=x.window)
              for x in geometry(model.config)]  # fmt: skip
    return CachePlan(tuple(layers), dtype=str(model.dtype).removeprefix("torch."))


def packed_logits(model: PreTrainedModel, bits: int) -> Tensor:
    model.set_attn_implementation(ATTENTION)
    store = PackedCache(plan_of(model, bits), batch_size=len(IDS), rope=Rope.from_model(model))
    with torch.no_grad():
        out: Tensor = model(IDS, past_key_values=store).logits
    model.set_attn_implementation("sdpa")
    return out


# --- the embedding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rotating_the_stream_unties_the_embedding(dtype: torch.dtype) -> None:
    model = build("llama-tied", dtype)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert fuse(model, transforms(model.config, random_parameters(model, ["r_res"]))) == 96 * 48 * dtype.itemsize
    assert not model.config.tie_word_embeddings
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert not model.all_tied_weights_keys  # what is saved, and what a device map counts, goes by it
    model.tie_weights()  # what Transformers calls after loading
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_an_embedding_that_is_untied_already_costs_nothing() -> None:
    model = build("llama")
    assert fuse(model, transforms(model.config, random_parameters(model, ["r_res"]))) == 0


@pytest.mark.parametrize("names", [KV, ("s_attn", "s_ffn", "s_ud")], ids=lambda x: "+".join(x))
def test_what_does_not_reach_the_embedding_leaves_it_tied(names: Sequence[str]) -> None:
    model = build("qwen2-tied")
    assert fuse(model, [NormGains(final=False), *transforms(model.config, random_parameters(model, names))]) == 0
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings


def test_without_a_last_gain_the_rotated_embedding_stays_tied() -> None:
    model = build("llama-tied")
    model.model.norm.weight.fill_(1)
    before = logits(model)
    assert fuse(model, transforms(model.config, random_parameters(model, ["r_res"]))) == 0
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert difference(logits(model), before) < 1e-11


# --- an ordinary model ------------------------------------------------------------------------------------------------


@each_model
def test_stock_transformers_loads_what_was_fused(architecture: str, tmp_path: Path) -> None:
    model = build(architecture, torch.float32)
    model.config.save_pretrained(tmp_path / "before")
    fuse(model, transforms(model.config, random_parameters(model)))
    model.save_pretrained(tmp_path / "fused")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fused").eval()
    assert torch.equal(logits(again), logits(model))
    old, new = (json.loads((tmp_path / x / "config.json").read_text()) for x in ("before", "fused"))
    changed = {k for k in old.keys() | new.keys() if old.get(k) != new.get(k)} - {"architectures", "dtype"}
    assert changed == ({"tie_word_embeddings"} if "tied" in architecture else set())


def test_kvcli_writes_and_reads_it(tinystories: Path, tmp_path: Path) -> None:
    loaded = load(str(tinystories), dtype="float32")
    ids = IDS
    with torch.no_grad():
        before = loaded.model(ids).logits
        fuse(loaded.model, transforms(loaded.model.config, random_parameters(loaded.model)))
        after = loaded.model(ids).logits
    assert difference(after, before) < 1e-4
    copy_source_files(loaded, tmp_path)
    save_file(dict(state_dict_for_saving(loaded)), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        assert torch.equal(load(str(tmp_path)).model(ids).logits, after)


@each_model
def test_the_packed_cache_runs_it(architecture: str) -> None:
    model = build(architecture, torch.float32)
    before = logits(model)
    fuse(model, transforms(model.config, random_parameters(model)))
    assert difference(packed_logits(model, 32), before) < 1e-4
    assert difference(packed_logits(model, 16), before) < 3e-2  # keys and values rounded to 16 bits
    half = build(architecture, torch.bfloat16)
    fuse(half, transforms(half.config, random_parameters(half)))
    with torch.no_grad():
        assert torch.equal(packed_logits(half, 16), half(IDS, past_key_values=DynamicCache(config=half.config)).logits)


@pytest.mark.slow
def test_the_standing_model(smollm2: Path) -> None:
    model = load(str(smollm2)).model
    with torch.no_grad():
        before = model(IDS).logits
        parameters = {**random_parameters(model, ALL), **womi(model, ["r_res", "r_ov"])}
        assert fuse(model, transforms(model.config, parameters)) == 49152 * 576 * 4
        assert difference(model(IDS).logits, before) < 1e-4


# --- H_down -----------------------------------------------------------------------------------------------------------


@each_model
def test_the_two_halves_of_h_down_undo_one_another(architecture: str) -> None:
    model = build(architecture)
    before = logits(model)
    inputs: list[Tensor] = []
    down = model.model.layers[0].mlp.down_proj
    with down.register_forward_pre_hook(lambda module, x: inputs.append(x[0])):
        logits(model)
    parameters = random_parameters(model, ["s_ud"])
    fuse(model, [*transforms(model.config, parameters), DownHadamard()])
    assert difference(logits(model), before) > 1e-3
    with rotating_down(model), down.register_forward_pre_hook(lambda module, x: inputs.append(x[0])):
        assert difference(logits(model), before) < 1e-11
    # a hook registered inside sees the input scaled first, then rotated
    torch.testing.assert_close(inputs[1], hadamard(inputs[0] / parameters["s_ud"][0]), rtol=1e-9, atol=1e-11)
    assert difference(logits(model), before) > 1e-3


def test_h_down_rotates_after_s_ud_has_scaled() -> None:
    model = build("llama")
    before = logits(model)
    fuse(model, [DownHadamard(), *transforms(model.config, random_parameters(model, ["s_ud"]))])
    with rotating_down(model):
        assert difference(logits(model), before) > 1e-3


# --- what is refused, and what is put right ---------------------------------------------------------------------------


def test_training_in_float32_is_settled_to_an_orthogonal_matrix() -> None:
    model = build("llama")
    before = logits(model)
    noise = torch.Generator().manual_seed(3)
    learned = {
        name: (x + 1e-4 * torch.randn(x.shape, generator=noise, dtype=x.dtype)).float().requires_grad_()
        for name, x in random_parameters(model, ["r_res", "r_ov"]).items()
    }
    settled = settle(model.config, learned)
    for name, r in settled.items():
        eye = torch.eye(r.shape[-1], dtype=torch.float64)
        assert (r.mT @ r - eye).abs().max() < 1e-14
        assert (r - learned[name]).abs().max() < 1e-3
        left, _, right = torch.linalg.svd(learned[name].detach().double())
        torch.testing.assert_close(r, left @ right, rtol=0, atol=1e-12)  # the nearest one
    fuse(model, transforms(model.config, settled))
    assert difference(logits(model), before) < 1e-11


def test_quantised_and_absent_weights_are_refused() -> None:
    model = build("llama")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(InputError, match=r"in memory, which model\.embed_tokens\.weight is not"):
        fuse(empty, [NormGains()])
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(InputError, match="are quantised"):
        fuse(model, [NormGains()])


def test_a_weight_out_of_range_is_refused() -> None:
    model = build("llama", torch.float16)
    parameters = {"s_ud": torch.full((2, 72), 1e-7, dtype=torch.float64)}
    with pytest.raises(InputError, match=r"up_proj\.weight leaves the range of float16"):
        fuse(model, transforms(model.config, parameters))


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("r_ov", lambda x: 1.1 * x, "r_ov is not orthogonal"),
        ("r_res", lambda x: x * torch.nan, "r_res holds NaN"),
        ("s_ud", lambda x: x.index_fill(1, torch.tensor([3]), 0), "s_ud scales by zero"),
        ("s_qk", lambda x: x.repeat(1, 1, 2), r"s_qk has shape \[2, 2, 8\] where the model needs \[2, 2, 4\]"),
    ],
)
def test_what_cannot_be_a_transform_is_refused(name: str, change: Callable[[Tensor], Tensor], named: str) -> None:
    model = build("llama")
    with pytest.raises(InputError, match=named):
        settle(model.config, {name: change(random_parameters(model, [name])[name])})
