"""What a pickle of `torch.save` says, read without doing it.

A pickle is a program for a small stack machine. This one knows the operations of protocols 2 to 5 that build plain
values, and gives every global as a name without meaning: there is nothing here to call, import or change. https://docs.python.org/3/library/pickletools.html

Bounded by construction: no length is believed before the bytes are there, every operation costs one step, and steps,
depth of the stack and size of integers have limits. Values may share and contain themselves; nothing here walks them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from lora_merge.containers.torch_values import ALLOWED, Global, Refused, StateDict, described_call, described_storage
from lora_merge.errors import printable

MAX_STACK = 1 << 17
MAX_DEPTH = 1000
MAX_INT_BYTES = 8


def read_pickle(data: bytes | bytearray, max_steps: int) -> Any:
    """The value that a pickle describes, in at most `max_steps` operations; `Refused` where it is not one of torch."""
    machine = _Machine(data, max_steps)
    try:
        return machine.run()
    except (IndexError, struct.error) as error:
        raise Refused(f"it ends or runs out of values at byte {machine.at}") from error
    except UnicodeDecodeError as error:
        raise Refused(f"a string before byte {machine.at} is not UTF-8") from error


class _Machine:
    def __init__(self, data: bytes | bytearray, max_steps: int) -> None:
        self.data = data
        self.at = 0
        self.max_steps = max_steps
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # the stacks below each open mark
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(self.max_steps):
            code = self.data[self.at]
            self.at += 1
            if code == 0x2E:  # STOP
                return self._stop()
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise self._unknown(code)
            operation(self)
            if len(self.stack) > MAX_STACK:
                raise Refused(f"more than {MAX_STACK} values are on the stack at byte {self.at}")
        raise Refused(f"it has more than {self.max_steps} operations, too many for the tensors in the file")

    def _stop(self) -> Any:
        value = self.stack.pop()
        if self.stack or self.outer or self.at != len(self.data):
            raise Refused(f"it stops at byte {self.at} with something left over")
        return value

    def _unknown(self, code: int) -> Refused:
        import pickletools

        names = {ord(op.code): op.name for op in pickletools.opcodes}
        name = f"operation {names.get(code, hex(code))}"
        if code == ord("i"):  # INST names what it would call
            name += f" of {self.line()}.{self.line()}"
        return Refused(f"{name} at byte {self.at} has no place in a file of tensors, and is not carried out")

    def take(self, count: int) -> bytes:
        """The next `count` bytes of the program."""
        if count > len(self.data) - self.at:
            raise Refused(f"a value at byte {self.at} claims {count} bytes, {len(self.data) - self.at} are left")
        self.at += count
        return bytes(self.data[self.at - count : self.at])

    def unsigned(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 1000)
        if end < 0:
            raise Refused(f"the name at byte {self.at} has no end")
        return self.take(end + 1 - self.at)[:-1].decode("utf-8")

    def marked(self) -> list[Any]:
        """The values above the last mark, which goes."""
        values = self.stack
        self.stack = self.outer.pop()
        return values

    # -- operations on marks, memo and containers

    def mark(self) -> None:
        if len(self.outer) >= MAX_DEPTH:
            raise Refused(f"values are nested more than {MAX_DEPTH} deep at byte {self.at}")
        self.outer.append(self.stack)
        self.stack = []

    def put(self, index: int) -> None:
        if index > self.max_steps:
            raise Refused(f"memo index {index} at byte {self.at} is larger than the program could need")
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise Refused(f"memo index {index} at byte {self.at} was never set")
        self.stack.append(self.memo[index])

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        values = tuple(self.stack[-count:])
        self.stack[-count:] = [values]

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise Refused(f"an item at byte {self.at} is appended to something that is not a list")
        target.extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(values) % 2:
            raise Refused(f"an item at byte {self.at} is set on something that is not a dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # A nested tuple that shares its parts takes for ever to hash.
            if not isinstance(key, (str, int, float, bytes, type(None), Global)):
                raise Refused(f"a key of a dict at byte {self.at} is neither text nor number")
            if key in target:
                raise Refused(f"the key {printable(key)} is in a dict twice")
            target[key] = value

    # -- operations that in a real unpickler call or change something

    def lookup(self, module: Any, name: Any) -> None:
        found = Global(module, name) if isinstance(module, str) and isinstance(name, str) else None
        if found not in ALLOWED:
            raise Refused(
                f"it asks for {found or 'a global without a name'}, which no plain tensor needs and which is not loaded"
            )
        self.stack.append(found)

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise Refused(f"a call at byte {self.at} is of something that is no function")
        try:
            self.stack.append(described_call(function, arguments))
        except Refused as error:
            names = [value for value in self.stack[-3:] if isinstance(value, str)]  # the key that waits for its value
            raise Refused(f"tensor {printable(names[-1])}: {error}" if names else str(error)) from error

    def build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], StateDict) or not isinstance(state, dict):
            raise Refused(f"the state of an object is set at byte {self.at}; only that of an OrderedDict may be")

    def persistent(self) -> None:
        self.stack.append(described_storage(self.stack.pop()))

    def integer(self) -> None:
        length = self.unsigned(1)
        if length > MAX_INT_BYTES:
            raise Refused(f"an integer of {length} bytes at byte {self.at} is too large")
        self.stack.append(int.from_bytes(self.take(length), "little", signed=True))

    def protocol(self) -> None:
        version = self.unsigned(1)
        if not 2 <= version <= 5:
            raise Refused(f"pickle protocol {version} is not one of 2 to 5")


def _push(value: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(value(machine))


def _text(width: int) -> Callable[[_Machine], None]:
    return _push(lambda machine: machine.take(machine.unsigned(width)).decode("utf-8"))


def _bytes(width: int) -> Callable[[_Machine], None]:
    return _push(lambda machine: machine.take(machine.unsigned(width)))


def _stack_global(machine: _Machine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.lookup(module, name)


def _tuple(machine: _Machine) -> None:
    values = tuple(machine.marked())
    machine.stack.append(values)


_OPERATIONS: dict[int, Callable[[_Machine], object]] = {
    0x80: _Machine.protocol,
    0x95: lambda m: m.take(8),  # FRAME: a hint for readers of streams
    ord("N"): _push(lambda m: None),
    0x88: _push(lambda m: True),
    0x89: _push(lambda m: False),
    ord("J"): _push(lambda m: int.from_bytes(m.take(4), "little", signed=True)),
    ord("K"): _push(lambda m: m.unsigned(1)),
    ord("M"): _push(lambda m: m.unsigned(2)),
    0x8A: _Machine.integer,
    ord("G"): _push(lambda m: struct.unpack(">d", m.take(8))[0]),
    0x8C: _text(1),
    ord("X"): _text(4),
    0x8D: _text(8),
    ord("C"): _bytes(1),
    ord("B"): _bytes(4),
    0x8E: _bytes(8),
    ord("("): _Machine.mark,
    ord(")"): _push(lambda m: ()),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    ord("t"): _tuple,
    ord("]"): _push(lambda m: []),
    ord("}"): _push(lambda m: {}),
    ord("a"): lambda m: m.append([m.stack.pop()]),
    ord("e"): lambda m: m.append(m.marked()),
    ord("s"): lambda m: m.set_items([m.stack.pop(), m.stack.pop()][::-1]),
    ord("u"): lambda m: m.set_items(m.marked()),
    ord("q"): lambda m: m.put(m.unsigned(1)),
    ord("r"): lambda m: m.put(m.unsigned(4)),
    0x94: lambda m: m.put(len(m.memo)),
    ord("h"): lambda m: m.get(m.unsigned(1)),
    ord("j"): lambda m: m.get(m.unsigned(4)),
    ord("c"): lambda m: m.lookup(m.line(), m.line()),
    0x93: _stack_global,
    ord("R"): _Machine.reduce,
    ord("b"): _Machine.build,
    ord("Q"): _Machine.persistent,
}
