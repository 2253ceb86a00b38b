"""VoxGRAF's released pickles: their weights, and the numbers that their networks state of themselves."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gan3d import pickled
from gan3d.cameras import Camera, Number, condition, intrinsics_from_fov
from gan3d.nn.stylegan2 import channels_at
from gan3d.rebuild import CheckpointError, Record

PUBLISHED = "ffhq256.pkl, carla128.pkl at https://s3.eu-central-1.amazonaws.com/avg-projects/voxgraf/models/"
GROWN = 10**9  # steps: a released generator is at the end of every schedule
VIEWS = 16  # cameras that ours prunes by, evenly out of the release's list
FACES, CARLA = 12.6, 30.0  # fields of view, in degrees: the release's code knows these two worlds alone
SAME = {"generator_fg": "foreground", "generator_bg": "background"}  # their name: ours
CONSTANT = ("resample_filter", "up_filter", "down_filter", "check_empty_neighbors.weight")
UNUSED = ("noise_const", "noise_strength")  # of noise that is never added


def official_discriminator(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The release's tensors have our names; its constant filters are not kept."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(CONSTANT)}


def official_generator(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The release's tensors by our names, its list of cameras thinned out."""
    ours: dict[str, Tensor] = {"progress": torch.tensor(GROWN), "views": official_views(tensors)}
    for name, tensor in tensors.items():
        if name.endswith(CONSTANT + UNUSED) or name.startswith("synthesis.pose_sampler."):
            continue
        room, _, rest = name.partition(".")
        part, _, inside = rest.partition(".")
        if room == "mapping":
            ours[f"mappings.{rest}"] = tensor
        elif part in SAME:
            ours[f"{SAME[part]}.{inside}"] = tensor
        elif room == "synthesis" and part[:1] == "r" and part[1:].isdecimal():
            ours[f"refinement.{inside}"] = tensor
        else:
            raise ValueError(f"{name[:80]!r} is no part of it")
    return ours


def official_views(tensors: Mapping[str, Tensor]) -> Tensor:
    """Some of its cameras; zeros if it has none. Their field of view is no tensor, but that of CARLA's cars, which have
    no background network, or of faces."""
    poses = tensors.get("synthesis.pose_sampler.poses")
    if poses is None or not len(poses):
        return torch.zeros(VIEWS, 25)
    if poses.shape[1:] != (4, 4):
        raise CheckpointError(f"its poses have the shape {tuple(poses.shape)}, not [n, 4, 4]")
    chosen = poses[torch.linspace(0, len(poses) - 1, VIEWS).long()].float()
    fov = FACES if any(name.startswith("synthesis.generator_bg.") for name in tensors) else CARLA
    return condition(Camera(chosen, intrinsics_from_fov(fov).expand(VIEWS, 3, 3)))


def official_numbers(generator: Record) -> dict[str, Any]:
    """What the release's pickled generator says of itself, by the keys of our config.

    Raises: CheckpointError where a number is missing or senseless, or where it computes what ours cannot.
    """
    tensors, synthesis = pickled.module_state(generator), pickled.part(generator, "synthesis")
    voxels, renderer = pickled.part(synthesis, "generator_fg"), pickled.part(synthesis, "renderer")
    widths = pickled.widths_by_resolution(tensors, "synthesis.generator_fg.b{}.conv1.weight")
    side = pickled.count(voxels, "grid_resolution", 4, 1024)
    if not widths or max(widths) != side:
        raise CheckpointError(f"it has no blocks up to the {side}³ of its grid")
    refuse_foreign(generator, list(widths))
    radius, centre = official_cube(renderer)
    fov, resolution = official_fov(renderer), pickled.count(synthesis, "img_resolution", 4, pickled.MAX_PIXELS)
    embed, bg = tensors["mapping.fg.embed.weight"], pickled.flag(synthesis, "use_bg")
    w_dim, clamp = embed.shape[0], pickled.common_clamp(pickled.clamped(generator, but="check_empty_neighbors"))
    return {
        "data": {"resolution": resolution, **official_world(fov)},
        "model": {"resolution": resolution, "poses": "${data.poses}", "generator": {
            "radius": radius,
            "centre": centre,
            "z_dim": pickled.count(generator, "z_dim", 1, 4096),
            "w_dim": w_dim,
            "mapping_depth": pickled.layers(tensors, "mapping.fg.fc{}.weight"),
            "grid_resolution": side,
            "dense_resolution": pickled.count(voxels, "dense_resolution", 4, 1024),
            **official_channels(widths),
            "clamp": clamp,
            "density_gain": pickled.number(synthesis, "sigma_mpl", 1e-6, 1e6) * radius,
            "background": official_background(tensors, resolution, w_dim, clamp) if bg else None,
            "refinement": official_refinement(tensors, resolution, w_dim),
            "views": VIEWS,
        }},
    }


def official_channels(widths: Mapping[int, int]) -> dict[str, int]:
    """The base, most and least by which `channels_at` gives these widths."""
    least, most = min(widths.values()), max(widths.values())
    base = max([r * width for r, width in widths.items() if width > least], default=4 * least)
    if any(channels_at(r, base, most, least) != width for r, width in widths.items()):
        raise CheckpointError(f"its feature maps are {dict(widths)}, not a number divided by the resolution")
    return {"channel_base": base, "channel_max": most, "channel_min": least}


def official_background(tensors: Mapping[str, Tensor], resolution: int, w_dim: int, clamp: Number | None
                        ) -> dict[str, Any]:
    widths = pickled.widths_by_resolution(tensors, "synthesis.generator_bg.b{}.conv1.weight")
    if not widths or max(widths) != resolution:
        raise CheckpointError(f"its background has no blocks up to {resolution}²")
    return {"_target_": "gan3d.gans.voxgraf.Background", "w_dim": w_dim, "resolution": resolution,
            **official_channels(widths), "clamp": clamp}


def official_refinement(tensors: Mapping[str, Tensor], resolution: int, w_dim: int) -> dict[str, Any] | None:
    name = f"synthesis.r{resolution}.layers.{{}}.weight"
    if not (depth := pickled.layers(tensors, name)):
        return None
    return {"_target_": "gan3d.nn.stylegan3.Refinement", "w_dim": w_dim, "depth": depth,
            "width": tensors[name.format(depth - 1)].shape[1]}


def official_cube(renderer: Record) -> tuple[float, list[float]]:
    """Half its side, and its middle."""
    radius, centre = pickled.told(renderer, "grid_radius"), pickled.told(renderer, "grid_center")
    if not all(isinstance(x, Tensor) and x.shape == (3,) and x.isfinite().all() for x in (radius, centre)):
        raise CheckpointError("its grid_radius and grid_center are not three numbers each")
    if not (radius == radius[0]).all() or not 1e-3 <= radius[0] <= 1e6:
        raise CheckpointError(f"its grid is no cube: its half sides are {radius.tolist()}")
    return round(float(radius[0]), 6), centre.tolist()  # 1.2 is not a number of float32


def official_fov(renderer: Record) -> float:
    fov = pickled.number(renderer, "fov", 0.1, 170)
    if fov not in (FACES, CARLA):
        raise CheckpointError(f"its field of view is {fov:g}, which belongs to no data set of the release")
    return fov


def official_world(fov: float) -> dict[str, Any]:
    """Cameras at 10, z up: around faces, which look towards azimuth 180, or all over the upper half of the sphere."""
    def law(name: str, *numbers: int) -> dict[str, Any]:
        return {"_target_": f"gan3d.poses.{name}", "_args_": list(numbers)}

    faces = fov == FACES
    return {"up": "z", "poses": {
        "_target_": "gan3d.poses.Spherical", "radius": 10, "fov_degrees": fov, "up": "${data.up}", "target": [0, 0, 0],
        "azimuth": law("Gaussian", 180, 20) if faces else law("Uniform", 0, 360),
        "polar": law("Gaussian", 90, 10) if faces else law("UniformArea", 0, 90)}}


def refuse_foreign(generator: Record, resolutions: list[int]) -> None:
    """CheckpointError if a part computes what ours does not, by arguments that show in no shape."""
    synthesis = pickled.part(generator, "synthesis")
    renderer = pickled.part(synthesis, "renderer")
    pickled.refuse_filters(generator)
    pickled.refuse(renderer, {"basis_dim": 1}, "renderer")
    pickled.refuse(pickled.told(renderer, "opt"), {"step_size": 0.5, "near_clip": 0, "background_brightness": 1},
                   "renderer")
    layers = [f"generator_fg.b{r}.{layer}" for r in resolutions for layer in ("conv0", "conv1", "torgb")[r == 4:]]
    background = ["generator_bg"] if pickled.flag(synthesis, "use_bg") else []
    for path in layers + background:
        pickled.refuse_unfamiliar(pickled.part(synthesis, path), "skip")
    for path, layer in pickled.modules(pickled.part(generator, "mapping")):
        if path.rpartition(".")[2].startswith("fc"):
            pickled.refuse(layer, {"activation": "lrelu", "bias_gain": 0.01}, path)
    for path, layer in pickled.modules(generator):
        pickled.refuse(layer, {"is_critically_sampled": True}, path)


def official_discriminator_numbers(discriminator: Record) -> dict[str, Any]:
    """What the release's pickled discriminator says of itself, like `official_numbers`."""
    pickled.refuse_unfamiliar(discriminator, "skip")
    tensors = pickled.module_state(discriminator)
    return {"model": {"discriminator": {
        **pickled.discriminator_numbers(discriminator),
        "mapping_depth": pickled.layers(tensors, "mapping.fc{}.weight"),
        "clamp": pickled.common_clamp(pickled.clamped(discriminator, but="b4.fromrgb"))}}}  # which has none
