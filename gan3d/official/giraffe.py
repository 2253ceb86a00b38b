"""GIRAFFE's released checkpoints: torch.save's dicts, whose `model` holds all networks, each under its name."""

from collections.abc import Mapping

from torch import Tensor

PUBLISHED = ("checkpoint_*.pt for cats64, celeba64, compcars64, chairs64, church64, celebahq256, ffhq256, cars256, "
             "church256, clevr2256 and clevr2345256, whose addresses are in configs/*/*_pretrained.yaml at "
             "https://github.com/autonomousvision/giraffe")
OFFICIAL_NETWORKS = {"decoder": "objects", "background_generator": "background", "neural_renderer": "renderer"}
OFFICIAL_LAYERS = {"fc_in": "position", "fc_z": "shape", "blocks": "trunk", "fc_z_skips.0": "shape_skip",
                   "fc_p_skips.0": "position_skip", "sigma_out": "density", "fc_z_view": "appearance",
                   "feat_view": "view", "fc_view": "direction", "feat_out": "feature", "conv_layers": "layers",
                   "conv_rgb": "to_rgb"}


def official_generator(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' `generator` or `generator_test` (its average) as a state dict of `GIRAFFE`. Raises: KeyError."""
    ours = {}
    for key, tensor in tensors.items():
        network, _, name = key.partition(".")
        if name == "upsample_rgb.1.f":  # the blur's 1, 2, 1
            continue
        layer = next((layer for layer in OFFICIAL_LAYERS if name.startswith(layer + ".")), None)
        if network not in OFFICIAL_NETWORKS or layer is None:
            raise KeyError(f"{key!r} is no parameter of a GIRAFFE generator")
        ours[f"{OFFICIAL_NETWORKS[network]}.{OFFICIAL_LAYERS[layer]}{name[len(layer):]}"] = tensor
    return ours


def official_discriminator(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' `discriminator` as a state dict of `DCDiscriminator`."""
    return {key.replace("conv_out.", "verdict."): tensor for key, tensor in tensors.items()}
