"""A checkpoint loads wholly right, or is refused in one sentence that names the culprit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kvcli.errors import InputError, UsageError
from kvcli.models.checkpoint import sha256
from kvcli.models.loading import LoadedModel, copy_source_files, load, state_dict_for_saving

SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 2048, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture
def checkpoint(tinystories: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    folder = tmp_path / "model"
    shutil.copytree(tinystories, folder)
    for file in folder.iterdir():
        file.chmod(0o644)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def refusal(source: Path | str) -> str:
    """Load what must be refused, and return the sentence."""
    with pytest.raises(InputError) as error:
        load(str(source))
    message = str(error.value)
    assert message.endswith(".")
    assert "\n" not in message
    assert ". " not in message
    return message


# --- what loads -------------------------------------------------------------------------------------------------------


def test_a_folder_loads_in_its_own_dtype_ready_to_run(tinystories, capfd):
    loaded = load(str(tinystories))
    assert loaded.dtype == "bfloat16"
    assert loaded.source == "TinyStories-656K"
    assert loaded.max_context == 512
    assert loaded.files == (tinystories / "model.safetensors",)
    assert loaded.sha256 == sha256(loaded.files)
    assert [(x.num_kv_heads, x.num_heads, x.head_dim, x.kind) for x in loaded.geometry] == [(4, 8, 16, "full")] * 2
    assert loaded.rope.inv_freq.shape == (8,)
    assert not loaded.model.training
    assert not any(x.requires_grad for x in loaded.model.parameters())
    out = loaded.model.generate(**loaded.tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=12)
    assert "a little girl named Lily" in loaded.tokenizer.decode(out[0])
    assert capfd.readouterr() == ("", "")


def test_weights_are_those_of_the_file(tinystories):
    state = load(str(tinystories), dtype="float32").model.state_dict()
    for name, tensor in load_file(tinystories / "model.safetensors").items():
        assert torch.equal(state[name], tensor.float())


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_dtype_can_be_chosen(tinystories, dtype):
    assert load(str(tinystories), dtype=dtype).dtype == dtype


@pytest.mark.parametrize(
    "change",
    [{"model_type": "llama"}, {"model_type": "mistral", "sliding_window": 8}, {"model_type": "qwen2"},
     {"model_type": "qwen3", "head_dim": 16}, {"model_type": "llama", "tie_word_embeddings": True}],
    ids=lambda x: "-".join(str(v) for v in x.values()),
)  # fmt: skip
def test_every_architecture_survives_a_round_trip(tinystories, tmp_path, change):
    """What load reads, copy_source_files and state_dict_for_saving write, and stock Transformers reads again."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SHAPE, **change})).eval()
    model.save_pretrained(tmp_path / "a")
    AutoTokenizer.from_pretrained(tinystories).save_pretrained(tmp_path / "a")

    again = _rewrite(load(str(tmp_path / "a")), tmp_path / "b")
    ids = torch.arange(40)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    stored = load_file(tmp_path / "a" / "model.safetensors")
    assert load_file(tmp_path / "b" / "model.safetensors").keys() == stored.keys()


def _rewrite(loaded: LoadedModel, folder: Path) -> Any:
    copy_source_files(loaded, folder)
    save_file(dict(state_dict_for_saving(loaded)), folder / "model.safetensors", metadata={"format": "pt"})
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    text = "One day, Tim said: 'Look!'\n\n  2 + 2"
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == loaded.tokenizer(text).input_ids
    assert not any(str(loaded.files[0].parent) in x.read_text("utf-8") for x in folder.glob("*.json"))
    return model


def test_copied_files_are_the_checkpoints_own_but_for_what_changed(tinystories, tmp_path):
    loaded = load(str(tinystories), dtype="float32")
    loaded.model.config.tie_word_embeddings = False  # as a stage that fuses scales into the embedding leaves it
    copy_source_files(loaded, tmp_path)
    before = json.loads((tinystories / "config.json").read_text())
    after = json.loads((tmp_path / "config.json").read_text())
    assert after == {**before, "torch_dtype": "float32", "tie_word_embeddings": False}
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (tinystories / name).read_bytes()


def test_untied_weights_are_both_saved(tinystories):
    loaded = load(str(tinystories))
    assert "lm_head.weight" not in dict(state_dict_for_saving(loaded))
    loaded.model.lm_head.weight = torch.nn.Parameter(loaded.model.lm_head.weight.clone())
    assert "lm_head.weight" in dict(state_dict_for_saving(loaded))


def test_sharded_weights_load_and_hash_as_a_whole(tinystories, tmp_path):
    whole = load(str(tinystories))
    whole.model.save_pretrained(tmp_path, max_shard_size="300KB")
    whole.tokenizer.save_pretrained(tmp_path)
    sharded = load(str(tmp_path))
    assert len(sharded.files) > 1
    assert len(sharded.sha256) == 64
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(sharded.model.state_dict()[name], tensor)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_missing_path_is_refused(tmp_path):
    assert "nowhere" in refusal(tmp_path / "nowhere")
    assert "gone.gguf does not exist" in refusal("gone.gguf")


@pytest.mark.parametrize("source", ["no-such-model", "no-such-org/no-such-model"])
def test_a_hub_id_that_cannot_be_had_is_refused_at_once(monkeypatch, tmp_path, source):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert f"{source} is neither a local path nor a model" in refusal(source)


def test_a_cached_hub_model_loads_without_the_hub(monkeypatch, tinystories):
    """The hub's client is asked for config.json alone first, so that an unsupported model is never downloaded."""
    asked = []

    def snapshot_download(name: str, *, allow_patterns: list[str], **_: object) -> str:
        asked.append(allow_patterns)
        return str(tinystories)

    monkeypatch.setattr("kvcli.models.checkpoint.snapshot_download", snapshot_download)
    assert load("org/tiny").source == "org/tiny"
    assert asked[0] == ["config.json"]
    assert "model*.safetensors" in asked[1]


def test_a_folder_without_config_is_refused(checkpoint):
    (checkpoint / "config.json").unlink()
    assert "holds no config.json" in refusal(checkpoint)


@pytest.mark.parametrize("text", ["{", "", "[1]", '{"model_type": "llama"', "\ud800", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(checkpoint, text):
    (checkpoint / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert "config.json" in refusal(checkpoint)


@pytest.mark.parametrize(("model_type", "named"), [("gemma2", "Gemma 2"), ("no-such", "'no-such'"), (None, "no mo")])
def test_an_unsupported_architecture_is_refused_by_name(checkpoint, model_type, named):
    edit_json(checkpoint / "config.json", model_type=model_type)
    (checkpoint / "model.safetensors").unlink()  # before anything else is looked at
    assert named in refusal(checkpoint)


def test_a_folder_without_weights_is_refused(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    assert "holds no weights" in refusal(checkpoint)


def test_pickled_weights_are_refused_and_never_opened(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    assert "can run code" in refusal(checkpoint)


def test_a_folder_without_tokenizer_is_refused(checkpoint):
    (checkpoint / "tokenizer.json").unlink()
    assert "holds no tokenizer" in refusal(checkpoint)


def test_a_broken_tokenizer_is_refused(checkpoint):
    (checkpoint / "tokenizer.json").write_text("{}")
    assert str(checkpoint) in refusal(checkpoint)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated_weights_are_refused(checkpoint, keep):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "model.safetensors is damaged or truncated" in refusal(checkpoint)


def test_a_flipped_bit_in_the_header_is_refused(checkpoint):
    file = checkpoint / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[20] ^= 0x80
    file.write_bytes(data)
    assert "model.safetensors is damaged or truncated" in refusal(checkpoint)


@pytest.mark.parametrize("shard", ["model-00002-of-00002.safetensors", "../model.safetensors"])
def test_an_index_naming_a_file_that_is_not_there_is_refused(checkpoint, shard):
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": shard}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert shard in refusal(checkpoint)


def test_a_missing_tensor_is_refused_by_name(checkpoint):
    name = "model.layers.1.self_attn.k_proj.weight"
    edit_weights(checkpoint, lambda w: w.pop(name))
    assert f"{name}, which the configuration calls for, is missing" in refusal(checkpoint)


def test_a_tensor_too_many_is_refused_by_name(checkpoint):
    edit_json(checkpoint / "config.json", num_hidden_layers=1)
    assert "model.layers.1." in refusal(checkpoint)


def test_a_tensor_of_another_shape_is_refused_by_name(checkpoint):
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(checkpoint, lambda w: w.update({name: w[name][:-1].contiguous()}))
    message = refusal(checkpoint)
    assert name in message
    assert "[383, 128]" in message
    assert "[384, 128]" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(checkpoint, value):
    name = "model.layers.1.mlp.down_proj.weight"
    edit_weights(checkpoint, lambda w: w[name].view(-1)[77].fill_(value))
    assert f"{name} holds NaN or infinite values" in refusal(checkpoint)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": "many"}, "hidden_size"),
        ({"vocab_size": 1 << 40}, "[1099511627776, 128]"),  # refused before it is allocated
        ({"num_attention_heads": 0}, "cannot be loaded"),
    ],
)
def test_an_absurd_config_is_refused(checkpoint, change, named):
    edit_json(checkpoint / "config.json", **change)
    assert named in refusal(checkpoint)


def test_a_file_that_is_no_gguf_is_refused(checkpoint):
    assert "not a .gguf file" in refusal(checkpoint / "model.safetensors")


def test_an_unknown_dtype_or_device_is_wrong_usage(tinystories):
    with pytest.raises(UsageError, match="int7"):
        load(str(tinystories), dtype="int7")
    with pytest.raises(UsageError, match="nonsense"):
        load(str(tinystories), device="nonsense")


def test_config_of_a_gguf_says_how_weights_are_quantised(tinystories, tmp_path):
    loaded = load(str(tinystories), dtype="float32")
    loaded.model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    copy_source_files(replace(loaded, files=(Path("x.gguf"),)), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["bits"] == 4


# --- gguf -------------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, architecture: str = "llama", **fields: Any) -> Path:
    """Write the beginnings of a .gguf file: enough to be looked at, too little to be loaded."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(f"{architecture}.{key.replace('__', '.')}", value)
    writer.add_tensor("token_embd.weight", np.zeros((8, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("data", [b"", b"GGUF", b"not a gguf file at all", b"GGUF" + b"\xff" * 100])
def test_a_file_that_only_claims_to_be_gguf_is_refused(tmp_path, data):
    (tmp_path / "x.gguf").write_bytes(data)
    assert "x.gguf is damaged, truncated or not a GGUF file" in refusal(tmp_path / "x.gguf")


def test_a_truncated_gguf_is_refused(tmp_path):
    path = write_gguf(tmp_path / "x.gguf")
    path.write_bytes(path.read_bytes()[:-64])
    assert "x.gguf is damaged, truncated" in refusal(path)


def test_an_unsupported_gguf_architecture_is_refused_by_name(tmp_path):
    assert "Gemma 2" in refusal(write_gguf(tmp_path / "x.gguf", "gemma2"))


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"rope__scaling__type": "yarn"}, "scaled RoPE"), ({"attention__sliding_window": 64}, "a sliding window")],
)
def test_a_gguf_that_transformers_would_misread_is_refused(tmp_path, fields, named):
    assert named in refusal(write_gguf(tmp_path / "x.gguf", **fields))


def test_a_gguf_without_what_it_needs_is_refused(tmp_path):
    assert "x.gguf cannot be loaded" in refusal(write_gguf(tmp_path / "x.gguf"))


@pytest.mark.slow
def test_the_standing_model_loads_from_gguf(smollm2, tmp_path, capfd):
    loaded = load(str(smollm2))
    assert capfd.readouterr() == ("", "")
    assert loaded.dtype == "float32"
    assert loaded.source == smollm2.name
    assert loaded.max_context == 8192
    assert [(x.num_kv_heads, x.num_heads, x.head_dim) for x in loaded.geometry] == [(3, 9, 64)] * 30
    assert loaded.model.config.tie_word_embeddings
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight

    tokenizer, text = loaded.tokenizer, "Hello,  world!\n\n\tdef f(x):\n  return x**2  # ünïcödé 你好 12345"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    turns = [{"role": "user", "content": "Hi"}]
    chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    logits = loaded.model(ids).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"

    assert torch.equal(_rewrite(loaded, tmp_path)(ids).logits, logits)
