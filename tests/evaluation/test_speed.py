"""How speed is measured: turns, medians, bytes and limits. Nothing here looks at what a clock really says."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvcli.evaluation import attention_speed, decode_speed, speed
from kvcli.evaluation.speed import Contestant
from kvcli.models.architectures import LayerGeometry
from kvcli.models.loading import LoadedModel
from kvcli.plan import CachePlan, LayerPlan
from kvcli.quant.format import KVFormat
from kvcli.runtime.packed_model import PackedModel

GEOMETRY = (LayerGeometry(2, 6, 16),) * 3


class Clock:
    """A clock that moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds

        return run

    def timer(self, work: Callable[[], object]) -> float:
        return speed.wall(work, clock=self)


@pytest.fixture
def clock() -> Clock:
    return Clock()


# --- the race ---------------------------------------------------------------------------------------------------------


def test_contestants_take_turns_and_every_other_round_goes_backwards(clock):
    seen: list[str] = []
    entered = [
        Contestant(name, {"go": lambda name=name: seen.append(name)}, {"go": 1}, prepare=lambda: seen.append("-"))
        for name in "abc"
    ]
    seconds = speed.race(entered, rounds=2, warmup=1, timer=clock.timer, step=lambda: seen.append("."))
    assert "".join(seen) == "-c.-b.-a." + "-a.-b.-c." + "-c.-b.-a."
    assert {name: len(x["go"]) for name, x in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_only_phases_are_timed(clock):
    entered = Contestant(
        "a", {"read": clock.work(2), "write": clock.work(3)}, {"read": 10, "write": 1}, prepare=clock.work(100)
    )
    assert speed.race([entered], rounds=2, timer=clock.timer) == {"a": {"read": [2, 2], "write": [3, 3]}}


def test_warm_up_does_not_count(clock):
    pending = iter([50.0, 1.0, 2.0, 3.0])
    entered = Contestant("a", {"go": lambda: clock.work(next(pending))()}, {"go": 1})
    assert speed.race([entered], rounds=3, warmup=1, timer=clock.timer) == {"a": {"go": [1, 2, 3]}}


def test_a_device_is_idle_before_the_clock_starts_and_before_it_stops():
    seen: list[str] = []

    def now() -> float:
        seen.append("clock")
        return 0.0

    speed.wall(lambda: seen.append("work"), clock=now, sync=lambda: seen.append("sync"))
    assert seen == ["sync", "clock", "work", "sync", "clock"]


def test_names_must_differ():
    twice = [Contestant("a", {}, {}), Contestant("a", {}, {})]
    with pytest.raises(ValueError, match="share a name"):
        speed.race(twice, rounds=1)


def test_rows_report_medians_of_one_step():
    entered = [
        Contestant("ours", {"decode": print}, {"decode": 8}, steps={"decode": 4}, bytes_read={"decode": 1000}),
        Contestant("theirs", {"decode": print, "prefill": print}, {"decode": 4, "prefill": 100}),
        Contestant("probe", {"read": print}, {"read": 0}),
    ]
    seconds = {
        "ours": {"decode": [8.0, 4.0, 100.0]},
        "theirs": {"decode": [4.0, 4.0, 4.0], "prefill": [5.0]},
        "probe": {"read": [1.0]},
    }
    ours, theirs = speed.rows(entered, seconds, "decode", threads=2, bandwidth=2000.0)
    assert {"name", "median_s", "tokens_per_s", "bytes_read", "threads"} <= ours.keys()
    assert (ours["name"], ours["median_s"], ours["tokens_per_s"], ours["threads"]) == ("ours", 2.0, 1.0, 2)
    assert (ours["bytes_read"], ours["gb_per_s"], ours["fraction_of_read_bandwidth"]) == (1000, 500 / 1e9, 0.25)
    assert ours["quartiles_s"] == [1.0, 25.0]
    assert (theirs["bytes_read"], theirs["gb_per_s"], theirs["fraction_of_read_bandwidth"]) == (None, None, None)
    assert speed.ratios([ours, theirs]) == {"theirs": 1.0}
    assert [x["tokens_per_s"] for x in speed.rows(entered, seconds, "prefill", threads=2)] == [20.0]


def test_a_clock_too_coarse_gives_no_speed():
    entered = [Contestant(x, {"go": print}, {"go": 1}, bytes_read={"go": 5}) for x in "ab"]
    rows = speed.rows(entered, {"a": {"go": [0.0]}, "b": {"go": [1.0]}}, "go", threads=1)
    assert rows[0]["tokens_per_s"] is None
    assert speed.ratios(rows) == {}


def test_the_fastest_probe_is_the_limit():
    seconds = {"dot": {"read": [1.0, 2.0, 3.0]}, "sum": {"read": [4.0]}, "copy": {"copy": [4.0]}, "a": {"go": [0.1]}}
    assert speed.bandwidth(seconds, nbytes=100) == {"read": 50.0, "copy": 50.0}


def test_probes_run():
    seconds = speed.race(speed.bandwidth_probes(nbytes=4096), rounds=1)
    assert all(x > 0 for x in speed.bandwidth(seconds, 4096).values())


def test_the_machine_is_named():
    facts = speed.machine(3)
    assert facts["threads"] == 3
    assert facts["versions"]["torch"]
    assert facts["processor"]
    assert facts["last_level_cache_bytes"] >= 2**15
    json.dumps(facts)


# --- attention --------------------------------------------------------------------------------------------------------


def test_an_exact_cache_is_read_whole():
    plan = attention_speed.uniform(GEOMETRY, 16)
    assert attention_speed.bytes_read(plan, 100, batch=2) == 2 * 100 * plan.scalars_per_token * 2


def test_a_packed_cache_is_read_in_pages_below_the_boundary_and_in_16_bits_above():
    fmt = KVFormat(4, group=16, scale_dtype="e5m3")
    plan = CachePlan((LayerPlan(2, 16, fmt, fmt),), block_size=16, sink_tokens=4, residual_window=8)
    pages = 5 * plan.layers[0].page_bytes(16)  # 16 * ((90 - 8) // 16) = 80 slots
    assert attention_speed.bytes_read(plan, 90) == pages + (10 + 4) * 64 * 2
    assert attention_speed.bytes_read(plan, 7) == 7 * 64 * 2  # nothing is packed, and no sink stands in for anything


def test_a_sliding_layer_is_read_within_its_window():
    plan = attention_speed.uniform([LayerGeometry(2, 4, 16, "sliding", 32)], 8)
    read = [attention_speed.bytes_read(plan, n) for n in (31, 32, 1000)]
    assert read[0] < read[1] == read[2]


@pytest.mark.parametrize("bits", attention_speed.UNIFORM_BITS)
def test_uniform_plans_need_nothing_beside_their_pages(bits):
    plan = attention_speed.uniform(GEOMETRY, bits)
    assert plan.nominal_bits == bits
    assert plan.is_portable(0)


def test_both_ways_to_call_sdpa_give_the_same_result():
    torch.manual_seed(0)
    folded = attention_speed.Sdpa(GEOMETRY[:1], 50, batch=2)
    (q, k, v), (wide, _, _) = folded.layers[0], folded.as_gqa().layers[0]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(sdpa(q, k, v).flatten(1, 2), sdpa(wide, k, v, enable_gqa=True)[:, :, 0])
    assert folded.bytes_read == 2 * k.nbytes


def test_everybody_attends_on_the_reference():
    entered = attention_speed.contestants(
        attention_speed.uniform(GEOMETRY, 4), GEOMETRY, 40, backend="reference", batch=2, bits=(16, 2), flush=False
    )
    seconds = speed.race(entered, rounds=1)
    rows = speed.rows(entered, seconds, attention_speed.PHASE, threads=1)
    assert [x["name"] for x in rows] == [
        "kvcli reference", "kvcli reference, uniform 16 bits", "kvcli reference, uniform 2 bits", "torch sdpa float32",
        "torch sdpa bfloat16",
    ]  # fmt: skip
    read = [x["bytes_read"] for x in rows]
    assert read[2] < read[0] < read[1] == read[4] < read[3]


def test_every_layer_and_sequence_is_filled_alike(native):
    fmt = KVFormat(4, group=16)
    layer = LayerPlan(2, 16, fmt, fmt)
    plan = CachePlan((layer, layer.with_format("v", KVFormat(2, group=16)), layer), sink_tokens=4, residual_window=8)
    step = attention_speed.NativeAttention(plan, GEOMETRY, 600, batch=2, library=native)
    assert step.cache.host_lengths == [599, 599]
    step.q = [torch.ones_like(q) for q in step.q]
    step()
    first, second, third = step.out
    assert first.abs().max() > 0
    torch.testing.assert_close(first[0], first[1])
    torch.testing.assert_close(first, third)
    assert not torch.equal(first, second)


# --- whole models -----------------------------------------------------------------------------------------------------


def test_text_is_repeated_until_it_is_long_enough(loaded, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("Once upon a time there was a little bird who sang all day in a tree. " * 3)
    short = decode_speed.text(str(file), loaded.tokenizer, 20)
    long = decode_speed.text(str(file), loaded.tokenizer, 300)
    assert (len(short), len(long)) == (20, 300)
    assert torch.equal(long[:20], short)


def decoders(loaded: LoadedModel) -> list[Any]:
    exact = attention_speed.uniform(loaded.geometry, 16)
    return [
        decode_speed.ReferenceDecoder("reference", PackedModel(loaded, exact, {}), 40, 44),
        decode_speed.TransformersDecoder("stock", loaded, 40),
    ]


@pytest.mark.parametrize("random", [False, True])
def test_decoders_share_a_model_and_hold_as_many_tokens(loaded, random):
    ids = torch.arange(44)
    both = decoders(loaded)
    entered = [decode_speed.contestant(x, ids, 40, random=random) for x in both]
    seconds = speed.race(entered, rounds=2)
    assert seconds["stock"].keys() == ({"decode"} if random else {"prefill", "decode"})
    assert both[0].cache.lengths == [44]
    assert both[1].cache.get_seq_length() == 44
    assert entered[0].steps == {"decode": 4}


def test_weights_are_counted_with_the_cache(loaded):
    reference, stock = decoders(loaded)
    weights = decode_speed.matrix_bytes(loaded)
    everything = sum(p.nbytes for p in loaded.model.parameters() if p.ndim == 2)
    embedding = loaded.model.get_input_embeddings().weight.nbytes
    assert weights == everything - (0 if loaded.model.config.tie_word_embeddings else embedding)
    scalars = reference.model.plan.scalars_per_token
    assert reference.bytes_read == weights + 41 * scalars * 2
    assert stock.bytes_read == weights + 41 * scalars * 4
