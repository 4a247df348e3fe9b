"""What the tests of quantized formats do to the parts of one weight."""

from collections.abc import Callable, Iterator, Mapping

import torch

from lora_merge.formats.base import ByteRange, Format
from lora_merge.spec import TensorSpec

DTYPES = {
    torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32",
}  # fmt: skip
Encode = Callable[[torch.Tensor, int, int, dict[str, torch.Tensor]], None]
"""Rows `[start, stop)` of a weight, start, stop, and the bytes of each part that they fill."""


def specs(parts: Mapping[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {part: TensorSpec(DTYPES[value.dtype], tuple(value.shape)) for part, value in parts.items()}


def raw(parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The bytes of each part, laid at odd places of one buffer, as a block of a file lies in memory."""
    data = {part: value.contiguous().view(-1).view(torch.uint8) for part, value in parts.items()}
    buffer = torch.zeros(1 + sum(len(value) + 1 for value in data.values()), dtype=torch.uint8)
    placed: dict[str, torch.Tensor] = {}
    begin = 1
    for part, value in data.items():
        placed[part] = buffer[begin : begin + len(value)].copy_(value)
        begin += len(value) + 1
    return placed


def decoded(format: Format, data: Mapping[str, torch.Tensor], weight: TensorSpec) -> torch.Tensor:
    out = torch.full(weight.shape, float("nan"))
    format.decode(data, out)
    return out


def blank(format: Format, weight: TensorSpec) -> dict[str, torch.Tensor]:
    """Room for every part of a weight, filled with what must not stay."""
    return raw({part: torch.full((spec.nbytes,), 0xA5).byte() for part, spec in format.describe(weight).items()})


def encoded(format: Format, weight: TensorSpec, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Bytes of each part, with scales that the format chooses."""
    out = blank(format, weight)
    format.encode(rows, out)
    return out


def encoding(format: Format) -> Encode:
    """Encodes each tile with scales that the format chooses."""
    return lambda tile, start, stop, out: format.encode(tile, out)


def recoding(format: Format, weight: TensorSpec, data: Mapping[str, torch.Tensor]) -> Encode:
    """Encodes each tile with the scales that are stored in `data`, whose values the tile must have."""

    def encode(tile: torch.Tensor, start: int, stop: int, out: dict[str, torch.Tensor]) -> None:
        cuts = format.slices(weight, weight.shape[1], start, stop)
        here = format.from_row(start)
        codes, grid = here.unpack(raw({part: gathered(data[part], cut) for part, cut in cuts.items()}), *tile.shape)
        assert torch.equal(grid.values(codes), tile)
        here.pack(grid.nearest(tile), grid, out)

    return encode


def kept(
    format: Format, weight: TensorSpec, data: Mapping[str, torch.Tensor], rows: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Bytes of each part, with the scales that are stored in `data`."""
    _, grid = format.unpack(data, *weight.shape)
    out = blank(format, weight)
    format.pack(grid.nearest(rows), grid, out)
    return out


def put(whole: torch.Tensor, cut: ByteRange, piece: torch.Tensor) -> None:
    """Write the bytes of one cut into a whole part; codes into their fields of a folded one, which were zero."""
    if cut.fold is None:
        place, data = window(whole, cut), piece.view(cut.lines, -1)
        place.copy_(place | data if cut.joined else data)
        return
    for code, at in zip(piece.tolist(), range(cut.begin, cut.end), strict=True):
        slab, byte = divmod(at, cut.fold.length)
        left = (8 // cut.fold.bits - 1 - slab if cut.fold.high else slab) * cut.fold.bits
        whole[byte] |= code << left


def window(data: torch.Tensor, cut: ByteRange) -> torch.Tensor:
    """The bytes of one cut of a whole part, `[lines, end - begin]`, as they lie in it."""
    lines = data.view(-1, cut.stride) if cut.stride else data.view(1, -1)
    return lines[cut.first : cut.first + cut.lines, cut.begin : cut.end]


def gathered(data: torch.Tensor, cut: ByteRange) -> torch.Tensor:
    """The bytes of one cut of a whole part, lines one behind the other; of a folded part its codes."""
    if cut.fold is not None:
        bits, length, mask = cut.fold.bits, cut.fold.length, (1 << cut.fold.bits) - 1
        slabs = torch.cat([data >> left & mask for left in range(0, 8, bits)][:: -1 if cut.fold.high else 1])
        assert len(data) == length
        return slabs[cut.begin : cut.end]
    return window(data, cut).reshape(-1)


def pieces(format: Format, weight: TensorSpec, rows: int, step: int) -> Iterator[tuple[int, int]]:
    """Rows `[start, stop)` of every tile; one ends where `slices` cannot go on."""
    within = format.rows_within(weight) or rows
    for first in range(0, rows, within):
        yield from ((start, min(start + step, first + within)) for start in range(first, first + within, step))


def by_tiles(format: Format, weight: TensorSpec, rows: torch.Tensor, step: int, encode: Encode) -> dict[str, bytes]:
    """Bytes of each part written tile by tile, parts of the whole weight but once; joined ones begin as zeros."""
    whole = {part: torch.full((spec.nbytes,), 0xA5).byte() for part, spec in format.describe(weight).items()}
    cuts = format.slices(weight, rows.shape[1], *next(pieces(format, weight, len(rows), step), (0, 0)))
    folded = {part for part, cut in cuts.items() if cut.fold}
    joined = {part for part, cut in cuts.items() if cut.joined}
    for part in folded | joined:
        whole[part].zero_()
    filled = dict.fromkeys(whole, 0)
    for start, stop in pieces(format, weight, len(rows), step):
        cuts = format.slices(weight, rows.shape[1], start, stop)
        out = {part: torch.full((cut.nbytes,), 0xA5, dtype=torch.uint8) for part, cut in cuts.items()}
        encode(rows[start:stop], start, stop, out)
        for part, cut in cuts.items():
            put(whole[part], cut, out[part])
            filled[part] = cut.nbytes if part in format.shared else filled[part] + cut.nbytes
    filled |= {part: min(filled[part], len(whole[part])) for part in joined}
    assert filled == {part: len(data) for part, data in whole.items()} | dict.fromkeys(folded, rows.numel())
    return {part: data.numpy().tobytes() for part, data in whole.items()}


def same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return {part: torch.equal(found[part], expected[part]) for part in expected} == dict.fromkeys(found, True)
