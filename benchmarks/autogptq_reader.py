"""Do others read the weights that kvcli writes? AutoGPTQ 0.7.1, in an environment of its own, against kvcli's reader.

AutoGPTQ no longer imports beside current versions of Transformers; docs/weights.md says how to make its environment.

    python benchmarks/autogptq_reader.py ARTIFACT --python /path/to/autogptq/bin/python

Every quantised layer is read back by feeding it the identity, and the logits of one prompt are compared. AutoGPTQ
computes in float32 on the CPU. It leaves a tied embedding as it came from memory (``embedding_loaded`` is false then);
so the embedding, which is not quantised, is put in place from the file before logits are computed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROMPT = "Once upon a time there was a little girl who lived near the forest, and every day"


def read_with_autogptq(folder: str, out: str) -> None:
    """Run in AutoGPTQ's environment: save each quantised layer's weight, and the prompt's logits."""
    import torch
    import transformers
    from auto_gptq import AutoGPTQForCausalLM, __version__
    from safetensors import safe_open
    from safetensors.torch import save_file

    model = AutoGPTQForCausalLM.from_quantized(
        folder, device="cpu", use_safetensors=True, use_triton=False, disable_exllama=True, disable_exllamav2=True,
        inject_fused_attention=False, inject_fused_mlp=False, torch_dtype=torch.float32,
    )  # fmt: skip
    tensors: dict[str, Any] = {}
    kind = ""
    with torch.no_grad():
        for name, module in model.model.named_modules():
            if hasattr(module, "qweight"):
                kind = type(module).__module__
                tensors[name] = module(torch.eye(module.infeatures)).t().contiguous().float()
        with safe_open(str(Path(folder) / "model.safetensors"), framework="pt") as opened:
            embedding = opened.get_tensor("model.embed_tokens.weight").float()
        inner = model.model
        came = torch.equal(inner.get_input_embeddings().weight, embedding)
        inner.get_input_embeddings().weight.data = embedding
        if inner.config.tie_word_embeddings:
            inner.get_output_embeddings().weight = inner.get_input_embeddings().weight
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(PROMPT, return_tensors="pt").input_ids
        tensors["logits"] = model.model(ids).logits[0].float().contiguous()
    versions = {"auto_gptq": __version__, "transformers": transformers.__version__, "torch": torch.__version__}
    versions["embedding_loaded"] = str(came)
    save_file(tensors, out, metadata={**versions, "linear": kind})


def main() -> None:
    """Compare what AutoGPTQ reads with what kvcli reads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", help="an artifact with int3, int4 or int8 weights")
    parser.add_argument("--python", required=True, help="Python of the environment that has AutoGPTQ")
    parser.add_argument("--out", help="add the result to this JSON file")
    args = parser.parse_args()

    import torch
    from safetensors import safe_open

    from kvcli.models.loading import load

    loaded = load(args.artifact, dtype="float32")
    if loaded.quantized is None:
        raise SystemExit("The artifact's weights are not quantised.")
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "read.safetensors"
        subprocess.run([args.python, __file__, "--child", args.artifact, str(file)], check=True, cwd=scratch)
        with safe_open(file, framework="pt") as opened:
            versions = opened.metadata()
            theirs = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    with torch.no_grad():
        ids = loaded.tokenizer(PROMPT, return_tensors="pt").input_ids
        logits = loaded.model(ids).logits[0]
    their_logits = theirs.pop("logits")
    if theirs.keys() != loaded.quantized.layers.keys():
        raise SystemExit("AutoGPTQ found other quantised layers than kvcli.")
    off = max(float((theirs[name] - x.dequantize()).abs().max()) for name, x in loaded.quantized.layers.items())
    result = {
        "artifact": Path(args.artifact).name, "layers": len(theirs), "bits": loaded.quantized.config["bits"],
        "group": loaded.quantized.config["group_size"], "largest_weight_difference": off,
        "largest_logit_difference": float((their_logits - logits).abs().max()),
        "largest_logit": float(logits.abs().max()), "versions": versions,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.out:
        path = Path(args.out)
        rows = json.loads(path.read_text())["results"] if path.exists() else []
        rows = [x for x in rows if x["bits"] != result["bits"]] + [result]
        question = "does AutoGPTQ read the weights that kvcli writes?"
        path.write_text(json.dumps({"question": question, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        read_with_autogptq(*sys.argv[2:4])
    else:
        main()
