"""The model runner against the plain path through Transformers: tokens, logits, chunks, batches, bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from kvcli.errors import InputError, KvcliError, UsageError
from kvcli.models.architectures import Rope, geometry
from kvcli.models.loading import LoadedModel, load
from kvcli.plan import CachePlan
from kvcli.quant.format import KVFormat
from kvcli.runtime import kvrt
from kvcli.runtime.packed_model import PackedModel
from kvcli.runtime.runner import ModelRunner

Tiny = Callable[..., PreTrainedModel]
PlanFor = Callable[..., CachePlan]
MeansFor = Callable[[CachePlan], dict[str, Tensor]]

EXACT = KVFormat(16)
TOKEN4, TOKEN8 = KVFormat(4, group=8), KVFormat(8, group=8)
CHANNEL2 = KVFormat(2, "channel", 16, symmetric=False)
NF4 = KVFormat(4, group=8, grid="nf4")
PLANS: dict[str, dict[str, Any]] = {
    "exact": {"k": EXACT, "v": EXACT},
    "portable": {"k": TOKEN8, "v": TOKEN4},
    "window": {"k": TOKEN8, "v": TOKEN8, "residual_window": 8},
    "mixed": {"k": EXACT, "v": TOKEN8, "sink_tokens": 4, "residual_window": 5, "block_size": 32},
    "everything": {
        "k": CHANNEL2, "v": TOKEN4, "sink_tokens": 4, "residual_window": 8,
        "rope": "before", "center": True, "transform": "hadamard",
    },
}  # fmt: skip
TOLERANCE = 2e-3

try:
    kvrt.library("cpu")
except kvrt.NativeError as error:
    pytest.skip(f"needs the native kernels: {error}", allow_module_level=True)


pytestmark = pytest.mark.usefixtures("one_thread")


def loaded_of(model: PreTrainedModel) -> LoadedModel:
    tokenizer: Any = SimpleNamespace()
    return LoadedModel(model, tokenizer, "tiny", geometry(model.config), Rope.from_model(model), ())


@pytest.fixture(params=PLANS)
def fields(request: pytest.FixtureRequest) -> dict[str, Any]:
    return PLANS[str(request.param)]


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 96, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Hold float32 logits of two paths against each other.

    Hidden states that were summed in another order differ by about 1e-6, and now and then a code falls on the other
    side of its border, which later tokens see: of 2 bits, a large step. That must stay rare; where each query looks is
    tested to the last digit in test_prefill.py, on the same keys and values.
    """
    assert float((found - expected).norm() / expected.norm()) < 0.01
    assert float((found - expected).abs().median()) < TOLERANCE


class Pair:
    """A plan on both paths."""

    def __init__(self, model: PreTrainedModel, plan: CachePlan, tensors: dict[str, Tensor]) -> None:
        self.loaded, self.plan, self.tensors = loaded_of(model), plan, tensors

    def runner(self, **settings: Any) -> ModelRunner:
        return ModelRunner(self.loaded, self.plan, self.tensors, **{"capacity": 160, **settings})

    def reference(self, ids: Tensor) -> Tensor:
        """Logits of all tokens through Transformers."""
        packed = PackedModel(self.loaded, self.plan, self.tensors)
        with torch.no_grad():
            out: Any = packed.loaded.model(ids[None], past_key_values=packed.new_cache(capacity=160))
        return Tensor(out.logits[0].float())


@pytest.fixture
def pair(tiny: Tiny, plan_for: PlanFor, means_for: MeansFor) -> Callable[..., Pair]:
    def make(architecture: str, fields: dict[str, Any], dtype: torch.dtype = torch.float32) -> Pair:
        model = tiny(architecture, dtype)
        plan = plan_for(model, **fields)
        return Pair(model, plan, means_for(plan))

    return make


def greedy(runner: ModelRunner, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Tokens, and the logits they were chosen by."""
    logits = [runner.prefill(ids).clone()]
    tokens = [logits[0].argmax()]
    for _ in range(count - 1):
        logits.append(runner.decode(tokens[-1][None])[0].clone())
        tokens.append(logits[-1].argmax())
    return torch.stack(tokens), torch.stack(logits)


def test_greedy_tokens_are_those_of_the_path_through_transformers(
    architecture: str, fields: dict[str, Any], pair: Callable[..., Pair]
) -> None:
    both, ids = pair(architecture, fields), random_ids(50)
    tokens, logits = greedy(both.runner(), ids, 64)
    model: Any = both.loaded.model
    packed = PackedModel(both.loaded, both.plan, both.tensors)
    out = model.generate(
        ids[None], past_key_values=packed.new_cache(capacity=114), max_new_tokens=64, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    expected, scores = out.sequences[0, 50:], torch.cat(out.logits)
    same = int((tokens == expected).long().cumprod(0).sum())
    if same < 64:  # they may part only where two tokens are all but equally likely
        best = scores[same].topk(2).values
        assert float(best[0] - best[1]) < TOLERANCE
    assert_close(logits[:same], scores[:same])


def test_prefill_in_chunks_of_any_size_gives_the_reference_logits(
    architecture: str, fields: dict[str, Any], pair: Callable[..., Pair]
) -> None:
    both, ids = pair(architecture, fields), random_ids(150, seed=1)
    expected = both.reference(ids)
    for chunk in (512, 150, 64, 17, 1):
        runner = both.runner()
        found = runner.prefill(ids, all_logits=True, chunk=chunk)
        assert_close(found, expected)
        last = both.runner().prefill(ids, chunk=chunk)
        assert_close(last, expected[-1])
        assert runner.cache.host_lengths == [150]


def test_decoding_goes_on_from_prefill_and_prefill_from_decoding(
    architecture: str, fields: dict[str, Any], pair: Callable[..., Pair]
) -> None:
    both, ids = pair(architecture, fields), random_ids(110, seed=2)
    expected, runner = both.reference(ids), both.runner()
    found = [runner.prefill(ids[:33], all_logits=True, chunk=20)]
    found += [runner.decode(x[None]).clone() for x in ids[33:70]]
    found.append(runner.prefill(ids[70:100], all_logits=True, chunk=9))
    found += [runner.decode(x[None]).clone() for x in ids[100:]]
    assert_close(torch.cat(found), expected)


def test_a_batch_of_unequal_sequences_decodes_as_each_alone(
    architecture: str, fields: dict[str, Any], pair: Callable[..., Pair]
) -> None:
    both = pair(architecture, fields)
    prompts, more = [random_ids(n, seed=n) for n in (40, 3, 75)], random_ids(3, 20, seed=9)
    runner = both.runner(batch_size=3)
    for row, prompt in enumerate(prompts):
        runner.prefill(prompt, row)
    found = torch.stack([runner.decode(x).clone() for x in more.t()], 1)
    for row, prompt in enumerate(prompts):
        expected = both.reference(torch.cat((prompt, more[row])))[len(prompt) :]
        assert_close(found[row], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_results_depend_on_neither_batch_nor_chunk_nor_split(
    architecture: str, fields: dict[str, Any], dtype: torch.dtype, pair: Callable[..., Pair]
) -> None:
    both, ids = pair(architecture, fields, dtype), random_ids(90, seed=3)
    alone = both.runner(deterministic=True).prefill(ids, all_logits=True)
    if dtype == torch.float32:
        assert_close(alone, both.reference(ids))
    for chunk, split in ((31, 90), (7, 50), (90, 1)):
        runner = both.runner(deterministic=True)
        found = [runner.prefill(ids[:split], all_logits=True, chunk=chunk)]
        found += [runner.decode(x[None]).clone() for x in ids[split:]]
        assert torch.equal(torch.cat(found), alone)
    batch = both.runner(deterministic=True, batch_size=18, capacity=200)
    batch.prefill(random_ids(120, seed=4), 3)
    batch.prefill(ids[:40], 17, chunk=11)
    for i in range(40, 90):
        tokens = random_ids(18, seed=i)
        tokens[17] = ids[i]
        assert torch.equal(batch.decode(tokens)[17], alone[i])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_stay_close_to_the_stock_model(
    architecture: str, dtype: torch.dtype, pair: Callable[..., Pair]
) -> None:
    both, ids = pair(architecture, PLANS["exact"], dtype), random_ids(60)
    expected, runner = both.reference(ids), both.runner()
    found = torch.cat([runner.prefill(ids[:40], all_logits=True), *(runner.decode(x[None]).clone() for x in ids[40:])])
    limit = 0.05 if dtype == torch.bfloat16 else 0.01  # roundings of hidden states, over two or three layers
    assert float((found - expected).norm() / expected.norm()) < limit


def test_log_probs_are_the_reference_paths(
    architecture: str, fields: dict[str, Any], pair: Callable[..., Pair]
) -> None:
    both, ids = pair(architecture, fields), random_ids(100, seed=5)
    expected, nbytes = PackedModel(both.loaded, both.plan, both.tensors).log_probs(ids, scored=50, chunk=40)
    runner = both.runner()
    runner.prefill(ids[:9])
    found, its_bytes = runner.log_probs(ids, scored=50, chunk=33)
    assert_close(found, expected)
    assert its_bytes >= nbytes
    assert its_bytes <= both.plan.bytes_at(100) + sum(x.page_bytes(both.plan.block_size) for x in both.plan.layers)


@pytest.mark.parametrize("chunk", [100, 13])
def test_a_residual_window_wider_than_the_sliding_one(chunk: int, pair: Callable[..., Pair]) -> None:
    both = pair("mistral-sliding", {"k": TOKEN8, "v": TOKEN8, "residual_window": 40})
    ids, runner = random_ids(130, seed=6), both.runner(batch_size=2)
    expected = both.reference(ids)
    for row in (1, 0):
        found = runner.prefill(ids[:100], row, all_logits=True, chunk=chunk)
        assert_close(found, expected[:100])
    for i in range(100, 130):
        found = runner.decode(ids[i].repeat(2))
        assert_close(found, expected[i].expand(2, -1))


def test_the_far_part_is_read_in_segments(monkeypatch: pytest.MonkeyPatch, pair: Callable[..., Pair]) -> None:
    monkeypatch.setattr("kvcli.runtime.prefill.SEGMENT", 32)
    monkeypatch.setattr("kvcli.runtime.prefill.QUERY_BLOCK", 11)
    for architecture in ("llama", "mistral-sliding"):
        both, ids = pair(architecture, PLANS["window"]), random_ids(150, seed=7)
        found = both.runner().prefill(ids, all_logits=True, chunk=40)
        assert_close(found, both.reference(ids))


def test_memory_is_counted_and_weights_are_shared(pair: Callable[..., Pair]) -> None:
    both = pair("qwen2", PLANS["window"])
    runner = both.runner(capacity=150)
    model: Any = both.loaded.model
    assert runner.nbytes["weights"] == sum(x.nbytes for x in model.parameters())
    assert runner.nbytes["cache"] == both.plan.bytes_at(150)
    runner.prefill(random_ids(100))
    constant = runner.nbytes["constant"]
    runner.prefill(random_ids(40))
    assert runner.nbytes["constant"] == constant
    attention = model.model.layers[0].self_attn
    first = runner.weights.layers[0].qkv
    assert first.weight.data_ptr() == attention.q_proj.weight.data_ptr()  # type: ignore[attr-defined]
    again = both.runner().weights.layers[0].qkv
    assert again.weight.data_ptr() == first.weight.data_ptr()  # type: ignore[attr-defined]


def small_llama(**changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**{**shape, **heads, "max_position_embeddings": 512, "initializer_range": 0.1, **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.eval().requires_grad_(False)
    return model


def dense_of(layer: Any) -> torch.Tensor:
    """The weights that a layer computes with: what it makes of the identity."""
    out = torch.empty(layer.shape[1], layer.shape[0])
    layer.bind(torch.eye(layer.shape[1], dtype=torch.bfloat16), out)()
    return out.t() if layer.bias is None else (out - layer.bias.float()).t()


@pytest.mark.parametrize("tied", [False, True])
def test_int4_weights_run_as_their_dequantised_selves(tied: bool, plan_for: PlanFor) -> None:
    model, ids = small_llama(tie_word_embeddings=tied, attention_bias=True, mlp_bias=True), random_ids(70)
    plan = plan_for(model, TOKEN8, TOKEN8, residual_window=8)
    runner = ModelRunner(loaded_of(model), plan, weights="int4", capacity=100)
    assert sum(x.numel() for x in model.parameters() if x.ndim == 2) == 0  # no second copy stays
    other = small_llama(tie_word_embeddings=False, attention_bias=True, mlp_bias=True)
    state = dict(other.named_parameters())
    for i, layer in enumerate(runner.weights.layers):
        at = f"model.layers.{i}."
        for linear, names in (
            (layer.qkv, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            (layer.o, ("self_attn.o_proj",)), (layer.down, ("mlp.down_proj",)),
            (layer.gate_up, ("mlp.gate_proj", "mlp.up_proj")),
        ):  # fmt: skip
            whole: Any = linear
            parts = [state[at + name + ".weight"] for name in names]
            for parameter, part in zip(parts, dense_of(whole).split([len(x) for x in parts]), strict=True):
                assert float((parameter - part).abs().max()) < 0.15 or tied
                parameter.data = part.clone()
    head: Any = runner.weights.head
    state["lm_head.weight"].data = dense_of(head)
    state["model.embed_tokens.weight"].data = runner.weights.embedding.float()
    dense = loaded_of(other)
    packed = PackedModel(dense, plan, {})
    with torch.no_grad():
        out: Any = other(ids[None], past_key_values=packed.new_cache(capacity=100))
    found = torch.cat([runner.prefill(ids[:60], all_logits=True), *(runner.decode(x[None]).clone() for x in ids[60:])])
    assert float((found - out.logits[0]).norm() / out.logits.norm()) < 0.03
    dense_bytes = sum(x.nbytes for x in other.parameters())
    assert runner.nbytes["weights"] < dense_bytes / 4


def test_a_tied_embedding_stays_one_matrix_in_another_dtype(plan_for: PlanFor) -> None:
    model = small_llama(tie_word_embeddings=True)
    weights = ModelRunner(loaded_of(model), plan_for(model, EXACT, EXACT), capacity=8, dtype=torch.bfloat16).weights
    head: Any = weights.head
    assert head.weight.data_ptr() == weights.embedding.data_ptr()
    assert weights.nbytes == sum(x.nbytes for x in model.parameters()) // 2


def test_what_cannot_be_run_is_refused(plan_for: PlanFor) -> None:
    model = small_llama(hidden_act="gelu")
    plan = plan_for(model, EXACT, EXACT)
    with pytest.raises(InputError, match="gelu"):
        ModelRunner(loaded_of(model), plan, capacity=8)
    model = small_llama()
    with pytest.raises(UsageError, match="bfloat16"):
        ModelRunner(loaded_of(model), plan, capacity=8, weights="int4", dtype=torch.float32)
    odd = small_llama(intermediate_size=72)
    with pytest.raises(InputError, match="72 inputs"):
        ModelRunner(loaded_of(odd), plan, capacity=8, weights="int4")
    assert all(x.numel() for x in odd.parameters())  # it keeps its weights
    runner = ModelRunner(loaded_of(model), plan, capacity=8)
    with pytest.raises(UsageError, match="do not fit"):
        runner.prefill(random_ids(9))
    runner.prefill(random_ids(8))
    with pytest.raises(KvcliError, match="empty"):  # a recording runs a step, which may write over what is needed
        runner.capture()
    with pytest.raises(UsageError, match="do not fit"):
        runner.decode(random_ids(1))
    with pytest.raises(UsageError, match="no tokens"):
        runner.prefill(random_ids(0))


def test_tinystories_tells_the_same_story(tinystories: Path, plan_for: PlanFor) -> None:
    loaded = load(str(tinystories), dtype="float32")
    plan = plan_for(loaded.model, TOKEN8, TOKEN8, sink_tokens=4, residual_window=16)
    ids: Tensor = loaded.tokenizer("Once upon a time", return_tensors="pt").input_ids[0]
    model: Any = loaded.model
    packed = PackedModel(loaded, plan, {})
    out = model.generate(
        ids[None], past_key_values=packed.new_cache(), max_new_tokens=80, do_sample=False, pad_token_id=2
    )
    expected = out[0, len(ids) :]
    tokens, _ = greedy(ModelRunner(loaded, plan, capacity=160), ids, len(expected))
    assert torch.equal(tokens, expected)
    exact = ModelRunner(loaded, plan, capacity=160).prefill(out[0], all_logits=True)
    int4 = ModelRunner(loaded, plan, weights="int4", capacity=160).prefill(out[0], all_logits=True)
    p, q = exact.log_softmax(-1), int4.log_softmax(-1)
    assert float((p.exp() * (p - q)).sum(-1).mean()) < 0.2  # the same model, though 4 bits are few for one so small
