"""What a format refuses, and what it says about its own size."""

from __future__ import annotations

from typing import Any

import pytest

from kvcli.errors import InputError
from kvcli.quant.format import KVFormat


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"bits": 0}, "0 bits is not a storage format"),
        ({"bits": 5}, "5 bits is not a storage format"),
        ({"bits": 64}, "64 bits is not a storage format"),
        ({"bits": 4, "axis": "head"}, "axis 'head' is neither"),
        ({"bits": 4, "scale_dtype": "float32"}, "scale dtype 'float32' is not one of"),
        ({"bits": 4, "group": 0}, "group 0 is not positive"),
        ({"bits": 4, "group": -64}, "group -64 is not positive"),
        ({"bits": 4, "grid": "gaussian", "symmetric": False}, "tables are symmetric"),
    ],
)
def test_impossible_formats_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        KVFormat(**fields)


@pytest.mark.parametrize(
    ("fmt", "sentence"),
    [
        (KVFormat(4, "token", group=48), "group 48 does not divide head_dim 64"),
        (KVFormat(4, "token", group=128), "group 128 does not divide head_dim 64"),
        (KVFormat(4, "channel", group=64), "group 64 does not divide block_size 32"),
        (KVFormat(4, "channel", group=24), "group 24 does not divide block_size 32"),
        (KVFormat(4, grid="no such table"), "no grid 'no such table'"),
        (KVFormat(8, grid="gaussian"), "no grid 'gaussian' of 8 bits"),
    ],
)
def test_formats_that_do_not_fit_a_page_are_refused(fmt: KVFormat, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        fmt.check(head_dim=64, block_size=32)


@pytest.mark.parametrize(("bits", "head_dim", "fits"), [(3, 20, False), (3, 24, True), (1, 12, False), (8, 7, True)])
def test_a_token_of_a_head_must_be_whole_bytes(bits: int, head_dim: int, fits: bool) -> None:
    fmt = KVFormat(bits, group=1)
    if fits:
        fmt.check(head_dim=head_dim, block_size=16)
    else:
        with pytest.raises(InputError, match=f"a head of {head_dim} values of {bits} bits"):
            fmt.check(head_dim=head_dim, block_size=16)


@pytest.mark.parametrize("bits", [16, 32])
def test_exact_formats_fit_everywhere(bits: int) -> None:
    KVFormat(bits, "channel", group=7).check(head_dim=5, block_size=16)


# (format, codes, scales, zeros) in bytes for 32 tokens of a head of 64: 2048 values
SIZES = [
    (KVFormat(4), 1024, 32 * 2, 0),
    (KVFormat(3), 768, 64, 0),
    (KVFormat(1), 256, 64, 0),
    (KVFormat(8), 2048, 64, 0),
    (KVFormat(2, group=16), 512, 32 * 4 * 2, 0),
    (KVFormat(2, group=16, symmetric=False), 512, 32 * 4 * 2, 32 * 4 * 2),
    (KVFormat(4, group=32, scale_dtype="e5m3"), 1024, 32 * 2, 0),
    (KVFormat(4, group=32, symmetric=False, scale_dtype="e5m3"), 1024, 64, 128),
    (KVFormat(2, "channel", group=32, symmetric=False), 512, 64 * 2, 64 * 2),
    (KVFormat(2, "channel", group=16, scale_dtype="e5m3"), 512, 64 * 2, 0),
    (KVFormat(4, grid="gaussian"), 1024, 64, 0),
    (KVFormat(16), 4096, 0, 0),
    (KVFormat(32), 8192, 0, 0),
    (KVFormat(16, symmetric=False), 4096, 0, 0),
]


@pytest.mark.parametrize(("fmt", "codes", "scales", "zeros"), SIZES, ids=lambda x: str(x))
def test_sizes_by_hand(fmt: KVFormat, codes: int, scales: int, zeros: int) -> None:
    assert fmt.code_bytes(64, 32) == codes
    assert fmt.scale_bytes(64, 32) == scales
    assert fmt.zero_bytes(64, 32) == zeros


@pytest.mark.parametrize("fmt", [x[0] for x in SIZES[:-1]], ids=str)
def test_json_round_trip(fmt: KVFormat) -> None:
    assert KVFormat.from_json(fmt.to_json()) == fmt


def test_an_exact_format_is_equal_whatever_its_unused_fields() -> None:
    # they are not written, so they must not tell two plans apart
    assert KVFormat(16, "channel", group=32, symmetric=False) == KVFormat.exact()
    assert KVFormat(32, scale_dtype="e5m3") == KVFormat.exact(32)


def test_only_channel_groups_tie_tokens_together() -> None:
    assert KVFormat(4).is_token_wise
    assert KVFormat(16, "channel").is_token_wise
    assert not KVFormat(4, "channel").is_token_wise


def test_names_tell_formats_apart() -> None:
    names = [str(x[0]) for x in SIZES[:-1]]
    assert len(set(names)) == len(names)
    assert str(KVFormat(4, "channel", 32, symmetric=False, scale_dtype="e5m3")) == "4-channel32-asym-e5m3"
    assert str(KVFormat(16)) == "16"
