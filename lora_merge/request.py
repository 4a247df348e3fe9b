"""What the user asked for: the recipe, which decides every byte of the output, and how it is to be run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from lora_merge.abilities import ABILITIES, DOUBLE_QUANT, FORMATS, QUANT_TYPES, WIDTHS, ZERO_POINTS
from lora_merge.digests import DIGESTS, USUAL, DigestName
from lora_merge.dtypes import MODEL_DTYPES
from lora_merge.errors import UsageError, quoted

# Format, width and kind of codes are spelled out for editors; a test compares them with the table of abilities.
Bits: TypeAlias = Literal[1, 2, 3, 4, 5, 6, 7, 8, 16]
DtypeName: TypeAlias = Literal["float32", "bfloat16", "float16"]
FormatName: TypeAlias = Literal[
    "plain",
    "chatglm",
    "compressed-tensors",
    "bitsandbytes",
    "gptq",
    "awq",
    "fp8",
    "fbgemm_fp8",
    "modelopt",
    "mxfp4",
    "torchao",
    "quanto",
    "eetq",
    "hqq",
]
QuantType: TypeAlias = Literal["int", "fp8", "nvfp4", "mxfp4", "mxfp8", "nf4", "fp4"]
Rounding: TypeAlias = Literal["auto", "nearest", "stochastic", "dither", "adapter-aware"]
Scales: TypeAlias = Literal["auto", "keep", "fresh"]
Fit: TypeAlias = Literal["minmax", "hqq"]
TrainedOn: TypeAlias = Literal["as-is", "nf4", "fp4", "int8"]
TokenizerFrom: TypeAlias = Literal["auto", "base", "adapter"]
Combine: TypeAlias = Literal["sum", "ties", "dare", "magnitude"]
Card: TypeAlias = Literal["new", "base"]

ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)
SCALES: tuple[Scales, ...] = get_args(Scales)
FITS: tuple[Fit, ...] = get_args(Fit)
TRAINED_ON: tuple[TrainedOn, ...] = get_args(TrainedOn)
TOKENIZERS: tuple[TokenizerFrom, ...] = get_args(TokenizerFrom)
COMBINES: tuple[Combine, ...] = get_args(Combine)
CARDS: tuple[Card, ...] = get_args(Card)
SAME = "same"
"""What `--adapter-base` says of an adapter that was trained on BASE itself."""
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


STRONGEST = 1e15
"""No weight and no alpha is further from 0. Then a strength, a weight times an alpha divided by a rank, is a number of
float32, and where something overflows it is the merged weight, which is looked at."""
INTEGERS = {
    "bits": (1, 16), "group_size": (-1, 2**20), "seed": (-(2**63), 2**63 - 1), "threads": (1, 1024),
    "max_memory": (1, 2**63 - 1), "max_shard_size": (1, 2**63 - 1),
}  # fmt: skip
"""Options that are integers, with the least and the largest value."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the bytes of an output: the inputs and the choices. None means the default.

    max_shard_size: bytes. `README.md` says what each choice means. Raises UsageError that names the option where a
    value is of another type, not finite, or out of its range.
    """

    base: Path
    adapters: tuple[Path, ...]
    bits: Bits | None = None
    format: FormatName | None = None
    dtype: DtypeName | None = None
    quant_type: QuantType | None = None
    double_quant: bool = False
    group_size: int | None = None
    scales: Scales = "auto"
    rounding: Rounding = "auto"
    seed: int = 0
    keep: tuple[str, ...] = ()
    quantize_towers: bool = False
    trained_on: TrainedOn = "as-is"
    adapter_base: str | None = None
    weight: tuple[float, ...] = ()
    combine: Combine = "sum"
    density: float | None = None
    alpha: float | None = None
    base_is_residual: bool = False
    allow_unused: str | None = None
    tokenizer: TokenizerFrom = "auto"
    card: Card = "new"
    digest: DigestName = USUAL
    max_shard_size: int | None = None
    fit: Fit | None = None

    def __post_init__(self) -> None:
        self._check_types()
        if self.weight and len(self.weight) != len(self.adapters):
            given, wanted = len(self.weight), len(self.adapters)
            raise UsageError(
                f"--weight: {given} given for {wanted} adapter{'' if wanted == 1 else 's'}; give one for each"
            )
        for name, known in (
            ("bits", WIDTHS), ("format", FORMATS), ("dtype", tuple(MODEL_DTYPES)), ("quant_type", QUANT_TYPES),
            ("rounding", ROUNDINGS), ("scales", SCALES), ("fit", FITS), ("trained_on", TRAINED_ON),
            ("tokenizer", TOKENIZERS), ("card", CARDS), ("digest", DIGESTS),
            ("combine", COMBINES),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value not in known:
                raise UsageError(f"{option(name)}: {value!r} is not one of {', '.join(map(str, known))}")
        if self.format == "plain" and self.bits not in (None, 16):
            raise UsageError(f"--format plain has 16 bits or what --dtype says, not {self.bits}")
        if self.bits == 16 and self.format not in (None, "plain"):
            raise UsageError(f"--bits 16 is plain; {self.format} has fewer")
        if self.group_size is not None and self.group_size != -1 and self.group_size < 1:
            raise UsageError(f"--group-size: {self.group_size} is neither a positive number nor -1 (one per row)")
        if self.bits == 16 and self.dtype == "float32":
            raise UsageError("--bits 16 and --dtype float32 exclude each other")
        self._check_codes()
        self._check_combination()
        for name, patterns in (("allow_unused", (self.allow_unused,)), ("keep", self.keep)):
            for pattern in filter(None, patterns):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise UsageError(f"{option(name)}: {pattern!r} is not a regular expression: {error}") from None

    def _check_codes(self) -> None:
        """Options that say how codes are written go with others that ask for codes."""
        names = ("quant_type", "double_quant", "group_size", "quantize_towers")
        given = [option(name) for name in names if getattr(self, name)]
        if given and not self.quantizes:
            raise UsageError(
                f"{', '.join(given)}: says how new codes are written, and none are asked for; give --bits or --format "
                "too, or leave it out"
            )
        if self.fit and (self.decodes or self.scales == "keep"):
            other = "--scales keep" if self.scales == "keep" else "a plain output"
            raise UsageError(f"--fit: says how fresh zero points are fitted, and {other} has none; leave it out")
        if self.format is not None:
            self.check_double_quant(self.format)
            self.check_fit(self.format)

    def _check_combination(self) -> None:
        """The share that stays goes with a way to thin changes out, and with adapters that make them."""
        if self.density is not None and not (_is_real(self.density) and 0 < self.density <= 1):
            raise UsageError(f"--density: {quoted(self.density)} is not a number above 0, and 1 at most")
        if self.combine == "sum" and self.density is not None:
            raise UsageError("--density: says which share of the changes stays; give --combine ties, dare or magnitude")
        if self.combine != "sum" and (self.density is None or not self.adapters):
            lacks = "an adapter" if self.density is not None else "--density"
            raise UsageError(f"--combine {self.combine}: needs {lacks}; it thins out the changes of adapters")

    def check_double_quant(self, name: str) -> None:
        """UsageError where `--double-quant` is given and the format of this name has none for these codes."""
        if self.double_quant and not ABILITIES[name].double_quant(self.bits, self.quant_type):
            raise UsageError(
                f"--double-quant: {name} has none for such codes; it goes with --bits 4 --format "
                f"{' or '.join(DOUBLE_QUANT)}; leave --double-quant out"
            )

    def check_fit(self, name: str) -> None:
        """UsageError where `--fit` is given and the format of this name has no zero points for these codes."""
        if self.fit and not (self.format == "plain" or ABILITIES[name].zero_points(self.bits, self.quant_type)):
            raise UsageError(
                f"--fit: {name} has no zero points for such codes, only scales; --fit goes with --format "
                f"{' or '.join(ZERO_POINTS)}; leave --fit out"
            )

    def _check_types(self) -> None:
        _check_flags(self, ("double_quant", "quantize_towers", "base_is_residual"))
        _check_texts(self, ("scales", "rounding", "trained_on", "tokenizer", "card", "digest", "combine"))
        _check_texts(self, ("format", "fit", "dtype", "quant_type", "adapter_base", "allow_unused"), optional=True)
        if not isinstance(self.keep, tuple) or not all(isinstance(pattern, str) for pattern in self.keep):
            raise UsageError(f"--keep: {quoted(self.keep)} is not a regular expression, nor several of them")
        _check_integers(self, ("bits", "group_size", "max_shard_size"), optional=True)
        _check_integers(self, ("seed",))
        strengths = [("weight", weight) for weight in self.weight]
        strengths += [] if self.alpha is None else [("alpha", self.alpha)]
        for name, value in strengths:
            if not (_is_real(value) and abs(value) <= STRONGEST):
                bounds = f"{-STRONGEST:g} to {STRONGEST:g}"
                raise UsageError(f"{option(name)}: {quoted(value)} is not a number from {bounds}")

    @property
    def original(self) -> Path | None:
        """The folder that `--adapter-base` names; None where it is not given, or the adapters were trained on BASE."""
        return None if self.adapter_base in (None, SAME) else Path(str(self.adapter_base))

    @property
    def inputs(self) -> list[Path]:
        """What the user named: folders, or single files whose neighbours are no inputs."""
        return [self.base, *self.adapters, *([self.original] if self.original else [])]

    @property
    def strengths(self) -> tuple[float, ...]:
        """The factor of each adapter's effect."""
        return self.weight or (1.0,) * len(self.adapters)

    @property
    def quantizes(self) -> bool:
        """Whether a quantized output is asked for."""
        return self.bits not in (None, 16) or self.format not in (None, "plain")

    @property
    def decodes(self) -> bool:
        """Whether a plain output is asked for."""
        return self.bits == 16 or self.format == "plain"

    @property
    def target_dtype(self) -> str | None:
        """`--dtype` as the name in a safetensors header."""
        return None if self.dtype is None else MODEL_DTYPES[self.dtype]

    def choices(self) -> dict[str, Any]:
        """The choices that differ from their defaults, as the record and the digest of a job have them (JSON values).

        An original is named by its folder alone: what it holds is in the digest of the job.
        """
        names = [one.name for one in fields(self) if one.name not in ("base", "adapters")]
        values = {name: getattr(self, name) for name in names}
        if self.original:
            values["adapter_base"] = self.original.resolve().name
        defaults = {one.name: one.default for one in fields(self)}
        return {name: value for name, value in values.items() if value != defaults[name]}


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a recipe is run, which changes no byte of the output. max_memory: bytes; None means the default.

    report: the file of the report; None: there is to be none.

    Raises UsageError that names the option where a value is of another type, or out of its range.
    """

    min_survival: float = 0.3
    device: str = "auto"
    max_memory: int | None = None
    threads: int | None = None
    resume: bool = False
    restart: bool = False
    overwrite: bool = False
    verify: bool = False
    report: str | None = None

    def __post_init__(self) -> None:
        _check_flags(self, ("resume", "restart", "overwrite", "verify"))
        _check_texts(self, ("device",))
        _check_texts(self, ("report",), optional=True)
        _check_integers(self, ("threads", "max_memory"), optional=True)
        if not (_is_real(self.min_survival) and -math.inf < self.min_survival <= 1):
            raise UsageError(
                f"--min-survival: {quoted(self.min_survival)} is not a number of at most 1; 0 and below: never refuse"
            )
        if self.resume and self.restart:
            raise UsageError("--resume and --restart exclude each other")


@dataclass(frozen=True, slots=True)
class Request:
    """One merge: what is made, where, and how. out: None where nothing is to be written."""

    recipe: Recipe
    out: Path | None = None
    run: RunOptions = field(default_factory=RunOptions)

    @classmethod
    def of(cls, base: Path, adapters: tuple[Path, ...], out: Path | None = None, /, **options: Any) -> Request:
        """From options by name, as the command line has them.

        Raises UsageError for a name that is none, or a value that does not fit.
        """
        known = {one.name for one in (*fields(Recipe), *fields(RunOptions))} - {"base", "adapters"}
        if unknown := sorted(options.keys() - known):
            raise UsageError(f"{', '.join(unknown)}: no such option; there are {', '.join(sorted(known))}")
        of_run = {one.name for one in fields(RunOptions)}
        run = RunOptions(**{name: value for name, value in options.items() if name in of_run})
        recipe = Recipe(base, adapters, **{name: value for name, value in options.items() if name not in of_run})
        return cls(recipe, out, run)

    @property
    def paths(self) -> list[Path]:
        """Everything that the user named."""
        written = [self.out, Path(self.run.report) if self.run.report else None]
        return [*self.recipe.inputs, *(path for path in written if path)]


DEFAULTS = {one.name: one.default for one in (*fields(Recipe), *fields(RunOptions))}


def option(name: str) -> str:
    """An option by its field, as the command line spells it."""
    return f"--{name.replace('_', '-')}"


def spelled(choices: Mapping[str, Any]) -> Iterator[str]:
    """Choices that are no defaults, as words of the command line."""
    for name, value in choices.items():
        if value is True:
            yield option(name)
        else:
            for one in value if isinstance(value, tuple | list) else (value,):
                yield from (option(name), str(one))


def _check_flags(options: object, names: Iterable[str]) -> None:
    for name in names:
        if not isinstance(getattr(options, name), bool):
            raise UsageError(f"{option(name)}: {quoted(getattr(options, name))} is neither true nor false")


def _check_texts(options: object, names: Iterable[str], optional: bool = False) -> None:
    for name in names:
        value = getattr(options, name)
        if not isinstance(value, str) and not (value is None and optional):
            raise UsageError(f"{option(name)}: {quoted(value)} is not a text")


def _check_integers(options: object, names: Iterable[str], optional: bool = False) -> None:
    for name in names:
        value, (least, most) = getattr(options, name), INTEGERS[name]
        if value is None and optional:
            continue
        if not (isinstance(value, int) and not isinstance(value, bool) and least <= value <= most):
            raise UsageError(f"{option(name)}: {quoted(value)} is not a whole number from {least} to {most}")


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def parse_size(text: str | int) -> int:
    """Bytes of `2GB`, `500MB`, `1.5GiB` or a plain number."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([KMGT]?I?)B?\s*", text.upper(), re.ASCII)
    if not match or match[2] not in UNITS:
        raise UsageError(f"{quoted(text)} is not a size; write it like 2GB or 500MiB")
    return int(float(match[1]) * UNITS[match[2]])
