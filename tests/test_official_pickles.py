"""Pickles in NVIDIA's format: they carry their networks' settings, which are read, checked and used, never executed."""

import contextlib
import io
import os
import pickle
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import open_dict
from torch import nn

from gan3d import launch
from gan3d.cameras import Camera, intrinsics_from_fov, look_at
from gan3d.checkpoints import load_official, read_official, read_tensors, stated_dataset
from gan3d.gans.eg3d import EG3D, DualDiscriminator, SuperResolution
from gan3d.nn.stylegan2 import (
    DiscriminatorBlock,
    EqualizedConv,
    FullyConnected,
    SynthesisBlock,
    SynthesisLayer,
    ToRGB,
)
from gan3d.pickled import module_state
from gan3d.ramps import Ramp
from gan3d.rays import Bounds
from gan3d.rebuild import CheckpointError, Record

SOURCE = "the_source_code_of_their_module = True"
TAPS = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
AXES = {"released": [[0, 0, 1], [1, 0, 0], [0, 1, 0]], "mended": [[0, 0, 1], [0, 1, 0], [1, 0, 0]]}


# ---- a maker of such pickles: our networks, in the wrapping that NVIDIA's classes give themselves


@contextlib.contextmanager
def foreign_modules():
    """Modules of the authors' that can be imported while pickling, and no longer while reading."""
    def reconstruct(meta):
        exec(meta["module_src"], {})  # as the original does

    reconstruct.__module__, reconstruct.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
    easy = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})
    plain = type("Plain", (), {"__module__": "training.triplane"})
    made = {name: types.ModuleType(name) for name in ("torch_utils", "torch_utils.persistence", "dnnlib",
                                                      "dnnlib.util", "training", "training.triplane")}
    made["torch_utils.persistence"]._reconstruct_persistent_obj = reconstruct
    made["dnnlib.util"].EasyDict, made["training.triplane"].Plain = easy, plain
    with pytest.MonkeyPatch.context() as patch:
        for name, module in made.items():
            patch.setitem(sys.modules, name, module)
        yield SimpleNamespace(reconstruct=reconstruct, easy=easy, plain=plain)


class Persistent:
    """Pickles as a call of `_reconstruct_persistent_obj`, with its state and the source code of its module."""

    def __init__(self, their, class_name, state):
        self.their, self.class_name, self.state = their, class_name, state

    def __reduce__(self):
        return self.their.reconstruct, ({"type": "class", "version": 6, "module_src": SOURCE,
                                         "class_name": self.class_name, "state": self.state},)


def settings(module: nn.Module) -> dict:
    """The attributes that their module of this kind has besides its tensors."""
    found = {}
    if isinstance(module, FullyConnected):  # our gain has the activation's in it, theirs is the learning rate's alone
        gain = 2**0.5 if module.activation == "lrelu" else 1
        found = {"activation": module.activation, "bias_gain": round(module.bias_gain / gain, 9)}
    if isinstance(module, SynthesisLayer | ToRGB | EqualizedConv):
        found["conv_clamp"] = module.clamp
    if isinstance(module, EqualizedConv) and module.clamp is not None:  # theirs is multiplied by the gain when used
        found["conv_clamp"] = round(module.clamp * 2**0.5 / module.bias_gain, 9)
    if isinstance(module, SynthesisLayer):
        found |= {"up": 2 if module.up else 1, "use_noise": True, "activation": "lrelu"}
    if isinstance(module, SynthesisBlock | DiscriminatorBlock):
        found["architecture"] = getattr(module, "architecture", "skip")
    return found


def wrapped(their, module: nn.Module, **more) -> Persistent:
    children = {name: wrapped(their, child) for name, child in module._modules.items() if child is not None}
    state = {"training": False, "_parameters": dict(module._parameters), "_buffers": dict(module._buffers),
             "_modules": children, "_non_persistent_buffers_set": set(), **settings(module), **more}
    if isinstance(module, SynthesisLayer):
        state["_buffers"] = {**state["_buffers"], "resample_filter": TAPS.outer(TAPS)}
    return Persistent(their, type(module).__name__, state)


def empty(**more) -> dict:
    return {"_parameters": {}, "_buffers": {}, "_modules": {}, **more}


def options(model: EG3D, **more) -> dict:
    bounds = model.bounds
    automatic = bounds.aabb is not None
    return {"depth_resolution": model.samples_per_ray, "depth_resolution_importance": model.fine_samples,
            "ray_start": "auto" if automatic else bounds.near, "ray_end": "auto" if automatic else bounds.far,
            "box_warp": model.box, "white_back": bounds.background is not None, "clamp_mode": "softplus",
            "disparity_space_sampling": False, "c_gen_conditioning_zero": not model.camera_conditioning,
            "c_scale": model.condition_scale, "superresolution_noise_mode": model.superresolution.noise,
            "avg_camera_pivot": [0, 0, 0.2], **more}


def pickled_generator(their, model: EG3D, axes: str = "released", drop: tuple[str, ...] = (), **more) -> Persistent:
    upsampler = model.superresolution
    generator = wrapped(their, model, z_dim=model.z_dim, img_resolution=upsampler.resolution, _last_planes=None,
                        neural_rendering_resolution=model.render_resolution, rendering_kwargs=options(model, **more),
                        _init_args=(), _init_kwargs=their.easy(mapping_kwargs=their.easy(num_layers=2)))
    for key in drop:
        del generator.state["rendering_kwargs"][key]
    generator.state["_buffers"] = {"dataset_label_std": torch.ones(25)}
    modules = generator.state["_modules"]
    modules["superresolution"].state |= {"input_resolution": upsampler.input_resolution, "sr_antialias": True}
    planes = torch.tensor([[[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 0, 1], [0, 1, 0]], AXES[axes]])
    modules["renderer"] = their.plain()  # such classes are pickled by reference
    vars(modules["renderer"]).update(empty(plane_axes=planes.float()))
    return generator


def pickled_discriminator(their, model: DualDiscriminator, group: int | None = 4) -> Persistent:
    resolution = model.resolutions[0]
    found = wrapped(their, model, img_resolution=resolution, disc_c_noise=0)
    found.state["_modules"]["b4"].state |= {"architecture": "resnet"}
    found.state["_modules"]["b4"].state["_modules"]["mbstd"] = Persistent(their, "Std", empty(group_size=group))
    return found


def snapshot(path, make, **more):
    """A snapshot of NVIDIA's trainer; `make(their)` gives the networks by their names."""
    with foreign_modules() as their:
        tree = {"training_set_kwargs": {"path": "/data/FFHQ_512.zip", "max_size": np.int64(7), "xflip": False},
                "augment_pipe": None, **make(their), **more}
        path.write_bytes(pickle.dumps(tree))
    return path


def tiny(seed: int = 0, *, bounds=None, superresolution=None, side: int = 16, **changes) -> EG3D:
    """An EG3D whose every number differs from the configs'."""
    torch.manual_seed(seed)
    upsampler = {"input_channels": 5, "input_resolution": 16, "w_dim": 12, "channels": (6, 7), "first_up": False,
                 "clamp": None, **(superresolution or {})}
    numbers = {"box": 1.5, "z_dim": 11, "w_dim": 12, "mapping_depth": 3, "plane_resolution": 8, "plane_channels": 4,
               "channel_base": 50, "channel_max": 9, "decoder_width": 8, "samples_per_ray": 6, "fine_samples": 5,
               "camera_conditioning": True, "plane_axes": "released", "raw_with_torgb": True, **changes}
    model = EG3D(bounds=Bounds(**(bounds or {"near": 1.9, "far": 3.1})), superresolution=SuperResolution(**upsampler),
                 render_resolution=Ramp(side, side, 0), swap=Ramp(0, 0, 0), density_weight=0, density_every=1,
                 density_points=1, density_distance=0, **numbers)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "noise_strength")):
            nn.init.normal_(parameter)
    nn.init.normal_(model.backbone.mapping.w_avg)
    return model.eval().requires_grad_(False)


def camera(n: int = 2) -> Camera:
    pose = look_at(torch.tensor([[0.5, 0.4, 2.3], [-0.8, 0.1, 2.2]])[:n], torch.zeros(3), "y")
    return Camera(pose, intrinsics_from_fov(20).repeat(n, 1, 1))


def picture(model: EG3D):
    z = torch.randn(2, model.z_dim, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ws = model.mapping(z, camera().__class__(*(part.flip(0) for part in camera())), 0.7)
        return model.synthesis(ws, camera(), model.superresolution.resolution)


def rebuilt(official, **fixed) -> EG3D:
    """Our generator by the numbers of the file alone."""
    numbers = official.numbers["model"]["generator"]
    numbers = {**numbers, "superresolution": {**numbers["superresolution"], "w_dim": numbers["w_dim"]}}
    model = instantiate({"_target_": "gan3d.gans.eg3d.EG3D", **numbers,
                         "bounds": {"_target_": "gan3d.rays.Bounds", **official.numbers["data"]["bounds"]},
                         "swap": Ramp(0, 0, 0), "density_weight": 0, "density_every": 1, "density_points": 1,
                         "density_distance": 0, **fixed}, _convert_="all")
    model.load_state_dict(official.weights["generator_ema"])
    return model.eval().requires_grad_(False)


CUBE = {"near": 0, "far": 10, "aabb": [[-0.75] * 3, [0.75] * 3]}
VARIANTS = {
    "as it is": {},
    "8x": {"superresolution": {"first_up": True}, "side": 8},
    "rendered larger than the upsampler's input": {"side": 24},
    "half precision's clamps": {"clamp": 0.5, "superresolution": {"clamp": 0.75}},
    "noise in the upsampler": {"superresolution": {"noise": "const"}},
    "white behind": {"bounds": {"near": 0.1, "far": 2.6, "background": [1, 1, 1]}},
    "limits by the cube": {"bounds": CUBE},
    "mended axes": {"plane_axes": "mended"},
    "no camera in the mapping": {"camera_conditioning": False},
    "half a camera in the mapping": {"condition_scale": 0.5},
    "a decoder that learns slowly": {"decoder_lr_multiplier": 0.25},
    "coarse samples only": {"fine_samples": 0},
    "one width throughout": {"channel_base": 4096},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_generator_comes_back_from_its_own_numbers_alone(tmp_path, variant):
    """The same pictures to the bit, and not the pictures of the plain variant: the change must have mattered."""
    model = tiny(**VARIANTS[variant])
    axes = VARIANTS[variant].get("plane_axes", "released")
    path = snapshot(tmp_path / "a.pkl", lambda their: {"G_ema": pickled_generator(their, model, axes)})
    official = read_official(path, "eg3d")
    mine, expected = picture(rebuilt(official)), picture(model)
    assert official.numbers["data"]["resolution"] == model.superresolution.resolution
    for name in ("rgb", "raw", "depth", "opacity"):
        assert torch.equal(getattr(mine, name), getattr(expected, name)), name
    if variant != "as it is":
        plain = picture(tiny())
        assert plain.rgb.shape != expected.rgb.shape or (plain.rgb - expected.rgb).abs().max() > 0.01


def test_a_generator_without_c_scale_sees_no_camera(tmp_path):
    """As released: the camera is multiplied by what `rendering_kwargs` says, and by 0 where it says nothing."""
    model = tiny()
    path = snapshot(tmp_path / "a.pkl",
                    lambda their: {"G_ema": pickled_generator(their, model, drop=("c_scale", "white_back"))})
    model.camera_conditioning = False
    assert torch.equal(picture(rebuilt(read_official(path, "eg3d"))).rgb, picture(model).rgb)


@pytest.mark.parametrize("side, first_up, added", [(16, False, True), (8, False, False), (16, True, False)])
def test_the_released_raw_image_includes_the_first_blocks_rgb_where_that_is_added_in_place(side, first_up, added):
    model = tiny(side=side, superresolution={"first_up": first_up})
    seen = []
    model.superresolution.block0.torgb.register_forward_hook(lambda module, inputs, output: seen.append(output))
    released = picture(model)
    model.raw_with_torgb = False
    clean = picture(model)
    assert torch.equal(released.rgb, clean.rgb)
    if added:  # one rounding each: values are of order 1
        torch.testing.assert_close(released.raw, clean.raw + seen[0], rtol=0, atol=1e-5)
        assert seen[0].abs().max() > 0.1
    else:
        assert torch.equal(released.raw, clean.raw)


@pytest.mark.parametrize("dual, group", [(True, 4), (False, 2), (True, None)])
def test_a_discriminator_comes_back_from_its_own_numbers_alone(tmp_path, dual, group):
    torch.manual_seed(1)
    model = DualDiscriminator(resolution=16, channel_base=100, channel_max=9, mapping_depth=2, group=group or 1024,
                              dual=dual, clamp=0.5)
    nn.init.normal_(model.b16.fromrgb.bias)
    path = snapshot(tmp_path / "a.pkl", lambda their: {"G": pickled_generator(their, tiny()),
                                                       "D": pickled_discriminator(their, model, group)})
    official = read_official(path, "eg3d")
    assert official.numbers["model"]["dual"] is dual and "generator_ema" not in official.weights
    mine = DualDiscriminator(**official.numbers["model"]["discriminator"])
    mine.load_state_dict(official.weights["discriminator"])
    images, raw = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 8, 8)
    cameras = Camera(*(torch.cat([part, part]) for part in camera()))
    judged, expected = (d(images, camera=cameras, raw=raw).logit for d in (mine, model))
    assert torch.equal(judged, expected) and expected.std() > 0


# ---- what is read


@pytest.mark.smoke
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_every_tensor_and_every_attribute_is_there_and_no_source_code(tmp_path, protocol):
    model = tiny()
    with foreign_modules() as their:
        generator = pickled_generator(their, model, extra=np.float64(0.25), note=np.bool_(True))
        generator.state["_modules"]["tied"] = Persistent(their, "Tied", empty(
            _parameters={"weight": model.decoder.net[0].weight}))
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"G_ema": generator}, protocol))
    assert SOURCE.encode() in (tmp_path / "a.pkl").read_bytes()
    record = read_tensors(tmp_path / "a.pkl")["G_ema"]
    state = module_state(record)
    expected = {name: tensor for name, tensor in model.state_dict().items() if name != "progress"}
    assert all(torch.equal(state[name], tensor) and state[name].stride() == tensor.stride()
               for name, tensor in expected.items())
    assert state["tied.weight"] is state["decoder.net.0.weight"]
    assert record.class_path == "EG3D" and record._init_args == () and record.neural_rendering_resolution == 16
    assert record._init_kwargs == {"mapping_kwargs": {"num_layers": 2}} and record._last_planes is None
    assert record.rendering_kwargs["extra"] == 0.25 and record.rendering_kwargs["note"] is True
    assert record.state["_modules"]["renderer"].plane_axes[2].tolist() == AXES["released"]
    assert SOURCE not in everything(record) and "dnnlib" not in sys.modules


def everything(value) -> set:
    """All text in a tree."""
    todo, texts, seen = [value], set(), set()
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, str):
            texts.add(item)
        elif isinstance(item, Record):
            todo += [item.class_path, item.args, item.state, item.entries]
        elif isinstance(item, dict):
            todo += [*item, *item.values()]
        elif isinstance(item, list | tuple | set):
            todo += item
    return texts


def test_tensors_that_a_gpu_pickled_arrive_on_the_cpu(tmp_path):
    """Plain attributes, as the renderer's axes, are not moved when a network is brought to the CPU for saving."""
    def moved(storage):
        raw = io.BytesIO()
        torch.save(storage, raw, _use_new_zipfile_serialization=False)
        assert b"X\x03\x00\x00\x00cpu" in raw.getvalue()
        return torch.storage._load_from_bytes, (raw.getvalue().replace(b"X\x03\x00\x00\x00cpu",
                                                                       b"X\x06\x00\x00\x00cuda:0"),)

    with foreign_modules() as their, (tmp_path / "a.pkl").open("wb") as file:
        pickler = pickle.Pickler(file)
        pickler.dispatch_table = {torch.storage.TypedStorage: moved}
        pickler.dump({"G_ema": pickled_generator(their, tiny(), "mended")})
    assert read_official(tmp_path / "a.pkl", "eg3d").numbers["model"]["generator"]["plane_axes"] == "mended"


# ---- what is refused


def refusals(their, model):
    """Name → (what is changed in a sound generator, what the error must say)."""
    def setting(key, value):
        return lambda g: g.state["rendering_kwargs"].__setitem__(key, value)

    def attribute(path, key, value):
        def change(g):
            for name in path.split(".") if path else []:
                g = g.state["_modules"][name]
            (g.state if isinstance(g, Persistent) else vars(g))[key] = value
        return change

    def tensor(path, name, value):
        def change(g):
            for step in path.split("."):
                g = g.state["_modules"][step]
            g.state["_parameters"] = {**g.state["_parameters"], name: value}
        return change

    def self_containing(g):
        g.state["_modules"]["again"] = their.plain()
        vars(g.state["_modules"]["again"]).update(empty())
        vars(g.state["_modules"]["again"])["_modules"]["again"] = g.state["_modules"]["again"]

    wide = torch.zeros(1).expand(2**22, 2, 2, 1)
    return {
        "samples by the billion": (setting("depth_resolution", 10**12), "depth_resolution is 1000000000000, not a"),
        "too few samples": (setting("depth_resolution", 1), "not a number from 4"),
        "a negative count": (setting("depth_resolution_importance", -1), "not a number from 0"),
        "a count in words": (setting("depth_resolution", "48"), "depth_resolution is '48'"),
        "a flag for a count": (setting("depth_resolution", True), "depth_resolution is True"),
        "half a sample": (setting("depth_resolution", 6.5), "not a whole number"),
        "a tensor for a number": (setting("box_warp", torch.ones(3)), "box_warp is a Tensor"),
        "not a number": (setting("box_warp", float("nan")), "box_warp is nan"),
        "an endless box": (setting("box_warp", float("inf")), "box_warp is inf"),
        "a number without end": (setting("depth_resolution", 10**5000), "depth_resolution is enormous"),
        "far before near": (setting("ray_start", 3.5), "not before its ray_end"),
        "one automatic limit": (setting("ray_start", "auto"), "ray_start is 'auto'"),
        "a flag in words": (setting("white_back", "yes"), "neither true nor false"),
        "an unknown noise": (setting("superresolution_noise_mode", "pink"), "noise_mode is 'pink'"),
        "disparity": (setting("disparity_space_sampling", True), "evenly in disparity"),
        "another density": (setting("clamp_mode", "relu"), "no softplus"),
        "settings that are no dict": (attribute("", "rendering_kwargs", [1]), "does not say its"),
        "an enormous rendering": (attribute("", "neural_rendering_resolution", 10**9), "neural_rendering_resolution"),
        "an enormous picture": (attribute("", "img_resolution", 2**40), "img_resolution"),
        "another picture": (attribute("", "img_resolution", 64), "not 32, what its super-resolution"),
        "an enormous latent": (attribute("", "z_dim", 10**9), "z_dim"),
        "other planes": (attribute("renderer", "plane_axes", torch.eye(3).expand(3, 3, 3)), "other axes"),
        "no upsampler": (attribute("", "superresolution", None), None),
        "another activation": (attribute("backbone.mapping.fc0", "activation", "relu"), "activation = 'relu'"),
        "another learning rate": (attribute("backbone.mapping.fc1", "bias_gain", 1.0), "bias_gain = 1.0"),
        "another architecture": (attribute("backbone.synthesis.b8", "architecture", "resnet"), "'resnet'"),
        "two clamps": (attribute("superresolution.block1.conv1", "conv_clamp", 3), "clamped differently"),
        "a senseless clamp": (attribute("superresolution.block0", "conv_clamp", []), "it is damaged"),
        "another filter": (attribute("backbone.synthesis.b8.conv1", "_buffers", {"resample_filter": torch.ones(4, 4)}),
                           "another filter"),
        "a label of 26 numbers": (tensor("backbone.mapping.embed", "weight", torch.zeros(12, 26)), "26 numbers"),
        "numbers that are not stored": (tensor("backbone.synthesis.b8.conv1", "weight", wide), "than are stored"),
        "a module in itself": (self_containing, "no network"),
        "no tensors": (attribute("backbone", "_parameters", None), "no network"),
        "no mapping": (lambda g: g.state["_modules"]["backbone"].state["_modules"].pop("mapping"), "embed.weight"),
        "an unknown source": (lambda g: setattr(g, "state", [1]), "without class or state"),
    }


with foreign_modules() as _their:
    REFUSALS = [name for name in refusals(_their, None) if name != "no upsampler"]


@pytest.mark.parametrize("fault", REFUSALS)
def test_senseless_or_foreign_numbers_are_refused_by_name(tmp_path, fault):
    model = tiny()
    words = []

    def make(their):
        generator = pickled_generator(their, model)
        change, expected = refusals(their, model)[fault]
        change(generator)
        words.append(expected)
        return {"G_ema": generator}

    path = snapshot(tmp_path / "a.pkl", make)
    with pytest.raises(CheckpointError, match=words[0]) as error:
        read_official(path, "eg3d")
    assert str(error.value).startswith(f"{path}: ") and len(str(error.value)) < len(str(path)) + 400


class Call:
    """Pickles as a call of os.system."""

    def __init__(self, sentinel):
        self.command = f"touch {sentinel}"

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("place", ["beside the networks", "in the settings", "among the modules", "as a tensor",
                                   "as the source", "as the class", "instead of the state"])
def test_calls_hidden_in_a_pickle_are_refused_and_nothing_runs(tmp_path, place):
    sentinel = tmp_path / "ran"

    def make(their):
        generator, call = pickled_generator(their, tiny()), Call(sentinel)
        meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": "G", "state": generator.state}
        if place == "in the settings":
            generator.state["rendering_kwargs"]["box_warp"] = call
        elif place == "among the modules":
            generator.state["_modules"]["extra"] = call
        elif place == "as a tensor":
            generator.state["_parameters"]["extra"] = call
        key = {"as the source": "module_src", "as the class": "class_name", "instead of the state": "state"}.get(place)
        if key:
            generator = type("Meta", (), {"__reduce__": lambda self: (their.reconstruct, ({**meta, key: call},))})()
        return {"G_ema": generator, **({"extra": call} if place == "beside the networks" else {})}

    path = snapshot(tmp_path / "a.pkl", make)
    with pytest.raises(CheckpointError, match=r"asks for posix\.system"):
        read_official(path, "eg3d")
    assert not sentinel.exists()
    with foreign_modules(), contextlib.suppress(BaseException):
        pickle.loads(path.read_bytes())
    assert sentinel.exists()  # or the above would prove nothing


# ---- a run of it


@pytest.fixture
def composed(monkeypatch):
    """The verb's config for a command line, as Hydra's main function would hand it over."""
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    with initialize_config_dir(str(launch.CONFIGS), version_base=None):
        def compose_for(*arguments, verb="render"):
            cfg = compose(verb, list(arguments), return_hydra_config=True)
            HydraConfig.instance().set_config(cfg)
            with open_dict(cfg):
                del cfg["hydra"]
            return cfg

        yield compose_for


@pytest.fixture
def faces(tmp_path):
    return snapshot(tmp_path / "faces.pkl", lambda their: {"G_ema": pickled_generator(their, tiny()),
                                                           "G": pickled_generator(their, tiny(1))})


def test_an_official_run_has_the_files_numbers_its_averaged_weights_and_the_datas_poses(composed, faces, capsys):
    run = launch.load_run(faces, composed("model=eg3d"))
    assert "data=ffhq" in capsys.readouterr().err and run.name == "eg3d_ffhq" and run.resolution == 32
    assert torch.equal(picture(run.generator).rgb, picture(tiny()).rgb)
    assert run.config["data"]["dataset"]["resolution"] == run.config["model"]["resolution"] == 32
    assert run.poses.sample(1).position.norm() == pytest.approx(2.7, abs=1e-5)  # of eg3d_ffhq; float32
    waiting = {"_target_": "gan3d.poses.FromData", "up": "y"}  # for the cameras of photographs, which a file lacks
    cfg = composed("model=eg3d", "data=ffhq")
    cfg.model.poses = waiting
    assert launch.load_run(faces, cfg).poses.radius == 2.7
    assert launch.load_run(faces, cfg, with_data=True).poses.cameras is None
    cfg.data.poses = waiting
    with pytest.raises(launch.Stop, match="Say where cameras stand"):
        launch.load_run(faces, cfg)
    again = launch.load_run(faces, composed("model=eg3d", "data=cars", "scale=mini"))  # whatever else is composed
    assert torch.equal(picture(again.generator).rgb, picture(tiny()).rgb) and again.name == "eg3d_cars"
    assert set(load_official(faces, "eg3d")) == {"generator", "generator_ema"}


def test_the_command_line_is_above_the_files_numbers(composed, faces):
    changes = ["model.generator.samples_per_ray=9", "data.bounds.near=2", "+model.generator.condition_scale=0.5"]
    run = launch.load_run(faces, composed("model=eg3d", "data=ffhq", *changes))
    expected = tiny(samples_per_ray=9, bounds={"near": 2, "far": 3.1}, condition_scale=0.5)
    assert torch.equal(picture(run.generator).rgb, picture(expected).rgb)
    with pytest.raises(launch.Stop, match="(?s)does the command line change.*decoder"):
        launch.load_run(faces, composed("model=eg3d", "data=ffhq", "model.generator.decoder_width=64"))


@pytest.mark.parametrize("path, known", [
    ("/data/FFHQ_512.zip", "ffhq"), ("D:\\sets\\afhqv2_cats/", "afhq"), ("cars_train.zip", None), ("", None), (7, None),
    ("my_folder.zip", None), ("ffhq_and_afhq.zip", None), ("/home/ffhq/portraits.zip", None)])
def test_the_data_set_is_guessed_from_its_own_name_alone(path, known):
    assert launch.known_data(stated_dataset({"training_set_kwargs": {"path": path}}), "eg3d") == known


def test_a_file_of_an_unknown_data_set_asks_for_one(composed, tmp_path):
    path = snapshot(tmp_path / "a.pkl", lambda their: {"G_ema": pickled_generator(their, tiny())},
                    training_set_kwargs={"path": "cars_train.zip"})
    with pytest.raises(launch.Stop, match=r"(?s)nothing about cameras.*'cars_train.zip' is none of ours.*say data=…"):
        launch.load_run(path, composed("model=eg3d"))


def test_sizes_are_compared_before_memory_is_asked_for(composed, tmp_path):
    """A layer of 2²⁰ feature maps in a few MB of tensors: our network of that width would take terabytes."""
    def make(their):
        generator = pickled_generator(their, tiny())
        block = generator.state["_modules"]["backbone"].state["_modules"]["synthesis"].state["_modules"]["b8"]
        block.state["_modules"]["conv1"].state["_parameters"]["weight"] = nn.Parameter(torch.zeros(2**20, 1, 1, 1))
        return {"G_ema": generator}

    path = snapshot(tmp_path / "a.pkl", make)
    with pytest.raises(launch.Stop, match="does not fit model=eg3d"):
        launch.load_run(path, composed("model=eg3d", "data=ffhq"))


@pytest.mark.parametrize("name", ["ffhq512-128.pkl", "nvidia/research/eg3d:1", "https://api.ngc.nvidia.com/v2/a.pkl"])
def test_a_file_that_is_not_there_is_named_with_the_place_where_it_is_published(composed, name):
    with pytest.raises(launch.Stop, match=r"(?s)no such file.*catalog\.ngc\.nvidia\.com.*research/models/eg3d.*path"):
        launch.load_run(name, composed("model=eg3d"))
    with pytest.raises(launch.Stop, match="no such file or run") as error:
        launch.load_run(name, composed("model=graf", "data=carla"))
    assert "ngc" not in str(error.value).replace(name, "")
