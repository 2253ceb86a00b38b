"""Checkpoints: what torch.save writes comes back bit for bit; what is broken or hostile is refused and nothing runs."""

import collections
import copyreg
import io
import os
import pickle
import struct
import sys
import types
import warnings
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from gan3d.checkpoints import is_ours, load_official, module_state, read_tensors
from gan3d.nn.discriminators import ProgressiveDiscriminator
from gan3d.rebuild import CheckpointError, Name, Record

BOTH = pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])


def save(value, path, archive=True):
    torch.save(value, path, _use_new_zipfile_serialization=archive)
    return path


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and bool((bits(a) == bits(b)).all())


def bits(tensor):
    return torch.frombuffer(bytearray(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() + b"."),
                            dtype=torch.uint8)


@pytest.fixture
def foreign(monkeypatch):
    """Classes of a module that can be imported while saving, and no longer while reading."""
    module = types.ModuleType("their_code")

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm, self.act = nn.Linear(3, 4), nn.BatchNorm1d(4), torch.nn.functional.relu
            self.register_buffer("scratch", torch.ones(2), persistent=False)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])
            self.gain = nn.Parameter(torch.randn(2, 2).t())
            self.missing, self.z_dim = None, 256

    class Average:
        def __init__(self, parameters):
            self.decay, self.num_updates, self.shadow_params = 0.999, 7, [p.detach().clone() for p in parameters]

    class Settings(dict):
        pass

    class Slotted:
        __slots__ = ("weight",)

    for kind in (Block, Net, Average, Settings, Slotted):
        kind.__module__, kind.__qualname__ = "their_code", kind.__name__
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "their_code", module)
    yield module, lambda: monkeypatch.delitem(sys.modules, "their_code")


# ---- what must come back


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64,
                                   torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64])
def test_tensors_of_every_type_come_back_bit_for_bit(tmp_path, archive, dtype):
    value = (torch.randn(3, 5, dtype=torch.float64) * 50).to(dtype)
    tree = read_tensors(save({"a": value, "scalar": value[1, 2], "none": value[:0]}, tmp_path / "a.pt", archive))
    assert same(tree["a"], value) and same(tree["scalar"], value[1, 2]) and same(tree["none"], value[:0])


@pytest.mark.smoke
@BOTH
def test_views_keep_their_values_and_share_their_storage(tmp_path, archive):
    base = torch.randn(4, 6)
    value = {"base": base, "transposed": base.t(), "stepped": base[1::2, ::3], "tail": base[3, 4:],
             "spread": base[0, :1].expand(7, 1), "again": base}
    tree = read_tensors(save(value, tmp_path / "a.pt", archive))
    assert all(same(tree[name], value[name]) and tree[name].stride() == value[name].stride() for name in value)
    assert tree["again"] is tree["base"]
    tree["base"][3, 4] = 42.0
    assert tree["tail"][0] == 42.0 and tree["transposed"][4, 3] == 42.0


@BOTH
def test_nan_payloads_and_signed_zeros_survive(tmp_path, archive):
    value = torch.tensor([0x7FC00001, -1, -(2**31), 1], dtype=torch.int32).view(torch.float32)
    assert same(read_tensors(save(value, tmp_path / "a.pt", archive)), value)


@BOTH
def test_a_state_dict_with_plain_values_comes_back_as_plain_containers(tmp_path, archive):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    value = {"net": net.state_dict(), "it": 12, "fid": np.float64(3.25), "kid": np.float32(0.5), "n": np.int64(-3),
             "flags": {True, None}, "name": "graf", "raw": b"\x00\xff", "size": torch.Size([2, 3]), "big": 2**80,
             "dtype": torch.float16, "device": torch.device("cuda:1"), "nested": [(1, [2.5, {"x": ()}])]}
    tree = read_tensors(save(value, tmp_path / "a.pt", archive))
    assert type(tree["net"]) is dict and list(tree["net"]) == list(value["net"])
    assert all(same(tree["net"][name], tensor) for name, tensor in net.state_dict().items())
    kept = ("it", "fid", "kid", "n", "flags", "name", "raw", "size", "big", "dtype", "nested")
    assert all(tree[name] == value[name] for name in kept)
    assert type(tree["fid"]) is float and tree["device"] == "cuda"


def test_numpy_arrays_come_back_in_either_order_and_byte_order(tmp_path):
    arrays = {"c": np.arange(6.0).reshape(2, 3), "f": np.asfortranarray(np.arange(6).reshape(2, 3)),
              "big": np.arange(3, dtype=">i2"), "empty": np.zeros((0, 4), np.float32), "bool": np.array([True, False])}
    tree = read_tensors(save([arrays, arrays["c"], torch.ones(1)], tmp_path / "a.pt"))
    for name, array in arrays.items():
        np.testing.assert_array_equal(tree[0][name], array)
        assert tree[0][name].dtype == array.dtype.newbyteorder("=") and tree[0][name].shape == array.shape
    assert tree[1] is tree[0]["c"]


@BOTH
def test_an_optimiser_state_comes_back(tmp_path, archive):
    net = nn.Linear(3, 2)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    net(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    tree = read_tensors(save(optimiser.state_dict(), tmp_path / "a.pt", archive))
    assert tree["param_groups"][0]["lr"] == 1e-3
    assert same(tree["state"][0]["exp_avg"], optimiser.state_dict()["state"][0]["exp_avg"])


@pytest.mark.smoke
@BOTH
def test_a_whole_module_is_read_without_its_code(tmp_path, foreign, archive):
    module, forget = foreign
    net = module.Net()
    expected = net.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it cannot find the source of the test's classes
        save(net, tmp_path / "generator.pth", archive)
    forget()
    record = read_tensors(tmp_path / "generator.pth")
    state = module_state(record)
    assert "their_code" not in sys.modules
    assert record.class_path == "their_code.Net" and record.z_dim == 256
    assert list(state) == list(expected) and all(same(state[name], expected[name]) for name in expected)
    assert record.state["_modules"]["blocks"].state["_modules"]["0"].act == Name("torch.nn.functional.relu")


@BOTH
def test_an_average_of_parameters_is_read_without_its_code(tmp_path, foreign, archive):
    module, forget = foreign
    average = module.Average(nn.Linear(3, 2).parameters())
    save(average, tmp_path / "ema.pth", archive)
    forget()
    record = read_tensors(tmp_path / "ema.pth")
    assert record.class_path == "their_code.Average" and record.decay == 0.999 and record.num_updates == 7
    assert [same(a, b) for a, b in zip(record.shadow_params, average.shadow_params, strict=True)] == [True, True]
    with pytest.raises(AttributeError, match="collected_params"):
        _ = record.collected_params


def test_plain_pickles_hold_tensors_and_foreign_dicts(tmp_path, foreign):
    module, forget = foreign
    settings, slotted = module.Settings(a=1), module.Slotted()
    settings.note, slotted.weight = "x", torch.ones(2)
    net, number = module.Net(), torch.randn(3, 3).t()
    for protocol in (2, 3, 4, 5):
        value = {"G": net, "number": number, "settings": settings, "slotted": slotted}
        (tmp_path / f"{protocol}.pkl").write_bytes(pickle.dumps(value, protocol))
    forget()
    for protocol in (2, 3, 4, 5):
        tree = read_tensors(tmp_path / f"{protocol}.pkl")
        assert same(tree["number"], number) and same(module_state(tree["G"])["gain"], net.gain.detach())
        assert tree["settings"].entries == {"a": 1} and tree["settings"].note == "x"
        assert same(tree["slotted"].weight, torch.ones(2))


def test_persistent_classes_give_their_state_and_leave_their_source_unread(tmp_path, monkeypatch):
    module = types.ModuleType("torch_utils.persistence")
    module._reconstruct_persistent_obj = lambda meta: None
    module._reconstruct_persistent_obj.__module__ = module.__name__
    module._reconstruct_persistent_obj.__qualname__ = module._reconstruct_persistent_obj.__name__ = (
        "_reconstruct_persistent_obj")
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    state = {"_parameters": {"w": torch.ones(2)}, "_buffers": {}, "_modules": {}, "z_dim": 512}
    meta = {"type": "class", "module_src": "raise SystemExit", "class_name": "Generator", "state": state}

    class Persistent:
        def __reduce__(self):
            return module._reconstruct_persistent_obj, (meta,)

    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"G_ema": Persistent()}))
    record = read_tensors(tmp_path / "a.pkl")["G_ema"]
    assert record.class_path == "Generator" and record.z_dim == 512 and same(module_state(record)["w"], torch.ones(2))


@BOTH
def test_tensors_saved_on_a_gpu_arrive_on_the_cpu(tmp_path, archive):
    path = save({"w": torch.arange(3.0)}, tmp_path / "a.pt", archive)
    raw = replace_in_pickle(path, b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:1")
    path.write_bytes(raw)
    assert same(read_tensors(path)["w"], torch.arange(3.0))


def replace_in_pickle(path, old, new):
    raw = path.read_bytes()
    if not zipfile.is_zipfile(path):
        assert old in raw
        return raw.replace(old, new)
    out = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            assert not name.endswith("data.pkl") or old in data
            target.writestr(name, data.replace(old, new) if name.endswith("data.pkl") else data)
    return out.getvalue()


# ---- what must be refused: hostile pickles. Each would create the sentinel file if pickle or torch loaded it.


def short(text):
    return b"\x8c" + bytes([len(text)]) + text.encode()


def globally(module, name):
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


class Hostile:
    """Pickles by opcodes; `touch` is the shell command that leaves the sentinel."""

    def __init__(self, sentinel):
        self.touch = f"touch {sentinel}"
        self.python = f"open({str(sentinel)!r}, 'w').close()"

    def os_system(self):
        return b"\x80\x02" + globally("os", "system") + short(self.touch) + b"\x85R."

    def posix_system(self):
        return b"\x80\x02" + globally("posix", "system") + short(self.touch) + b"\x85R."

    def builtins_eval(self):
        return b"\x80\x02" + globally("builtins", "eval") + short(self.python) + b"\x85R."

    def python_2_eval(self):
        return b"\x80\x02" + globally("__builtin__", "eval") + short(self.python) + b"\x85R."

    def subprocess(self):
        return b"\x80\x02" + globally("subprocess", "getoutput") + short(self.touch) + b"\x85R."

    def stack_global(self):
        return b"\x80\x04" + short("os") + short("system") + b"\x93" + short(self.touch) + b"\x85R."

    def inst(self):
        return b"(" + b"S" + repr(self.touch).encode() + b"\n" + b"ios\nsystem\n."

    def obj(self):
        return b"(" + globally("os", "system") + b"S" + repr(self.touch).encode() + b"\no."

    def newobj(self):
        return b"\x80\x02" + globally("subprocess", "Popen") + short(self.touch) + b"\x85\x81."

    def newobj_ex(self):
        return b"\x80\x04" + globally("subprocess", "Popen") + b")}" + short("args") + short(self.touch) + b"s\x92."

    def nested_in_state(self):  # an innocent object, whose state is computed by a call
        return (b"\x80\x02" + globally("their_code", "Net") + b")\x81}" + short("x") + globally("os", "system")
                + short(self.touch) + b"\x85Rsb.")

    def setstate_of_a_class(self):  # BUILD with a dict on a class would set its attributes
        return b"\x80\x02" + globally("their_code", "Net") + b"}" + short("forward") + b"Nsb."

    def build_on_a_function_of_ours(self):  # would set __code__ or __defaults__ of what rebuilds tensors
        ours = globally("torch._utils", "_rebuild_tensor_v2")
        return b"\x80\x02" + ours + b"N}" + short("__defaults__") + b"Ns\x86b."

    def getattr_chain(self):
        return (b"\x80\x04" + globally("builtins", "getattr") + globally("torch", "nn") + short("__loader__")
                + b"\x86R.")

    def dotted_name_through_torch(self):
        return b"\x80\x04" + short("torch") + short("serialization.os.system") + b"\x93" + short(self.touch) + b"\x85R."

    def dotted_name_to_a_dunder(self):
        return b"\x80\x04" + short("torch") + short("nn.Module.__init__") + b"\x93)R."

    def torch_load(self):
        return b"\x80\x02" + globally("torch", "load") + short("/etc/passwd") + b"\x85R."

    def torch_jit_load(self):
        return b"\x80\x02" + globally("torch.jit", "load") + short("/etc/passwd") + b"\x85R."

    def torch_hub(self):
        return b"\x80\x02" + globally("torch.hub", "load_state_dict_from_url") + short("http://localhost") + b"\x85R."

    def numpy_load(self):
        return b"\x80\x02" + globally("numpy", "load") + short("/etc/passwd") + b"\x85R."

    def numpy_object_dtype(self):
        return (b"\x80\x02" + globally("numpy.core.multiarray", "scalar") + globally("numpy", "dtype") + short("O8")
                + b"\x85R" + b"C\x0800000000" + b"\x86R.")

    def copyreg_extension(self):  # the registry is process-wide, and so is its cache of objects
        return b"\x80\x02\x82\x07" + short(self.touch) + b"\x85R."

    def copyreg_add_extension(self):
        return b"\x80\x02" + globally("copyreg", "add_extension") + short("os") + short("system") + b"K\x09\x87R."

    def reconstructor(self):
        return b"\x80\x02" + globally("copy_reg", "_reconstructor") + globally("os", "system") + b"NN\x87R."

    def functools_partial_reduce(self):
        return b"\x80\x02" + globally("operator", "methodcaller") + short("system") + b"\x85R."

    def importlib(self):
        return b"\x80\x02" + globally("importlib", "import_module") + short("antigravity") + b"\x85R."

    def load_from_bytes_with_a_pickle_inside(self):
        inner = self.os_system()
        return (b"\x80\x03" + globally("torch.storage", "_load_from_bytes") + b"C" + bytes([len(inner)]) + inner
                + b"\x85R.")

    def calling_what_it_built(self):
        return b"\x80\x02" + globally("their_code", "make") + b")R)R."

    def persistent_id_of_garbage(self):
        return b"\x80\x02K\x07Q."

    def persistent_id_as_text(self):
        return b"Pstorage\n."

    def persistent_id_of_a_class(self):
        return b"\x80\x02(" + short("module") + globally("os", "system") + b"NNtQ" + short(self.touch) + b"\x85R."


HOSTILE = [name for name in vars(Hostile) if not name.startswith("_")]


@pytest.mark.parametrize("wrapping", ["plain", "zip", "legacy"])
@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_pickles_are_refused_and_nothing_runs(tmp_path, monkeypatch, attack, wrapping):
    monkeypatch.setitem(copyreg._inverted_registry, 7, ("os", "system"))  # as a program might have registered it
    monkeypatch.setitem(copyreg._extension_cache, 7, os.system)
    sentinel, path = tmp_path / "ran", tmp_path / "a.pt"
    path.write_bytes(wrapped(getattr(Hostile(sentinel), attack)(), wrapping))
    loaded = set(sys.modules)
    with pytest.raises(CheckpointError, match=r"a\.pt: its? "):
        read_tensors(path)
    assert not sentinel.exists()
    assert "antigravity" not in sys.modules and set(sys.modules) == loaded


def wrapped(raw, wrapping):
    if wrapping == "zip":
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("archive/data.pkl", raw)
        return out.getvalue()
    header = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    return b"".join(pickle.dumps(part, 2) for part in header) + raw if wrapping == "legacy" else raw


@pytest.mark.parametrize("attack", ["os_system", "builtins_eval", "python_2_eval", "subprocess", "stack_global",
                                    "inst", "obj", "nested_in_state", "copyreg_extension"])
def test_the_hostile_pickles_do_run_in_python(tmp_path, monkeypatch, attack):
    """Or the test above would prove nothing."""
    monkeypatch.setitem(copyreg._inverted_registry, 7, ("os", "system"))
    monkeypatch.setitem(sys.modules, "their_code", types.SimpleNamespace(Net=type("Net", (), {})))
    sentinel = tmp_path / "ran"
    pickle.loads(getattr(Hostile(sentinel), attack)())
    assert sentinel.exists()


def test_foreign_functions_are_recorded_and_not_called(tmp_path):
    raw = b"\x80\x04" + short("their_code") + short("os.system") + b"\x93" + short("ls") + b"\x85R."
    (tmp_path / "a.pkl").write_bytes(raw)
    record = read_tensors(tmp_path / "a.pkl")
    assert isinstance(record, Record) and (record.class_path, record.args) == ("their_code.os.system", ("ls",))


# ---- what must be refused: broken files


def rebuild(offset=0, size=(2,), stride=(1,), numel=4, kind="FloatStorage", label="0", storage=b""):
    """A pickle with one tensor."""
    def ints(values):
        return b"(" + b"".join(pickle.dumps(value, 2)[2:-1] for value in values) + b"t"

    storage = storage or (b"(" + short("storage") + globally("torch", kind) + short(label) + short("cpu")
                          + pickle.dumps(numel, 2)[2:-1] + b"tQ")
    return (b"\x80\x02" + globally("torch._utils", "_rebuild_tensor_v2") + b"(" + storage
            + pickle.dumps(offset, 2)[2:-1] + ints(size) + ints(stride) + b"\x89"
            + globally("collections", "OrderedDict") + b")RtR.")


def archive_of(raw, **entries):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", raw)
        for name, data in entries.items():
            archive.writestr(f"archive/data/{name.strip('_')}", data)
    return out.getvalue()


def legacy_of(raw, labels, data):
    return wrapped(raw, "legacy") + pickle.dumps(labels, 2) + data


def test_the_hand_made_tensor_is_sound(tmp_path):
    """The broken files below differ from this one in one thing each."""
    data = struct.pack("<4f", 1, 2, 3, 4)
    (tmp_path / "a.pt").write_bytes(archive_of(rebuild(offset=1, size=(2,), stride=(2,)), _0=data))
    assert read_tensors(tmp_path / "a.pt").tolist() == [2.0, 4.0]
    (tmp_path / "b.pt").write_bytes(legacy_of(rebuild(), ["0"], struct.pack("<q", 4) + data))
    assert read_tensors(tmp_path / "b.pt").tolist() == [1.0, 2.0]


def good_zip():
    return archive_of(rebuild(), _0=bytes(16))


def zip_with(*names, compression=zipfile.ZIP_STORED, data=b"x"):
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of a name that comes twice
        with zipfile.ZipFile(out, "w", compression) as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
            for name in names:
                archive.writestr(name, data)
    return out.getvalue()


def corrupt(raw):
    at = raw.index(b"archive/data/0") + len(b"archive/data/0")
    return raw[:at] + b"\xff" + raw[at + 1:]


def doubling(depth):
    """Lists of twice the same list: 2^depth leaves in a walk that does not notice."""
    return b"\x80\x02]" + b"".join(b"q" + bytes([i]) + b"0]h" + bytes([i]) + b"ah" + bytes([i]) + b"a"
                                 for i in range(depth)) + b"."


BROKEN = {
    "an empty file": (lambda: b"", "empty"),
    "a web page": (lambda: b"<!DOCTYPE html><html>Quota exceeded</html>", "web page"),
    "a Git LFS pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "a text file": (lambda: b"epoch 3, loss 0.25\n", "download it again"),
    "random bytes": (lambda: bytes(range(255, 0, -1)) * 8, "download it again"),
    "a gzip archive": (lambda: b"\x1f\x8b\x08" + bytes(40), "unpack"),
    "another zip": (lambda: zip_with("readme.txt").replace(b"archive/data.pkl", b"archive/data.bin"),
                    "not one of torch.save's"),
    "TorchScript": (lambda: zip_with("archive/constants.pkl"), "TorchScript"),
    "a big-endian archive": (lambda: zip_with("archive/byteorder", data=b"big"), "big-endian"),
    "a truncated zip": (lambda: good_zip()[:-30], "download it again"),
    "half a zip": (lambda: good_zip()[:150], "download it again"),
    "a flipped bit": (lambda: corrupt(good_zip()), "download it again"),
    "a truncated pickle": (lambda: pickle.dumps({"a": [1, 2, 3]}, 2)[:-4], "download it again"),
    "a truncated legacy storage": (lambda: legacy_of(rebuild(numel=8), ["0"], struct.pack("<q", 8) + bytes(30)),
                                   "cut short"),
    "a legacy file without storages": (lambda: legacy_of(rebuild(), [], b""), "list of storages"),
    "a wrong magic number": (lambda: pickle.dumps(0x1950A86A20F9469CFC6D, 2) + rebuild(numel=1), None),
    "a storage that is not there": (lambda: archive_of(rebuild(), _1=bytes(16)), "missing"),
    "a storage of another size": (lambda: archive_of(rebuild(), _0=bytes(12)), "stated size"),
    "a storage of astronomical size": (lambda: archive_of(rebuild(numel=2**62), _0=bytes(16)), "stated size"),
    "a legacy storage of astronomical size": (lambda: legacy_of(rebuild(numel=2**62), ["0"], bytes(24)),
                                              "more numbers"),
    "a negative storage size": (lambda: archive_of(rebuild(numel=-4), _0=bytes(16)), "impossible"),
    "a storage of unknown kind": (lambda: archive_of(rebuild(kind="QInt8Storage"), _0=bytes(16)), "QInt8Storage"),
    "a storage label that leads out": (lambda: archive_of(rebuild(label="../data.pkl"), _0=bytes(16)), "missing"),
    "a storage overrun": (lambda: archive_of(rebuild(size=(5,)), _0=bytes(16)), "beyond its 4"),
    "an overrun by stride": (lambda: archive_of(rebuild(size=(2, 2), stride=(3, 1)), _0=bytes(16)), "beyond its 4"),
    "an overrun by offset": (lambda: archive_of(rebuild(offset=3), _0=bytes(16)), "beyond its 4"),
    "an offset past an empty tensor": (lambda: archive_of(rebuild(offset=5, size=(0,)), _0=bytes(16)), "beyond its 4"),
    "a negative offset": (lambda: archive_of(rebuild(offset=-1), _0=bytes(16)), "impossible"),
    "a negative stride": (lambda: archive_of(rebuild(offset=3, stride=(-1,)), _0=bytes(16)), "impossible"),
    "a negative size": (lambda: archive_of(rebuild(size=(-2,)), _0=bytes(16)), "impossible"),
    "a stride that overflows": (lambda: archive_of(rebuild(size=(3, 2), stride=(2**63, 1)), _0=bytes(16)),
                                "beyond its 4"),
    "a size that overflows": (lambda: archive_of(rebuild(size=(2**40, 2**40), stride=(0, 0)), _0=bytes(16)),
                              "beyond its 4"),
    "an endless broadcast": (lambda: archive_of(rebuild(size=(2**30,), stride=(0,)), _0=bytes(16)), "beyond its 4"),
    "shape and stride of two lengths": (lambda: archive_of(rebuild(size=(2, 1)), _0=bytes(16)), "impossible"),
    "a fraction for a size": (lambda: archive_of(rebuild(size=(1.5,)), _0=bytes(16)), "impossible"),
    "a tensor of no storage": (lambda: archive_of(rebuild(storage=b"N")), "impossible"),
    "a plain pickle that needs storages": (lambda: rebuild(numel=4), "does not bring"),
    "a zip bomb": (lambda: zip_with("archive/data/0", compression=zipfile.ZIP_DEFLATED, data=bytes(2_000_000)),
                   "zip bomb"),
    "one name twice": (lambda: zip_with("archive/data/0", "archive/data/0"), "twice"),
    "a name that leads out": (lambda: zip_with("archive/../../../tmp/x"), "leads out"),
    "an absolute name": (lambda: zip_with("/tmp/x"), "leads out"),
    "a protocol too new": (lambda: b"\x80\x09N.", "protocol 9"),
    "a huge frame": (lambda: b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.", "far longer"),
    "a huge string": (lambda: b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"N.", "download it again"),
    "a huge memo": (lambda: b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b"0h\x00.", "download it again"),
    "a memo never filled": (lambda: b"\x80\x02h\x00.", "download it again"),
    "a stack too short": (lambda: b"\x80\x02\x86.", "takes more than it has"),
    "a mark never set": (lambda: b"\x80\x02t.", "download it again"),
    "an odd dict": (lambda: b"\x80\x02}(K\x01K\x02K\x03u.", "download it again"),
    "items of a number": (lambda: b"\x80\x02K\x01K\x02a.", "appends to a int"),
    "a list as a key": (lambda: b"\x80\x02}]Ns.", "as a key"),
    "a key that takes forever to hash": (lambda: b"\x80\x02}))\x86" + b"2\x86" * 60 + b"Ns.", "as a key"),
    "deep tuples": (lambda: b"\x80\x02N" + b"\x85" * 3000 + b".", "deep"),
    "deep lists": (lambda: b"\x80\x02" + b"]" * 3000 + b"a" * 2999 + b".", "deep"),
    "one list copied over and over": (lambda: b"\x80\x02](" + b"N" * 3000 + b"eq\x000]" + (
        globally("torch", "Size") + b"h\x00\x85R0") * 3000 + b".", "over and over"),
    "a name without end": (lambda: b"\x80\x02" + globally("a" * 5000, "b") + b".", "endless name"),
    "two values at the end": (lambda: b"\x80\x02NN.", "download it again"),
    "a pickled buffer out of band": (lambda: b"\x80\x05\x97.", "NEXT_BUFFER"),
    "bytes by the billion": (lambda: b"\x80\x02" + globally("builtins", "bytes") + b"J\x00\x00\x00\x7f\x85R.",
                             "download"),
    "an array of objects": (lambda: pickle.dumps(np.array([None]), 2), "something other than numbers"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_files_are_refused_with_the_file_and_the_fault(tmp_path, fault):
    make, words = BROKEN[fault]
    path = tmp_path / "a.pt"
    path.write_bytes(make())
    if words is None:  # an integer followed by rubbish is a sound pickle of that integer, but no networks
        assert isinstance(read_tensors(path), int)
        return
    with pytest.raises(CheckpointError, match=words) as error:
        read_tensors(path)
    assert str(error.value).startswith(f"{path}: ") and len(str(error.value)) < len(str(path)) + 400


def test_folders_and_missing_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder"):
        read_tensors(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        read_tensors(tmp_path / "missing.pt")


def test_every_truncation_of_a_checkpoint_is_refused(tmp_path):
    value = {"w": torch.arange(5.0), "n": 3}
    for archive in (True, False):
        raw = save(value, tmp_path / "whole.pt", archive).read_bytes()
        for length in range(0, len(raw), 7):
            (tmp_path / "part.pt").write_bytes(raw[:length])
            with pytest.raises(CheckpointError):
                read_tensors(tmp_path / "part.pt")


def test_random_damage_gives_values_or_a_checkpoint_error_and_nothing_else(tmp_path):
    generator = np.random.default_rng(0)
    raw = save({"w": torch.arange(5.0), "n": [3, "x"]}, tmp_path / "whole.pt", False).read_bytes()
    refused = 0
    for _ in range(300):
        damaged = bytearray(raw)
        for at in generator.integers(0, len(raw), 3):
            damaged[at] = generator.integers(0, 256)
        (tmp_path / "a.pt").write_bytes(damaged)
        try:
            read_tensors(tmp_path / "a.pt")
        except CheckpointError:
            refused += 1
    assert refused > 100


def test_a_list_that_doubles_itself_is_read_in_no_time(tmp_path):
    (tmp_path / "a.pkl").write_bytes(doubling(60))
    assert len(read_tensors(tmp_path / "a.pkl")) == 2


def test_a_module_that_contains_itself_is_refused(tmp_path):
    inner = b"}" + short("a") + b"h\x00s"
    body = b"}" + short("_parameters") + b"}s" + short("_buffers") + b"}s" + short("_modules") + inner + b"s"
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02" + globally("their_code", "Net") + b")\x81q\x00" + body + b"b.")
    with pytest.raises(CheckpointError, match="no network"):
        module_state(read_tensors(tmp_path / "a.pkl"))


# ---- whose checkpoint it is


def test_our_own_checkpoints_are_known_by_their_keys(tmp_path):
    ours = {"state_dict": {"w": torch.ones(2)}, "pytorch-lightning_version": "2.6.1", "epoch": 0}
    assert is_ours(save(ours, tmp_path / "ours.ckpt"))
    assert not is_ours(save({"state_dict": {"w": torch.ones(2)}}, tmp_path / "theirs.pt"))
    assert not is_ours(save(ours["state_dict"], tmp_path / "legacy.pt", archive=False))
    assert not is_ours(tmp_path)
    (tmp_path / "bundle.zip").write_bytes(zip_with("generator.pth").replace(b"archive/data.pkl", b"archive/ema2.pth"))
    assert not is_ours(tmp_path / "bundle.zip")
    with pytest.raises(CheckpointError, match="no such file"):
        is_ours(tmp_path / "missing.ckpt")


GRAF_LAYERS = {**{f"pts_linears.{i}": (256, 447 if i == 5 else 191 if i == 0 else 256) for i in range(8)},
               "views_linears.0": (128, 411), "feature_linear": (256, 256), "alpha_linear": (1, 256),
               "rgb_linear": (3, 128)}
PIGAN_LAYERS = {"network.0.layer": (256, 3), **{f"network.{i}.layer": (256, 256) for i in range(1, 8)},
                "final_layer": (1, 256), "color_layer_sine.layer": (256, 259), "color_layer_linear.0": (3, 256),
                **{f"mapping_network.network.{i}": (256, 256) for i in (0, 2, 4)},
                "mapping_network.network.6": (4608, 256)}


def random_state(layers, prefix=""):
    state = collections.OrderedDict()
    for name, shape in layers.items():
        state[f"{prefix}{name}.weight"], state[f"{prefix}{name}.bias"] = torch.randn(shape), torch.randn(shape[0])
    return state


def test_a_graf_checkpoint_gives_generator_average_and_discriminator(tmp_path):
    raw, average = random_state(GRAF_LAYERS), random_state(GRAF_LAYERS)
    critic = {}
    for number, channels in {0: (3, 128), 3: (128, 256), 6: (256, 512), 9: (512, 1)}.items():
        weight = torch.randn(channels[1], channels[0], 4, 4)
        critic |= {f"main.{number}.weight_orig": weight, f"main.{number}.weight_u": torch.randn(channels[1]),
                   f"main.{number}.weight_v": torch.randn(channels[0] * 16)}
    official = {"generator": raw, "generator_test": average, "discriminator": critic, "g_optimizer": {"state": {}},
                "it": 12, "fid_best": np.float64(40.5)}
    for archive in (True, False):
        ours = load_official(save(official, tmp_path / "carla_128.pt", archive), "graf")
        assert set(ours) == {"generator", "generator_ema", "discriminator"}
        for part, theirs in zip(ours.values(), (raw, average, critic), strict=True):
            assert len(part) == len(theirs)
            assert all(same(a, b) for a, b in zip(part.values(), theirs.values(), strict=True))


def pickled_net(module, layers):
    """A module of the authors' with such layers in this order, for torch.save to pickle whole."""
    def empty(kind):
        made = kind.__new__(kind)
        nn.Module.__init__(made)
        return made

    owner = empty(module.Net)
    for name, shape in layers.items():
        place = owner
        for step in name.split("."):
            if step not in place._modules:
                place.add_module(step, empty(module.Block))
            place = place._modules[step]
        place.weight, place.bias = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape[0]))
    return owner


def pickled_pigan(folder, module):
    """generator.pth and ema.pth as the authors' code pickles them: whole objects."""
    generator = pickled_net(module, {f"siren.{name}": shape for name, shape in PIGAN_LAYERS.items()})
    generator.z_dim, generator.avg_frequencies = 256, torch.zeros(1, 2304)
    average = module.Average(torch.randn_like(p) for p in generator.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(generator, folder / "generator.pth")
        save(average, folder / "ema.pth")
    return generator.state_dict(), average.shadow_params


def test_a_pigan_checkpoint_is_read_from_folder_zip_or_single_file(tmp_path, foreign):
    module, forget = foreign
    folder = tmp_path / "CelebA"
    folder.mkdir()
    raw, average = pickled_pigan(folder, module)
    with zipfile.ZipFile(tmp_path / "CelebA.zip", "w", zipfile.ZIP_DEFLATED) as bundle:
        for name in ("generator.pth", "ema.pth"):
            bundle.write(folder / name, f"CelebA/{name}")
        bundle.writestr("__MACOSX/CelebA/._generator.pth", b"rubbish")
    forget()
    for path in (folder, tmp_path / "CelebA.zip"):
        ours = load_official(path, "pigan")
        assert set(ours) == {"generator", "generator_ema"}
        assert sorted(ours["generator"]) == sorted(ours["generator_ema"])
        for part, theirs in zip(ours.values(), (list(raw.values()), average), strict=True):
            assert sum(t.numel() for t in part.values()) == 1_910_788
            assert all(any(same(a, b) for b in theirs if b.shape == a.shape) for a in part.values())
    assert set(load_official(folder / "generator.pth", "pigan")) == {"generator"}
    assert set(load_official(folder / "ema.pth", "pigan")) == {"generator_ema"}


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_a_nameless_pigan_average_is_read_in_the_order_of_the_parameters(tmp_path, foreign):
    module, forget = foreign
    generator = pickled_net(module, {f"siren.{name}": shape for name, shape in PIGAN_LAYERS.items()})
    save(generator, tmp_path / "generator.pth")
    save(module.Average(generator.parameters()), tmp_path / "ema.pth")  # before the first step they are the same
    forget()
    ours = load_official(tmp_path, "pigan")
    assert list(ours["generator"]) == list(ours["generator_ema"])
    assert all(same(ours["generator"][name], ours["generator_ema"][name]) for name in ours["generator"])


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_a_pigan_discriminator_is_read_beside_the_generator(tmp_path, foreign):
    module, forget = foreign
    pickled_pigan(tmp_path, module)
    critic = pickled_net(module, {"layers.0.network.0.conv": (5, 6, 3, 3), "layers.0.network.2.conv": (5, 7, 3, 3),
                                  "layers.0.proj": (5, 4, 1, 1), "fromRGB.0.model.0": (4, 3, 1, 1),
                                  "fromRGB.1.model.0": (5, 3, 1, 1), "final_layer": (259, 5, 2, 2)})
    save(critic, tmp_path / "discriminator.pth")
    forget()
    ours = load_official(tmp_path, "pigan")["discriminator"]
    mine = ProgressiveDiscriminator(channels=[4, 5], coord=True, down="stride", latent_dim=256, pose=True)
    mine.load_state_dict(ours)
    assert same(ours["blocks.0.second.weight"], critic.state_dict()["layers.0.network.2.conv.weight"])


def test_official_checkpoints_of_the_wrong_kind_say_so(tmp_path):
    other = save({"model": {"w": torch.ones(1)}, "epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other\.pt: it has no generator \(it has model, epoch\)"):
        load_official(other, "graf")
    with pytest.raises(CheckpointError, match="no parameter of a GRAF generator"):
        load_official(save({"generator": {"w": torch.ones(1)}}, tmp_path / "a.pt"), "graf")
    with pytest.raises(CheckpointError, match=r"b\.pt: it holds no pigan .*another method"):
        load_official(save({"generator": random_state({"rgb_linear": (3, 128)})}, tmp_path / "b.pt"), "pigan")
    with pytest.raises(CheckpointError, match="not the networks of a GAN"):
        load_official(save([1, 2], tmp_path / "a.pt"), "graf")
    with pytest.raises(CheckpointError, match="it has nothing"):
        load_official(tmp_path, "pigan")
    two = zip_with("a/ema.pth", "b/ema.pth").replace(b"archive/data.pkl", b"archive/none.txt")
    (tmp_path / "two.zip").write_bytes(two)
    with pytest.raises(CheckpointError, match="several checkpoints"):
        load_official(tmp_path / "two.zip", "pigan")
    for unknown in ("nerfgan", "../graf", "os.path"):
        with pytest.raises(ValueError, match="no method"):
            load_official(other, unknown)
