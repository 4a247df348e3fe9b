"""torchao as config.json and the headers of weight files have it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from lora_merge.abilities import FormatOptions
from lora_merge.dtypes import TORCH_NAMES
from lora_merge.formats.base import CodedFormat, Format, Metadata
from lora_merge.formats.method import SECTION, ConfigPath, Loader, QuantMethod, sections
from lora_merge.formats.torchao import metadata
from lora_merge.formats.torchao.config import METHOD, new_section, not_converted, section
from lora_merge.formats.torchao.format import TorchAO, TorchAODown, TorchAOGateUp
from lora_merge.formats.torchao.int4 import TorchAOInt4
from lora_merge.formats.torchao.layout import FLOAT8, INT8
from lora_merge.spec import TensorSpec

KINDS = {"int": INT8, "fp8": FLOAT8}
"""The classes that are written anew, by the word of `--quant-type`."""
_BLOCK: list[int] = []
"""Of the weight, once it is known which."""
_ATTRIBUTES: Mapping[str, tuple[Mapping[str, Any], list[str]]] = {
    INT8: (
        {"act_quant_kwargs": None, "reduce_range": False, "block_size": _BLOCK},
        ["zero_point", "qdata", "scale"],
    ),
    FLOAT8: (
        {
            "block_size": _BLOCK,
            "mm_config": None,
            "act_quant_kwargs": None,
            "kernel_preference": {"_type": "KernelPreference", "_data": "AUTO"},
        },
        ["qdata", "scale"],
    ),
}


class TorchAOMethod(QuantMethod[TorchAO]):
    """A scale a row, made anew; any blocks, kept."""

    name: ClassVar[str] = METHOD
    formats: ClassVar[tuple[type[CodedFormat], ...]] = (TorchAO, TorchAOGateUp, TorchAODown, TorchAOInt4)
    loader: ClassVar[Loader | None] = Loader(cuts=False)

    @classmethod
    def format_for(cls, options: FormatOptions, weights: Mapping[str, TensorSpec]) -> TorchAO:
        kind = KINDS[str(options.quant_type)]
        data, parts = _ATTRIBUTES[kind]
        body = {"_type": kind, "_data": {**data, "dtype": _dtype(options.dtype)}, "_tensor_data_names": parts}
        text = json.dumps(body)
        if kind == FLOAT8:
            return TorchAO(kind, "F8_E4M3", zeros=False, dtype=options.dtype, text=text, fresh=True)
        return TorchAO(kind, dtype=options.dtype, text=text, fresh=True)

    @classmethod
    def config_changes(
        cls, written: Mapping[str, TorchAO], plain: Sequence[str], config: Mapping[str, Any]
    ) -> dict[ConfigPath, Any]:
        """A new section for weights made anew; of what is kept, only which linears are plain may change."""
        format = next(iter(written.values()))
        if format.fresh:
            word = next(word for word, kind in KINDS.items() if kind == format.kind)
            return {**cls.config_removal(config), (SECTION,): new_section(word, plain)}
        own = section(config)
        places = (path for path, body in sections(config) if own is not None and body is own)
        return {path: {**(own or {}), "modules_to_not_convert": not_converted(plain)} for path in places}

    @classmethod
    def header_metadata(cls, old: Metadata, weights: Iterable[tuple[str, Format | None, TensorSpec]]) -> Metadata:
        written: dict[str, str] = {}
        plain = []
        for name, format, weight in weights:
            if isinstance(format, TorchAO | TorchAOInt4):
                written[name] = format.description(weight)
            else:
                plain.append(name)
        return metadata.renewed(old, written, plain)


def _dtype(name: str) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": TORCH_NAMES[name]}
