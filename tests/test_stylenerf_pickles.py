"""StyleNeRF's pickles are NVIDIA's, with objects and OmegaConf's lists beside the networks: settings, read and checked.

The classes that write them are not here: our networks take their names and places.
"""

import copy
import math
import pickle

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from test_official_pickles import (
    TAPS,
    Persistent,
    composed,  # noqa: F401  (a fixture)
    empty,
    snapshot,
)
from torch import nn

from gan3d import launch
from gan3d.cameras import Camera
from gan3d.checkpoints import load_official, read_official, read_tensors
from gan3d.gans.stylenerf import (
    Background,
    Block,
    StyledConv,
    StyleNeRF,
    StyleNeRFDiscriminator,
)
from gan3d.nn.stylegan2 import EqualizedConv, FullyConnected, ToRGB
from gan3d.official.stylenerf import official_discriminator_numbers, official_numbers
from gan3d.poses import Gaussian, Spherical, Uniform
from gan3d.rays import Bounds
from gan3d.rebuild import CheckpointError

# ---- a maker of such pickles


def tiny(seed: int = 0, *, alpha: float = 1, bounds=None, background=None, **changes) -> StyleNeRF:
    """A StyleNeRF whose every number differs from the configs'."""
    torch.manual_seed(seed)
    behind = {"z_dim": 5, "width": 7, "depth": 2, "octaves": 4, "samples": 3, "start": 0.7, **(background or {})}
    numbers = {"growth": 32, "render_resolution": 8, "z_dim": 11, "w_dim": 12, "mapping_depth": 3, "width": 16,
               "depth": 3, "octaves": 5, "features": 6, "samples_per_ray": 6, "fine_samples": 6, "channel_base": 200,
               "channel_max": 9, "upsampling": "pixelshuffle", "blur": False, "magnitude_decay": 0.9, "clamp": 2,
               "path_samples": 4, "path_full": False, "density_noise": 1, "path_weight": 2, **changes}
    model = StyleNeRF(bounds=Bounds(**{"near": 0.9, "far": 1.2, "planar": True, **(bounds or {})}),
                      background=None if background == {} else Background(features=numbers["features"], **behind),
                      **numbers)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("w_avg"):
            nn.init.uniform_(buffer, 0.5, 2)
    model.alpha.fill_(alpha)
    return model.eval().requires_grad_(False)


def settings(module: nn.Module) -> dict:
    """The attributes that their module of this kind has besides its tensors."""
    if isinstance(module, FullyConnected):  # our gain has the activation's in it, theirs is the learning rate's alone
        gain = 2**0.5 if module.activation == "lrelu" else 1
        return {"activation": module.activation, "bias_gain": round(module.bias_gain / gain, 9)}
    if isinstance(module, EqualizedConv):
        return {"activation": module.activation, "conv_clamp": module.clamp}
    if isinstance(module, ToRGB):
        return {"conv_clamp": module.clamp}
    if isinstance(module, StyledConv):
        return {"activation": "lrelu", "conv_clamp": None, "magnitude_ema_beta": module.decay or -1}
    return {"architecture": "skip"} if isinstance(module, Block) else {}


def wrapped(their, module: nn.Module, **more) -> Persistent:
    children = {name: wrapped(their, child) for name, child in module._modules.items() if child is not None}
    buffers = dict(module._buffers)
    if isinstance(module, StyledConv | Block | EqualizedConv):
        buffers["resample_filter"] = TAPS.outer(TAPS)
    return Persistent(their, type(module).__name__, {
        "training": False, "_parameters": dict(module._parameters), "_buffers": buffers, "_modules": children,
        "_non_persistent_buffers_set": set(), **settings(module), **more})


def camera_settings(model: StyleNeRF) -> dict:
    lists = OmegaConf.create({"u": [-0.4, 0.6], "v": [1.3, 1.7], "r": [1.0, 1.0],
                              "depth": [model.bounds.near, model.bounds.far]})
    return {"range_u": lists.u, "range_v": lists.v, "range_radius": lists.r, "depth_range": lists.depth, "fov": 13.5,
            "gaussian_camera": True, "angular_camera": True, "depth_transform": None, "ray_align_corner": False,
            "bg_start": 0.5 if model.background is None else model.background.start,
            "camera_matrix": torch.eye(4)[None]}


def renderer_settings(model: StyleNeRF) -> dict:
    return {"n_ray_samples": model.samples_per_ray, "hierarchical": model.fine_samples > 0,
            "no_background": model.background is None,
            "n_bg_samples": 4 if model.background is None else model.background.samples}


def pickled_generator(their, model: StyleNeRF, older: str = "", gaussian: bool = True) -> Persistent:
    """`older`: there are no objects yet, the settings are arguments, "grouped" or all "together"."""
    conv = next(iter(model.blocks.values())).conv0
    mode = conv.mode + ("" if conv.blur else "_noblur")
    blocks = {}
    for name, block in model.blocks.items():
        blocks[name] = wrapped(their, block)
        for layer in ("conv0", "conv1"):
            blocks[name].state["_modules"][layer].state |= {
                "conv_clamp": block.clamp, "use_noise": False, "upsample_mode": mode, "mode": "2d"}
    foreground = wrapped(their, model.foreground, z_dim=0, n_freq_posenc=model.foreground.octaves, use_sdf=False)
    fields = {"fg_nerf": foreground, "bg_nerf": None}
    if model.background is not None:
        fields["bg_nerf"] = wrapped(their, model.background, z_dim=model.background.z_dim, inverse_sphere=True,
                                    n_freq_posenc=model.background.octaves)
    camera, renderer = camera_settings(model) | {"gaussian_camera": gaussian}, renderer_settings(model)
    objects = {} if older else {"C": Persistent(their, "CameraRay", camera), "I": None,
                                "V": Persistent(their, "VolumeRenderer", renderer),
                                "U": Persistent(their, "Upsampler", {"upsample_type": "bilinear", "block_reses": None})}
    grouped = OmegaConf.create({"camera_kwargs": {k: v for k, v in camera.items() if k != "camera_matrix"},
                                "renderer_kwargs": renderer})
    arguments = {"": {"camera_kwargs": {"fov": 1}}, "grouped": dict(**grouped),
                 "together": {"camera_kwargs": {}, **camera, **renderer}}[older]
    synthesis = Persistent(their, "NeRFSynthesisNetwork", empty(
        **objects, _init_kwargs=arguments, z_dim_bg=model.latents[1], resolution_vol=model.render_resolution,
        resolution_start=model.render_resolution, n_reg_samples=model.path_samples, reg_full=model.path_full,
        progressive_growing=True, predict_camera=False, margin=0))
    synthesis.state["_modules"] = {**fields, **blocks}
    synthesis.state["_buffers"] = {"alpha": model.alpha}
    generator = Persistent(their, "Generator", empty(z_dim=model.latents[0], c_dim=0, img_resolution=model.last,
                                                     img_channels=3))
    generator.state["_modules"] = {"synthesis": synthesis, "mapping": wrapped(their, model.mapper), "encoder": None}
    return generator


def pickled_discriminator(their, model: StyleNeRFDiscriminator, group: int | None) -> Persistent:
    found = wrapped(their, model, img_resolution=model.resolutions[0], c_dim=0, architecture="skip",
                    dual_input_ratio=None)
    found.state["_buffers"] = {"alpha": torch.tensor(1.0)}
    last = found.state["_modules"]["b4"].state["_modules"]
    last["fromrgb"].state["conv_clamp"] = None
    last["mbstd"] = Persistent(their, "Std", empty(group_size=group))
    return found


def file_of(path, model, **more):
    return snapshot(path / "a.pkl", lambda their: {"G_ema": pickled_generator(their, model, **more)})


def picture(model: StyleNeRF, side: int | None = None):
    z = torch.randn(2, model.z_dim, generator=torch.Generator().manual_seed(3))
    poses = Spherical(1.0, Uniform(-30, 30), Uniform(70, 110), 12, "z")
    camera = poses.sample(2, torch.Generator().manual_seed(4))
    with torch.no_grad():
        return model.synthesis(model.mapping(z, None, 0.7), Camera(*camera), side or model.side)


def rebuilt(official) -> StyleNeRF:
    """Our generator by the numbers of the file alone."""
    numbers = official.numbers
    model = instantiate({"_target_": "gan3d.gans.stylenerf.StyleNeRF", **numbers["model"]["generator"],
                         "growth": numbers["model"]["resolution"],
                         "bounds": {"_target_": "gan3d.rays.Bounds", **numbers["data"]["bounds"]}}, _convert_="all")
    model.load_state_dict(official.weights["generator_ema"])
    return model.eval().requires_grad_(False)


# ---- what comes back

VARIANTS = {
    "as it is": {},
    "nn_cat": {"upsampling": "nn_cat", "blur": True},
    "a blur": {"blur": True},
    "no background": {"background": {}},
    "another background": {"background": {"samples": 5, "start": 0.4, "octaves": 3}},
    "coarse samples only": {"fine_samples": 0},
    "another depth": {"bounds": {"near": 0.8}},
    "never trained": {"alpha": -1},
    "only rendered so far": {"alpha": 0},
    "halfway": {"alpha": 0.3},
    "one doubling": {"growth": 16},
    "no clamp": {"clamp": None},
    "a shallow field": {"depth": 1},
}


@pytest.fixture(scope="module")
def plain():
    return picture(tiny())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_generator_comes_back_from_its_own_numbers_alone(tmp_path, variant, plain):
    """The same pictures to the bit, and not the pictures of the plain variant: the change must have mattered."""
    model = tiny(**VARIANTS[variant])
    official = read_official(file_of(tmp_path, model), "stylenerf")
    assert official.numbers["data"]["resolution"] == model.side
    mine, expected = picture(rebuilt(official)), picture(model)
    for name in ("rgb", "raw", "depth", "opacity"):
        assert torch.equal(getattr(mine, name), getattr(expected, name)), name
    if variant != "as it is":
        assert plain.rgb.shape != expected.rgb.shape or (plain.rgb - expected.rgb).abs().max() > 0.01


def test_what_only_training_sees_comes_back_too(tmp_path):
    for full, samples in ((True, 4), (False, 0)):
        model = tiny(path_full=full, path_samples=samples, magnitude_decay=0.99)
        mine = rebuilt(read_official(file_of(tmp_path, model), "stylenerf"))
        assert (mine.path_full, mine.path_samples, mine.path_weight, mine.density_noise) == (full, samples, 2, 1)
        assert {m.decay for m in mine.modules() if isinstance(m, StyledConv)} == {None, 0.99}


@pytest.mark.parametrize("older", ["grouped", "together"])
def test_an_older_pickle_without_objects_is_read_from_its_arguments(tmp_path, older):
    new, old = (read_official(file_of(tmp_path, tiny(), older=age), "stylenerf").numbers for age in ("", older))
    assert new == old


def test_cameras_that_are_not_gaussian_are_uniform_between_the_same_angles(tmp_path):
    numbers = read_official(file_of(tmp_path, tiny(), gaussian=False), "stylenerf").numbers
    poses = instantiate({**numbers["data"]["poses"], "up": "z"}, _convert_="all")
    assert isinstance(poses.azimuth, Uniform) and isinstance(poses.polar, Uniform)
    ends = [poses.azimuth.low, poses.azimuth.high, poses.polar.low, poses.polar.high]
    assert [math.radians(end) for end in ends] == pytest.approx([-0.4, 0.6, 1.3, 1.7])


@pytest.mark.parametrize("group", [2, None])
def test_a_discriminator_comes_back_from_its_own_numbers_alone(tmp_path, group):
    torch.manual_seed(1)
    model = StyleNeRFDiscriminator(resolution=16, channel_base=100, channel_max=9, group=group or 1024, clamp=0.5)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    path = snapshot(tmp_path / "a.pkl", lambda their: {"G": pickled_generator(their, tiny()),
                                                       "D": pickled_discriminator(their, model, group)})
    official = read_official(path, "stylenerf")
    assert official.numbers["data"]["up"] == "z" and "generator_ema" not in official.weights
    mine = StyleNeRFDiscriminator(**official.numbers["model"]["discriminator"])
    mine.load_state_dict(official.weights["discriminator"])
    for side in (16, 8):
        judged, expected = (d(torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(side))).logit
                            for d in (mine, model))
        assert torch.equal(judged, expected) and expected.std() > 0


# ---- a run of it


def test_an_official_run_stands_where_its_faces_look(composed, tmp_path, capsys):  # noqa: F811
    path = file_of(tmp_path, tiny())
    run = launch.load_run(path, composed("model=stylenerf"))
    assert "data=ffhq" in capsys.readouterr().err and run.name == "stylenerf_ffhq" and run.resolution == 32
    assert run.config["model"]["resolution"] == 32 and run.config["data"]["dataset"]["resolution"] == 32
    laws = [run.poses.azimuth, run.poses.polar]
    assert [type(law) for law in laws] == [Gaussian, Gaussian]
    assert [math.radians(n) for law in laws for n in (law.mean, law.std)] == pytest.approx([0.1, 0.5, 1.5, 0.2])
    assert (run.poses.radius, run.poses.fov_degrees, run.poses.up, run.poses.target) == (1, 13.5, "z", [0, 0, 0])
    positions = run.poses.sample(2000, torch.Generator().manual_seed(0)).position
    assert (positions[:, 0] > 0).float().mean() > 0.99  # +x, cos 0.1 ± 0.5 rad; 3 standard deviations end at π/2
    assert positions[:, 2].abs().max() < 0.8  # sin of 4 σ and 0.07 of the mean
    assert torch.equal(picture(run.generator).rgb, picture(tiny()).rgb)
    other = launch.load_run(path, composed("model=stylenerf", "data=cars", "scale=mini"))  # whatever else is composed
    assert torch.equal(picture(other.generator).rgb, picture(tiny()).rgb) and other.poses == run.poses


def test_the_command_line_is_above_the_files_numbers(composed, tmp_path):  # noqa: F811
    path = file_of(tmp_path, tiny())
    changes = ["model.generator.samples_per_ray=9", "data.bounds.near=0.8", "data.poses.fov_degrees=20"]
    run = launch.load_run(path, composed("model=stylenerf", "data=ffhq", *changes))
    expected = tiny(samples_per_ray=9, bounds={"near": 0.8})
    assert torch.equal(picture(run.generator).rgb, picture(expected).rgb) and run.poses.fov_degrees == 20
    with pytest.raises(launch.Stop, match="(?s)does the command line change.*foreground"):
        launch.load_run(path, composed("model=stylenerf", "data=ffhq", "model.generator.width=64"))


def test_a_run_that_was_still_growing_has_the_side_it_had_reached(composed, tmp_path):  # noqa: F811
    run = launch.load_run(file_of(tmp_path, tiny(alpha=0.3)), composed("model=stylenerf", "data=ffhq"))
    assert run.resolution == run.generator.side == 16 and run.config["model"]["resolution"] == 32
    assert float(run.generator.alpha) == pytest.approx(0.3)


@pytest.mark.parametrize("name", ["ffhq_256.pkl", "facebook/stylenerf-ffhq-config-basic"])
def test_a_file_that_is_not_there_is_named_with_the_place_where_it_is_published(composed, name):  # noqa: F811
    with pytest.raises(launch.Stop, match=r"(?s)no such file.*huggingface\.co/facebook/stylenerf-ffhq-config-basic"):
        launch.load_run(name, composed("model=stylenerf", "data=ffhq"))


# ---- what is refused


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The networks of a sound file, as they are read: "G" and "D"."""
    discriminator = StyleNeRFDiscriminator(resolution=16, channel_base=100, channel_max=9, group=2, clamp=0.5)
    path = snapshot(tmp_path_factory.mktemp("sound") / "a.pkl", lambda their: {
        "G": pickled_generator(their, tiny()), "D": pickled_discriminator(their, discriminator, 2)})
    return read_tensors(path)


def within(network, path: str) -> dict:
    for step in path.split(".") if path else []:
        inside = network.state["_modules"]
        network = inside[step] if step in inside else network.state[step]
    return network.state


REFUSALS = {  # place, key, value, what the error must say
    "planes": ("synthesis", "I", torch.ones(1), "features of planes, a grid or a hash table"),
    "warped depth": ("synthesis.C", "depth_transform", "LogWarp", "camera has depth_transform = 'LogWarp'"),
    "a predicted camera": ("synthesis", "predict_camera", True, "synthesis has predict_camera = True"),
    "cameras by area": ("synthesis.C", "angular_camera", False, "angular_camera = False"),
    "pixels at corners": ("synthesis.C", "ray_align_corner", True, "ray_align_corner = True"),
    "intervals without length": ("synthesis.C", "dists_normalized", True, "dists_normalized = True"),
    "another density": ("synthesis.V", "sigma_type", "exp_truncated", "sigma_type = 'exp_truncated'"),
    "white behind": ("synthesis.V", "white_background", True, "white_background = True"),
    "no upsampler": ("synthesis.U", "no_2d_renderer", True, "no_2d_renderer = True"),
    "one style for all rgb": ("synthesis.U", "shared_rgb_style", True, "shared_rgb_style = True"),
    "view directions": ("synthesis.fg_nerf", "use_viewdirs", True, "fg_nerf has use_viewdirs = True"),
    "a signed distance": ("synthesis.fg_nerf", "use_sdf", True, "use_sdf = True"),
    "a background without inversion": ("synthesis.bg_nerf", "inverse_sphere", False, "inverse_sphere = False"),
    "another growth": ("synthesis", "resolution_start", 4, "do not grow to 32² from the 8²"),
    "another picture": ("", "img_resolution", 64, "do not grow to 64²"),
    "an enormous picture": ("", "img_resolution", 10**9, "img_resolution is 1000000000"),
    "labels": ("", "c_dim", 25, "generator has c_dim = 25"),
    "an encoder": ("", "encoder", torch.ones(2), "encoder = a Tensor"),
    "samples by the billion": ("synthesis.V", "n_ray_samples", 10**12, "n_ray_samples is 1000000000000"),
    "samples in words": ("synthesis.V", "n_bg_samples", "4", "n_bg_samples is '4'"),
    "a flag in words": ("synthesis.V", "hierarchical", "yes", "neither true nor false"),
    "far before near": ("synthesis.C", "depth_range", [1.2, 0.9], "depth_range runs from 1.2 down to 0.9"),
    "no depth": ("synthesis.C", "depth_range", [1, 1], "begins and ends at 1"),
    "one angle": ("synthesis.C", "range_u", 0.3, "range_u is 0.3, not two numbers"),
    "an endless angle": ("synthesis.C", "range_u", [0, float("inf")], "range_u is inf"),
    "a lens of 180 degrees": ("synthesis.C", "fov", 180, "fov is 180"),
    "another upsampling": ("synthesis.b16.conv0", "upsample_mode", "liif", "upsample_mode is 'different"),
    "another activation": ("mapping.fc1", "activation", "relu", "activation = 'relu'"),
    "another learning rate": ("mapping.fc1", "bias_gain", 1.0, "bias_gain = 1.0"),
    "noise": ("synthesis.b16.conv1", "use_noise", True, "use_noise = True"),
    "no running mean": ("synthesis.b32.conv1", "magnitude_ema_beta", -1, "magnitude_ema_beta is -1"),
    "two clamps": ("synthesis.b32.conv1", "conv_clamp", 7, "clamped differently"),
    "octaves that do not fit": ("synthesis.fg_nerf", "n_freq_posenc", 4, "not told 4 octaves"),
    "an alpha beyond": ("synthesis", "_buffers", {"alpha": torch.tensor(2.0)}, "alpha is 2"),
    "another filter": ("synthesis.b16.conv1", "_buffers", {"resample_filter": torch.ones(4, 4)}, "another filter"),
}


@pytest.mark.parametrize("fault", REFUSALS)
def test_senseless_or_foreign_numbers_are_refused_by_name(sound, fault):
    place, key, value, words = REFUSALS[fault]
    generator = copy.deepcopy(sound["G"])
    within(generator, place)[key] = value
    with pytest.raises(CheckpointError, match=words) as error:
        official_numbers(generator)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("place, key, value, words", [
    ("synthesis", "predict_camera", True, "synthesis has predict_camera = True; here it is False always"),
    ("synthesis.C", "range_v", OmegaConf.create([1, 2, 3]), "range_v is a list, not two numbers"),
    ("synthesis.C", "range_v", OmegaConf.create(["a", 2]), "range_v is 'a'"),
    ("synthesis", "_buffers", {}, "holds no stylenerf .*alpha"),
])
def test_a_refusal_begins_with_the_file(tmp_path, place, key, value, words):
    def make(their):
        generator = pickled_generator(their, tiny())
        within(generator, place)[key] = value
        return {"G_ema": generator}

    path = snapshot(tmp_path / "a.pkl", make)
    with pytest.raises(CheckpointError, match=words) as error:
        read_official(path, "stylenerf")
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize("key, value", [("predict_camera", True), ("dual_discriminator", True), ("dual_input_ratio", 2),
                                        ("separate_camera", True), ("c_dim", 25), ("architecture", "resnet")])
def test_a_discriminator_of_another_kind_is_refused_by_name(sound, key, value):
    discriminator = copy.deepcopy(sound["D"])
    discriminator.state[key] = value
    with pytest.raises(CheckpointError, match=f"{key} = "):
        official_discriminator_numbers(discriminator)


def test_state_dicts_of_the_release_are_read_as_before_and_state_nothing(tmp_path):
    """As torch.save writes them: no settings, so none are claimed."""
    model = tiny()
    theirs = {"mapper": "mapping", "foreground": "synthesis.fg_nerf", "background": "synthesis.bg_nerf",
              "blocks": "synthesis", "alpha": "synthesis.alpha"}
    state = {".".join([theirs[first], rest]).rstrip("."): tensor for name, tensor in model.state_dict().items()
             for first, _, rest in [name.partition(".")]}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"G_ema": state}))
    assert read_official(tmp_path / "a.pkl", "stylenerf").numbers == {}
    weights = load_official(tmp_path / "a.pkl", "stylenerf")["generator_ema"]
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
