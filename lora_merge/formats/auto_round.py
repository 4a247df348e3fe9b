"""AutoRound's own export: the words of GPTQ or of AWQ, under a config of its own.

packing_format                           parts
auto_round:auto_gptq  auto_round:gptq    those of GPTQ version 1, without g_idx
auto_round:gptqmodel  auto_round         those of GPTQ version 2, without g_idx
auto_round:auto_awq   auto_round:awq     those of AWQ's gemm

`extra_config` gives single layers another width or leaves them plain. All of it stays as it is: weights are
written back where they were. No other checkpoint is turned into one of these, since GPTQ's own config says the same to
more loaders. https://github.com/intel/auto-round/blob/main/auto_round/inference/backend.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from lora_merge.errors import UnsupportedError
from lora_merge.formats.awq.gemm import AWQ
from lora_merge.formats.base import ByteRange, CodedFormat, Parts, ReadPart
from lora_merge.formats.gptq.config import WHERE, GptqOptions, plain_in_blocks, section
from lora_merge.formats.gptq.format import GPTQ
from lora_merge.formats.method import SECTION, ConfigPath, JsonFile, QuantMethod
from lora_merge.formats.patterns import compiled
from lora_merge.models.config_values import OBJECT, WHOLE, value
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch

    from lora_merge.quantization.grids import Grid

METHODS = ("auto-round", "intel/auto-round")
"""The second in files of early versions."""
VERSIONS = {
    "auto_round:auto_gptq": 1, "auto_round:gptq": 1, "auto": 1, "auto_round:gptqmodel": 2, "auto_round": 2,
}  # fmt: skip
AS_AWQ = ("auto_round:auto_awq", "auto_round:awq")
PLAIN = {"bits": 16}
"""What `extra_config` has for a layer that is not quantized."""


@dataclass(frozen=True, slots=True)
class AutoRound(CodedFormat):
    """Weights whose bits lie as `packing` has them."""

    packing: GPTQ | AWQ

    name: ClassVar[str] = "auto-round"
    part_names: ClassVar[tuple[str, ...]] = GPTQ.part_names
    identifying_parts: ClassVar[tuple[str, ...]] = GPTQ.identifying_parts

    @classmethod
    def detect(cls, parts: Parts, config: Mapping[str, Any], module: str, read: ReadPart) -> AutoRound | None:
        """The format of these parts, or None where config.json does not say AutoRound."""
        body = section(config)
        if body.get("quant_method") not in METHODS:
            return None
        packing_format = str(body.get("packing_format", "auto"))
        if packing_format not in (*VERSIONS, *AS_AWQ):
            raise UnsupportedError(
                f"{module}: AutoRound's packing_format {packing_format} is not read "
                f"({', '.join((*VERSIONS, *AS_AWQ))} are); export the model anew in one of these"
            )
        own = _extra(body, module)
        options = {key: own.get(key, body.get(key)) for key in ("bits", "group_size", "sym")}
        packing: GPTQ | AWQ | None
        if packing_format in AS_AWQ:
            as_awq = {"quant_method": "awq", "version": "gemm", "group_size": options["group_size"]}
            packing = AWQ.detect(parts, {SECTION: as_awq}, module, read)
        else:
            as_gptq = replace(GptqOptions.of(options, module), version=VERSIONS[packing_format])
            packing = GPTQ.of(parts, as_gptq, module, read)
        return None if packing is None else cls(packing)

    @property
    def bits(self) -> int:
        return self.packing.bits

    @property
    def shared(self) -> tuple[str, ...]:
        return self.packing.shared

    @property
    def limit(self) -> float:
        return self.packing.limit

    def for_weight(self, weight: TensorSpec, compute_dtype: str = "F32", seen: torch.Tensor | None = None) -> AutoRound:
        return replace(self, packing=self.packing.for_weight(weight, compute_dtype, seen))

    def describe(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        return self.packing.describe(weight)

    def refinable(self, grid: Grid) -> bool:
        return self.packing.refinable(grid)

    def measure(self, parts: Parts) -> TensorSpec:
        return self.packing.measure(parts)

    def refusal(self, weight: TensorSpec) -> str | None:
        return self.packing.refusal(weight)

    def rows_at_once(self, weight: TensorSpec) -> int:
        return self.packing.rows_at_once(weight)

    def slices(self, weight: TensorSpec, columns: int, start: int, stop: int) -> dict[str, ByteRange]:
        return self.packing.slices(weight, columns, start, stop)

    def fit(self, rows: torch.Tensor, start: int = 0) -> Grid:
        return self.packing.fit(rows, start)

    def unpack(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> tuple[torch.Tensor, Grid]:
        return self.packing.unpack(parts, rows, columns)

    def pack(self, codes: torch.Tensor, grid: Grid, out: Mapping[str, torch.Tensor]) -> None:
        self.packing.pack(codes, grid, out)

    def __str__(self) -> str:
        return f"auto-round {self.packing}"


class AutoRoundMethod(QuantMethod[AutoRound]):
    """Kept where a base has it: GPTQ's own config says the same to more loaders."""

    name: ClassVar[str] = "auto-round"
    aliases: ClassVar[tuple[str, ...]] = METHODS[1:]
    formats: ClassVar[tuple[type[CodedFormat], ...]] = (AutoRound,)
    json_file: ClassVar[JsonFile | None] = JsonFile("quantization_config.json")

    @classmethod
    def config_changes(
        cls, written: Mapping[str, AutoRound], plain: Sequence[str], config: Mapping[str, Any]
    ) -> dict[ConfigPath, Any]:
        """What the base says of itself, and the linears of its blocks that have become plain."""
        body = dict(section(config))
        became = [module for module in plain_in_blocks(written, plain) if _bits(_extra(body, module)) < PLAIN["bits"]]
        if became:
            body["extra_config"] = {**_layers(body), **dict.fromkeys(became, PLAIN)}
        return {**cls.config_removal(config), (SECTION,): body}


def _extra(body: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """What `extra_config` says of this layer: by its name, or by the first pattern found in it."""
    layers = _layers(body)
    named = (
        [layers[module]] if module in layers else [values for name, values in layers.items() if _matches(name, module)]
    )
    return next((values for values in named if isinstance(values, Mapping)), {})


def _layers(body: Mapping[str, Any]) -> Mapping[str, Any]:
    layers: Mapping[str, Any] = value(body, "extra_config", OBJECT, WHERE, default={})
    return layers


def _bits(layer: Mapping[str, Any]) -> int:
    return int(value(layer, "bits", WHOLE, f"{WHERE}.extra_config", default=0))


def _matches(pattern: str, module: str) -> bool:
    try:
        return compiled(pattern).search(module) is not None
    except ValueError:  # the loader leaves such a pattern out, too
        return False
