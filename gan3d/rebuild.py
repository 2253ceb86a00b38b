"""What a checkpoint's pickle may ask for, made by our own functions: tensors, arrays, containers. `CALLS` is the list.

Everything else stays a `Name` (it was referred to) or a `Record` (it was to be constructed). Every number of the file
is checked before it is used: a view lies inside its storage, an array has as many numbers as its shape says.
"""

import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_NAME = 1000  # letters
MAX_EXPANDED = 2**24  # elements that a broadcast view (stride 0) may show beyond those that are stored
STORAGE_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
}  # fmt: skip


class CheckpointError(ValueError):
    """A file that is not, or not safely, a checkpoint. The message says which file, what is wrong and what to do."""


@dataclass(frozen=True)
class Name:
    """Something the file refers to by name: a class or a function. Only the name: it was never looked up."""

    path: str


@dataclass(eq=False, repr=False)
class Record:
    """An object of a foreign class, unmade: what its constructor was to get, and the state it was to be given.

    What the state holds reads as attributes: `ema.shadow_params`. Subclasses of dict or list have `entries`.
    """

    class_path: str
    args: tuple = ()
    state: Any = None
    entries: Any = None

    def __getattr__(self, name: str) -> Any:
        state = self.__dict__.get("state")
        if isinstance(state, dict) and name in state:
            return state[name]
        raise AttributeError(f"{self!r} has no {name!r}")

    def __repr__(self) -> str:
        return f"Record({self.__dict__.get('class_path')})"


@dataclass(eq=False)
class Storage:
    """The memory that tensors are views of."""

    elements: Tensor


def storage_dtype(kind: Any) -> torch.dtype:
    module, _, name = kind.path.rpartition(".") if isinstance(kind, Name) else ("", "", "")
    if module not in ("torch", "torch.cuda", "torch.storage") or name not in STORAGE_DTYPES:
        raise CheckpointError(f"it stores {name[:40] or 'things'}, which is no kind of number that this reader knows")
    return STORAGE_DTYPES[name]


def is_count(*values: Any) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def view(storage: Any, offset: Any, size: Any, stride: Any) -> Tensor:
    """The tensor that shows `storage` from `offset` on, in steps of `stride`; it must lie inside the storage."""
    shaped = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= 32
    if not isinstance(storage, Storage) or not shaped or not is_count(offset, *size, *stride):
        raise CheckpointError("it holds a tensor with an impossible shape, stride or offset; the file is damaged")
    stored, shown = storage.elements.numel(), math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if shown else offset - 1
    if last >= stored or shown > stored + MAX_EXPANDED or max(*size, *stride, 0, 0) > sys.maxsize:
        raise CheckpointError(f"it holds a tensor of shape {size} that reaches beyond its {stored} stored numbers; "
                              "the file is damaged")
    return storage.elements.as_strided(size, stride, offset)


def rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None) -> Tensor:
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise CheckpointError("it holds a tensor without storage or number type; the file is damaged")
    return view(Storage(storage.elements.view(dtype)), offset, size, stride)


def numpy_dtype(record: Any) -> np.dtype:
    code = record.args[0] if isinstance(record, Record) and record.class_path == "numpy.dtype" and record.args else None
    if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?[biufc]\d{1,2}", code):
        raise CheckpointError("it holds an array of something other than numbers")
    order = record.state[1] if isinstance(record.state, tuple) else "="
    return np.dtype(code).newbyteorder(order if order in ("<", ">") else "=")


def numpy_scalar(dtype: Any, raw: bytes) -> Any:
    return np.frombuffer(raw, numpy_dtype(dtype), count=1)[0].item()


def fill_array(array: np.ndarray, state: Any) -> None:
    """NumPy's own `__setstate__`, after a check: the array must stay the object that others may refer to already."""
    _, shape, dtype, fortran, raw = state
    dtype = numpy_dtype(dtype)
    if not is_count(*shape) or not isinstance(raw, bytes) or math.prod(shape) * dtype.itemsize != len(raw):
        raise CheckpointError("it holds an array with an impossible shape; the file is damaged")
    array.__setstate__((1, shape, dtype, bool(fortran), raw))


def key(value: Any) -> Any:
    """A key of a dict or a member of a set. Tuples of tuples are refused: hashing them can take exponential time."""
    plain = str | bytes | int | float | complex | None | Name | Record | Tensor | torch.dtype
    flat = isinstance(value, tuple) and len(value) <= 32 and all(isinstance(item, plain) for item in value)
    if not flat and not isinstance(value, plain):
        raise CheckpointError(f"it uses a {type(value).__name__} as a key; the file is damaged")
    return value


def pairs(items: Any) -> dict:
    return {key(k): v for k, v in items}


def text_bytes(text: Any, encoding: Any) -> bytes:
    """How protocol 2, torch.save's, spells bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise CheckpointError("it holds bytes in an unknown spelling; the file is damaged")
    return text.encode("latin1")


def text(value: Any, *more: Any) -> str:
    """A device or a layout, by its name alone."""
    return value[:MAX_NAME] if isinstance(value, str) else type(value).__name__


def persistent_object(meta: Any) -> Record:
    """NVIDIA's pickles carry the source code of their classes; it is neither looked at nor kept."""
    if not isinstance(meta, dict) or not isinstance(meta.get("state"), dict):
        raise CheckpointError("it holds an object of NVIDIA's without class or state; the file is damaged")
    return Record(text(meta.get("class_name")), (), meta["state"])


def rebuild_tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None) -> Tensor:
    return view(storage, offset, size, stride)


def rebuild_parameter(data, requires_grad=False, hooks=None, state=None) -> Any:
    return data


CALLS: dict[str, Callable] = {
    "collections.OrderedDict": lambda items=(): pairs(items),
    "builtins.set": lambda items=(): {key(item) for item in items},
    "builtins.frozenset": lambda items=(): frozenset(key(item) for item in items),
    "builtins.complex": complex,
    "builtins.bytes": lambda: b"",  # protocol 2's way; an argument could ask for any amount of memory
    "_codecs.encode": text_bytes,
    "copyreg._reconstructor": lambda kind, base, state: Record(kind.path),
    "torch._utils._rebuild_tensor": rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": rebuild_parameter,
    "torch.Size": lambda sizes=(): tuple(sizes),
    "torch.device": text,
    "torch.serialization._get_layout": text,
    "numpy.dtype": lambda *args: Record("numpy.dtype", args),
    "torch_utils.persistence._reconstruct_persistent_obj": persistent_object,
    "dnnlib.util.EasyDict": lambda items=(): pairs(items),
}
for core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    CALLS[f"{core}.multiarray._reconstruct"] = lambda kind, shape, code: np.empty(0, np.uint8)  # `fill_array` follows
    CALLS[f"{core}.multiarray.scalar"] = numpy_scalar
