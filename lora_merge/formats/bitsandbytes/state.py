"""What bitsandbytes stores of a 4-bit weight besides its codes: levels, quant_state, doubly quantized scales.

quant_state is JSON text, spaces at its end are no matter:

    key                meaning
    quant_type         "nf4" or "fp4", as in the name of the part
    blocksize          consecutive elements of the flat weight that share one absmax
    dtype, shape       of the weight before, and of what it decodes to
    nested_blocksize   with double quantization: consecutive absmax that share one nested_absmax
    nested_dtype       "float32"
    nested_offset      what is taken off every absmax, their mean

https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/functional.py
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_merge.dtypes import MODEL_DTYPES, TORCH_NAMES
from lora_merge.errors import InputError, UnsupportedError, printable
from lora_merge.formats.bitsandbytes.grids import Doubled

if TYPE_CHECKING:
    import torch

LEVELS = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(
        value / 12 for value in (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)
    ),
}  # fmt: skip
"""Value of each nibble. fp4: sign, two bits of exponent, one of mantissa, though not in the order of IEEE floats."""
LONGEST = 4096
"""The library has no kernel for longer blocks."""
HALF_PLACES = 32767.5
"""Of the places from -1 to 1 at which the library's table of levels has entries."""
NESTED = 256
"""Blocksize of double quantization."""
WIDEST = "1.1754943508222875e-38"
"""No float32 that is not negative has a longer text."""
DECADES = 7


@dataclass(frozen=True, slots=True)
class QuantState:
    """quant_state of one weight. dtype: name of the safetensors header. nested_blocksize: 0 without double
    quantization."""

    quant_type: str
    blocksize: int
    dtype: str
    shape: tuple[int, ...]
    nested_blocksize: int = 0
    nested_offset: float = 0.0

    @classmethod
    def parse(cls, data: bytes, module: str) -> QuantState:
        """Raises InputError where the text is not the JSON that loaders understand."""
        try:
            body = json.loads(data.decode("utf-8"))
            state = cls._read(body)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise InputError(
                f"{printable(module)}: its quant_state is not what bitsandbytes writes ({printable(repr(error))} in "
                f"{printable(data[:200])}); fetch the file again"
            ) from None
        if state.nested_blocksize and body.get("nested_dtype") != "float32":
            raise UnsupportedError(
                f"{printable(module)}: nested_dtype {printable(body.get('nested_dtype'))} is not read, only float32"
            )
        return state

    @classmethod
    def _read(cls, body: dict[str, Any]) -> QuantState:
        sizes = [body["blocksize"], *body["shape"], body.get("nested_blocksize", 1)]
        if any(type(size) is not int or size < 1 for size in sizes):
            raise ValueError("sizes must be positive integers")
        if max(sizes[0], sizes[-1]) > LONGEST:
            raise ValueError(f"blocks have at most {LONGEST} elements")
        offset = float(body["nested_offset"]) if "nested_blocksize" in body else 0.0
        if not math.isfinite(offset):
            raise ValueError("nested_offset must be finite")
        dtype, shape = MODEL_DTYPES[body["dtype"]], tuple(body["shape"])
        return cls(body["quant_type"], body["blocksize"], dtype, shape, body.get("nested_blocksize", 0), offset)

    def text(self) -> str:
        """JSON as the library writes it."""
        return json.dumps(self._json())

    def encoded(self, room: int) -> bytes:
        """JSON in exactly `room` bytes."""
        texts = (self.text(), json.dumps(self._json(), separators=(",", ":")))
        text = next((text for text in texts if len(text) <= room), None)
        assert text is not None, f"{self} does not go into {room} bytes"
        return text.encode().ljust(room)

    @property
    def room(self) -> int:
        """Bytes that hold the text whatever the offset is."""
        if not self.nested_blocksize:
            return len(self.text())
        return len(replace(self, nested_offset=0.5).text()) - len("0.5") + len(WIDEST)

    def fitting(self, room: int) -> QuantState:
        """This state with as many digits of the offset as go into `room` bytes: any offset near the mean will do."""
        compact = len(json.dumps(self._json(), separators=(",", ":"))) - len(json.dumps(self.nested_offset))
        if len(self.text()) <= room or not self.nested_blocksize:
            return self
        texts = [f"{self.nested_offset:.{digits}g}" for digits in range(17, 0, -1)]
        short = [float(text) for text in texts if len(json.dumps(float(text))) <= room - compact]
        return replace(self, nested_offset=short[0] if short else 0.0)

    def _json(self) -> dict[str, Any]:
        body = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": TORCH_NAMES[self.dtype],
            "shape": list(self.shape),
        }
        if not self.nested_blocksize:
            return body
        nested = {"nested_blocksize": self.nested_blocksize, "nested_dtype": "float32"}
        return {**body, **nested, "nested_offset": self.nested_offset}


@dataclass(frozen=True, slots=True)
class Nesting:
    """Double quantization of all absmax of a weight: its state, which tells the offset, and nested_absmax, float32
    `[blocks / nested_blocksize]`."""

    state: QuantState
    nested_absmax: torch.Tensor

    @classmethod
    def of(cls, absmax: torch.Tensor, state: QuantState, room: int) -> Nesting:
        """absmax: float32 `[blocks]`. room: bytes of the state's text."""
        import torch

        absmax = absmax.float().cpu()
        state = replace(state, nested_offset=absmax.mean().item()).fitting(room)
        rest = (absmax - single(state.nested_offset)).abs()
        blocks = torch.nn.functional.pad(rest, (0, -len(rest) % state.nested_blocksize))
        return cls(state, blocks.view(-1, state.nested_blocksize).amax(1))

    def doubled(self, absmax: torch.Tensor, first: int, shape: Sequence[int]) -> Doubled:
        """Double quantization of the `absmax` `[blocks]` of rows of this shape, which begin with a nested_absmax, the
        `first`."""
        levels, nested = dynamic_map(absmax.device), self.nested_absmax
        nested = nested[first : first - (-len(absmax) // self.state.nested_blocksize)].to(absmax.device)
        each = nested.repeat_interleave(self.state.nested_blocksize)[: len(absmax)]
        codes = nested_codes(absmax - single(self.state.nested_offset), each, levels)
        return Doubled.of(codes, nested, levels, (self.state.blocksize, self.state.nested_blocksize), shape)


def single(value: float) -> float:
    """The nearest float32."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def dynamic_map(device: torch.device | None = None) -> torch.Tensor:
    """The 256 levels of an 8-bit dynamic float, rising, float32: the means of 2^i equal parts of [0.1, 1] in each of
    seven decades, their negatives, 0 and 1."""
    import torch

    positive = [
        10.0 ** (i - DECADES + 1) * (edges[1:] + edges[:-1]) / 2
        for i, edges in ((i, torch.linspace(0.1, 1, 2**i + 1)) for i in range(DECADES))
    ]
    magnitudes = torch.cat(positive)
    return torch.cat([magnitudes, -magnitudes, torch.tensor([0.0, 1.0])]).sort().values.to(device)


def nested_codes(rest: torch.Tensor, nested_absmax: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """uint8 codes of the nearest levels of `rest / nested_absmax`, where 0 / 0 is code 0.

    The library's CPU kernel first rounds the quotient to one of 2^16 places from -1 to 1, and looks its level up there:
    within 1.5e-5 of the middle between two levels its code is not always the nearer one.
    """
    import torch

    places = (rest * (1.0 / nested_absmax)).add_(1.0).mul_(HALF_PLACES).add_(0.5).floor_()
    mids = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(places.div_(HALF_PLACES).sub_(1.0), mids, out_int32=True).to(torch.uint8)
    return codes.masked_fill(nested_absmax == 0, 0)
