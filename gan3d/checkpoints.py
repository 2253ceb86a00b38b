"""The authors' weights, read without running anything that comes with them; and which files are our own.

Three kinds of file are read: torch.save's archives (a zip with a pickle and one entry per storage), its older stream
(pickles, then raw storages) and plain pickles with tensors inside. `gan3d.unpickle` reads the pickles as data; all
tensors arrive on the CPU. Our own checkpoints are Lightning's: `torch.load(path, weights_only=True)` reads those.
"""

import importlib.util
import pickletools
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedIOBase, BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gan3d.pickled import module_state
from gan3d.rebuild import CALLS, MAX_NAME, CheckpointError, Name, Record, Storage, is_count, storage_dtype
from gan3d.unpickle import unpickle

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of torch.save's older stream
MAX_INFLATION = 20  # a zip may unpack to so many times its size; weights hardly shrink at all
PARTS = {  # what the authors call the part that we name on the left
    "generator": ("generator", "G"),
    "generator_ema": ("generator_test", "ema", "G_ema"),
    "discriminator": ("discriminator", "D"),
}
SUFFIXES = (".pth", ".pt", ".pkl")
OTHER_FILES = {  # how files begin that are often taken for checkpoints
    b"": "is empty: download it again",
    b"<": "is a web page, not a checkpoint: the download went wrong, fetch it again in a browser",
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself: run `git lfs pull`",
    b"\x1f\x8b": "is a gzip archive: unpack it first",
}


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Errors as CheckpointErrors that begin with the file. A broken file can make the readers below fail in any way."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:
        detail = f"it is damaged, or no checkpoint at all ({type(error).__name__}: {str(error)[:200]})"
        raise CheckpointError(f"{path}: {detail}; download it again") from error


def read_tensors(path: str | Path) -> Any:
    """What a checkpoint holds: dicts, lists, numbers, text and CPU tensors, with a `Record` for each foreign object.

    Tensors that shared memory still do; none requires gradients. NumPy scalars become numbers, its arrays stay arrays.
    Raises: CheckpointError if the file is missing, damaged, of another kind, or asks for what no network needs.
    """
    path = Path(path)
    with about(path):
        with open_file(path) as file:
            return read_file(file)


def is_ours(path: str | Path) -> bool:
    """Whether Lightning wrote this checkpoint: an archive whose pickle has its two tell-tale keys. Loads no tensors."""
    path = Path(path)
    if path.is_dir():
        return False
    with about(path), open_file(path) as file:
        if not is_zip(file):
            return False
        with zipfile.ZipFile(file) as archive:
            entries = checked_entries(archive)
            root = archive_root(entries)
            if root is None:
                return False
            words = {arg for _, arg, _ in pickletools.genops(archive.read(entries[root + "data.pkl"]))
                     if isinstance(arg, str)}
    return {"state_dict", "pytorch-lightning_version"} <= words


class Official(NamedTuple):
    """An authors' checkpoint, in our terms."""

    weights: dict[str, dict[str, Tensor]]  # state dicts: "generator", "generator_ema", "discriminator"
    numbers: dict[str, Any]  # values of our config that the file states (NVIDIA's pickles do); empty: it states none
    dataset: str  # the name of the folder or zip that it was trained on; empty: it does not say


def load_official(path: str | Path, method: str) -> dict[str, dict[str, Tensor]]:
    """The weights that `read_official` finds."""
    return read_official(path, method).weights


def read_official(path: str | Path, method: str, parts: Collection[str] = tuple(PARTS)) -> Official:
    """Weights for our networks, and what else is stated, out of the authors' checkpoint of `method` ("graf", "eg3d" …).

    Args:
        path: the file; or, where the authors give several, the folder or zip with `generator.pth`, `ema.pth` ….
        parts: the networks to read. Those are missing that the checkpoint lacks or the method does not read.
    Raises: CheckpointError as `read_tensors`, or if there is no generator, or it is not of this method; ValueError if
        there is no such method, or it reads no official weights.
    """
    path = Path(path)
    module = method_module(method)
    with about(path):
        official = read_parts(path)
        found = {ours: official[theirs] for ours, names in PARTS.items() for theirs in names
                 if ours in parts and theirs in official}
        if not {"generator", "generator_ema"} & found.keys():
            known = ", ".join(str(key)[:40] for key in list(official)[:8]) or "nothing"
            raise CheckpointError(f"it has no generator (it has {known}); is this the authors' file of {method}?")
        if not hasattr(module, "official_discriminator"):
            found.pop("discriminator", None)
        try:
            weights = {part: convert(module, part, value) for part, value in found.items()}
            return Official(weights, stated_numbers(module, found), stated_dataset(official))
        except CheckpointError:
            raise
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"it holds no {method} ({error.args[0]}); did another method write it?") from error


def method_module(method: str) -> ModuleType:
    if not method.isidentifier() or importlib.util.find_spec(f"gan3d.official.{method}") is None:
        raise ValueError(f"no method {method!r} that reads official weights")
    return importlib.import_module(f"gan3d.official.{method}")


def convert(method: ModuleType, part: str, value: Any) -> dict[str, Tensor]:
    """Their weights to our state dict, by the functions of the method's file in `gan3d.official`."""
    if isinstance(value, Record) and isinstance(value.state, dict) and "shadow_params" in value.state:
        value = value.shadow_params  # torch_ema: the averaged parameters, without names
    if isinstance(value, list):
        return method.official_ema(value)
    state = module_state(value) if isinstance(value, Record) else value
    return method.official_discriminator(state) if part == "discriminator" else method.official_generator(state)


def stated_numbers(method: ModuleType, found: Mapping[str, Any]) -> dict[str, Any]:
    """What pickled networks say of themselves, for our config. The method's file in `gan3d.official` reads it:

    `official_numbers(generator)` and `official_discriminator_numbers(discriminator)` take a `Record` and return a
    nested dict with the keys of the whole config: {"data": …, "model": {"generator": …}}.
    """
    generator, discriminator = found.get("generator_ema", found.get("generator")), found.get("discriminator")
    numbers: dict[str, Any] = {}
    for function, network in (("official_numbers", generator), ("official_discriminator_numbers", discriminator)):
        if isinstance(network, Record) and hasattr(method, function):
            numbers = merged(numbers, getattr(method, function)(network))
    return numbers


def merged(under: dict, over: dict) -> dict:
    both = {key: merged(under[key], value) for key, value in over.items()
            if isinstance(value, dict) and isinstance(under.get(key), dict)}
    return {**under, **over, **both}


def stated_dataset(official: Mapping[str, Any]) -> str:
    settings = official.get("training_set_kwargs")
    path = settings.get("path") if isinstance(settings, dict) else None
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1][:MAX_NAME] if isinstance(path, str) else ""


def read_parts(path: Path) -> dict[str, Any]:
    """The parts of a checkpoint by the authors' names: the keys of one file, or the names of several."""
    if path.is_dir():
        return {file.stem: read_tensors(file) for file in sorted(path.iterdir()) if is_part(file.name)}
    with open_file(path) as file:
        if is_zip(file):
            with zipfile.ZipFile(file) as archive:
                entries = checked_entries(archive)
                if archive_root(entries) is None:
                    return read_bundle(archive, entries)
        tree = read_file(file)
    if isinstance(tree, Record):
        return {"ema" if isinstance(tree.state, dict) and "shadow_params" in tree.state else "generator": tree}
    if not isinstance(tree, dict):
        raise CheckpointError(f"it holds a {type(tree).__name__}, not the networks of a GAN")
    return tree | by_network(tree["model"]) if isinstance(tree.get("model"), dict) else tree


def by_network(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of a module that holds all networks, taken apart: {"generator": {…}, "discriminator": {…}}."""
    parts: dict[str, Any] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if rest:
            parts.setdefault(part, {})[rest] = tensor
    return parts


def read_bundle(archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo]) -> dict[str, Any]:
    parts = [name for name in entries if is_part(Path(name).name)]
    if len({Path(name).stem for name in parts}) < len(parts):
        raise CheckpointError(f"it has several checkpoints ({', '.join(parts)[:200]}): unpack it and name one folder")
    return {Path(name).stem: read_file(BytesIO(archive.read(entries[name]))) for name in parts}


def is_part(name: str) -> bool:
    return Path(name).suffix in SUFFIXES and any(Path(name).stem in theirs for theirs in PARTS.values())


def open_file(path: Path) -> BufferedIOBase:
    if path.is_dir():
        raise CheckpointError("it is a folder: name the checkpoint file inside")
    if not path.is_file():
        raise CheckpointError("there is no such file")
    return path.open("rb")


def is_zip(file: BufferedIOBase) -> bool:
    file.seek(0)
    return file.read(4) == b"PK\x03\x04"


def read_file(file: BufferedIOBase) -> Any:
    file.seek(0)
    head = file.read(64)
    for start, explanation in OTHER_FILES.items():
        if head == start or (start and head.lstrip().startswith(start)):
            raise CheckpointError(f"it {explanation}")
    if is_zip(file):
        with zipfile.ZipFile(file) as archive:
            return read_archive(archive)
    file.seek(0)
    return read_stream(BytesIO(file.read()))


def checked_entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The entries by name, if they are what torch.save or a zip tool would have written."""
    infos = archive.infolist()
    size = archive.fp.seek(0, 2)
    entries = {info.filename: info for info in infos}
    if len(entries) < len(infos):
        raise CheckpointError("its zip holds one name twice; the file is damaged or hostile")
    for name in entries:
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise CheckpointError(f"its zip holds {name[:80]!r}, a name that leads out of it; the file is hostile")
    stored = sum(info.file_size for info in infos if info.compress_type == zipfile.ZIP_STORED)
    if stored > size or sum(info.file_size for info in infos) > MAX_INFLATION * size:
        raise CheckpointError("its zip claims to hold far more than fits in it; the file is damaged or a zip bomb")
    return entries


def archive_root(entries: dict[str, zipfile.ZipInfo]) -> str | None:
    """The folder, with its slash, inside a zip of torch.save's; None for any other zip."""
    roots = [name.removesuffix("data.pkl") for name in entries if name.count("/") <= 1 and name.endswith("data.pkl")]
    return roots[0] if len(roots) == 1 else None


def read_archive(archive: zipfile.ZipFile) -> Any:
    entries = checked_entries(archive)
    root = archive_root(entries)
    if root is None:
        raise CheckpointError("it is a zip, but not one of torch.save's: unpack it and name the checkpoint inside")
    if root + "constants.pkl" in entries:
        raise CheckpointError("it is a TorchScript program, not a checkpoint; save its state dict instead")
    byteorder = root + "byteorder"
    if byteorder in entries and archive.read(entries[byteorder]) != b"little":
        raise CheckpointError("it was written on a big-endian machine; save it again on a little-endian one")
    storages: dict[str, Tensor] = {}

    def persistent(reference: Any) -> Storage:
        dtype, label, n_bytes = storage_reference(reference)
        if label not in storages:
            info = entries.get(f"{root}data/{label}")
            if info is None or info.file_size != n_bytes or info.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"its storage {label[:40]!r} is missing, compressed or not of its stated size; "
                                      "the file is damaged: download it again")
            with archive.open(info) as stream:
                storages[label] = read_storage(stream, torch.empty(n_bytes, dtype=torch.uint8))
        return typed(storages[label], dtype, n_bytes)

    return unpickle(BytesIO(archive.read(entries[root + "data.pkl"])), persistent)


def storage_reference(reference: Any) -> tuple[torch.dtype, str, int]:
    """(number type, label, bytes) of a storage that a pickle refers to: ("storage", type, label, place, count)."""
    if not isinstance(reference, tuple) or len(reference) not in (5, 6) or reference[0] != "storage":
        raise CheckpointError("its pickle refers to something outside that is no storage; the file is damaged")
    _, kind, label, _, count, *view = reference
    if not isinstance(label, str) or not is_count(count) or any(view):
        raise CheckpointError("it has a storage of impossible name or size; the file is damaged")
    dtype = storage_dtype(kind)
    return dtype, label, count * dtype.itemsize


def typed(memory: Tensor, dtype: torch.dtype, n_bytes: int) -> Storage:
    if memory.numel() != n_bytes:
        raise CheckpointError("it states two sizes for one storage; the file is damaged")
    return Storage(memory.view(dtype))


def read_storage(stream: BufferedIOBase, memory: Tensor) -> Tensor:
    """`memory` filled from the stream."""
    if memory.numel() and stream.readinto(memoryview(memory.numpy())) != memory.numel():
        raise CheckpointError("it ends in the middle of its numbers: the download was cut short, fetch it again")
    return memory


def read_stream(stream: BytesIO, nested: bool = False) -> Any:
    """torch.save's older stream, or a plain pickle; `nested` inside one, where tensors are such streams as bytes."""
    storages: dict[str, Tensor] = {}
    room = stream.getbuffer().nbytes

    def persistent(reference: Any) -> Storage | Name:
        nonlocal room
        if isinstance(reference, tuple) and len(reference) == 4 and isinstance(reference[1], Name):
            return reference[1]  # ("module", class, file, source code): how this format names the classes of networks
        dtype, label, n_bytes = storage_reference(reference)
        if label not in storages:
            room -= n_bytes
            if room < 0:
                raise CheckpointError("it states more numbers than it has: the download was cut short, fetch it again")
            storages[label] = torch.empty(n_bytes, dtype=torch.uint8)  # filled below: the numbers follow the pickle
        return typed(storages[label], dtype, n_bytes)

    calls = CALLS if nested else {**CALLS, "torch.storage._load_from_bytes": load_from_bytes}
    tree = unpickle(stream, persistent, calls)
    if not is_count(tree) or tree != LEGACY_MAGIC:
        if storages:
            raise CheckpointError("its pickle refers to storages that it does not bring along")
        return tree
    _, system = unpickle(stream, persistent), unpickle(stream, persistent)
    if not system.get("little_endian", True):
        raise CheckpointError("it was written on a big-endian machine; save it again on a little-endian one")
    tree, labels = unpickle(stream, persistent, calls), unpickle(stream, persistent)
    if sorted(labels) != sorted(storages):
        raise CheckpointError("its list of storages is not that of its tensors; the file is damaged")
    for label in labels:
        stream.seek(8, 1)  # the count of numbers, known already
        read_storage(stream, storages[label])
    return tree


def load_from_bytes(raw: bytes) -> Any:
    """A storage inside a plain pickle: a stream of torch.save's, as bytes."""
    return read_stream(BytesIO(raw), nested=True)
