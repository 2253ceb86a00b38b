"""What pickled networks say of themselves, read from their `Record`s with type and range before anything is made of it.

NVIDIA's pickles hold whole networks with their settings; a method's file reads them by these functions.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gan3d.cameras import Number
from gan3d.rebuild import CheckpointError, Record

MAX_MODULES = 10_000
MAX_LAYERS, MAX_PIXELS, MAX_BATCH = 64, 4096, 1024  # of a network, a picture's side, a batch: what a file may ask for
TAPS = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8  # StyleGAN2's filter
INSIDE = ("_parameters", "_buffers", "_modules")  # what every nn.Module keeps


def modules(network: Record) -> Iterator[tuple[str, Record]]:
    """A pickled nn.Module and all inside it, in the order of `named_modules`, with their dotted paths."""
    todo, visits = [("", network)], 0
    while todo:
        path, record = todo.pop()
        visits += 1
        if path and isinstance(record, Record) and record.state is None:
            continue  # a part that is made anew by its constructor: the file holds nothing of it
        state = record.state if isinstance(record, Record) and isinstance(record.state, dict) else {}
        if visits > MAX_MODULES or not all(isinstance(state.get(key), dict) for key in INSIDE):
            raise CheckpointError(f"{record!r} at '{path[:80]}' is no network; the file is damaged")
        yield path, record
        inner = [(f"{path}.{k}" if path else str(k), child) for k, child in state["_modules"].items()
                 if child is not None]
        todo += reversed(inner)


def module_state(network: Record) -> dict[str, Tensor]:
    """`network.state_dict()` of a pickled nn.Module, from its own dictionaries, in the same order."""
    state: dict[str, Tensor] = {}
    for path, record in modules(network):
        prefix = f"{path}." if path else ""
        tensors = {**record.state["_parameters"], **record.state["_buffers"]}
        passing = record.state.get("_non_persistent_buffers_set", ())
        state |= {prefix + k: v for k, v in tensors.items() if isinstance(v, Tensor) and k not in passing}
    if any(t.numel() * t.element_size() > t.untyped_storage().nbytes() for t in state.values()):
        raise CheckpointError("a network of it has tensors that show more numbers than are stored; the file is hostile")
    return state


def part(record: Any, path: str) -> Record:
    """The module at a dotted path inside a pickled nn.Module."""
    for name in path.split("."):
        inside = record.state.get("_modules") if isinstance(record, Record) and isinstance(record.state, dict) else None
        record = inside.get(name) if isinstance(inside, dict) else None
    if not isinstance(record, Record) or not isinstance(record.state, dict):
        raise CheckpointError(f"it has no module {path}")
    return record


def told(source: Any, key: str, *default: Any) -> Any:
    """What a record, or a dict of it, says at `key`; `default` where it says nothing."""
    entries = source.state if isinstance(source, Record) else source
    if isinstance(entries, dict) and key in entries:
        return entries[key]
    if not default:
        raise CheckpointError(f"it does not say its {key}")
    return default[0]


def brief(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 100:
        return "enormous"
    return repr(value)[:40] if isinstance(value, None | int | float | str) else f"a {type(value).__name__}"


def number(source: Any, key: str, low: Number, high: Number, *default: Number) -> Number:
    """A number from low to high."""
    value = told(source, key, *default)
    if type(value) not in (int, float) or not low <= value <= high:
        raise CheckpointError(f"its {key} is {brief(value)}, not a number from {low:g} to {high:g}; the file is "
                              "damaged or hostile")
    return value


def count(source: Any, key: str, low: int, high: int, *default: int) -> int:
    """A whole number from low to high."""
    value = number(source, key, low, high, *default)
    if type(value) is not int:
        raise CheckpointError(f"its {key} is {value:g}, not a whole number; the file is damaged")
    return value


def flag(source: Any, key: str, *default: bool) -> bool:
    value = told(source, key, *default)
    if type(value) is not bool:
        raise CheckpointError(f"its {key} is {brief(value)}, neither true nor false; the file is damaged")
    return value


# StyleGAN2's parts


def widths_by_resolution(tensors: Mapping[str, Tensor], name: str, first: int = 4) -> dict[int, int]:
    """Feature maps of each resolution, from `first` up, of a StyleGAN2 network."""
    widths = {}
    while name.format(first) in tensors:
        widths[first] = tensors[name.format(first)].shape[0]
        first *= 2
    return widths


def channel_numbers(widths: dict[int, int]) -> dict[str, int]:
    """The channel_base and channel_max that give these widths, if any do (the smallest such base)."""
    return {"channel_base": max(r * width for r, width in widths.items()), "channel_max": max(widths.values())}


def layers(tensors: Mapping[str, Tensor], name: str) -> int:
    """How many of name.format(0), name.format(1), … there are."""
    return sum(name.format(i) in tensors for i in range(MAX_LAYERS))


def clamped(network: Record, but: str) -> list[Record]:
    """The convolutions that have a clamp or could have one, but for those whose path ends in `but`."""
    return [layer for path, layer in modules(network) if "conv_clamp" in layer.state and not path.endswith(but)]


def common_clamp(convolutions: Iterable[Record]) -> Number | None:
    """The clamp of all these."""
    clamps = {told(layer, "conv_clamp") for layer in convolutions}
    if len(clamps) != 1:
        raise CheckpointError("its convolutions are clamped differently, which ours are not")
    (clamp,) = clamps
    return None if clamp is None else number({"conv_clamp": clamp}, "conv_clamp", 1e-3, 1e6)


def discriminator_numbers(discriminator: Record) -> dict[str, Any]:
    """The resolution, widths and batch groups of a StyleGAN2 discriminator, by the names of ours."""
    tensors = module_state(discriminator)
    resolution, last = count(discriminator, "img_resolution", 8, MAX_PIXELS), tensors["b4.conv.weight"]
    widths = {4: last.shape[0], **widths_by_resolution(tensors, "b{}.conv0.weight", 8)}
    if max(widths) != resolution or last.shape[1] != widths[4] + 1:
        raise CheckpointError(f"its discriminator has no blocks from {resolution}² down, or sees another number of "
                              "channels of its batch than one")
    deviation = part(discriminator, "b4.mbstd")
    whole_batch = told(deviation, "group_size") is None
    return {"resolution": resolution, **channel_numbers(widths),
            "group": MAX_BATCH if whole_batch else count(deviation, "group_size", 1, MAX_BATCH)}


def refuse(source: Any, ours: Mapping[str, Any], what: str) -> None:
    """CheckpointError if a record or dict says of one of these keys what ours never is."""
    for key, value in ours.items():
        if told(source, key, value) != value:
            raise CheckpointError(f"its {what} has {key} = {brief(told(source, key))}; here it is {value!r} always")


def refuse_filters(network: Record) -> None:
    """CheckpointError if a layer of a StyleGAN2 network resamples otherwise than all others do."""
    for path, layer in modules(network):
        resample = layer.state["_buffers"].get("resample_filter")
        if isinstance(resample, Tensor) and not torch.equal(resample, TAPS.outer(TAPS)):
            raise CheckpointError(f"its {path} resamples with another filter than 1 3 3 1")


def refuse_unfamiliar(network: Record, architecture: str) -> None:
    """CheckpointError if a layer of a StyleGAN2 network computes what ours do not.

    These are arguments of NVIDIA's classes that their training scripts give no switch for; so no shape betrays them.
    """
    refuse_filters(network)
    for path, layer in modules(network):
        linear = path.rpartition(".")[2] in ("affine", "embed", "out", "skip", "0", "2")  # 0, 2: EG3D's decoder.net
        usual: dict[str, Any] = {"activation": "linear" if linear else "lrelu", "use_noise": True,
                                 "architecture": architecture}
        if "mapping.fc" in path:
            usual["bias_gain"] = 0.01  # the multiplier of the mapping's learning rate
        refuse(layer, usual, path)
