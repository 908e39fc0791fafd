"""``kvcli eval`` as its user meets it."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.special
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from cli_checks import accepted, names, refused


def test_eval_prints_every_key_and_dumps_what_it_was_computed_from(pristine, warm, text, tmp_path):
    words = (*text, "--window", 256, "--limit", 2, "--dump", "dump.safetensors", "--json")
    found = json.loads(accepted(warm("eval", pristine, *words, cwd=tmp_path)))
    assert (found["context"], found["windows"], found["scored_tokens"]) == (256, 2, 256)
    assert set(found["ppl"]) == {"value", "reference", "delta_pct", "interval_pct"}
    assert set(found["kl"]) == {"mean", "p99", "p999", "interval"}
    assert set(found["flips"]) == {"rate", "interval"}
    assert found["effective_bits"] < found["effective_bits_with_model"]
    inspected = json.loads(accepted(warm("inspect", pristine, "--context", 256, "--json")))
    assert found["effective_bits"] == inspected["effective_bits"]
    assert found["measured_bytes"] == inspected["bytes_at"]["256"]
    dump = load_file(tmp_path / "dump.safetensors")
    p, q = (dump[x].astype(float) for x in ("reference", "quantized"))
    kl = scipy.special.rel_entr(np.exp(p), np.exp(q)).sum(-1).ravel()
    assert found["kl"]["mean"] == pytest.approx(kl.mean(), rel=1e-4)
    assert found["kl"]["p99"] == pytest.approx(np.percentile(kl, 99), rel=1e-4)
    assert found["kl"]["p999"] == pytest.approx(np.percentile(kl, 99.9), rel=1e-4)
    nll = [-np.take_along_axis(x, dump["targets"][..., None], -1).mean() for x in (q, p)]
    assert found["ppl"]["value"] == pytest.approx(np.exp(nll[0]), rel=1e-6)
    assert found["ppl"]["delta_pct"] == pytest.approx(100 * np.expm1(nll[0] - nll[1]), rel=1e-4)
    assert found["flips"]["rate"] == (p.argmax(-1) != q.argmax(-1)).mean()


def test_eval_works_without_any_option(pristine, warm):
    # calibrate tells its user to run it
    done = warm("eval", pristine)
    shown = done.stdout
    assert done.returncode == 0
    assert "--data" in done.stderr  # the built-in text is no fair judge of what was calibrated on it
    for word in ("effective bits", "perplexity", "KL mean", "99.9th", "top-1 flips", "4 windows, 1024 tokens"):
        assert word in shown


def test_eval_reports_only_the_tasks_asked_for(pristine, warm, text):
    found = json.loads(accepted(warm("eval", pristine, "--tasks", "kl", *text, "--json")))
    assert "kl" in found
    assert not {"ppl", "flips"} & set(found)


def test_eval_measures_against_another_model(pristine, tinystories, warm, text):
    words = (*text, "--json")
    own = json.loads(accepted(warm("eval", pristine, *words)))
    same = json.loads(accepted(warm("eval", pristine, "--against", tinystories, *words)))
    # the artifact's weights have scales fused into them, and were rounded to float16 once more
    assert same["ppl"]["value"] == own["ppl"]["value"]
    assert same["ppl"]["reference"] == pytest.approx(own["ppl"]["reference"], rel=0.01)
    assert same["kl"]["mean"] == pytest.approx(own["kl"]["mean"], rel=0.1)


def test_eval_measures_against_a_model_of_another_depth(pristine, model, warm, text):
    # of one family, with one tokenizer; the deeper one is the shallow one and a copy of its last layer
    tensors = load_file_of(model)
    tensors |= {x.replace("layers.1", "layers.2"): y for x, y in tensors.items() if "layers.1." in x}
    write_tensors(model, tensors)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    found = json.loads(accepted(warm("eval", pristine, "--against", model, *text, "--json")))
    assert found["kl"]["mean"] > 0.1


def load_file_of(model: Path) -> dict[str, np.ndarray]:
    """The tensors of a bfloat16 checkpoint, as float32."""
    data = (model / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    found = {}
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__":
            begin, end = (8 + size + x for x in entry["data_offsets"])
            wide = np.frombuffer(data[begin:end], "<u2").astype("<u4") << 16
            found[name] = wide.view("<f4").reshape(entry["shape"])
    return found


def write_tensors(model: Path, tensors: dict[str, np.ndarray]) -> None:
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tasks", "ppl,nonsense"), "nonsense"),
        (("--window", 600), "512"),
        (("--window", 3), "--window"),
        (("--dump", "none/dump.safetensors"), "none"),
        (("--dump", "."), "--dump"),
        (("--data", "self"), "self"),
    ],
)
def test_wrong_usage_of_eval(warm, pristine, words, said):
    refused(warm("eval", pristine, *words), 2, said)


def test_an_interrupted_evaluation_leaves_no_dump(pristine, warm, text, tmp_path):
    words = ("eval", pristine, *text, "--dump", tmp_path / "dump.safetensors")
    assert warm(*words, interrupt=("kvcli.evaluation.fidelity", "", "save_file")).returncode == 130
    assert names(tmp_path) == []
