"""What ``--data`` names becomes token windows: the same for the same seed, and never a surprise."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import random
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcli.calibration import corpora, texts
from kvcli.calibration.corpora import tokens, windows
from kvcli.errors import InputError, UsageError
from kvcli.models.loading import LoadedModel, added_bos, load

CALIB = Path(__file__).parents[2] / "calib"
KINDS = ["arithmetic", "code", "dialogue", "everyday", "narrative", "prose", "tables"]


@pytest.fixture(scope="module")
def loaded(tinystories: Path) -> LoadedModel:
    return load(str(tinystories))


@pytest.fixture
def builtin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Find the built-in corpora in the source tree, whether or not the package is installed."""
    monkeypatch.setattr(texts.resources, "files", lambda _: CALIB)


@pytest.fixture
def story(tmp_path: Path) -> Path:
    """A text of some 3000 tokens in which no stretch occurs twice."""
    file = tmp_path / "story.txt"
    file.write_text("\n".join(f"On day {i} Tim saw {i * i} birds." for i in range(200)))
    return file


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))


def refusal(spec: object, loaded: LoadedModel, length: int = 16) -> str:
    """Ask for what must be refused, and return the sentence."""
    with pytest.raises(InputError) as error:
        tokens(str(spec), loaded, num_tokens=64, seed=0, length=length)
    message = str(error.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


# --- windows for calibration ------------------------------------------------------------------------------------------


def test_windows_have_the_shape_asked_for(loaded, story):
    corpus = tokens(str(story), loaded, num_tokens=200, seed=0, length=32)
    assert corpus.ids.shape == (6, 32)
    assert corpus.ids.dtype == torch.int64
    assert corpus.name == "story.txt"
    assert corpus.description == "6 of 32 tokens from story.txt"
    assert len(corpus.sha256) == 64


def test_a_seed_decides_everything(loaded, story):
    one, again, other = (tokens(str(story), loaded, num_tokens=320, seed=s, length=32) for s in (1, 1, 2))
    assert torch.equal(one.ids, again.ids)
    assert one.sha256 == again.sha256
    assert one.sha256 != other.sha256


def test_windows_do_not_depend_on_where_the_file_lies(loaded, story, tmp_path):
    (tmp_path / "sub").mkdir()
    moved = tmp_path / "sub" / story.name
    moved.write_bytes(story.read_bytes())
    a, b = (tokens(str(x), loaded, num_tokens=320, seed=1, length=32) for x in (story, moved))
    assert a.sha256 == b.sha256


def test_windows_are_stretches_of_the_text_spread_over_it_without_overlap(loaded, story):
    whole = loaded.tokenizer(story.read_text()).input_ids
    ids = tokens(str(story), loaded, num_tokens=10 * 32, seed=3, length=32).ids.tolist()
    starts = sorted(next(i for i in range(len(whole)) if whole[i + 1 : i + 32] == row[1:]) for row in ids)
    assert all(b - a >= 32 for a, b in itertools.pairwise(starts))
    assert [x * 10 // len(whole) for x in starts] == list(range(10))


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 500), st.integers())
def test_stretches_never_overlap_and_lie_one_in_each_part(count, width, spare, seed):
    size = count * width + spare
    starts = corpora._starts(size, count, width, random.Random(seed))
    assert len(starts) == count
    assert all(b - a >= width for a, b in zip(starts, [*starts[1:], size], strict=True))
    assert all(i * (size // count) <= x <= (i + 1) * (size // count) - width for i, x in enumerate(starts))


def test_where_the_tokenizer_adds_a_bos_every_window_begins_with_it(loaded, story):
    assert added_bos(loaded.tokenizer) == loaded.tokenizer.bos_token_id
    ids = tokens(str(story), loaded, num_tokens=320, seed=0, length=32).ids
    assert (ids[:, 0] == loaded.tokenizer.bos_token_id).all()
    assert (ids[:, 1:] != loaded.tokenizer.bos_token_id).all()


def test_a_text_far_longer_than_needed_is_thinned_out_evenly(loaded, story, monkeypatch):
    encoded = []
    encode = corpora._encode
    monkeypatch.setattr(corpora, "CHARACTERS_PER_TOKEN", 8)
    monkeypatch.setattr(corpora, "_encode", lambda text, tokenizer: encoded.append(text) or encode(text, tokenizer))
    corpus = tokens(str(story), loaded, num_tokens=128, seed=0, length=32)
    assert corpus.ids.shape == (4, 32)
    assert len(encoded[0]) < len(story.read_text()) / 5
    quarters = [story.read_text().find(x) * 4 // len(story.read_text()) for x in encoded[0].split("\n\n")]
    assert quarters == [0, 1, 2, 3]


def test_a_corpus_gives_what_it_has(loaded, story):
    whole = len(loaded.tokenizer(story.read_text()).input_ids)
    assert len(tokens(str(story), loaded, num_tokens=10**6, seed=0, length=100).ids) == whole // 100


def test_windows_longer_than_the_context_are_wrong_usage(loaded, story):
    with pytest.raises(UsageError, match="512"):
        tokens(str(story), loaded, num_tokens=1024, seed=0, length=513)


# --- mixtures ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(1, 60))
def test_shares_are_equal_but_for_what_a_source_lacks(rooms, count):
    room = {str(i): n for i, n in enumerate(rooms)}
    shares = corpora._shares(room, count)
    assert sum(shares.values()) == min(count, sum(rooms))
    assert all(0 < n <= room[x] for x, n in shares.items())
    unfilled = [shares.get(x, 0) for x in room if shares.get(x, 0) < room[x]]
    assert not unfilled or max(shares.values()) - min(unfilled) <= 1


def test_a_mixture_takes_equal_shares(loaded, story, tmp_path):
    (tmp_path / "b.txt").write_text("She said no. " * 400)
    corpus = tokens(f"{story}, {tmp_path / 'b.txt'}", loaded, num_tokens=8 * 32, seed=0, length=32)
    assert corpus.name == "story.txt,b.txt"
    assert corpus.description == "4 of 32 tokens from story.txt, 4 of 32 tokens from b.txt"


def test_the_builtin_corpora_count_as_one_source_of_a_mixture(loaded, story, builtin):
    corpus = tokens(f"{story},builtin", loaded, num_tokens=14 * 32, seed=0, length=32)
    assert corpus.description.startswith("7 of 32 tokens from story.txt")
    assert corpus.ids.shape == (14, 32)


def test_a_path_with_a_comma_is_one_source(loaded, story):
    odd = story.rename(story.with_name("a,b.txt"))
    assert tokens(str(odd), loaded, num_tokens=64, seed=0, length=32).name == "a,b.txt"


@pytest.mark.parametrize("spec", ["", "a.txt,,b.txt", "builtin:code,builtin:code"])
def test_a_spec_that_makes_no_sense_is_wrong_usage(loaded, spec):
    with pytest.raises(UsageError, match="--data"):
        tokens(spec, loaded, num_tokens=64, seed=0, length=16)


# --- built-in corpora -------------------------------------------------------------------------------------------------


def test_the_builtin_corpora_are_of_many_kinds_and_their_sources_are_stated(builtin):
    assert texts.builtin_names() == KINDS
    readme = (CALIB / "corpora" / "README.md").read_text()
    sizes = {x: len(texts.read(f"builtin:{x}").encode()) for x in KINDS}
    assert all(f"| {x}.txt |" in readme for x in KINDS)
    assert 300_000 < sum(sizes.values()) < 600_000
    assert min(sizes.values()) > 15_000


def test_builtin_mixes_all_kinds(loaded, builtin):
    corpus = tokens("builtin", loaded, num_tokens=7 * 64, seed=0, length=64)
    assert sorted(corpus.description.split(", ")) == [f"1 of 64 tokens from builtin:{x}" for x in KINDS]


def test_one_builtin_corpus_can_be_named(loaded, builtin):
    text = loaded.tokenizer.decode(tokens("builtin:arithmetic", loaded, num_tokens=128, seed=0, length=128).ids[0])
    assert re.search(r"\d\d", text)
    assert "How" in text


def test_an_unknown_builtin_corpus_is_refused_with_those_there_are(loaded, builtin):
    assert "prose" in refusal("builtin:poetry", loaded)


def test_without_the_data_installed_builtin_is_refused(loaded, monkeypatch):
    def missing(name: str) -> Path:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(texts.resources, "files", missing)
    assert "not installed" in refusal("builtin", loaded)
    assert "without its data" in refusal("builtin:code", loaded)


def test_the_generated_corpora_are_what_their_generator_writes():
    made = runpy.run_path(str(CALIB / "make_corpora.py"))
    for name, seed in (("arithmetic", 1), ("tables", 2)):
        text = "\n\n\n".join(made[name](random.Random(seed), 60_000)) + "\n"
        assert (CALIB / "corpora" / f"{name}.txt").read_text() == text


# --- files and pipes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [
        {"text": "one two"},
        {"question": "one", "answer": "two"},
        {"answer": "two", "question": "one", "id": 7},
        {"prompt": "one", "completion": "two"},
        {"instruction": "one", "input": "two", "output": ""},
        {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]},
    ],
    ids=lambda x: "-".join(x),
)
def test_json_lines_of_many_shapes_are_read(tmp_path, record):
    file = tmp_path / "x.jsonl"
    file.write_text(f"{json.dumps(record)}\n\n{json.dumps({'text': 'end'})}\n")
    assert texts.read(str(file)).split() == ["one", "two", "end"]


@pytest.mark.parametrize("name", ["x.txt.gz", "x.jsonl.gz"])
def test_gzipped_files_are_read(tmp_path, name):
    content = '{"text": "héllo"}\n' if "jsonl" in name else "héllo"
    (tmp_path / name).write_bytes(gzip.compress(content.encode()))
    assert texts.read(str(tmp_path / name)) == "héllo"


def test_a_real_data_set_is_read(loaded, gsm8k):
    assert "####" in texts.read(str(gsm8k))


def test_standard_input_is_text(loaded, story, monkeypatch):
    stdin(monkeypatch, story.read_bytes())
    piped = tokens("-", loaded, num_tokens=128, seed=0, length=32)
    assert piped.name == "-"
    assert piped.ids.shape == (4, 32)


def test_a_missing_file_is_refused(loaded, tmp_path):
    assert "nowhere.txt is not a file" in refusal(tmp_path / "nowhere.txt", loaded)


@pytest.mark.parametrize("content", ["", " \n\n\t "])
def test_an_empty_corpus_is_refused(loaded, tmp_path, monkeypatch, content):
    (tmp_path / "empty.txt").write_text(content)
    assert "empty.txt holds no text" in refusal(tmp_path / "empty.txt", loaded)
    stdin(monkeypatch, content.encode())
    assert refusal("-", loaded) == "Standard input holds no text."


def test_a_corpus_too_short_for_a_window_is_refused_with_both_numbers(loaded, tmp_path):
    (tmp_path / "short.txt").write_text("Once upon a time")
    there = len(loaded.tokenizer("Once upon a time").input_ids)
    assert f"short.txt holds {there} tokens, and one window needs 500." in refusal(tmp_path / "short.txt", loaded, 500)
    with pytest.raises(InputError, match=f"holds {there} tokens, and one window needs 500"):
        windows(str(tmp_path / "short.txt"), loaded.tokenizer, 500)


def test_bytes_that_are_not_text_are_refused(loaded, tmp_path):
    (tmp_path / "x.txt").write_bytes(b"fine so far \xff\xfe")
    assert "x.txt is not UTF-8 text: byte 12 is 0xff." in refusal(tmp_path / "x.txt", loaded)


@pytest.mark.parametrize(
    ("line", "named"),
    [("{", "line 2 is not valid JSON"), ('{"words": 1}', "line 2 has none"), ("[]", "line 2 has none")],
)
def test_a_bad_json_line_is_refused_by_its_number(loaded, tmp_path, line, named):
    (tmp_path / "x.jsonl").write_text(f'{{"text": "good"}}\n{line}\n')
    assert named in refusal(tmp_path / "x.jsonl", loaded)


def test_a_damaged_gzip_file_is_refused(loaded, tmp_path):
    data = gzip.compress(b"word " * 1000)
    for name, content in (("cut.txt.gz", data[:-20]), ("none.txt.gz", b"not gzip")):
        (tmp_path / name).write_bytes(content)
        assert f"{name} cannot be read" in refusal(tmp_path / name, loaded)


def test_a_folder_is_refused(loaded, tmp_path):
    assert "cannot be read" in refusal(tmp_path, loaded)


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_a_hub_data_set_needs_the_package_that_reads_it(loaded, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install" in refusal("hub:some/text", loaded)


def test_a_hub_data_set_is_read_no_further_than_needed(monkeypatch):
    asked = []

    def load_dataset(name: str, *, split: str, streaming: bool):
        asked.append((name, split, streaming))
        return ({"body": f"Document {i}."} for i in range(10**9))

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    text = texts.read("hub:some/text:test:body", enough=100)
    assert asked == [("some/text", "test", True)]
    assert text.startswith("Document 0.\n\nDocument 1.")
    assert 100 < len(text) < 200
    with pytest.raises(InputError, match="no text field among body"):
        texts.read("hub:some/text", enough=100)


# --- self -------------------------------------------------------------------------------------------------------------


def test_the_model_writes_its_own_calibration_text(loaded):
    steps = []
    one = tokens("self", loaded, num_tokens=20 * 24, seed=1, length=24, progress=lambda *x: steps.append(x))
    again, other = (tokens("self", loaded, num_tokens=20 * 24, seed=s, length=24) for s in (1, 2))
    assert one.ids.shape == (20, 24)
    assert one.sha256 == again.sha256 != other.sha256
    assert (one.ids[:, 0] == loaded.tokenizer.bos_token_id).all()
    assert len({tuple(x) for x in one.ids.tolist()}) == 20
    assert steps[-1] == (480, 480)
    assert all(a < b for a, b in itertools.pairwise(steps))


def test_what_the_model_writes_is_what_it_finds_likely(loaded):
    with torch.no_grad():
        ids = tokens("self", loaded, num_tokens=16 * 48, seed=0, length=48).ids
        noise = torch.randint(3, loaded.model.config.vocab_size, ids.shape, generator=torch.Generator().manual_seed(0))
        own, other = (loaded.model(x, labels=x).loss for x in (ids, noise))
    assert own < other - 2


# --- windows for evaluation -------------------------------------------------------------------------------------------


def test_evaluation_reads_consecutive_windows_from_the_beginning(loaded, story):
    whole = loaded.tokenizer(story.read_text()).input_ids
    cut = windows(str(story), loaded.tokenizer, 100)
    assert len(cut) == len(whole) // 100
    for i, window in enumerate(cut):
        assert window.shape == (100,)
        assert window[0] == loaded.tokenizer.bos_token_id
        assert window[1:].tolist() == whole[100 * i + 1 : 100 * (i + 1)]


def test_a_tokenizer_without_bos_leaves_windows_as_they_are(loaded, story):
    class Plain:
        bos_token_id = 1

        def __call__(self, text: str, **_: object) -> SimpleNamespace:
            return SimpleNamespace(input_ids=list(range(10, 10 + len(text.split()))))

    ids = torch.cat(windows(str(story), Plain(), 7))
    assert ids.tolist() == list(range(10, 10 + len(ids)))


def test_the_number_of_windows_can_be_limited(loaded, story):
    assert len(windows(str(story), loaded.tokenizer, 100, limit=3)) == 3


def test_the_standing_text_gives_the_standing_windows(loaded, wikitext_test, capfd):
    cut = windows(str(wikitext_test), loaded.tokenizer, 512, limit=2)
    text = loaded.tokenizer.decode(torch.cat(cut), skip_special_tokens=True)
    assert "Robert Boulter" in text
    assert capfd.readouterr() == ("", "")


def test_a_model_is_not_evaluated_on_its_own_words(loaded):
    with pytest.raises(UsageError, match="calibration"):
        windows("self", loaded.tokenizer, 16)
