"""GRAM's released checkpoints: state dicts of both networks, and `ema.pth`, an average without names."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from gan3d.official import pigan

PUBLISHED = ("generator.pth and ema.pth in the folders FFHQ_default, CATS_default and CARLA_default under "
             "pretrained_models at https://github.com/microsoft/GRAM; give the folder's path, and data=ffhq, "
             "data=cats or data=carla")

OFFICIAL_LAYERS = {  # of the released generator, in the order of its parameters, hence of its EMA file → ours
    **{f"sample_network.network.{2 * k}": f"manifolds.layers.{k}" for k in range(3)},
    "sample_network.output_layer": "manifolds.output",
    **{f"rf_network.network.{k}.layer": f"radiance.layers.{k}" for k in range(8)},
    "rf_network.color_layer.0.layer": "radiance.colour_layer",
    **{f"rf_network.output_sigma.{k}": f"radiance.density_heads.{k}" for k in range(7)},
    **{f"rf_network.output_color.{k}": f"radiance.colour_heads.{k}" for k in range(7)},
    **{f"rf_network.mapping_network.network.{2 * k}": f"mapping_network.layers.{k}" for k in range(4)},
}
OFFICIAL_ORDER = [f"representation.{layer}.{kind}" for layer in OFFICIAL_LAYERS for kind in ("weight", "bias")]


def official_generator(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The released generator's tensors (`representation.rf_network.network.0.layer.weight` …) → our state dict.

    Raises: KeyError for a name that it does not have.
    """
    ours = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.removeprefix("representation.").rpartition(".")
        ours[f"{OFFICIAL_LAYERS[layer]}.{kind}"] = tensor
    return ours


def official_ema(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """The 62 nameless tensors of a released EMA file, in their order there → our state dict.

    Raises: ValueError if there are not 62 of them.
    """
    return official_generator(dict(zip(OFFICIAL_ORDER, tensors, strict=True)))


def official_discriminator(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The released discriminator's tensors → our state dict. It is π-GAN's with one entry, of which the name differs.

    Raises: KeyError for a name that it does not have.
    """
    entry = "fromRGB.model."
    return pigan.official_discriminator({name.replace(entry, "fromRGB.0.model."): t for name, t in tensors.items()})
