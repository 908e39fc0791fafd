"""What the CUDA kernels do on a GPU: right results, and how fast beside torch's attention and plain copies of memory.

One call on a machine that has a GPU and the built library, under ten minutes, one JSON, written after every part:

1. checks: formats, head sizes and ragged lengths against the plain reference;
2. attention of one token a sequence in the shape of Llama-3.1-8B and Qwen3-8B, against SDPA (flash, bfloat16) and the
   bandwidth of a plain copy;
3. decoding with an 8B-shaped Llama of random weights, against the same runner with the exact 16-bit cache.

    python benchmarks/gpu.py --out $OUT/gpu.json
    python benchmarks/gpu.py --device cpu --tiny      the same code on the CPU library with toy shapes
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gpu_checks
import torch

from kvcli.evaluation import attention_speed as attention
from kvcli.evaluation import decode_speed, speed
from kvcli.models.architectures import LayerGeometry
from kvcli.runtime import kvrt

SHAPE = LayerGeometry(num_kv_heads=8, num_heads=32, head_dim=128)
MODELS = {"Llama-3.1-8B": 32, "Qwen3-8B": 36}  # layers; the attention of both is 32 query and 8 KV heads of 128
FLASH = [torch.nn.attention.SDPBackend.FLASH_ATTENTION, torch.nn.attention.SDPBackend.MATH]
SHARES = {"checks": 0.2, "attention": 0.45, "decode": 0.35}  # of the time; what a part leaves over goes to the next


@dataclass(frozen=True)
class Sizes:
    """What is run: the real thing, or a toy of it."""

    head_dims: tuple[int, ...] = (64, 128)
    lengths: tuple[int, ...] = (1, 15, 100, 513, 1029, 2500)  # one batch, no two alike
    shape: LayerGeometry = SHAPE
    batches: tuple[int, ...] = (1, 16, 64)
    contexts: tuple[int, ...] = (2048, 8192, 32768, 131072)
    copy_bytes: int = 4 * 2**30
    hidden: int = 4096
    intermediate: int = 14336
    layers: int = 32
    vocabulary: int = 128256
    decode_batches: tuple[int, ...] = (1, 16)
    decode_depth: int = 32768
    tokens: int = 16
    rounds: int = 5


TINY = Sizes(
    head_dims=(64,), lengths=(1, 15, 70), shape=LayerGeometry(1, 4, 64), batches=(1, 2), contexts=(64, 160),
    copy_bytes=2**20, hidden=256, intermediate=128, layers=2, vocabulary=96, decode_batches=(1, 2), decode_depth=96,
    tokens=2, rounds=1,
)  # fmt: skip


@dataclass
class Budget:
    """Wall time, shared out: a part that is over its share stops, and says what it left out."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    began: float = field(init=False)

    def __post_init__(self) -> None:
        self.began = self.clock()

    def deadline(self, part: str) -> float:
        """When a part has to end, seconds after the beginning."""
        names = list(SHARES)
        return self.seconds * sum(SHARES[x] for x in names[: names.index(part) + 1])

    def spent(self) -> float:
        """Seconds since the beginning."""
        return self.clock() - self.began

    def allows(self, part: str) -> bool:
        """Whether a part may begin something more."""
        return self.spent() < self.deadline(part)


@dataclass
class Run:
    """One run's settings, and its JSON as it grows."""

    device: torch.device
    library: kvrt.Library
    sizes: Sizes
    budget: Budget
    out: Path
    result: dict[str, Any]

    def save(self) -> None:
        """Write what there is so far: a run that is killed leaves its finished parts."""
        self.result["seconds"] = self.budget.spent()
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.result, indent=1) + "\n", "utf-8")

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Put a failure into the JSON and go on."""
        try:
            yield
        except Exception as error:  # whatever goes wrong on a borrowed machine, the rest is still worth having
            self.result["failed"].append({"what": what, "error": f"{type(error).__name__}: {error}"})
            print(f"FAILED {what}: {error}", flush=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


# --- 1: checks --------------------------------------------------------------------------------------------------------


def checks(run: Run) -> list[dict[str, Any]]:
    """Hold the kernels to the reference."""
    found = []
    for head_dim in run.sizes.head_dims:
        for name, plan in gpu_checks.plans(head_dim).items():
            for dtype in gpu_checks.TOLERANCE:
                what = f"check: {name}, head {head_dim}, {str(dtype)[6:]}"
                if not run.budget.allows("checks"):
                    run.result["skipped"].append(what)
                    continue
                with run.guarded(what):
                    measured = gpu_checks.check(run.library, run.device, plan, run.sizes.lengths, dtype)
                    found.append({"check": what, **measured})
                    if not measured["passed"]:
                        run.result["failed"].append({"what": what, **measured})
    return found


# --- 2: attention -----------------------------------------------------------------------------------------------------


def captured(step: Callable[[], None], run: Run, execs: list[kvrt.Exec]) -> Callable[[], object]:
    """Return the step as a CUDA graph, so that launches cost what they cost in a decoder that captures its steps."""
    if run.device.type != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        for x in execs:
            x.stream = side.cuda_stream
        step()
        side.synchronize()
        with torch.cuda.graph(graph, stream=side):
            step()
    torch.cuda.current_stream().wait_stream(side)
    return graph.replay


def events(work: Callable[[], object]) -> float:
    """Time by the GPU's own clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def layers_for(bytes_per_layer: int, cache_bytes: int, free: float) -> int:
    """Return how many layers outgrow the L2 cache four times over; 0 if not even one fits into memory."""
    return min(64, max(1, -(-4 * cache_bytes // bytes_per_layer)), int(free // bytes_per_layer))


def attention_case(run: Run, batch: int, context: int, limit: dict[str, float]) -> dict[str, Any]:
    """Race all formats at one batch and context; times are of one layer."""
    g, cuda = run.sizes.shape, run.device.type == "cuda"
    l2 = speed.last_level_cache(run.device) if cuda else 2**16
    free = 0.85 * torch.cuda.mem_get_info(run.device)[0] if cuda else 2**28
    entered, left_out = [], []

    def enter(name: str, one: int, make: Callable[[tuple[LayerGeometry, ...]], Any]) -> None:
        nonlocal free
        count = layers_for(one, l2, free)
        if not count:
            left_out.append(name)
            return
        free -= count * one
        step = make((g,) * count)
        for title, x in ((name, step), (f"{name}, enable_gqa", step.as_gqa() if name.startswith("sdpa") else None)):
            if x is not None:
                work = captured(x, run, [x.cache.exec] if hasattr(x, "cache") else [])
                entered.append(
                    speed.Contestant(
                        title, {"attention": work}, {"attention": batch * count}, {"attention": count},
                        {"attention": x.bytes_read // count},
                    )
                )  # fmt: skip

    dense = 2 * 2 * batch * context * g.num_kv_heads * g.head_dim
    enter(
        "sdpa bfloat16",
        dense,
        lambda gs: attention.Sdpa(gs, context, batch=batch, device=run.device, dtype=torch.bfloat16),
    )
    for bits in attention.UNIFORM_BITS:
        one = attention.uniform((g,), bits, dtype="bfloat16").bytes_at(context) * batch
        make = lambda gs, bits=bits: attention.NativeAttention(  # noqa: E731
            attention.uniform(gs, bits, dtype="bfloat16"), gs, context, batch=batch, library=run.library,
            device=run.device, dtype=torch.bfloat16,
        )  # fmt: skip
        enter(f"kvcli {bits} bits", one, make)
    seconds = speed.race(entered, rounds=4 * run.sizes.rounds, warmup=2, timer=events if cuda else speed.wall)
    rows = speed.rows(entered, seconds, "attention", threads=0, bandwidth=limit["copy"])
    for row in rows:
        row["fraction_of_copy_bandwidth"] = row.pop("fraction_of_read_bandwidth")
        row["model_step_s"] = {name: count * row["median_s"] for name, count in MODELS.items()}
    peers = [x for x in rows if x["name"].startswith("sdpa")]
    ratios = {x["name"]: speed.ratios([x, *peers]) for x in rows if x not in peers}
    return {"batch": batch, "context": context, "ratios": ratios, "results": rows, "did_not_fit": left_out}


def attention_sweep(run: Run) -> dict[str, Any]:
    """Race at every batch and context, the small ones first."""
    probes = speed.bandwidth_probes(run.device, run.sizes.copy_bytes)
    timer = events if run.device.type == "cuda" else speed.wall
    limit = speed.bandwidth(speed.race(probes, timer=timer), run.sizes.copy_bytes)
    del probes
    found: dict[str, Any] = {"shape": vars(run.sizes.shape), "bandwidth": limit, "cases": []}
    sizes = [(b, n) for b in run.sizes.batches for n in run.sizes.contexts]
    for batch, context in sorted(sizes, key=lambda x: x[0] * x[1]):
        what = f"attention: batch {batch}, context {context}"
        if not run.budget.allows("attention"):
            run.result["skipped"].append(what)
            continue
        with run.guarded(what), torch.nn.attention.sdpa_kernel(FLASH):
            found["cases"].append(attention_case(run, batch, context, limit))
            run.result["attention"] = found
            run.save()
            print(what, found["cases"][-1]["ratios"], flush=True)
    return found


# --- 3: decoding ------------------------------------------------------------------------------------------------------


def random_llama(run: Run) -> Any:
    """Return an 8B-shaped Llama with random bfloat16 weights on the device (float32 on a CPU)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from kvcli.models.architectures import Rope, geometry
    from kvcli.models.loading import LoadedModel

    s = run.sizes
    config = LlamaConfig(
        vocab_size=s.vocabulary, hidden_size=s.hidden, intermediate_size=s.intermediate, num_hidden_layers=s.layers,
        num_attention_heads=s.shape.num_heads, num_key_value_heads=s.shape.num_kv_heads, head_dim=s.shape.head_dim,
        max_position_embeddings=131072, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        dtype="bfloat16" if run.device.type == "cuda" else "float32",
    )  # fmt: skip
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if run.device.type == "cuda" else torch.float32)
    try:
        with torch.device(run.device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(dtype)
    model = model.eval().requires_grad_(False)
    return LoadedModel(model, None, "random", geometry(config), Rope.from_model(model), ())  # type: ignore[arg-type]


def decode_case(run: Run, loaded: Any, batch: int) -> dict[str, Any]:
    """Time decoding at one batch, plan after plan: side by side they would not fit."""
    s = run.sizes
    bits_of = {"kvcli 4 bits": 4, "kvcli 3 bits": 3, "kvcli 2 bits": 2, "16-bit cache": 16}
    rows = []
    for name, bits in bits_of.items():
        if not run.budget.allows("decode"):
            run.result["skipped"].append(f"decode: {name}, batch {batch}")
            continue
        with run.guarded(f"decode: {name}, batch {batch}"):
            plan = replace(attention.uniform(loaded.geometry, bits), dtype=loaded.dtype)
            decoder = decode_speed.native(
                name, loaded, plan, {}, backend="cuda" if run.device.type == "cuda" else "cpu", depth=s.decode_depth,
                capacity=s.decode_depth + s.tokens, batch_size=batch,
            )  # fmt: skip
            ids = torch.arange(s.decode_depth + s.tokens, device=run.device) % s.vocabulary
            entered = [decode_speed.contestant(decoder, ids, s.decode_depth, random=True, batch=batch)]
            seconds = speed.race(entered, rounds=s.rounds, timer=speed.timer_for(run.device))
            rows += speed.rows(entered, seconds, "decode", threads=0)
            rows[-1]["cache_bytes"] = decoder.runner.cache.nbytes
            del decoder, entered
    exact = [x for x in rows if x["name"] == "16-bit cache"]
    ratios = {x["name"]: speed.ratios([x, *exact]) for x in rows if x not in exact}
    return {"batch": batch, "depth": s.decode_depth, "ratios": ratios, "results": rows}


def decoding(run: Run) -> list[dict[str, Any]]:
    """Decode with an 8B-shaped model at every batch."""
    loaded = random_llama(run)
    found = []
    for batch in run.sizes.decode_batches:
        found.append(decode_case(run, loaded, batch))
        run.result["decode"] = found
        run.save()
        print(f"decode: batch {batch}", found[-1]["ratios"], flush=True)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run all parts; 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy shapes: a check of this script")
    parser.add_argument("--seconds", type=float, default=500, help="time budget")
    parser.add_argument("--parts", default="checks,attention,decode")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"))
    args = parser.parse_args(arguments)
    try:
        library = kvrt.library(args.device)
    except kvrt.NativeError as error:
        raise SystemExit(str(error)) from None
    result: dict[str, Any] = {
        "question": "are the kernels right on a GPU, and how fast beside torch's attention and a plain copy?",
        "machine": speed.machine(torch.get_num_threads(), args.device), "variant": library.variant,
        "tiny": args.tiny, "failed": [], "skipped": [],
    }  # fmt: skip
    device = torch.device(args.device)
    run = Run(device, library, TINY if args.tiny else Sizes(), Budget(args.seconds), args.out, result)
    parts: dict[str, Callable[[Run], Any]] = {"checks": checks, "attention": attention_sweep, "decode": decoding}
    for name in args.parts.split(","):
        with torch.inference_mode(), run.guarded(name):
            result[name] = parts[name](run)
        run.save()
    done = result.get("checks", [])
    print(f"{sum(x['passed'] for x in done)} of {len(done)} checks passed, {len(result['failed'])} failures")
    return int(bool(result["failed"]))


if __name__ == "__main__":
    raise SystemExit(main())
