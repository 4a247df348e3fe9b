"""What a format can be asked for, as data."""

from __future__ import annotations

import pytest

from lora_merge.abilities import ABILITIES, FORMATS, QUANT_TYPES, WIDTHS, Abilities, FormatOptions, QuantType
from lora_merge.errors import UnsupportedError

BOTH = Abilities({"int": QuantType((8,), (32, 64)), "nf4": QuantType((4,), None, True), "fp4": QuantType((4,))})


@pytest.mark.parametrize(
    ("options", "quant_type"),
    [
        (FormatOptions(8), "int"),
        (FormatOptions(4), "nf4"),
        (FormatOptions(4, quant_type="fp4"), "fp4"),
        (FormatOptions(4, group_size=7, double_quant=True), "nf4"),
        (FormatOptions(8, group_size=64), "int"),
    ],
)
def test_the_kind_of_codes_follows_from_the_width(options: FormatOptions, quant_type: str) -> None:
    assert BOTH.chosen("both", options).quant_type == quant_type


@pytest.mark.parametrize(
    ("abilities", "options", "message"),
    [
        (BOTH, FormatOptions(3), "both has weights of 4 and 8 bits, not 3; choose --bits 4 or 8"),
        (BOTH, FormatOptions(4, quant_type="int"), "both: int weights have 8 bits, not 4"),
        (BOTH, FormatOptions(4, quant_type="mx"), "both has no mx weights; it has int, nf4, fp4"),
        (BOTH, FormatOptions(8, group_size=16), "groups of 32 and 64, not of 16"),
        (BOTH, FormatOptions(4, quant_type="fp4", group_size=16), "no group size to choose"),
        (BOTH, FormatOptions(8, double_quant=True), "leave --double-quant out"),
        (Abilities(), FormatOptions(4), "both is kept where a base is in it already"),
        (Abilities(writable=False), FormatOptions(4, quant_type="int"), "both is only read"),
    ],
)
def test_what_a_format_has_not_is_refused(abilities: Abilities, options: FormatOptions, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        abilities.chosen("both", options)


def test_what_the_table_says_in_words() -> None:
    assert str(BOTH) == "8 as `int`; 4 as `nf4`, `fp4`"
    assert str(Abilities({"int": QuantType((2, 3, 4))})) == "2 to 4 as `int`"
    assert [one.written for one in (BOTH, Abilities(), Abilities(writable=False))] == ["yes", "kept", "no"]
    assert (BOTH.widths, BOTH.default_bits, Abilities({"fp8": QuantType((8,))}).default_bits) == ((4, 8), 4, 8)
    assert (BOTH.group_sizes, Abilities({"int": QuantType((8,), (32,))}).group_sizes) == (None, (32,))


def test_the_choices_of_the_command_line_are_those_of_the_table() -> None:
    assert set(FORMATS) == {"plain", *(name for name, has in ABILITIES.items() if has.written == "yes")}
    assert WIDTHS == (1, 2, 3, 4, 5, 6, 7, 8, 16)
    assert set(QUANT_TYPES) == {"int", "fp8", "nf4", "fp4", "nvfp4", "mxfp4", "mxfp8"}
