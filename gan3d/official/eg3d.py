"""EG3D's released pickles: their weights, and the numbers that their networks state of themselves."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gan3d import pickled
from gan3d.cameras import CONDITION_DIM
from gan3d.rebuild import CheckpointError, Record

PUBLISHED = ("ffhq512-64.pkl, ffhq512-128.pkl, ffhqrebalanced512-64.pkl, ffhqrebalanced512-128.pkl, "
             "afhqcats512-128.pkl, shapenetcars128-64.pkl at https://catalog.ngc.nvidia.com/orgs/nvidia/teams/research/models/eg3d")
FAR = 1e6  # beyond anything: where the box alone limits the rays
MOST_SAMPLES, MOST_PIXELS = 1024, 1024  # what a file may ask for


def official_discriminator(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The release's tensors have our names; its constant filters are not kept."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("resample_filter")}


def official_generator(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The release's tensors have our names; its constant filters and the labels' spread are not kept."""
    kept = {name: tensor for name, tensor in tensors.items()
            if not name.endswith("resample_filter") and name != "dataset_label_std"}
    return {"progress": torch.zeros((), dtype=torch.long), **kept}


def official_numbers(generator: Record) -> dict[str, Any]:
    """What the release's pickled generator says of itself, by the keys of our config.

    Its tensors' shapes say how wide it is, its modules and `rendering_kwargs` the rest. Raises: CheckpointError where a
    number is missing or senseless, or where the generator computes what ours cannot.
    """
    pickled.refuse_unfamiliar(generator, "skip")
    tensors, options = pickled.module_state(generator), pickled.told(generator, "rendering_kwargs")
    widths = pickled.widths_by_resolution(tensors, "backbone.synthesis.b{}.conv1.weight")
    embed, decoder = tensors["backbone.mapping.embed.weight"], tensors["decoder.net.0.weight"]
    if embed.shape[1] != CONDITION_DIM:
        raise CheckpointError(f"its labels have {embed.shape[1]} numbers; EG3D's cameras have {CONDITION_DIM}")
    if pickled.flag(options, "disparity_space_sampling", False):
        raise CheckpointError("it samples evenly in disparity, which this EG3D does not")
    if pickled.told(options, "clamp_mode", "softplus") != "softplus":
        raise CheckpointError("its density is no softplus")
    side = pickled.count(generator, "neural_rendering_resolution", 1, MOST_PIXELS)
    scale = pickled.number(options, "c_scale", 0, 1000, 0)  # as released: 0 where this key is missing
    resolution, upsampler = official_superresolution(generator, tensors, side)
    return {
        "data": {"resolution": resolution, "bounds": official_bounds(options)},
        "model": {"generator": {
            "box": pickled.number(options, "box_warp", 1e-3, 1000),
            "z_dim": pickled.count(generator, "z_dim", 1, 4096),
            "w_dim": embed.shape[0],
            "mapping_depth": pickled.layers(tensors, "backbone.mapping.fc{}.weight"),
            "plane_resolution": max(widths),
            "plane_channels": tensors["backbone.synthesis.b4.torgb.weight"].shape[0] // 3,
            **pickled.channel_numbers(widths),
            "clamp": pickled.common_clamp(pickled.clamped(pickled.part(generator, "backbone.synthesis"), but="skip")),
            "plane_axes": official_axes(generator),
            "decoder_width": decoder.shape[0],
            "decoder_lr_multiplier": pickled.number(pickled.part(generator, "decoder.net.0"), "bias_gain", 1e-6, 1000),
            "samples_per_ray": pickled.count(options, "depth_resolution", 4, MOST_SAMPLES),
            "fine_samples": pickled.count(options, "depth_resolution_importance", 0, MOST_SAMPLES),
            "render_resolution": {"_target_": "gan3d.ramps.Ramp", "first": side, "last": side, "steps": 0},
            "superresolution": upsampler,
            "raw_with_torgb": True,
            "camera_conditioning": scale > 0 and not pickled.flag(options, "c_gen_conditioning_zero"),
            "condition_scale": scale or 1,
        }},
    }


def official_superresolution(generator: Record, tensors: Mapping[str, Tensor], side: int
                             ) -> tuple[int, dict[str, Any]]:
    """The picture's side, and the numbers of our `SuperResolution`."""
    theirs, options = pickled.part(generator, "superresolution"), pickled.told(generator, "rendering_kwargs")
    first_up = pickled.count(pickled.part(theirs, "block0.conv0"), "up", 1, 2) == 2
    size = pickled.count(theirs, "input_resolution", 4, MOST_PIXELS)
    resolution = size * (4 if first_up else 2)
    if pickled.count(generator, "img_resolution", 4, 4 * MOST_PIXELS) != resolution:
        raise CheckpointError(f"its img_resolution is not {resolution}, what its super-resolution of {size} makes")
    if side > size and not pickled.flag(theirs, "sr_antialias", False):
        raise CheckpointError("it shrinks the rendered image without a filter before the super-resolution")
    noise = pickled.told(options, "superresolution_noise_mode", "none")
    if noise not in ("none", "const", "random"):
        raise CheckpointError(f"its superresolution_noise_mode is {pickled.brief(noise)}")
    weights = [tensors[f"superresolution.block{i}.conv0.weight"] for i in (0, 1)]
    return resolution, {"_target_": "gan3d.gans.eg3d.SuperResolution", "input_channels": weights[0].shape[1],
                        "input_resolution": size, "channels": [w.shape[0] for w in weights], "first_up": first_up,
                        "clamp": pickled.common_clamp(pickled.clamped(theirs, but="skip")), "noise": noise}


def official_bounds(options: Any) -> dict[str, Any]:
    """Near and far, or the cube of the planes where they are "auto"; white behind where it says so."""
    background = [1, 1, 1] if pickled.flag(options, "white_back", False) else None
    if pickled.told(options, "ray_start") == pickled.told(options, "ray_end") == "auto":
        half = pickled.number(options, "box_warp", 1e-3, 1000) / 2
        return {"near": 0, "far": FAR, "aabb": [[-half] * 3, [half] * 3], "background": background}
    near, far = pickled.number(options, "ray_start", 0, FAR), pickled.number(options, "ray_end", 0, FAR)
    if near >= far:
        raise CheckpointError(f"its ray_start {near:g} is not before its ray_end {far:g}")
    return {"near": near, "far": far, "aabb": None, "background": background}


def official_axes(generator: Record) -> str:
    """Which of our `plane_axes` its renderer has; as released, where it does not say."""
    axes = pickled.told(pickled.part(generator, "renderer"), "plane_axes", None)
    third = {"released": [[0, 0, 1], [1, 0, 0], [0, 1, 0]], "mended": [[0, 0, 1], [0, 1, 0], [1, 0, 0]]}
    for name, last in third.items():
        planes = [[[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 0, 1], [0, 1, 0]], last]
        if axes is None or (isinstance(axes, Tensor) and axes.shape == (3, 3, 3) and axes.tolist() == planes):
            return name
    raise CheckpointError("its planes lie along other axes than the release's or the mended ones")


def official_discriminator_numbers(discriminator: Record) -> dict[str, Any]:
    """What the release's pickled discriminator says of itself, like `official_numbers`."""
    pickled.refuse_unfamiliar(discriminator, "resnet")
    tensors = pickled.module_state(discriminator)
    numbers = pickled.discriminator_numbers(discriminator)
    if pickled.number(discriminator, "raw_fade", 0, 1, 1) != 1:
        raise CheckpointError("its discriminator fades the raw image out, which ours does not")
    images = tensors[f"b{numbers['resolution']}.fromrgb.weight"].shape[1]
    if images not in (3, 6):
        raise CheckpointError("its discriminator sees other channels than rgb, once or twice")
    numbers |= {
        "mapping_depth": pickled.layers(tensors, "mapping.fc{}.weight"),
        "dual": images == 6,
        "clamp": pickled.common_clamp(pickled.clamped(discriminator, but="skip")),  # residual paths have none
    }
    return {"model": {"dual": images == 6, "discriminator": numbers}}
