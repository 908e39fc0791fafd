"""``kvcli generate`` as its user meets it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from cli_checks import accepted, generated, refused, rewritten


def test_generate_prints_the_completion_only(pristine, warm):
    text = generated(warm, pristine, "Once upon a time", "--max-tokens", 20)
    assert not text.startswith("Once")
    assert text.endswith("\n")
    found = json.loads(generated(warm, pristine, "Once upon a time", "--max-tokens", 20, "--json"))
    assert found["text"] + "\n" == text
    assert set(found) == {"text", "prompt_tokens", "completion_tokens", "finish_reason", "cache_bytes"}
    assert (found["completion_tokens"], found["finish_reason"]) == (20, "length")


def test_generate_stops_where_the_model_does(pristine, warm):
    found = json.loads(generated(warm, pristine, "Once upon a time", "--max-tokens", 400, "--json"))
    assert found["finish_reason"] == "stop"
    assert found["completion_tokens"] < 400


def test_generate_writes_one_line_for_every_line(pristine, warm):
    prompts = "Once upon a time\n\nThe dog\n\n\nShe said"  # the last without an end
    text = generated(warm, pristine, "-", "--max-tokens", 8, input=prompts)
    lines = text.split("\n")
    assert lines.pop() == ""
    assert [bool(x) for x in lines] == [True, False, True, False, False, True]
    assert lines[2] + "\n" == generated(warm, pristine, "The dog", "--max-tokens", 8)
    objects = generated(warm, pristine, "-", "--max-tokens", 8, "--json", input=prompts).splitlines()
    assert [json.loads(x).get("text", "") for x in objects] == lines


def test_generate_reads_stdin_by_default_and_nothing_gives_nothing(pristine, warm):
    assert generated(warm, pristine, "--max-tokens", 4, input="The dog\n").count("\n") == 1
    assert generated(warm, pristine) == ""


def test_generate_escapes_newlines_and_backslashes(pristine, warm):
    prompt = "Once upon a time"
    whole = json.loads(generated(warm, pristine, prompt, "--max-tokens", 120, "--json"))["text"]
    assert "\n" in whole
    line = generated(warm, pristine, "-", "--max-tokens", 120, input=prompt + "\n")
    assert line.count("\n") == 1
    unescaped = re.sub(r"\\(.)", lambda m: {"n": "\n", "r": "\r", "\\": "\\"}[m[1]], line.rstrip("\n"))
    assert unescaped == whole


def test_generate_keeps_to_a_seed(pristine, warm):
    hot = (pristine, "Once upon a time", "--temperature", 1.5, "--max-tokens", 16)
    one, again, other = (generated(warm, *hot, "--seed", seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other
    narrow = generated(warm, *hot, "--top-k", 1)
    assert narrow == generated(warm, pristine, "Once upon a time", "--max-tokens", 16)


def test_every_line_starts_from_the_seed(pristine, warm):
    lines = generated(warm, pristine, "-", "--temperature", 1.5, "--max-tokens", 8, input="The dog\n" * 2).splitlines()
    assert lines[0] == lines[1]


def test_the_largest_seed_the_command_takes_is_one_it_can_use(pristine, warm):
    done = warm("generate", pristine, "The dog", "--temperature", 1, "--max-tokens", 2, "--seed", 2**32)
    refused(done, 2, "seed")
    accepted(warm("generate", pristine, "The dog", "--temperature", 1, "--max-tokens", 2, "--seed", 2**32 - 1))


def test_generate_exact_uses_16_bits(pristine, warm):
    words = (pristine, "Once upon a time there was a dog", "--max-tokens", 60, "--json")
    packed, exact = (json.loads(generated(warm, *words, *more)) for more in ((), ("--exact",)))
    # pages of 16 tokens: 256 scalars a token of two bytes
    tokens = exact["prompt_tokens"] + exact["completion_tokens"]
    assert exact["cache_bytes"] == -(-tokens // 16) * 16 * 256 * 2
    assert packed["cache_bytes"] < exact["cache_bytes"]


def test_exact_generation_is_the_stock_models(pristine, tinystories, warm):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stock, tokenizer = AutoModelForCausalLM.from_pretrained(tinystories), AutoTokenizer.from_pretrained(tinystories)
    ids = tokenizer("The dog", return_tensors="pt").input_ids
    asked = {"attention_mask": ids > -1, "max_new_tokens": 40, "do_sample": False, "pad_token_id": 2}
    out = stock.generate(ids, **asked, return_dict_in_generate=True, output_logits=True)
    tokens = out.sequences[0, ids.shape[1] :].tolist()

    def text(those: list[int]) -> str:
        return tokenizer.decode(those, skip_special_tokens=True)

    words = (pristine, "The dog", "--max-tokens", 40, "--exact", "--backend", "reference")
    ours = generated(warm, *words).removesuffix("\n")
    agreed = max(n for n in range(41) if ours.startswith(text(tokens[:n])))
    if agreed < 40:
        # in bfloat16 two tokens as likely as each other may change places with the machine's order of summing
        (first, second), (_, other) = (x.tolist() for x in out.logits[agreed][0].float().topk(2))
        assert first - second <= 1 / 8
        assert ours.startswith(text([*tokens[:agreed], other]))
    else:
        assert ours == text(tokens)


def test_every_backend_continues_the_prompt(pristine, warm):
    # in bfloat16 the backends round differently; in float32 they agree: tests/runtime/test_generation.py
    words = (pristine, "Once upon a time", "--max-tokens", 24, "--json")
    for more in ((), ("--exact",)):
        backends = (("reference",), ("auto",), ("cpu",), ("cpu", "--deterministic"))
        found = [json.loads(generated(warm, *words, "--backend", *x, *more)) for x in backends]
        texts = [x.pop("text") for x in found]
        assert all(x == found[0] for x in found)
        assert all(len(x) > 40 for x in texts)
        assert texts[1] == texts[2]


def test_int4_weights_generate(pristine, warm):
    found = json.loads(generated(warm, pristine, "Once upon a time", "--max-tokens", 8, "--json", "--weights", "int4"))
    assert found["completion_tokens"] == 8
    again = generated(warm, pristine, "-", "--max-tokens", 8, input="The dog\n" * 2, env={"KVCLI_WEIGHTS": "int4"})
    assert len(set(again.splitlines())) == 1


def test_what_a_backend_cannot_do_is_refused(pristine, warm):
    words = ("generate", pristine, "The dog", "--max-tokens", 2, "--backend")
    refused(warm(*words, "reference", "--weights", "int4"), 2, "native runtime")
    refused(warm(*words, "reference", "--deterministic"), 2, "native runtime")
    refused(warm(*words, "cuda"), 1, "GPU", json_too=True)
    refused(warm(*words, "tpu"), 2, "tpu")


def test_chat_needs_a_template(pristine, warm):
    refused(warm("generate", pristine, "Hello", "--chat"), 2, "no chat template")


def test_chat_applies_the_template(artifact, warm):
    file = artifact / "tokenizer_config.json"
    template = "{% for m in messages %}Once upon a time {{ m.content }}{% endfor %}"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    rewritten(artifact, lambda m: m["files"].pop("tokenizer_config.json"))
    chat = json.loads(generated(warm, artifact, "a dog", "--chat", "--max-tokens", 8, "--json"))
    from transformers import AutoTokenizer

    # the template says where special tokens go, so the tokenizer adds none
    words = AutoTokenizer.from_pretrained(artifact)("Once upon a time a dog", add_special_tokens=False).input_ids
    assert chat["prompt_tokens"] == len(words)


def test_a_prompt_that_fills_the_context_is_refused(pristine, warm):
    refused(warm("generate", pristine, "dog " * 600), 2, "no room", "512")


def test_prompts_that_are_not_utf8_are_refused(pristine, warm):
    done = warm("generate", pristine, "-", "--max-tokens", 2, input=b"The dog\n\xff\xfe\n")
    assert done.stdout.count("\n") == 1  # the line before was answered
    refused(done, 3, "UTF-8", json_too=True)
    refused(warm("generate", pristine, "\udcff"), 3, "UTF-8")  # what Python makes of such a byte among the arguments
