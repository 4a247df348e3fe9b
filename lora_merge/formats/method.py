"""What config.json says of a format of codes: one `quant_method`, read, chosen and written.

Formats that are stored alike, or that one loader takes for one, share a method.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from lora_merge.abilities import ABILITIES, Abilities, FormatOptions
from lora_merge.formats.base import CodedFormat, Format, Metadata
from lora_merge.models.config_paths import text_configs
from lora_merge.spec import TensorSpec

ConfigPath = tuple[str, ...]
GONE = None
"""Value of a config change that takes the key away."""
SECTION = "quantization_config"
SECTIONS = (SECTION, "compression_config")
"""Where config.json, or the text model in it, says how weights are quantized; the second in files of early versions."""
F = TypeVar("F", bound=CodedFormat)


@dataclass(frozen=True, slots=True)
class Loader:
    """What transformers' loader of a format takes for quantized.

    derived: linears whose class is derived from Linear, too.
    blocks: linears that lie in a list of blocks alone.
    text: models that take text first alone; other loaders of the format take the rest as well.
    conv1d: transformers' Conv1D as well, whose weights then lie `[out, in]` as those of a linear.
    by_end: its list of what stays plain goes by the beginnings of names up to a dot, and by their ends.
    renames: it renames that list as if it were names of stored modules.
    experts: what it makes of experts that are stored one by one where the class stacks them: "linears", "merged" into
        a stack of codes, "stacks", which must be plain, or "served": it cannot open them, and servers can.
    own_experts: it has a module of its own for experts, unless they are listed.
    split_experts: classes of experts that it takes apart.
    scaled_activations: model types for which it wants scales of activations, which only calibration can give.
    cuts: it opens classes that cut one stored weight into several.
    by_name: it fills parameters from tensors of the very same name alone.
    loses_plain: parts that weights have for which it drops plain ones where the class puts one together from several.
    served: servers open the format with loaders of their own, also where this one cannot.
    """

    derived: bool = True
    blocks: bool = False
    text: bool = False
    conv1d: bool = False
    by_end: bool = False
    renames: bool = False
    experts: str = "stacks"
    own_experts: bool = False
    split_experts: tuple[str, ...] = ()
    scaled_activations: tuple[str, ...] = ()
    cuts: bool = True
    by_name: bool = False
    loses_plain: tuple[str, ...] = ()
    served: bool = False


class JsonFile(NamedTuple):
    """A JSON file that says how weights are quantized. alone: config.json does not say it as well."""

    name: str
    alone: bool = False


class QuantMethod(Generic[F]):
    """The config side of a format of codes. Nothing here knows values or bytes of weights.

    A method whose abilities name no `quant_types` may leave `format_for` out, one that is only read `config_changes`.
    """

    name: ClassVar[str]
    """`quant_method` in config.json, and the word of `--format`."""
    aliases: ClassVar[tuple[str, ...]] = ()
    """Other values of `quant_method` that mean the same."""
    formats: ClassVar[tuple[type[CodedFormat], ...]]
    """Layouts under this name, the usual one first: new weights have its names and, where it says so, are stacks."""
    loader: ClassVar[Loader | None] = None
    """None where transformers loads no checkpoints of this format, or quantizes what the tensors say."""
    json_file: ClassVar[JsonFile | None] = None
    """Beside config.json, in which this format's loaders look for `quantization_config`, too."""
    rescales_channels: ClassVar[bool] = False
    """Channels were multiplied by something before they were rounded, so that adapters of the original do not fit."""

    @classmethod
    def abilities(cls) -> Abilities:
        """Widths, kinds of codes, group sizes that can be asked for."""
        return ABILITIES[cls.name]

    @classmethod
    def from_options(cls, options: FormatOptions, weights: Mapping[str, TensorSpec]) -> F:
        """The format to write all these weights in, by module. Raises UnsupportedError for what it does not have."""
        return cls.format_for(cls.abilities().chosen(cls.name, options), weights)

    @classmethod
    def format_for(cls, options: FormatOptions, weights: Mapping[str, TensorSpec]) -> F:
        """The format of options that `abilities` has found possible; their quant_type is never None."""
        raise NotImplementedError

    @classmethod
    def config_changes(
        cls, written: Mapping[str, F], plain: Sequence[str], config: Mapping[str, Any]
    ) -> dict[ConfigPath, Any]:
        """What config.json must say of an output. GONE takes a key away.

        written: format of each quantized module, in the order of the model; plain: its other linears (the head among
        them). config: that of the base. Raises UnsupportedError for what the format's loaders cannot be told.
        """
        raise NotImplementedError

    @classmethod
    def config_removal(cls, config: Mapping[str, Any]) -> dict[ConfigPath, Any]:
        """What config.json must say of an output whose weights are no longer in this format."""
        return dict.fromkeys((path for path, _ in sections(config)), GONE)

    @classmethod
    def header_metadata(cls, old: Metadata, weights: Iterable[tuple[str, Format | None, TensorSpec]]) -> Metadata:
        """What the header of every weight file of an output must say.

        old: the headers of the base. weights: every weight of the output, by the name that it has without quantization,
        and every other tensor, whose format is None.
        """
        return old

    @classmethod
    def is_quantized(cls, module: str, config: Mapping[str, Any]) -> bool | None:
        """Whether this format's loader takes this module for quantized; None where config.json decides."""
        return None

    @classmethod
    def from_json_file(cls, content: dict[str, Any]) -> dict[str, Any]:
        """The content of `json_file`, as `quantization_config` of config.json would say it."""
        return content

    @classmethod
    def to_json_file(cls, section: Mapping[str, Any], old: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        """The content of `json_file` for a `quantization_config`; undoes `from_json_file`. old: that of the base."""
        return section


def sections(config: Mapping[str, Any]) -> Iterator[tuple[ConfigPath, Any]]:
    """Every place in config.json, or in the text model's part of it, that says how weights are quantized, with what it
    says."""
    for path, part in text_configs(config):
        yield from (((*path, key), part[key]) for key in SECTIONS if key in part)
