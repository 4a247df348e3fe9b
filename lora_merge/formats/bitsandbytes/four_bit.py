"""NF4 and FP4 with or without double quantization.

    part                                   dtype      shape                   meaning
    weight                                 U8, other  [ceil(n / 2), 1] or     codes of the flat weight, n = out * in,
                                                      [ceil(n / 2)]           two to a byte, the first in the upper
                                                                              half; or the bytes as another dtype
    weight.absmax                          F32        [blocks]                largest magnitude of each block of the
                                                                              flat weight, blind to where rows end
    weight.quant_map                       F32        [16]                    value of each nibble
    weight.quant_state.bitsandbytes__nf4   U8         [length]                JSON, see `state`; or ...__fp4
                                           doubly quantized scales have besides
    weight.absmax                          U8         [blocks]                codes
    weight.nested_absmax                   F32        [blocks / 256]          their scales
    weight.nested_quant_map                F32        [256]                   value of each code

w = quant_map[nibble] * absmax in float32, then rounded to the dtype of quant_state. Doubly quantized,
absmax = nested_quant_map[code] * nested_absmax + offset, in float32.
https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/bitsandbytes.py
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lora_merge.dtypes import BITS, TORCH_NAMES, torch_dtype
from lora_merge.errors import InputError, UnsupportedError, printable
from lora_merge.formats.base import ByteRange, Parts, ReadPart, shown
from lora_merge.formats.bitsandbytes.format import QUANT_STATE, Bitsandbytes, check_parts, may_be, no_matrix
from lora_merge.formats.bitsandbytes.grids import Blocks, Doubled, block_absmax, gathered, rising, spread
from lora_merge.formats.bitsandbytes.state import LEVELS, Nesting, QuantState
from lora_merge.formats.plain import LIMITS
from lora_merge.formats.raw import fill, numbers
from lora_merge.quantization import bits as codec
from lora_merge.spec import TensorSpec

if TYPE_CHECKING:
    import torch

    from lora_merge.quantization.grids import Grid

STORAGE = ("U8", "I8", "F16", "BF16", "F32")
"""dtypes as which the bytes of 4-bit codes may be stored."""
PADDING = {"nf4": 7, "fp4": 0}
"""The nibble of zero."""
LONGEST = 4096
"""Bytes; a quant_state has some 200."""


@dataclass(frozen=True, slots=True)
class FourBit(Bitsandbytes):
    """quant_type: "nf4" or "fp4". nested_blocksize: 0 without double quantization. storage: dtype as which the codes
    are stored. column: whether they are `[N, 1]`, not `[N]`. shape: of the weight, once it is known. room: bytes of the
    stored quant_state. nesting: the doubly quantized scales of the whole weight, once `observe` has seen all rows."""

    quant_type: str
    blocksize: int
    dtype: str
    nested_blocksize: int = 0
    storage: str = "U8"
    column: bool = True
    shape: tuple[int, ...] = ()
    room: int | None = field(default=None, compare=False)
    nesting: Nesting | None = field(default=None, compare=False, repr=False)

    @classmethod
    def detect(cls, parts: Parts, config: Mapping[str, Any], module: str, read: ReadPart) -> FourBit | None:
        if not may_be(parts) or "SCB" in parts:
            return None
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
        if reason := no_matrix(TensorSpec(state.dtype, state.shape)):
            raise UnsupportedError(f"{printable(module)}: {reason}; take the unquantized original")
        column = len(parts["weight"].shape) != 1
        nested = state.nested_blocksize
        format = FourBit(
            state.quant_type, state.blocksize, state.dtype, nested, storage, column, state.shape, len(text)
        )
        check_parts(format, parts, state.shape, module)
        return format

    @property
    def bits(self) -> int:
        return 4

    @property
    def config_keys(self) -> dict[str, Any]:
        return {
            "bnb_4bit_quant_storage": TORCH_NAMES[self.storage],
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
        known = replace(self, shape=weight.shape)
        if seen is None or not self.nested_blocksize:
            return known
        return replace(known, nesting=Nesting.of(seen, known._state(), known._room()))

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
        assert self.shape, "codes lie flat; the shape of the weight is not known"
        return TensorSpec(self.dtype, self.shape)

    def refusal(self, weight: TensorSpec) -> str | None:
        if self._bytes(weight.numel) * 8 % BITS[self.storage]:
            return f"the codes of {weight.numel} values do not fill words of {TORCH_NAMES[self.storage]}"
        return no_matrix(weight)

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

        assert not self.needs_observation, "scales are doubly quantized as a whole, and are not all known"
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
