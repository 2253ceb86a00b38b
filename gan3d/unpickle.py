"""Pickles read as data. A pickle is a program for a small stack machine; here is the machine without its power to act.

Nothing that a file names is imported, and nothing that it asks for is called: an import becomes a `Name`, a call a
`Record`. The few calls that tensors and arrays need are in `rebuild.CALLS`, by name, and are functions of ours. Safety
rests on that alone. That most names of Python's standard library are refused serves the reader of the error: a file
that asks for `os.system` is to be thrown away, not pardoned.
"""

import pickletools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gan3d.rebuild import CALLS, MAX_NAME, CheckpointError, Name, Record, fill_array, key, pairs

MAX_PROTOCOL = 5
MAX_OPCODES = 5_000_000  # the largest checkpoint of the papers here has about 10⁵
MAX_DEPTH = 200  # of containers in containers; a module inside a module is three levels
STANDARD = {  # what a checkpoint may name of Python's standard library; the rest is refused
    "builtins.object", "builtins.set", "builtins.frozenset", "builtins.bytearray", "builtins.bytes", "builtins.complex",
    "builtins.dict", "builtins.list", "builtins.tuple", "builtins.int", "builtins.float", "builtins.bool",
    "builtins.str", "collections.OrderedDict", "collections.defaultdict", "collections.deque", "collections.Counter",
    "copyreg._reconstructor", "_codecs.encode", "argparse.Namespace", "types.SimpleNamespace", "functools.partial",
    "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath", "pathlib.PureWindowsPath", "datetime.datetime",
    "typing.Any", "typing.Dict", "typing.List",  # OmegaConf's containers name the types of what they hold
}  # fmt: skip
PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def name(module: Any, qualified: Any) -> Any:
    """What a file means by a name: a number type of torch's, or a `Name` that stays one."""
    if not isinstance(module, str) or not isinstance(qualified, str):
        raise CheckpointError("it refers to something by a name that is no text; the file is damaged")
    if len(module) + len(qualified) > MAX_NAME:
        raise CheckpointError("it refers to something by an endless name; the file is damaged")
    path = f"{PYTHON_2.get(module, module)}.{qualified}"
    if path.split(".")[0] in sys.stdlib_module_names and path not in STANDARD:
        raise CheckpointError(f"it asks for {path[:80]}, which no network needs. Nothing was run, but the file may be "
                              "hostile: delete it and fetch it from its authors")
    dtype = vars(torch).get(qualified) if module == "torch" else None  # getattr could import parts of torch
    return dtype if isinstance(dtype, torch.dtype) else Name(path)


def call(callee: Any, args: Any, calls: Mapping[str, Callable]) -> Any:
    """One of `calls`, or the record of a call. Functions of torch and NumPy are refused, their classes are not."""
    if not isinstance(callee, Name) or not isinstance(args, tuple):
        raise CheckpointError(f"it calls a {type(callee).__name__}; the file is damaged")
    if callee.path in calls:
        return calls[callee.path](*args)
    package, last = callee.path.split(".")[0], callee.path.rpartition(".")[2]
    if package in ("torch", "numpy") and not last.lstrip("_")[:1].isupper():
        raise CheckpointError(f"it wants to call {callee.path[:80]}, which this reader does not do. If the file is "
                              "from its authors, save the state dicts of its networks alone and load those")
    return Record(callee.path, args)


@dataclass
class Machine:
    """The stack machine: `stack`, the `marks` in it, the `memo`. See pickletools for what each instruction does.

    `credit` is how many items its calls may still take: a file could otherwise copy one long list a million times.
    """

    persistent: Callable[[Any], Any]
    calls: Mapping[str, Callable]
    credit: int
    stack: list = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def since_mark(self) -> list:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def take(self, n: int) -> list:
        if len(self.stack) < n:
            raise CheckpointError("its pickle takes more than it has; the file is damaged")
        items = self.stack[len(self.stack) - n:]
        del self.stack[len(self.stack) - n:]
        return items

    def call(self, callee: Any, args: Any, calls: Mapping[str, Callable]) -> None:
        self.pay(args)
        self.stack.append(call(callee, args, calls))

    def pay(self, args: Any) -> None:
        for item in args if isinstance(args, tuple) else ():
            self.credit -= len(item) if isinstance(item, str | bytes | bytearray | list | tuple | dict | set) else 1
        if self.credit < 0:
            raise CheckpointError("it uses the same data over and over; the file is damaged or hostile")

    def extend(self, items: list) -> None:
        target = self.stack[-1]
        if isinstance(target, Record):
            target.entries = [] if target.entries is None else target.entries
            target = target.entries
        if isinstance(target, set):
            target.update(key(item) for item in items)
        elif isinstance(target, list):
            target.extend(items)
        else:
            raise CheckpointError(f"it appends to a {type(target).__name__}; the file is damaged")

    def update(self, items: list) -> None:
        target = self.stack[-1]
        if isinstance(target, Record):
            target.entries = {} if target.entries is None else target.entries
            target = target.entries
        if not isinstance(target, dict):
            raise CheckpointError(f"it sets items of a {type(target).__name__}; the file is damaged")
        target.update(pairs(zip(items[::2], items[1::2], strict=True)))

    def build(self, state: Any) -> None:
        target = self.stack[-1]
        self.pay(state)
        if isinstance(target, np.ndarray):
            fill_array(target, state)
        elif isinstance(target, Record):
            slots = isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict)
            target.state = {**(state[0] or {}), **state[1]} if slots else state
        elif not isinstance(target, dict | Tensor):  # of which attributes, as a state dict's _metadata, are not kept
            raise CheckpointError(f"it gives state to a {type(target).__name__}; the file is damaged")

    def step(self, opcode: str, arg: Any) -> None:
        """One instruction. As long as the instruction set; a table reads better than its parts."""
        stack, memo = self.stack, self.memo
        match opcode:
            case ("INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "LONG4" | "FLOAT" | "BINFLOAT"
                  | "STRING" | "BINSTRING" | "SHORT_BINSTRING" | "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE"
                  | "BINUNICODE8" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8"):
                stack.append(arg)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "EMPTY_LIST" | "EMPTY_TUPLE" | "EMPTY_DICT" | "EMPTY_SET":
                stack.append({"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": set}[opcode]())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self.take(int(opcode[-1]))))
            case "TUPLE":
                stack.append(tuple(self.since_mark()))
            case "LIST":
                stack.append(self.since_mark())
            case "FROZENSET":
                stack.append(frozenset(key(item) for item in self.since_mark()))
            case "DICT":
                items = self.since_mark()
                stack.append(pairs(zip(items[::2], items[1::2], strict=True)))
            case "APPEND":
                self.extend(self.take(1))
            case "APPENDS" | "ADDITEMS":
                self.extend(self.since_mark())
            case "SETITEM":
                self.update(self.take(2))
            case "SETITEMS":
                self.update(self.since_mark())
            case "MARK":
                self.marks.append(len(stack))
            case "POP_MARK":
                self.since_mark()
            case "POP":
                self.marks.pop() if self.marks and self.marks[-1] == len(stack) else stack.pop()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "GLOBAL":
                stack.append(name(*arg.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(name(*self.take(2)))
            case "REDUCE" | "NEWOBJ":
                kind, args = self.take(2)
                self.call(kind, args, self.calls)
            case "NEWOBJ_EX":
                kind, args, named = self.take(3)
                self.call(kind, (args, named), {})
            case "INST":
                self.call(name(*arg.split(" ", 1)), tuple(self.since_mark()), self.calls)
            case "OBJ":
                kind, *args = self.since_mark()
                self.call(kind, tuple(args), self.calls)
            case "BUILD":
                self.build(*self.take(1))
            case "PERSID":
                stack.append(self.persistent(arg))
            case "BINPERSID":
                stack.append(self.persistent(*self.take(1)))
            case "PROTO" if arg > MAX_PROTOCOL:
                raise CheckpointError(f"it is a pickle of protocol {arg}; {MAX_PROTOCOL} is the newest there is")
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _:
                raise CheckpointError(f"its pickle uses {opcode}, which no checkpoint needs")


def unpickle(stream: BytesIO, persistent: Callable[[Any], Any], calls: Mapping[str, Callable] = CALLS) -> Any:
    """The next pickle in `stream`: containers, numbers, text, tensors, arrays, and `Record`s and `Name`s for the rest.

    `persistent` gives what the file keeps outside its pickle (the storages). The stream is left behind the pickle.
    Raises: CheckpointError for what is refused; other exceptions where the pickle is broken.
    """
    size = stream.getbuffer().nbytes
    machine = Machine(persistent, calls, credit=2**20 + 4 * size)
    for count, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
        if count == MAX_OPCODES or (opcode.name == "FRAME" and arg > size):
            raise CheckpointError("its pickle is far longer than a checkpoint's, or says so; the file is damaged")
        machine.step(opcode.name, arg)
    (value,) = machine.stack
    refuse_deep(value)
    return value


def refuse_deep(value: Any) -> None:
    """CheckpointError if containers are nested deeper than a reader could follow. Each is looked at once."""
    level, seen = [value], set()
    for _ in range(MAX_DEPTH):
        inside = []
        for item in level:
            if id(item) not in seen:
                seen.add(id(item))
                inside += children(item)
        if not inside:
            return
        level = inside
    raise CheckpointError(f"it nests containers more than {MAX_DEPTH} deep; the file is damaged or hostile")


def children(item: Any) -> list:
    if isinstance(item, Record):
        return [item.args, item.state, item.entries]
    if isinstance(item, dict):
        return list(item.values())
    return list(item) if isinstance(item, list | tuple | set | frozenset) else []
