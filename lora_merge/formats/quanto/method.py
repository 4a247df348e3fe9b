"""optimum-quanto's own checkpoints: which modules are quantized stands in quanto_qmap.json, not in config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lora_merge.abilities import FormatOptions
from lora_merge.formats.base import CodedFormat
from lora_merge.formats.method import SECTION, ConfigPath, JsonFile, Loader, QuantMethod
from lora_merge.formats.quanto.format import Quanto, QuantoBits, QuantoBytes, ScaledBits, ScaledBytes
from lora_merge.formats.quanto.qmap import MODULES, modules
from lora_merge.spec import TensorSpec

NONE = "none"


class QuantoMethod(QuantMethod[Quanto]):
    """Its loader builds the class, swaps the modules of the map for its own, and fills it by stored names."""

    name: ClassVar[str] = "quanto"
    formats: ClassVar[tuple[type[CodedFormat], ...]] = (QuantoBytes, QuantoBits, ScaledBytes, ScaledBits)
    loader: ClassVar[Loader | None] = Loader(by_name=True)
    json_file: ClassVar[JsonFile | None] = JsonFile("quanto_qmap.json", alone=True)

    @classmethod
    def format_for(cls, options: FormatOptions, weights: Mapping[str, TensorSpec]) -> Quanto:
        if options.bits < 8:
            return QuantoBits(options.dtype, bits=options.bits)
        return QuantoBytes(options.dtype, kind="qint8" if options.quant_type == "int" else "qfloat8_e4m3fn")

    @classmethod
    def config_changes(
        cls, written: Mapping[str, Quanto], plain: Sequence[str], config: Mapping[str, Any]
    ) -> dict[ConfigPath, Any]:
        old = modules(config)
        kept = {name: one for name, one in old.items() if isinstance(one, Mapping) and one.get("weights") == NONE}
        body = {module: _entry(old.get(module), format) for module, format in written.items()}
        return {(SECTION,): {"quant_method": cls.name, MODULES: {**kept, **body}}}

    @classmethod
    def from_json_file(cls, content: dict[str, Any]) -> dict[str, Any]:
        return {MODULES: content}

    @classmethod
    def to_json_file(cls, section: Mapping[str, Any], old: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        found: Mapping[str, Any] = section[MODULES]
        return found


def _entry(old: object, format: Quanto) -> dict[str, Any]:
    """What the map says of one module."""
    kind = format.kind if isinstance(format, QuantoBytes) else f"qint{format.bits}"
    activations = old.get("activations", NONE) if isinstance(old, Mapping) and not format.scalars else NONE
    return {"weights": kind, "activations": activations}
