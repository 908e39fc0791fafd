"""lm-evaluation-harness reads artifacts, and finds what we find."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

ROWS = [
    {"question": f"The {x} saw", "choices": ["a big red ball in the park", "the sun", "it"], "answer": i % 3}
    for i, x in enumerate(("dog", "cat", "bird", "girl"))
]
TASK = """
task: own_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture(scope="module")
def artifact(tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("harness") / "artifact"
    words = ("calibrate", str(tinystories), "--bits", "4", "--context", "512", "--tokens", "1024", "-o", str(out))
    subprocess.run([sys.executable, "-m", "kvcli", *words], check=True, capture_output=True)
    return out


def likelihoods(lm: Any, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    from lm_eval.api.instance import Instance

    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    return list(lm.loglikelihood(asked, disable_tqdm=True))


def test_the_exact_cache_gives_what_the_harnesss_own_model_gives(artifact):
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    import kvcli.evaluation.harness  # noqa: F401

    pairs = [(f"Question: {x['question']}\nAnswer:", f" {y}") for x in ROWS for y in x["choices"]] + [("", "Once")]
    ours = get_model("kvcli").create_from_arg_string(f"artifact={artifact},exact=True")
    theirs = get_model("hf").create_from_arg_string(f"pretrained={artifact},device=cpu,dtype=bfloat16,batch_size=1")
    for a, b in zip(likelihoods(ours, pairs), likelihoods(theirs, pairs), strict=True):
        assert a[0] == pytest.approx(b[0], rel=0.02, abs=0.1)  # bfloat16, in other batches
    packed = get_model("kvcli").create_from_arg_string(f"artifact={artifact}")
    assert likelihoods(packed, pairs) != likelihoods(ours, pairs)
    text = Instance("loglikelihood_rolling", {}, ("Once upon a time there was a dog. " * 90,), 0)
    a, b = (x.loglikelihood_rolling([text], disable_tqdm=True)[0] for x in (ours, theirs))
    assert a == pytest.approx(b, rel=0.05)
    until = Instance("generate_until", {}, ("Once upon a time", {"until": ["."], "max_gen_toks": 20}), 0)
    assert ours.generate_until([until], disable_tqdm=True) == theirs.generate_until([until], disable_tqdm=True)


def test_its_command_line_knows_artifacts_and_agrees_with_our_task(artifact, tmp_path):
    from dataclasses import replace

    from kvcli.artifact.reader import open_artifact
    from kvcli.evaluation.suites import TASKS
    from kvcli.evaluation.tasks import Settings
    from kvcli.models.loading import load
    from kvcli.runtime.packed_model import PackedModel

    (tmp_path / "arc_easy.jsonl").write_text("".join(json.dumps(x) + "\n" for x in ROWS))
    (tmp_path / "own.yaml").write_text(TASK.format(data=tmp_path / "arc_easy.jsonl"))
    words = ("--model", "kvcli", "--model_args", f"artifact={artifact}", "--tasks", "own_choice")
    words += ("--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"))
    start = [sys.executable, "-m", "kvcli.evaluation.harness"]
    done = subprocess.run([*start, *words], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("results*.json")
    theirs = json.loads(file.read_text())["results"]["own_choice"]
    found = open_artifact(artifact)
    subject = PackedModel(load(str(artifact), dtype=found.plan.dtype), found.plan, found.tensors())
    task, settings = TASKS["arc_easy"], Settings(9, (64,), 8, folder=tmp_path)
    ours = [task.measure(subject, replace(x), None).score for x in task.items(subject, settings)]
    assert theirs["acc_norm,none"] == pytest.approx(sum(ours) / len(ours))
