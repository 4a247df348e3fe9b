"""The contract of a format: how one weight is stored as parts.

A *weight* is a logical float tensor, usually `[out, in]`; its *parts* are stored tensors, named by what follows the
module path (`weight`, `weight_scale`, `qweight`, ...). `describe` and `measure` are pure and undo each other;
`decode` and `encode` move rows. A format that can only be read lacks `fit` and `pack` (`writable` is False).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from lora_merge.quantization.grids import Grid

Parts = Mapping[str, TensorSpec]
ReadPart = Callable[[str], bytes]
"""The bytes of a small part, by part name, while a weight's format is looked for."""
ConfigPath = tuple[str, ...]
GONE = None
"""Value of a config change that takes the key away."""
SECTION = "quantization_config"
SECTIONS = (SECTION, "compression_config")
"""Where config.json, or the text model in it, says how weights are quantized; the second in files of early versions."""


class ByteRange(NamedTuple):
    """Which bytes of a part: `[begin, end)` of each of the lines `[first, first + lines)`, all `stride` bytes long; one
    line (without a stride, the whole part) is the usual piece in one run. Formats that store a weight transposed,
    `[in, out]`, need many; a stack of such weights has those of each expert one behind the other."""

    begin: int
    end: int
    lines: int = 1
    stride: int = 0
    first: int = 0

    @property
    def nbytes(self) -> int:
        return (self.end - self.begin) * self.lines


@dataclass(frozen=True, slots=True)
class FormatOptions:
    """What the user asks of a quantized output; None leaves it to the format.

    dtype: safetensors name of the dtype of the plain weights: scales that are floats are stored in it where the format
        leaves that open, and the weights decode to it.
    """

    bits: int
    dtype: str = "BF16"
    quant_type: str | None = None
    group_size: int | None = None
    double_quant: bool = False


@dataclass(frozen=True, slots=True)
class Loader:
    """What transformers' loader of a format takes for quantized.

    derived: linears whose class is derived from Linear, too.
    by_end: its list of what stays plain goes by the beginnings of names up to a dot, and by their ends.
    renames: it renames that list as if it were names of stored modules.
    experts: what it makes of experts that are stored one by one where the class stacks them: "linears", "merged" into
        a stack of codes, or "stacks", which must be plain.
    own_experts: it has a module of its own for experts, unless they are listed.
    split_experts: classes of experts that it takes apart.
    cuts: it opens classes that cut one stored weight into several.
    loses_plain: parts that weights have for which it drops plain ones where the class puts one together from several.
    served: servers open the format with loaders of their own, also where this one cannot.
    """

    derived: bool = True
    by_end: bool = False
    renames: bool = False
    experts: str = "stacks"
    own_experts: bool = False
    split_experts: tuple[str, ...] = ()
    cuts: bool = True
    loses_plain: tuple[str, ...] = ()
    served: bool = False


class Format(Protocol):
    """One way to store a weight, with its parameters (dtype, bits, group size, ...); frozen.

    Rows are those of `TensorSpec.matrix(stacked)`; a format that codes rows together cuts
    at multiples of `rows_at_once`.
    """

    name: ClassVar[str]
    writable: ClassVar[bool]

    @property
    def limit(self) -> float:
        """The largest magnitude of a float32 value that it can hold; above it lies an overflow."""

    def describe(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        """Every part of this weight, by part name, in the order in which they are written."""

    def measure(self, parts: Parts) -> TensorSpec:
        """The weight that these parts hold: float dtype in which it decodes, logical shape. Undoes `describe`."""

    def refusal(self, weight: TensorSpec) -> str | None:
        """Why this weight cannot be stored so, or None."""

    def rows_at_once(self, weight: TensorSpec) -> int:
        """The smallest number of rows that can be coded alone."""

    def slices(self, weight: TensorSpec, columns: int, start: int, stop: int) -> dict[str, ByteRange]:
        """The bytes of each part that hold rows `[start, stop)` of the view with `columns` columns."""

    def decode(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Fill float32 `out` `[n, columns]` from the bytes (uint8, 1-D; lines one behind the other) that `slices`
        names."""

    def encode(self, rows: torch.Tensor, out: Mapping[str, torch.Tensor]) -> None:
        """Round float32 rows `[n, columns]` onto this format, into the bytes (uint8, 1-D) that `slices` names."""


class Quantized(ABC):
    """A format of codes on a grid, the base class of all. It says where bits go and which scales fit; the grid does the
    arithmetic.

    `decode` is `unpack` and the grid's values; `encode` is `fit`, the grid's nearest codes and `pack`. Any other
    rounding, and scales kept from the stored weight, come in between.
    """

    name: ClassVar[str]
    writable: ClassVar[bool] = True
    part_names: ClassVar[tuple[str, ...]]
    """Every part that a weight of this format may have. Parts named `bias`, `input_scale`, ... that a merge leaves as
    they are do not count."""
    identifying_parts: ClassVar[tuple[str, ...]]
    """Parts one of which every weight of this format has, and which a plain weight has not."""
    separator: ClassVar[str] = "."
    """What stands between the module (`stem`) and the part: tensor = stem + separator + part."""
    weight_suffix: ClassVar[str] = ".weight"
    """The weight's own name, as a model without quantization has it: stem + weight_suffix."""
    stacked: ClassVar[bool] = False
    """Weights are stacks `[experts, a, b]`, worked on as rows `experts * a`."""
    own_file: ClassVar[str | None] = None
    """A JSON file beside config.json in which this format's loaders look for `quantization_config`, too."""
    beside: ClassVar[tuple[str, ...]] = ()
    """Tensors of a quantized module that are no parts of its weight, and that a merge leaves as they are although it
    moves what they were measured on: scales of activations."""
    opaque: ClassVar[tuple[str, ...]] = ()
    """Parts whose dtype does not say what their bytes are."""
    expert_linears: ClassVar[bool] = False
    """Loaders take experts that are stored one by one as linears, though the model class stacks them."""
    loader: ClassVar[Loader | None] = None
    """None where transformers loads no checkpoints of this format, or quantizes what the tensors say."""
    conv1d: ClassVar[bool] = False
    """Its loader quantizes transformers' Conv1D as well, whose weights then lie `[out, in]` as those of a linear."""
    fused: ClassVar[bool] = False
    """Weights that a server computes as one matrix must share what `observe` sees."""

    @classmethod
    @abstractmethod
    def detect(cls, parts: Parts, config: Mapping[str, Any], module: str, read: ReadPart) -> Self | None:
        """The format of the parts of one module, or None where they are another format's.

        config: config.json of the checkpoint; `quantization_config` in it may come from the format's `own_file`.
        Raises InputError where the parts contradict each other, UnsupportedError where they cannot be read.
        """

    @classmethod
    def from_options(cls, wanted: FormatOptions, weights: Mapping[str, TensorSpec]) -> Self:
        """The format to write all these weights in, by module. Raises UnsupportedError for what it does not have."""
        raise NotImplementedError

    @classmethod
    def config_changes(
        cls, written: Mapping[str, Self], kept: Sequence[str], config: Mapping[str, Any]
    ) -> dict[ConfigPath, Any]:
        """What config.json must say of an output. GONE takes a key away.

        written: format of each quantized module, in the order of the model; kept: its other linears, which stay plain
        (the head among them). config: that of the base.
        """
        raise NotImplementedError

    @classmethod
    def section(cls, own_file: dict[str, Any]) -> dict[str, Any]:
        """What `own_file` holds, as `quantization_config` of config.json would say it."""
        return own_file

    @classmethod
    def as_own_file(cls, section: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        """The content of `own_file` for a `quantization_config`. before: what the base has there."""
        return section

    @classmethod
    def plain_changes(cls, config: Mapping[str, Any]) -> dict[ConfigPath, Any]:
        """What config.json must say of an output whose weights are no longer in this format."""
        return dict.fromkeys((path for path, _ in sections(config)), GONE)

    @classmethod
    def quantizes(cls, module: str, config: Mapping[str, Any]) -> bool | None:
        """Whether this format's loader has this module quantized; None where config.json decides."""
        return None

    @property
    @abstractmethod
    def bits(self) -> int: ...

    @property
    def shared(self) -> tuple[str, ...]:
        """Parts that belong to the whole weight. `slices` names them whole for any rows; `pack` may fill them each
        time with the same; they are written once."""
        return ()

    @property
    def needs_observation(self) -> bool:
        """Whether `fit` needs to know of the whole weight, and has not yet been told by `for_weight`."""
        return False

    def observe(self, rows: torch.Tensor) -> torch.Tensor:
        """What `for_weight` must see of these float32 rows (a multiple of `rows_at_once`), float32 `[k]`: the largest
        magnitude, the scales, ...; those of all rows in order, one behind the other, are told to it."""
        raise NotImplementedError

    @abstractmethod
    def for_weight(self, weight: TensorSpec, compute_dtype: str = "F32", seen: torch.Tensor | None = None) -> Self:
        """This format for this one weight.

        compute_dtype: dtype (safetensors name) in which `fit` and the nearest codes are computed: F32, unless the bytes
            must be those of a library that computes in the weight's own dtype.
        seen: what `observe` said of all its rows (and, where the format is `fused`, of those that it is fused with).
        """

    @property
    @abstractmethod
    def limit(self) -> float: ...

    @abstractmethod
    def describe(self, weight: TensorSpec) -> dict[str, TensorSpec]: ...

    @abstractmethod
    def measure(self, parts: Parts) -> TensorSpec: ...

    @abstractmethod
    def refusal(self, weight: TensorSpec) -> str | None: ...

    @abstractmethod
    def rows_at_once(self, weight: TensorSpec) -> int: ...

    def rows_within(self, weight: TensorSpec) -> int | None:
        """Rows at whose multiples a piece must end, since `slices` cannot name a piece across them; None: nowhere."""
        return None

    @abstractmethod
    def slices(self, weight: TensorSpec, columns: int, start: int, stop: int) -> dict[str, ByteRange]: ...

    def fit(self, rows: torch.Tensor, start: int = 0) -> Grid:
        """The scales that the format's own library would choose for float32 rows `[n, columns]`, the first of them row
        `start` of the weight; whole multiples of `rows_at_once`, unless they are the last."""
        raise NotImplementedError

    def refinable(self, grid: Grid) -> bool:
        """Whether each scale of a grid that `fit` gave may be replaced by another: none is shared between rows, and all
        are stored as plain numbers."""
        from lora_merge.quantization.grids import Affine

        return type(grid) is Affine

    @abstractmethod
    def unpack(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> tuple[torch.Tensor, Grid]:
        """Codes `[rows, columns]` and their grid, from the bytes that `slices` names."""

    def pack(self, codes: torch.Tensor, grid: Grid, out: Mapping[str, torch.Tensor]) -> None:
        """Codes and the scales of their grid into the bytes that `slices` names; undoes `unpack` bit for bit."""
        raise NotImplementedError

    def decode(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        codes, grid = self.unpack(parts, *out.shape)
        grid.values(codes, out)

    def encode(self, rows: torch.Tensor, out: Mapping[str, torch.Tensor]) -> None:
        grid = self.fit(rows)
        self.pack(grid.nearest(rows), grid, out)


def sections(config: Mapping[str, Any]) -> Iterator[tuple[ConfigPath, Any]]:
    """Every place in config.json, or in the text model's part of it, that says how weights are quantized, with what it
    says."""
    text = config.get("text_config")
    places: list[tuple[ConfigPath, Mapping[str, Any]]] = [((), config)]
    places += [(("text_config",), text)] if isinstance(text, Mapping) else []
    for place, body in places:
        yield from (((*place, key), body[key]) for key in SECTIONS if key in body)


def shown(parts: Parts) -> str:
    """Parts with their specs, as an error tells them."""
    return ", ".join(f"{name} {spec}" for name, spec in parts.items())


def same_grid(one: Format | Quantized, other: Format | Quantized, weight: TensorSpec) -> bool:
    """Whether what one format's `unpack` gives can be kept by the other's `pack`."""
    if not isinstance(one, Quantized) or not isinstance(other, Quantized):
        return False
    return one.for_weight(weight) == other.for_weight(weight)


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight of an open checkpoint: its format, its logical spec, and the tensor name of each part."""

    format: Format | Quantized
    weight: TensorSpec
    parts: Mapping[str, str]
