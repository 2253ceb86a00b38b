"""π-GAN's released checkpoints: whole pickled networks, and `ema.pth`, an average without names. GOF's are alike."""

from collections.abc import Mapping, Sequence

from torch import Tensor

OFFICIAL_ORDER = [  # of the 30 tensors of a released EMA file: the order of the generator's parameters
    f"siren.{part}.{kind}"
    for part in [f"network.{k}.layer" for k in range(8)]
    + ["final_layer", "color_layer_sine.layer", "color_layer_linear.0"]
    + [f"mapping_network.network.{k}" for k in (0, 2, 4, 6)]
    for kind in ("weight", "bias")
]


def official_generator(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of pi-GAN's and GOF's released generators → under ours (`mapping_network.`, `siren.`).

    Every name is used once; a missing or foreign one raises KeyError.
    """
    ours = {}
    for name, tensor in tensors.items():
        part, _, rest = name.removeprefix("siren.").partition(".")
        *_, kind = rest.split(".")
        if part == "mapping_network":  # mapping_network.network.6.weight: every second entry is an activation
            ours[f"mapping_network.layers.{int(rest.split('.')[1]) // 2}.{kind}"] = tensor
        elif part == "network":
            ours[f"siren.layers.{rest.split('.')[0]}.{kind}"] = tensor
        else:
            mine = {"final_layer": "density_head", "color_layer_sine": "colour_layer",
                    "color_layer_linear": "colour_head"}[part]
            ours[f"siren.{mine}.{kind}"] = tensor
    return ours


def official_ema(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """The 30 nameless tensors of a released EMA file, in their order there → our state dict.

    Raises: ValueError if there are not 30 of them.
    """
    return official_generator(dict(zip(OFFICIAL_ORDER, tensors, strict=True)))


def official_discriminator(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of pi-GAN's and GOF's released discriminators → under ours.

    Heads that the released classes carry but never use (`pose_layer`, `freq_phase_layer`) are left out.
    """
    ours = {}
    for name, tensor in tensors.items():
        part, *path, kind = name.split(".")
        if part == "layers":  # layers.3.network.2.conv.weight, layers.3.proj.weight
            branch = ".".join(path[1:]).removesuffix(".conv")
            mine = {"proj": "skip", "network.0": "first", "network.2": "second"}[branch]
            ours[f"blocks.{path[0]}.{mine}.{kind}"] = tensor
        elif part == "fromRGB":
            ours[f"adapters.{path[0]}.{kind}"] = tensor
        elif part == "final_layer":
            ours[f"final.{kind}"] = tensor
        elif part not in ("pose_layer", "freq_phase_layer"):
            raise KeyError(f"{name} is no tensor of a pi-GAN discriminator")
    return ours
