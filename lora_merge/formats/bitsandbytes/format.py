"""bitsandbytes as transformers saves it: LLM.int8, and NF4 or FP4 with or without double quantization.

    part                                   dtype      shape                   meaning
    weight                                 I8         [out, in]               codes, -127 to 127
    SCB                                    F32 (F16)  [out]                   largest magnitude of each row
    weight_format                          U8         []                      0: the codes lie in rows. May lack

    weight                                 U8, other  [ceil(n / 2), 1] or     codes of the flat weight, n = out * in,
                                                      [ceil(n / 2)]           two to a byte, the first in the upper
                                                                              half; or the bytes as another dtype
    weight.absmax                          F32        [blocks]                largest magnitude of each block of the
                                                                              flat weight, blind to where rows end
    weight.quant_map                       F32        [16]                    value of each nibble
    weight.quant_state.bitsandbytes__nf4   U8         [length]                JSON, see bnb_state; or ...__fp4
                                           doubly quantized scales have besides
    weight.absmax                          U8         [blocks]                codes
    weight.nested_absmax                   F32        [blocks / 256]          their scales
    weight.nested_quant_map                F32        [256]                   value of each code

    int8   w = (code * SCB) * f32(1 / 127)                          in float32
    4 bit  w = quant_map[nibble] * absmax                           in float32, then rounded to the dtype of quant_state
           absmax = nested_quant_map[code] * nested_absmax + offset in float32, where it is doubly quantized

Conv1D weights (GPT-2) are saved transposed to `[out, in]`.
https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/bitsandbytes.py
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from lora_merge.errors import InputError, UnsupportedError, printable
from lora_merge.formats.base import (
    SECTION,
    ByteRange,
    ConfigPath,
    FormatOptions,
    Loader,
    Parts,
    Quantized,
    ReadPart,
    shown,
)
from lora_merge.formats.bitsandbytes.config import METHOD, check_kept, section
from lora_merge.formats.bitsandbytes.grids import (
    STEP,
    Blocks,
    Doubled,
    Int8Rows,
    block_absmax,
    gathered,
    rising,
    spread,
)
from lora_merge.formats.bitsandbytes.state import DTYPES, LEVELS, NAMES, NESTED, Nesting, QuantState
from lora_merge.formats.plain import LIMITS
from lora_merge.formats.raw import fill, numbers, torch_dtype
from lora_merge.quantization import bits as codec
from lora_merge.spec import BITS, TensorSpec

if TYPE_CHECKING:
    import torch

    from lora_merge.quantization.grids import Grid

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""What the library's kernels take."""
STORAGE = {"U8": "uint8", "I8": "int8", "F16": "float16", "BF16": "bfloat16", "F32": "float32"}
"""dtypes as which the bytes of 4-bit codes may be stored."""
QUANT_STATE = "weight.quant_state.bitsandbytes__"
PADDING = {"nf4": 7, "fp4": 0}
"""The nibble of zero."""
LONGEST = 4096
"""Bytes; a quant_state has some 200."""


class Bitsandbytes(Quantized):
    """Either of `LLMInt8` and `FourBit`."""

    __slots__ = ()
    name: ClassVar[str] = METHOD
    loader: ClassVar[Loader | None] = Loader(derived=False, by_end=True, split_experts=("Llama4TextExperts",))
    conv1d: ClassVar[bool] = True
    part_names: ClassVar[tuple[str, ...]] = (
        "weight", "weight.absmax", "weight.quant_map", QUANT_STATE + "nf4", QUANT_STATE + "fp4",
        "weight.nested_absmax", "weight.nested_quant_map", "SCB", "weight_format",
    )  # fmt: skip
    identifying_parts: ClassVar[tuple[str, ...]] = ("SCB", "weight.absmax", QUANT_STATE + "nf4", QUANT_STATE + "fp4")

    @classmethod
    def detect(cls, parts: Parts, config: Mapping[str, Any], module: str, read: ReadPart) -> Bitsandbytes | None:
        if (
            "weight" not in parts
            or not set(parts) <= set(cls.part_names)
            or not set(parts) & set(cls.identifying_parts)
        ):
            return None
        found: LLMInt8 | FourBit
        if "SCB" in parts:
            found, shape = _int8(parts, config, module, read), parts["weight"].shape
        else:
            found = _four_bit(parts, module, read)
            shape = found.shape
        expected = found.describe(TensorSpec(found.dtype, shape))
        if dict(parts) != expected:
            raise InputError(
                f"{printable(module)}: holds {shown(parts)}; bitsandbytes stores a weight {list(shape)} as "
                f"{shown(expected)}; the checkpoint is damaged, fetch it again"
            )
        return found

    @classmethod
    def from_options(cls, wanted: FormatOptions, weights: Mapping[str, TensorSpec]) -> Bitsandbytes:
        if wanted.dtype not in NAMES:
            raise UnsupportedError(f"bitsandbytes has no weights in {wanted.dtype}; choose a --dtype")
        if wanted.bits == 8:
            if wanted.quant_type not in (None, "int") or wanted.group_size or wanted.double_quant:
                raise UnsupportedError(
                    "bitsandbytes has one kind of 8 bits, LLM.int8 with a scale per row; leave --quant-type, "
                    "--group-size and --double-quant out, or choose --bits 4"
                )
            return LLMInt8(wanted.dtype)
        quant_type, blocksize = wanted.quant_type or "nf4", wanted.group_size or 64
        if wanted.bits != 4 or quant_type not in LEVELS:
            raise UnsupportedError(
                f"bitsandbytes has nf4 and fp4 with 4 bits and int with 8, no {wanted.quant_type or 'type'} with "
                f"{wanted.bits}"
            )
        if blocksize not in BLOCKSIZES:
            raise UnsupportedError(
                f"bitsandbytes has blocks of {', '.join(map(str, BLOCKSIZES))}, not {blocksize}; choose a --group-size"
            )
        return FourBit(quant_type, blocksize, wanted.dtype, NESTED if wanted.double_quant else 0)

    @classmethod
    def config_changes(
        cls, written: Mapping[str, Bitsandbytes], kept: Sequence[str], config: Mapping[str, Any]
    ) -> dict[ConfigPath, Any]:
        check_kept(kept, written)
        format, old = next(iter(written.values())), config.get(SECTION)
        body = section(old, format.bits, NAMES[format.dtype], kept, format.said)
        return {**cls.plain_changes(config), (SECTION,): body}

    dtype: str
    """Of the model; safetensors name."""

    @property
    @abstractmethod
    def said(self) -> dict[str, Any]:
        """What config.json says of this format's parameters."""


@dataclass(frozen=True, slots=True)
class LLMInt8(Bitsandbytes):
    """dtype: of the model. scale: of SCB. weight_format: its shape, None where it is not stored.

    Fresh scales and their nearest codes are those of weights rounded to F16, as the library has them.
    """

    dtype: str
    scale: str = "F32"
    weight_format: tuple[int, ...] | None = ()

    @property
    def bits(self) -> int:
        return 8

    @property
    def said(self) -> dict[str, Any]:
        return {}

    @property
    def shared(self) -> tuple[str, ...]:
        return ("weight_format",)

    @property
    def limit(self) -> float:
        return LIMITS["F16"]

    def for_weight(self, weight: TensorSpec, compute_dtype: str = "F32", seen: torch.Tensor | None = None) -> LLMInt8:
        return self

    def describe(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        rows, columns = weight.shape
        parts = {"weight": TensorSpec("I8", (rows, columns)), "SCB": TensorSpec(self.scale, (rows,))}
        if self.weight_format is not None:
            parts["weight_format"] = TensorSpec("U8", self.weight_format)
        return parts

    def measure(self, parts: Parts) -> TensorSpec:
        return TensorSpec(self.dtype, parts["weight"].shape)

    def refusal(self, weight: TensorSpec) -> str | None:
        return _no_matrix(weight)

    def rows_at_once(self, weight: TensorSpec) -> int:
        return 1

    def slices(self, weight: TensorSpec, columns: int, start: int, stop: int) -> dict[str, ByteRange]:
        size = BITS[self.scale] // 8
        cuts = {"weight": ByteRange(start * columns, stop * columns), "SCB": ByteRange(start * size, stop * size)}
        if self.weight_format is not None:
            cuts["weight_format"] = ByteRange(0, 1)
        return cuts

    def fit(self, rows: torch.Tensor, start: int = 0) -> Int8Rows:
        import torch

        most = rows.abs().amax(1, keepdim=True) if rows.shape[1] else rows.new_zeros(len(rows), 1)
        return self._grid(most.half().to(torch_dtype(self.scale)).float(), rows.shape[1], torch.float16)

    def unpack(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> tuple[torch.Tensor, Int8Rows]:
        codes = numbers(parts["weight"], "I8", columns)
        return codes, self._grid(numbers(parts["SCB"], self.scale, 1).float(), columns)

    def pack(self, codes: torch.Tensor, grid: Grid, out: Mapping[str, torch.Tensor]) -> None:
        fill(out["weight"], codes)
        fill(out["SCB"], grid.SCB.to(torch_dtype(self.scale)))  # type: ignore[attr-defined]
        if self.weight_format is not None:
            out["weight_format"].zero_()

    def __str__(self) -> str:
        return "bitsandbytes int8"

    def _grid(self, SCB: torch.Tensor, columns: int, compute_dtype: torch.dtype | None = None) -> Int8Rows:
        """compute_dtype: None for scales that are kept, whose codes may be any."""
        low = -127 if compute_dtype else -128
        return Int8Rows(
            SCB=SCB, scale=SCB * STEP, group=max(1, columns), low=low, high=127, compute_dtype=compute_dtype
        )


@dataclass(frozen=True, slots=True)
class FourBit(Bitsandbytes):
    """quant_type: "nf4" or "fp4". nested_blocksize: 0 without double quantization. storage: dtype as which the codes
    are stored. column: whether they are `[N, 1]`, not `[N]`. shape: of the weight, once it is known. room: bytes of the
    stored quant_state. nesting: the doubly quantized scales of the whole weight, once they were surveyed."""

    quant_type: str
    blocksize: int
    dtype: str
    nested_blocksize: int = 0
    storage: str = "U8"
    column: bool = True
    shape: tuple[int, ...] = ()
    room: int | None = field(default=None, compare=False)
    nesting: Nesting | None = field(default=None, compare=False, repr=False)

    @property
    def bits(self) -> int:
        return 4

    @property
    def said(self) -> dict[str, Any]:
        return {
            "bnb_4bit_quant_storage": STORAGE[self.storage],
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": bool(self.nested_blocksize),
        }

    @property
    def state_part(self) -> str:
        return QUANT_STATE + self.quant_type

    @property
    def shared(self) -> tuple[str, ...]:
        return ("weight.quant_map", "weight.nested_quant_map", self.state_part)

    @property
    def needs_observation(self) -> bool:
        return bool(self.nested_blocksize) and self.nesting is None

    def observe(self, rows: torch.Tensor) -> torch.Tensor:
        """absmax of every block."""
        return block_absmax(rows, self.blocksize)

    def for_weight(self, weight: TensorSpec, compute_dtype: str = "F32", seen: torch.Tensor | None = None) -> FourBit:
        settled = replace(self, shape=weight.shape)
        if seen is None or not self.nested_blocksize:
            return settled
        return replace(settled, nesting=Nesting.of(seen, settled._state(), settled._room()))

    @property
    def limit(self) -> float:
        return LIMITS[self.dtype]

    def describe(self, weight: TensorSpec) -> dict[str, TensorSpec]:
        blocks = -(-weight.numel // self.blocksize)
        words = self._bytes(weight.numel) * 8 // BITS[self.storage]
        parts = {
            "weight": TensorSpec(self.storage, (words, 1) if self.column else (words,)),
            "weight.absmax": TensorSpec("U8" if self.nested_blocksize else "F32", (blocks,)),
            "weight.quant_map": TensorSpec("F32", (16,)),
        }
        if self.nested_blocksize:
            parts["weight.nested_absmax"] = TensorSpec("F32", (-(-blocks // self.nested_blocksize),))
            parts["weight.nested_quant_map"] = TensorSpec("F32", (256,))
        return {**parts, self.state_part: TensorSpec("U8", (replace(self, shape=weight.shape)._room(),))}

    def measure(self, parts: Parts) -> TensorSpec:
        assert self.shape, "codes lie flat; the shape of the weight was not told"
        return TensorSpec(self.dtype, self.shape)

    def refusal(self, weight: TensorSpec) -> str | None:
        if self._bytes(weight.numel) * 8 % BITS[self.storage]:
            return f"the codes of {weight.numel} values do not fill words of {STORAGE[self.storage]}"
        return _no_matrix(weight)

    def rows_at_once(self, weight: TensorSpec) -> int:
        whole = math.lcm(self.blocksize * max(1, self.nested_blocksize), 2 * BITS[self.storage] // 8)
        return whole // math.gcd(whole, weight.matrix()[1])

    def slices(self, weight: TensorSpec, columns: int, start: int, stop: int) -> dict[str, ByteRange]:
        first, last = -(-start * columns // self.blocksize), -(-stop * columns // self.blocksize)
        size = 1 if self.nested_blocksize else 4
        cuts = {part: ByteRange(0, spec.nbytes) for part, spec in self.describe(weight).items() if part in self.shared}
        cuts["weight"] = ByteRange(self._bytes(start * columns), self._bytes(stop * columns))
        cuts["weight.absmax"] = ByteRange(first * size, last * size)
        if self.nested_blocksize:
            every = self.nested_blocksize
            cuts["weight.nested_absmax"] = ByteRange(-(-first // every) * 4, -(-last // every) * 4)
        return cuts

    def fit(self, rows: torch.Tensor, start: int = 0) -> Blocks:
        import torch

        assert not self.needs_observation, "scales are doubly quantized as a whole, and were not all told"
        absmax, columns = block_absmax(rows, self.blocksize), rows.shape[1]
        quant_map = torch.tensor(LEVELS[self.quant_type], device=rows.device)
        exact = spread(absmax, self.blocksize, rows.shape)
        scale, state, doubled = exact, self._state(), None
        if self.nesting is not None:
            state = self.nesting.state
            first = start * columns // self.blocksize // self.nested_blocksize
            doubled = self.nesting.doubled(absmax, first, rows.shape)
            scale = doubled.absmax(state.nested_offset)
        text = torch.frombuffer(bytearray(state.encoded(self._room())), dtype=torch.uint8)
        table, order = rising(quant_map)
        return Blocks(
            table=table, quant_map=quant_map, order=order, state=text, padding=PADDING[self.quant_type], scale=scale,
            doubled=doubled, absmax=exact, short=rows.numel() % self.blocksize,
            group=math.gcd(self.blocksize, columns), dtype=torch_dtype(self.dtype),
        )  # fmt: skip

    def unpack(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> tuple[torch.Tensor, Blocks]:
        n, data, text, doubled = rows * columns, parts["weight"], parts[self.state_part], None
        padding = int(data[-1]) & 0xF if n % 2 else 0
        quant_map = numbers(parts["weight.quant_map"], "F32", 16)[0]
        if self.nested_blocksize:
            state = QuantState.parse(bytes(text.tolist()), "a weight")
            nested = numbers(parts["weight.nested_absmax"], "F32", 1)[:, 0]
            levels = numbers(parts["weight.nested_quant_map"], "F32", 256)[0]
            doubled = Doubled.of(
                parts["weight.absmax"], nested, levels, (self.blocksize, self.nested_blocksize), (rows, columns)
            )
            scale = doubled.absmax(state.nested_offset)
        else:
            scale = spread(numbers(parts["weight.absmax"], "F32", 1)[:, 0], self.blocksize, (rows, columns))
        table, order = rising(quant_map)
        codes = codec.unpack(data, 4, n, order="high").view(rows, columns)
        if order is not None:
            codes = order.argsort().to(codes.dtype)[codes.int()]
        return codes, Blocks(
            table=table, quant_map=quant_map, order=order, state=text, padding=padding, scale=scale, doubled=doubled,
            group=math.gcd(self.blocksize, columns), dtype=torch_dtype(self.dtype),
        )  # fmt: skip

    def pack(self, codes: torch.Tensor, grid: Grid, out: Mapping[str, torch.Tensor]) -> None:
        import torch

        assert isinstance(grid, Blocks)
        nibbles = codes if grid.order is None else grid.order[codes.int()]
        packed = codec.pack(nibbles.reshape(-1), 4, torch.uint8, order="high")
        if codes.numel() % 2:
            packed[-1] |= grid.padding
        fill(out["weight"], packed)
        fill(out["weight.quant_map"], grid.quant_map)
        text = out[self.state_part]
        if len(grid.state) == len(text):
            text.copy_(grid.state)
        else:
            state = QuantState.parse(bytes(grid.state.tolist()), "a weight")
            text.copy_(torch.frombuffer(bytearray(state.encoded(len(text))), dtype=torch.uint8))
        scales = grid.scale if grid.doubled is None else grid.doubled.codes
        fill(out["weight.absmax"], gathered(scales, grid.group, self.blocksize))
        if grid.doubled is not None:
            nested = gathered(grid.doubled.nested_absmax, grid.group, self.blocksize * self.nested_blocksize)
            fill(out["weight.nested_absmax"], nested)
            fill(out["weight.nested_quant_map"], grid.doubled.levels)

    def __str__(self) -> str:
        return f"bitsandbytes {self.quant_type} {self.blocksize}{' double' if self.nested_blocksize else ''}"

    def _state(self) -> QuantState:
        return QuantState(self.quant_type, self.blocksize, self.dtype, self.shape, self.nested_blocksize)

    def _room(self) -> int:
        return self._state().room if self.room is None else self.room

    @staticmethod
    def _bytes(values: int) -> int:
        return -(-values // 2)


def _int8(parts: Parts, config: Mapping[str, Any], module: str, read: ReadPart) -> LLMInt8:
    scale, weight = parts["SCB"], parts["weight"]
    if weight.dtype != "I8" or len(weight.shape) != 2 or scale.dtype not in ("F32", "F16"):
        raise InputError(
            f"{printable(module)}: holds {shown(parts)}; LLM.int8 has a weight I8 [out, in] and its SCB F32 [out]; "
            "the checkpoint is damaged, fetch it again"
        )
    layout = parts.get("weight_format")
    if layout is not None and layout.numel != 1:
        raise InputError(
            f"{printable(module)}.weight_format: is {layout}, expected one number; the checkpoint is damaged, fetch it "
            "again"
        )
    if layout is not None and layout.nbytes == 1 and (number := read("weight_format")[0]):
        raise UnsupportedError(
            f"{printable(module)}: its codes lie in the tiles of one GPU generation (weight_format {number}), which "
            "the library no longer reads either; save the model again with the version that wrote it, on CPU"
        )
    said = config.get("dtype") or config.get("torch_dtype")
    return LLMInt8(DTYPES.get(str(said), "F16"), scale.dtype, None if layout is None else layout.shape)


def _four_bit(parts: Parts, module: str, read: ReadPart) -> FourBit:
    types = [quant_type for quant_type in LEVELS if QUANT_STATE + quant_type in parts]
    storage = parts["weight"].dtype
    if len(types) != 1 or storage not in STORAGE or parts[QUANT_STATE + types[0]].nbytes > LONGEST:
        raise InputError(
            f"{printable(module)}: holds {shown(parts)}; bitsandbytes stores 4-bit codes with one small "
            f"{QUANT_STATE}nf4 or ...fp4; the checkpoint is damaged, fetch it again"
        )
    text = read(QUANT_STATE + types[0])
    state = QuantState.parse(text, module)
    if state.quant_type != types[0]:
        raise InputError(
            f"{printable(module)}: its quant_state says {printable(state.quant_type)}, its name {types[0]}; the "
            "checkpoint is damaged, fetch it again"
        )
    if reason := _no_matrix(TensorSpec(state.dtype, state.shape)):
        raise UnsupportedError(f"{printable(module)}: {reason}; take the unquantized original")
    column = len(parts["weight"].shape) != 1
    nested = state.nested_blocksize
    return FourBit(state.quant_type, state.blocksize, state.dtype, nested, storage, column, state.shape, len(text))


def _no_matrix(weight: TensorSpec) -> str | None:
    if len(weight.shape) != 2:
        return f"bitsandbytes holds matrices, this weight is {list(weight.shape)}"
    return None
