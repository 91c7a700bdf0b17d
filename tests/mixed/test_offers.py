from __future__ import annotations

import pytest

from quantvla.mixed.offers import DEFAULT_FORMATS, format_name, left_out, offers, parse_formats
from quantvla.plan import PlanEntry
from quantvla.runtime.errors import QuantVLAError
from quantvla.schemes import Scheme


def entry(width: int) -> PlanEntry:
    return PlanEntry(
        site="layer.down", stage="prefix", part="llm", kind="down", layer=0, out_features=8,
        in_features=width, scheme=Scheme("w4a8", 4, 8, 16), bytes_before=0, bytes_after=0, reason="",
    )  # fmt: skip


def test_formats_are_written_and_read_the_same_way() -> None:
    schemes = offers(entry(256), parse_formats(DEFAULT_FORMATS))
    assert tuple(format_name(scheme) for scheme in schemes) == DEFAULT_FORMATS


def test_a_block_that_does_not_divide_the_row_is_not_offered() -> None:
    found = {format_name(s) for s in offers(entry(48), parse_formats(DEFAULT_FORMATS))}
    assert found == {"float", "w4a8:16", "w8a8-dynamic"}


def test_a_format_that_is_not_offered_everywhere_is_said() -> None:
    (note,) = left_out([entry(256), entry(48)], parse_formats(["float", "w4a8:16", "w4a8:32"]))
    assert note == (
        "w4a8:32 is not offered at 1 of 2 sites: their inputs of 48 are no multiple of 32"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w4a9:32", "format 'w4a9:32': unknown scheme; did you mean 'w4a8'"),
        (
            "w4a8",
            "its block must be one of: 16, 32, 48, 64, 128, 192, 240, 256, 320, got none; write w4a8:32",
        ),
        ("w4a8:50", "its block must be one of: 16, 32, 48, 64, 128, 192, 240, 256, 320, got 50"),
        ("float:32", "its block must be one of: none, got 32; write float"),
        ("w8a8-dynamic:32", "its block must be one of: none, got 32; write w8a8-dynamic"),
    ],
)
def test_bad_formats(text: str, message: str) -> None:
    with pytest.raises(QuantVLAError, match=message):
        parse_formats([text])


def test_a_site_that_no_format_fits_is_named() -> None:
    with pytest.raises(
        QuantVLAError, match=r"layer\.down: none of the formats on offer fits .* got 40"
    ):
        offers(entry(40), parse_formats(["w4a8:32", "w8a8:128"]))
