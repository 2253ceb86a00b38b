"""StyleNeRF's released pickles: their weights, and the numbers and cameras that their networks state of themselves."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gan3d import pickled
from gan3d.cameras import Number
from gan3d.gans.stylenerf import blocks_in_use
from gan3d.rebuild import CheckpointError, Record

PUBLISHED = "ffhq_256.pkl, ffhq_512.pkl, ffhq_1024.pkl at https://huggingface.co/facebook/stylenerf-ffhq-config-basic"
MOST_SAMPLES = 1024  # what a file may ask for
FAR = 1e6
OFFICIAL_PARTS = {"mapping": "mapper", "synthesis.fg_nerf": "foreground", "synthesis.bg_nerf": "background",
                  "synthesis.alpha": "alpha"}


def official_generator(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The release's `G` or `G_ema` as a state dict of `StyleNeRF`; its constant filters are not kept."""
    def ours(name: str) -> str:
        for theirs, mine in OFFICIAL_PARTS.items():
            if name == theirs or name.startswith(theirs + "."):
                return mine + name[len(theirs) :]
        return "blocks." + name.removeprefix("synthesis.")

    return {ours(name): tensor for name, tensor in tensors.items() if not name.endswith("resample_filter")}


def official_discriminator(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The release's `D` as a state dict of `StyleNeRFDiscriminator`, which sees from the picture what alpha says."""
    return {name: tensor for name, tensor in tensors.items()
            if not name.endswith("resample_filter") and name != "alpha"}


# Of the release's objects, what they are where a file says nothing (attributes of a class are not pickled), and what
# ours always are.
CAMERA = {"gaussian_camera": False, "angular_camera": False, "depth_transform": None, "dists_normalized": False,
          "ray_align_corner": True, "random_rotate": False, "bg_start": 1.0}
OUR_CAMERA = {"angular_camera": True, "depth_transform": None, "dists_normalized": False, "ray_align_corner": False,
              "random_rotate": False}
RENDERER = {"n_ray_samples": 14, "n_bg_samples": 4, "sigma_type": "relu", "hierarchical": True, "no_background": False,
            "white_background": False}
OUR_RENDERER = {"sigma_type": "relu", "white_background": False}
OUR_UPSAMPLER = {"no_2d_renderer": False, "no_residual_img": False, "block_reses": None, "shared_rgb_style": False}
OUR_SYNTHESIS = {"predict_camera": False, "progressive_growing": True, "progressive_nerf_only": False,
                 "interp_steps": None, "rectangular_crop": None, "margin": 0}
OUR_FIELD = {"use_sdf": False, "use_viewdirs": False, "use_normal": False, "use_skip": False, "use_pos": False,
             "add_rgb": False, "merge_sigma_feat": False, "no_sigma": False, "tcnn_backend": False,
             "disable_latents": False, "normalized_feat": False, "final_sigmoid_act": False, "shuffle_factor": 1,
             "downscale_p_by": 1, "positional_encoding": "normal"}
OUR_DISCRIMINATOR = {"c_dim": 0, "predict_camera": False, "separate_camera": False, "dual_discriminator": False,
                     "dual_input_ratio": None}


def official_numbers(generator: Record) -> dict[str, Any]:
    """What the release's pickled generator says of itself, by the keys of our config; also how its world lies.

    Its tensors' shapes say how wide it is, its modules and its camera, renderer and upsampler the rest. `alpha` decides
    the side of its pictures. Raises: CheckpointError where a number is missing or senseless, or where the generator
    computes what ours cannot.
    """
    tensors, synthesis = pickled.module_state(generator), pickled.part(generator, "synthesis")
    camera = CAMERA | official_settings(synthesis, "C", "camera_kwargs")
    renderer = RENDERER | official_settings(synthesis, "V", "renderer_kwargs")
    refuse_foreign_generator(generator, camera, renderer, official_settings(synthesis, "U", "upsampler_kwargs"))
    side = pickled.count(synthesis, "resolution_vol", 1, pickled.MAX_PIXELS)
    last = pickled.count(generator, "img_resolution", 4, pickled.MAX_PIXELS)
    widths = pickled.widths_by_resolution(tensors, "synthesis.b{}.conv1.weight", 2 * side)
    start = pickled.count(synthesis, "resolution_start", 1, pickled.MAX_PIXELS, side)
    if not widths or max(widths) != last or start != side:
        raise CheckpointError(f"its pictures do not grow to {last}² from the {side}² that are rendered")
    alpha = official_alpha(tensors)
    samples = pickled.count(renderer, "n_ray_samples", 4, MOST_SAMPLES)
    features = tensors["synthesis.fg_nerf.feat_out.weight"].shape[0]
    return {
        "data": {"resolution": side << blocks_in_use(alpha, len(widths)), **official_world(camera)},
        "model": {"resolution": last, "poses": "${data.poses}", "generator": {
            "render_resolution": side,
            "z_dim": tensors["mapping.fc0.weight"].shape[1],
            "w_dim": tensors["synthesis.fg_nerf.fc_in.affine.weight"].shape[1],
            "mapping_depth": pickled.layers(tensors, "mapping.fc{}.weight"),
            **official_field(tensors, pickled.part(synthesis, "fg_nerf"), "synthesis.fg_nerf.", 6),
            "features": features,
            "background": official_background(tensors, synthesis, camera, renderer, features),
            "samples_per_ray": samples,
            "fine_samples": samples if pickled.flag(renderer, "hierarchical") else 0,
            "density_noise": 1,
            **pickled.channel_numbers(widths),
            **official_blocks(synthesis, list(widths)),
            "path_weight": 2,
            "path_samples": pickled.count(synthesis, "n_reg_samples", 0, MOST_SAMPLES, 0),
            "path_full": pickled.flag(synthesis, "reg_full", False),
        }},
    }


def official_settings(synthesis: Record, name: str, arguments: str) -> dict[str, Any]:
    """What one of its objects holds; of an older pickle, without it, the arguments that the release remakes it from."""
    held = pickled.told(synthesis, name, None)
    if isinstance(held, Record) and isinstance(held.state, dict):
        return held.state
    given = official_plain(pickled.told(synthesis, "_init_kwargs", {}))
    if not isinstance(given, dict):
        return {}
    group = official_plain(given.get(arguments))
    return group if isinstance(group, dict) and group else given


def official_plain(value: Any) -> Any:
    """Lists and dicts of OmegaConf's, which the release never unwraps, as lists and dicts; one level down."""
    if not isinstance(value, Record) or not value.class_path.startswith("omegaconf."):
        return value
    content = pickled.told(value, "_content", None)
    if isinstance(content, list):
        return [pickled.told(node, "_val", node) for node in content]
    return {k: pickled.told(node, "_val", node) for k, node in content.items()} if isinstance(content, dict) else value


def official_range(source: Any, key: str, low: Number, high: Number) -> tuple[Number, Number]:
    """Two numbers from low to high, the first not above the second."""
    ends = official_plain(pickled.told(source, key))
    if not isinstance(ends, list | tuple) or len(ends) != 2:
        raise CheckpointError(f"its {key} is {pickled.brief(ends)}, not two numbers")
    first, second = (pickled.number({key: end}, key, low, high) for end in ends)
    if first > second:
        raise CheckpointError(f"its {key} runs from {first:g} down to {second:g}; the file is damaged")
    return first, second


def official_alpha(tensors: Mapping[str, Tensor]) -> float:
    value = tensors["synthesis.alpha"]
    alpha = float(value) if value.numel() == 1 else math.nan
    if alpha != -1 and not 0 <= alpha <= 1:
        raise CheckpointError(f"its alpha is {alpha:g}, not -1 (untrained) or a number from 0 to 1")
    return alpha


def official_world(camera: Mapping[str, Any]) -> dict[str, Any]:
    """z points up, and azimuth 0 is on +x: where the faces look."""
    near, far = official_range(camera, "depth_range", 0, FAR)
    nearest, farthest = official_range(camera, "range_radius", 1e-3, FAR)
    if near == far:
        raise CheckpointError(f"its depth_range begins and ends at {near:g}")

    def law(low: Number, high: Number) -> dict[str, Any]:
        if not pickled.flag(camera, "gaussian_camera"):
            return {"_target_": "gan3d.poses.Uniform", "_args_": [math.degrees(low), math.degrees(high)]}
        mean = (low + high) / 2
        return {"_target_": "gan3d.poses.Gaussian", "_args_": [math.degrees(mean), math.degrees(mean - low)]}

    return {
        "up": "z",
        "poses": {
            "_target_": "gan3d.poses.Spherical",
            "radius": nearest if nearest == farthest else [nearest, farthest],
            "azimuth": law(*official_range(camera, "range_u", -4 * math.pi, 4 * math.pi)),
            "polar": law(*official_range(camera, "range_v", 0, math.pi)),
            "fov_degrees": pickled.number(camera, "fov", 0.1, 170),
            "up": "${data.up}",
            "target": [0, 0, 0],
        },
        "bounds": {"near": near, "far": far, "planar": True, "aabb": None, "reference_radius": None,
                   "background": None},
    }


def official_field(tensors: Mapping[str, Tensor], theirs: Record, prefix: str, per_octave: int, more: int = 0
                   ) -> dict[str, int]:
    """Width, depth and octaves of a field whose input is the encoded point and `more` numbers."""
    width, inputs = tensors[prefix + "fc_in.weight"].shape[:2]
    octaves = pickled.count(theirs, "n_freq_posenc", 1, 64, 10)
    if inputs != per_octave * octaves + more or prefix + "to_rgb.weight" not in tensors:
        raise CheckpointError(f"its {prefix[:-1]} is not told {octaves} octaves of a point, or predicts no rgb")
    return {"width": width, "depth": 1 + pickled.layers(tensors, prefix + "blocks.{}.weight"), "octaves": octaves}


def official_background(tensors: Mapping[str, Tensor], synthesis: Record, camera: Mapping[str, Any],
                        renderer: Mapping[str, Any], features: int) -> dict[str, Any] | None:
    """Without one, the last sample of a ray closes it."""
    if pickled.flag(renderer, "no_background"):
        return None
    theirs, z_dim = pickled.part(synthesis, "bg_nerf"), pickled.count(synthesis, "z_dim_bg", 1, 4096)
    return {"_target_": "gan3d.gans.stylenerf.Background", "z_dim": z_dim,
            **official_field(tensors, theirs, "synthesis.bg_nerf.", 8, z_dim), "features": features,
            "samples": pickled.count(renderer, "n_bg_samples", 2, MOST_SAMPLES),
            "start": pickled.number(camera, "bg_start", 1e-6, 1)}


def official_blocks(synthesis: Record, sides: list[int]) -> dict[str, Any]:
    """What its upsampling blocks have in common."""
    blocks = [pickled.part(synthesis, f"b{side}") for side in sides]
    modes = {pickled.told(pickled.part(block, "conv0"), "upsample_mode") for block in blocks}
    mode = str(modes.pop()) if len(modes) == 1 else "different in its blocks"
    upsampling = mode.removesuffix("_noblur")
    if upsampling not in ("nn_cat", "pixelshuffle"):
        raise CheckpointError(f"its upsample_mode is {pickled.brief(mode)}, not nn_cat or pixelshuffle")
    decays = {pickled.number(pickled.part(block, name), "magnitude_ema_beta", 0, 1)
              for block in blocks for name in ("conv0", "conv1")}
    if len(decays) != 1:
        raise CheckpointError("its layers' magnitude_ema_beta differ, which ours do not")
    return {"upsampling": upsampling, "blur": mode == upsampling, "magnitude_decay": decays.pop(),
            "clamp": pickled.common_clamp(pickled.part(block, name) for block in blocks
                                    for name in ("conv0", "conv1", "torgb"))}


def refuse_foreign(source: Any, ours: Mapping[str, Any], what: str) -> None:
    entries = source.state if isinstance(source, Record) else source
    plain = {key: official_plain(value) for key, value in entries.items()} if isinstance(entries, dict) else {}
    if plain.get("depth_transform") == "None":
        plain["depth_transform"] = None
    pickled.refuse(plain, ours, what)


def refuse_foreign_generator(generator: Record, camera: Any, renderer: Any, upsampler: Any) -> None:
    """CheckpointError if some part of a generator computes what ours does not, and no shape betrays it."""
    synthesis = pickled.part(generator, "synthesis")
    for source, ours, what in (
        (generator, {"c_dim": 0, "img_channels": 3, "encoder": None}, "generator"), (camera, OUR_CAMERA, "camera"),
        (renderer, OUR_RENDERER, "renderer"), (upsampler, OUR_UPSAMPLER, "upsampler"),
        (synthesis, OUR_SYNTHESIS, "synthesis"),
    ):
        refuse_foreign(source, ours, what)
    if pickled.told(synthesis, "I", None) is not None:
        raise CheckpointError("its field sees features of planes, a grid or a hash table; here it sees encoded points")
    refuse_foreign(pickled.part(synthesis, "fg_nerf"), OUR_FIELD | {"z_dim": 0, "inverse_sphere": False}, "fg_nerf")
    if not pickled.flag(renderer, "no_background"):
        refuse_foreign(pickled.part(synthesis, "bg_nerf"), OUR_FIELD | {"inverse_sphere": True}, "bg_nerf")
    pickled.refuse_filters(generator)
    for path, layer in pickled.modules(generator):
        linear = path.endswith(("affine", "to_rgb", "adapter.1"))
        refuse_foreign(layer, {
            "activation": "linear" if linear else "lrelu", "use_noise": False, "architecture": "skip", "mode": "2d",
            "bias_gain": 0.01 if path.startswith("mapping.fc") else 1,  # the multiplier of the learning rate
        }, path)


def official_discriminator_numbers(discriminator: Record) -> dict[str, Any]:
    """What the release's pickled discriminator says of itself, like `official_numbers`."""
    refuse_foreign(discriminator, OUR_DISCRIMINATOR, "discriminator")
    pickled.refuse_unfamiliar(discriminator, "skip")
    unclamped = "b4.fromrgb"  # in the release what comes in at 4² never is clamped
    return {"model": {"discriminator": {
        **pickled.discriminator_numbers(discriminator),
        "clamp": pickled.common_clamp(pickled.clamped(discriminator, but=unclamped)),
        "camera_conditioning": False,
    }}}
