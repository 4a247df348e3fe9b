"""What each format of codes can be asked for, as data: `--format`, `--bits`, `--quant-type`, `--group-size`.

The choices of the command line, the checks of a request, the table in README.md and what `inspect` says come from this
table. No torch here: `--help` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lora_merge.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class FormatOptions:
    """What the user asks of a quantized output; None leaves it to the format.

    dtype: safetensors name of the dtype of the plain weights: scales that are floats are stored in it where the format
        leaves that open, and the weights decode to it.
    fit: how zero points are fitted; with it the codes have some where the format leaves that open.
    """

    bits: int
    dtype: str = "BF16"
    quant_type: str | None = None
    group_size: int | None = None
    double_quant: bool = False
    fit: str | None = None


@dataclass(frozen=True, slots=True)
class QuantType:
    """One kind of codes that a format writes.

    widths: bits of a code. group_sizes: what `--group-size` may name, -1 being a whole row; empty: the format fixes it;
    None: any. double_quant: whether scales may be quantized, too. zero_points: whether codes may have zero points.
    """

    widths: tuple[int, ...]
    group_sizes: tuple[int, ...] | None = ()
    double_quant: bool = False
    zero_points: bool = False


KEPT, NONE = "as the base has it", "none"
ANY = range(1, 17)
"""Every width of a code."""


@dataclass(frozen=True, slots=True)
class Abilities:
    """What one format can be asked for.

    quant_types: kinds of codes, by the word of `--quant-type`; of two with the same width the first is the default.
        Without any no other checkpoint is turned into this format.
    writable: whether a merge writes weights that are in this format already.
    towers: whether servers take towers of images and sounds for quantized where config.json says so.
    experts: widths at which servers load experts one by one, as linears; transformers may not (`Loader.experts`).
    splits_stacks: whether it does so too where the base stores experts in stacks.
    """

    quant_types: Mapping[str, QuantType] = field(default_factory=dict)
    writable: bool = True
    towers: bool = True
    experts: Sequence[int] = ()
    splits_stacks: bool = True

    @property
    def widths(self) -> tuple[int, ...]:
        """All widths, in bits, narrowest first."""
        return tuple(sorted({bits for kind in self.quant_types.values() for bits in kind.widths}))

    @property
    def default_bits(self) -> int:
        """The width where none is asked for: 4, or 8 where there is no 4."""
        return next((bits for bits in (4, 8) if bits in self.widths), 4)

    @property
    def group_sizes(self) -> tuple[int, ...] | None:
        """All sizes that `--group-size` may name for some width; None: any."""
        sizes = [kind.group_sizes for kind in self.quant_types.values()]
        return None if None in sizes else tuple(dict.fromkeys(size for some in sizes for size in some or ()))

    def double_quant(self, bits: int | None = None, quant_type: str | None = None) -> bool:
        """Whether scales may be quantized for some kind of codes of this width and name; None: whichever."""
        return any(
            kind.double_quant and bits in (None, *kind.widths) and quant_type in (None, word)
            for word, kind in self.quant_types.items()
        )

    def zero_points(self, bits: int | None = None, quant_type: str | None = None) -> bool:
        """Whether some kind of codes of this width and name may have zero points; None: whichever."""
        return any(
            kind.zero_points and bits in (None, *kind.widths) and quant_type in (None, word)
            for word, kind in self.quant_types.items()
        )

    @property
    def written(self) -> str:
        """ "yes", "kept" (where a base is in this format already) or "no"."""
        return "yes" if self.quant_types else "kept" if self.writable else "no"

    def chosen(self, name: str, options: FormatOptions) -> FormatOptions:
        """The options with their kind of codes filled in.

        name: of the format, for errors. Raises UnsupportedError for what this format does not have.
        """
        if not self.quant_types:
            state = "kept where a base is in it already" if self.writable else "only read"
            raise UnsupportedError(f"{name} is {state}, and nothing else is turned into it; choose another --format")
        quant_type = options.quant_type or self._default_type(name, options.bits)
        if quant_type not in self.quant_types:
            known = ", ".join(self.quant_types)
            raise UnsupportedError(f"{name} has no {quant_type} weights; it has {known}: choose one with --quant-type")
        kind = self.quant_types[quant_type]
        if options.bits not in kind.widths:
            raise UnsupportedError(
                f"{name}: {quant_type} weights have {_either(kind.widths)} bits, not {options.bits}; choose one of "
                "these --bits, or another --quant-type"
            )
        size, sizes = options.group_size, kind.group_sizes
        if size is not None and sizes is not None and size not in sizes:
            asked = f"{name}: {quant_type} weights of {options.bits} bits have"
            if not sizes:
                raise UnsupportedError(f"{asked} no group size to choose; leave --group-size out")
            raise UnsupportedError(f"{asked} groups of {_either(sizes)}, not of {size}; choose one with --group-size")
        if options.double_quant and not kind.double_quant:
            raise UnsupportedError(f"{name}: scales of {quant_type} weights are plain; leave --double-quant out")
        return replace(options, quant_type=quant_type)

    def _default_type(self, name: str, bits: int) -> str:
        found = next((word for word, kind in self.quant_types.items() if bits in kind.widths), None)
        if found is None:
            raise UnsupportedError(
                f"{name} has weights of {_either(self.widths)} bits, not {bits}; choose --bits "
                f"{_either(self.widths, 'or')}, or another --format"
            )
        return found

    def __str__(self) -> str:
        """Widths with their kinds, as README.md has them: 2 to 8 as `int`; 8 as `fp8`, `mxfp8`."""
        words: dict[tuple[int, ...], list[str]] = {}
        for word, kind in self.quant_types.items():
            words.setdefault(kind.widths, []).append(f"`{word}`")
        return "; ".join(f"{_range(widths)} as {', '.join(some)}" for widths, some in words.items()) or (
            KEPT if self.writable else NONE
        )


def _either(numbers: tuple[int, ...], joint: str = "and") -> str:
    """`2, 3 and 4`."""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} {joint} {last}" if most else last


def _range(numbers: tuple[int, ...]) -> str:
    """`2 to 8` for all of them, else as `_either`."""
    whole = len(numbers) > 2 and numbers == tuple(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]} to {numbers[-1]}" if whole else _either(numbers)


_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
ABILITIES: Mapping[str, Abilities] = {
    "chatglm": Abilities({"int": QuantType((4, 8))}),
    "compressed-tensors": Abilities(
        {
            "int": QuantType((2, 3, 4, 5, 6, 7, 8), None, zero_points=True),
            "fp8": QuantType((8,), None),
            "nvfp4": QuantType((4,), None),
            "mxfp4": QuantType((4,), None),
            "mxfp8": QuantType((8,), None),
        },
        experts=ANY,
    ),
    "bitsandbytes": Abilities(
        {
            "nf4": QuantType((4,), _BLOCKSIZES, True),
            "fp4": QuantType((4,), _BLOCKSIZES, True),
            "int": QuantType((8,)),
        }
    ),
    "gptq": Abilities(
        {"int": QuantType((2, 3, 4, 8), (-1, 16, 32, 64, 128, 256, 512, 1024), zero_points=True)}, experts=ANY
    ),
    "auto-round": Abilities(),
    "awq": Abilities({"int": QuantType((4,), (128, 64, 32, 16), zero_points=True)}, experts=ANY),
    "fp8": Abilities({"fp8": QuantType((8,), (128,))}, experts=ANY),
    "fbgemm_fp8": Abilities({"fp8": QuantType((8,), (128,))}),
    # Of experts at 8 bits servers want one scale a weight, and rows have their own here.
    "modelopt": Abilities({"fp8": QuantType((8,)), "nvfp4": QuantType((4,), (16,))}, towers=False, experts=(4,)),
    "mxfp4": Abilities({"mxfp4": QuantType((4,), (32,))}),
    "torchao": Abilities({"int": QuantType((8,)), "fp8": QuantType((8,))}),
    "quanto": Abilities({"int": QuantType((2, 4, 8)), "fp8": QuantType((8,))}),
    "eetq": Abilities({"int": QuantType((8,))}),
    "aqlm": Abilities(writable=False),
    # transformers 4.57 has experts as linears where their files have them so, and in stacks where these do.
    "hqq": Abilities(
        {"int": QuantType((1, 2, 3, 4, 8), (64, 128, 32, 16, 8, 256, 512, 1024), zero_points=True)},
        experts=ANY,
        splits_stacks=False,
    ),
}
"""By the name under which config.json has a format (`quant_method`)."""
PLAIN = "plain"
"""The format without codes, of 16 or 32 bits."""
FORMATS = (PLAIN, *(name for name, has in ABILITIES.items() if has.quant_types))
"""What `--format` takes."""
DOUBLE_QUANT = tuple(name for name, has in ABILITIES.items() if has.double_quant())
"""Formats for which there is `--double-quant`."""
ZERO_POINTS = tuple(name for name, has in ABILITIES.items() if has.zero_points())
"""Formats for which there is `--fit`."""
WIDTHS = (*sorted({bits for has in ABILITIES.values() for bits in has.widths}), 16)
"""What `--bits` takes."""
QUANT_TYPES = tuple(dict.fromkeys(word for has in ABILITIES.values() for word in has.quant_types))
"""What `--quant-type` takes."""
