"""The packed cache under Transformers: stock logits where nothing is quantised, and the bytes that the plan counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from kvcli.errors import InputError, KvcliError
from kvcli.models.architectures import Rope
from kvcli.plan import CachePlan
from kvcli.quant.format import KVFormat
from kvcli.runtime.packed_cache import PackedCache

Tiny = Callable[..., PreTrainedModel]
PlanFor = Callable[..., CachePlan]
MeansFor = Callable[[CachePlan], dict[str, Tensor]]

EXACT = KVFormat(16)
TOKEN4 = KVFormat(4, group=8)
CHANNEL2 = KVFormat(2, "channel", 16, symmetric=False)
EVERYTHING: dict[str, Any] = {
    "k": CHANNEL2, "v": TOKEN4, "sink_tokens": 4, "residual_window": 8,
    "rope": "before", "center": True, "transform": "hadamard",
}  # fmt: skip
SLIDING = {"mistral-sliding", "qwen2-sliding"}


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 96, shape, generator=torch.Generator().manual_seed(seed))


def run(model: PreTrainedModel, cache: Cache, ids: Tensor, chunk: int | None = None) -> Tensor:
    """Return the logits of all tokens, fed in chunks."""
    parts = ids.split(chunk or ids.shape[1], dim=1)
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)


def generate(model: PreTrainedModel, ids: Tensor, cache: Cache | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the sequences and the logits they were chosen by."""
    out: Any = model.generate(
        ids, past_key_values=cache, max_new_tokens=12, do_sample=False,
        output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)


# --- 16 bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_give_the_stock_logits_bit_for_bit(
    architecture: str, dtype: torch.dtype, tiny: Tiny, plan_for: PlanFor
) -> None:
    stock, ours = tiny(architecture, dtype, "sdpa"), tiny(architecture, dtype)
    plan = plan_for(ours, EXACT, EXACT)
    # 24 tokens just fill a sliding window, 23 do not
    for batch, n, chunks in ((1, 60, (None, 1, 24, 31)), (1, 24, (None, 23)), (3, 40, (None, 7))):
        ids = random_ids(batch, n)
        for chunk in chunks:
            expected = run(stock, DynamicCache(config=stock.config), ids, chunk)
            packed = run(ours, PackedCache(plan, batch_size=batch), ids, chunk)
            assert torch.equal(packed, expected), (batch, n, chunk)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {}),
        (torch.float16, {}),
        (torch.bfloat16, {"num_beams": 3}),
        (torch.float16, {"prefill_chunk_size": 9}),
    ],
    ids=["bfloat16", "float16", "beams", "chunks"],
)
def test_sixteen_bits_generate_the_stock_tokens_and_logits_bit_for_bit(
    architecture: str, dtype: torch.dtype, options: dict[str, Any], tiny: Tiny, plan_for: PlanFor
) -> None:
    stock, ours = tiny(architecture, dtype, "sdpa"), tiny(architecture, dtype)
    ids = random_ids(2, 20)
    cache = PackedCache(plan_for(ours, EXACT, EXACT), batch_size=2 * options.get("num_beams", 1))
    for a, b in zip(generate(ours, ids, cache, **options), generate(stock, ids, **options), strict=True):
        assert torch.equal(a, b)


def test_with_float32_compute_keys_and_values_are_rounded_to_float16_and_nothing_else_changes(
    architecture: str, tiny: Tiny, plan_for: PlanFor
) -> None:
    class Rounding(DynamicCache):
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            return super().update(key_states.half().float(), value_states.half().float(), *args, **kwargs)

    stock, ours = tiny(architecture, torch.float32, "sdpa"), tiny(architecture, torch.float32)
    plan = plan_for(ours, EXACT, EXACT)
    ids = random_ids(1, 50)
    for chunk in (None, 1, 9):
        packed = run(ours, PackedCache(plan), ids, chunk)
        assert torch.equal(packed, run(stock, Rounding(config=stock.config), ids, chunk))
        assert not torch.equal(packed, run(stock, DynamicCache(config=stock.config), ids, chunk))


def test_the_test_format_of_32_bits_changes_nothing_in_float32(
    architecture: str, tiny: Tiny, plan_for: PlanFor
) -> None:
    stock, ours = tiny(architecture, torch.float32, "sdpa"), tiny(architecture, torch.float32)
    plan = plan_for(ours, KVFormat(32), KVFormat(32))
    ids = random_ids(1, 50)
    assert torch.equal(run(ours, PackedCache(plan), ids, 9), run(stock, DynamicCache(config=stock.config), ids, 9))


@pytest.mark.parametrize(
    "fields", [{}, {"rope": "before", "transform": "hadamard", "center": True}], ids=["plain", "all"]
)
def test_fewer_bits_are_further_from_the_stock_model(
    architecture: str, fields: dict[str, Any], tiny: Tiny, plan_for: PlanFor, means_for: MeansFor
) -> None:
    # eight bits are all but exact, so windows, positions and the rotary embedding are the model's own
    stock, ours, ids = tiny(architecture, torch.float32, "sdpa"), tiny(architecture), random_ids(1, 60)
    exact = stock(ids).logits.log_softmax(-1)
    divergence = []
    for bits in (8, 4, 2):
        fmt = KVFormat(bits, group=8)
        plan = plan_for(ours, fmt, fmt, **fields)
        cache = PackedCache(plan, rope=Rope.from_model(ours), tensors=means_for(plan))
        logits = run(ours, cache, ids).log_softmax(-1)
        divergence.append((exact.exp() * (exact - logits)).sum(-1).mean().item())
    assert divergence[0] < 1e-3
    assert divergence[0] < divergence[1] < divergence[2]


# --- bytes ----------------------------------------------------------------------------------------------------------


def tensors_in(root: object) -> Iterator[Tensor]:
    """Every tensor reachable from an object, through attributes and containers."""
    stack, seen = [root], set[int]()
    while stack:
        x = stack.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, Tensor):
            yield x
        if isinstance(x, dict):
            stack += [*x.keys(), *x.values()]
        elif isinstance(x, (list, tuple, set)):
            stack += x
        stack += [getattr(x, name) for name in getattr(type(x), "__slots__", ()) if hasattr(x, name)]
        stack += vars(x).values() if hasattr(x, "__dict__") and not isinstance(x, type) else ()


def reachable_bytes(*roots: object) -> int:
    """Bytes of all memory that tensors reachable from the objects hold on to, views counted with what they view."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for x in roots for t in tensors_in(x)}
    return sum(storages.values())


@pytest.mark.parametrize("chunk", [None, 1, 13])
@pytest.mark.parametrize("reserve", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen2-sliding"])
def test_nothing_but_packed_bytes_and_means_is_kept(
    name: str, reserve: bool, chunk: int | None, tiny: Tiny, plan_for: PlanFor, means_for: MeansFor
) -> None:
    # every tensor the cache can reach, so that a decoded copy has nowhere to hide
    model = tiny(name)
    plan, ids = plan_for(model, **EVERYTHING), random_ids(2, 70)
    means, rope = means_for(plan), Rope.from_model(model)
    cache = PackedCache(plan, batch_size=2, capacity=70 * reserve, rope=rope, tensors=means)
    run(model, cache, ids, chunk)
    assert reachable_bytes(cache) == cache.nbytes + reachable_bytes(means, rope)
    if reserve or name == "llama":
        assert cache.nbytes == 2 * plan.bytes_at(70)
    else:  # a sliding layer that was not reserved holds a page less than its worst step at most
        assert cache.nbytes <= 2 * plan.bytes_at(70)


@pytest.mark.parametrize("fields", [{"k": EXACT, "v": EXACT}, EVERYTHING], ids=["exact", "everything"])
def test_measured_bytes_are_the_plans(
    architecture: str, fields: dict[str, Any], tiny: Tiny, plan_for: PlanFor, means_for: MeansFor
) -> None:
    model = tiny(architecture)
    plan = plan_for(model, **fields)
    more: dict[str, Any] = {"rope": Rope.from_model(model), "tensors": means_for(plan)}
    for n in (1, 15, 16, 17, 24, 40, 41, 100):
        reserved, grown = PackedCache(plan, capacity=n, **more), PackedCache(plan, **more)
        run(model, reserved, random_ids(1, n), 33)
        run(model, grown, random_ids(1, n))
        assert reserved.nbytes == plan.bytes_at(n)
        assert grown.nbytes == plan.bytes_at(n) or (architecture in SLIDING and grown.nbytes < plan.bytes_at(n))
        assert reserved.lengths == grown.lengths == [n]


# --- batches --------------------------------------------------------------------------------------------------------


def padded(ids: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Left-pad sequences; return ids, mask and positions."""
    longest = max(len(x) for x in ids)
    batch = torch.stack([torch.cat((x.new_zeros(longest - len(x)), x)) for x in ids])
    mask = torch.stack([torch.arange(longest) >= longest - len(x) for x in ids]).long()
    return batch, mask, (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("fields", [{"k": EXACT, "v": EXACT}, EVERYTHING], ids=["exact", "everything"])
@pytest.mark.parametrize("chunk", [10, 1])
def test_a_ragged_batch_is_each_sequence_alone(
    architecture: str, chunk: int, fields: dict[str, Any], tiny: Tiny, plan_for: PlanFor, means_for: MeansFor
) -> None:
    model = tiny(architecture, torch.float64)
    plan = plan_for(model, **fields)
    more: dict[str, Any] = {"rope": Rope.from_model(model), "tensors": means_for(plan)}
    sequences = [random_ids(n, seed=n) for n in (64, 41, 5)]
    batch, mask, positions = padded(sequences)
    cache = PackedCache(plan, batch_size=3, **more)
    logits = []
    for start in range(0, 64, chunk):  # the shortest sequence has chunks of nothing but padding
        end = min(start + chunk, 64)
        out = model(
            batch[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
        )
        logits.append(out.logits)
    together = torch.cat(logits, dim=1)
    assert cache.lengths == [64, 41, 5]
    for row, ids in enumerate(sequences):
        alone = run(model, PackedCache(plan, **more), ids[None])[0]
        torch.testing.assert_close(together[row, -len(ids) :], alone, rtol=0, atol=1e-9)


@pytest.mark.usefixtures("float64_norms")
def test_a_ragged_batch_generates_what_each_prompt_alone_does(
    architecture: str, tiny: Tiny, plan_for: PlanFor, means_for: MeansFor
) -> None:
    model = tiny(architecture, torch.float64)
    plan = plan_for(model, **EVERYTHING)
    more: dict[str, Any] = {"rope": Rope.from_model(model), "tensors": means_for(plan)}
    prompts = [random_ids(n, seed=n) for n in (30, 17, 2)]
    batch, mask, _ = padded(prompts)
    sequences, logits = generate(model, batch, PackedCache(plan, batch_size=3, **more), attention_mask=mask)
    assert sequences.shape == (3, 42)
    for row, ids in enumerate(prompts):
        alone, its_logits = generate(model, ids[None], PackedCache(plan, **more))
        assert torch.equal(sequences[row, 30:], alone[0, len(ids) :])
        torch.testing.assert_close(logits[:, row], its_logits[:, 0], rtol=0, atol=1e-9)


@pytest.mark.usefixtures("float64_norms")
def test_reordered_beams_go_on_as_if_they_had_been_run_so(
    architecture: str, tiny: Tiny, plan_for: PlanFor, means_for: MeansFor
) -> None:
    model = tiny(architecture, torch.float64)
    plan = plan_for(model, **EVERYTHING)
    more: dict[str, Any] = {"rope": Rope.from_model(model), "tensors": means_for(plan)}
    past, after, beams = random_ids(3, 45), random_ids(3, 20, seed=1), torch.tensor([2, 0, 0])
    cache = PackedCache(plan, batch_size=3, **more)
    run(model, cache, past)
    cache.reorder_cache(beams)
    continued = run(model, cache, after)
    again = run(model, PackedCache(plan, batch_size=3, **more), torch.cat((past[beams], after), 1))
    torch.testing.assert_close(continued, again[:, 45:], rtol=0, atol=1e-9)
    assert cache.nbytes <= 3 * plan.bytes_at(65)


@pytest.mark.usefixtures("float64_norms")
def test_sequences_can_be_repeated_and_chosen(tiny: Tiny, plan_for: PlanFor, means_for: MeansFor) -> None:
    model = tiny("llama", torch.float64)
    plan = plan_for(model, **EVERYTHING)
    more: dict[str, Any] = {"rope": Rope.from_model(model), "tensors": means_for(plan)}
    past, after = random_ids(2, 45), random_ids(3, 20, seed=1)
    cache = PackedCache(plan, batch_size=2, **more)
    run(model, cache, past)
    cache.batch_repeat_interleave(2)  # rows 0, 0, 1, 1
    cache.batch_select_indices(torch.tensor([3, 0, 1]))
    rows = [1, 0, 0]
    again = run(model, PackedCache(plan, batch_size=3, **more), torch.cat((past[rows], after), 1))
    torch.testing.assert_close(run(model, cache, after), again[:, 45:], rtol=0, atol=1e-9)


def test_generation_goes_on_from_a_cache_that_was_filled_before(
    architecture: str, tiny: Tiny, plan_for: PlanFor
) -> None:
    # one more turn of a conversation: the cache is handed to generate again
    model = tiny(architecture, torch.bfloat16)
    plan, ids = plan_for(model, TOKEN4, TOKEN4, residual_window=8), random_ids(1, 20)
    cache = PackedCache(plan)
    first, _ = generate(model, ids, cache)
    turn = torch.cat((first, random_ids(1, 5, seed=1)), 1)
    second, _ = generate(model, turn, cache)
    assert cache.lengths == [second.shape[1] - 1]  # the last token was chosen, not fed
    assert torch.equal(second[:, : turn.shape[1]], turn)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reserved", "given"), [(1, 2), (3, 2)])
def test_a_batch_of_the_wrong_size_is_an_error(reserved: int, given: int, tiny: Tiny, plan_for: PlanFor) -> None:
    model = tiny("llama")
    for fmt in (TOKEN4, EXACT):
        cache = PackedCache(plan_for(model, fmt, fmt), batch_size=reserved)
        with pytest.raises(KvcliError, match=f"holds {reserved} sequences and was given {given}"):
            model(random_ids(given, 4), past_key_values=cache)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_model_without_a_packed_cache_says_so(use_cache: bool, tiny: Tiny) -> None:
    with pytest.raises(KvcliError, match="pass one as past_key_values"):
        tiny("llama")(random_ids(1, 4), use_cache=use_cache)


def test_a_missing_mean_is_an_error_before_any_work(tiny: Tiny, plan_for: PlanFor, means_for: MeansFor) -> None:
    model = tiny("llama")
    plan = plan_for(model, **EVERYTHING)
    tensors = {name: x for name, x in means_for(plan).items() if name != "layer.1.v.mean"}
    with pytest.raises(InputError, match=r"tensor layer\.1\.v\.mean is missing"):
        PackedCache(plan, rope=Rope.from_model(model), tensors=tensors)


def test_what_a_packed_cache_cannot_do_it_says(tiny: Tiny, plan_for: PlanFor) -> None:
    model = tiny("llama")
    cache = PackedCache(plan_for(model, TOKEN4, TOKEN4))
    for call in (cache.reset, lambda: cache.crop(-1)):
        with pytest.raises(KvcliError, match="a packed cache"):
            call()
