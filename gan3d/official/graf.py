"""GRAF's released checkpoints: torch.save's dicts with `generator`, `generator_test` and `discriminator`."""

from collections.abc import Mapping

from torch import Tensor

OFFICIAL_LAYERS = {"pts_linears": "radiance.trunk", "views_linears.0": "radiance.view",
                   "feature_linear": "radiance.feature", "alpha_linear": "radiance.density",
                   "rgb_linear": "radiance.colour"}


def official_generator(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' `generator` or `generator_test` (its average) as a state dict of `GRAF`. Raises: KeyError."""
    def ours(key: str) -> str:
        for theirs, name in OFFICIAL_LAYERS.items():
            if key.startswith(theirs + "."):
                return name + key[len(theirs) :]
        raise KeyError(f"{key!r} is no parameter of a GRAF generator")

    return {ours(key): tensor for key, tensor in tensors.items()}


def official_discriminator(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' `discriminator` as a state dict of `PatchDiscriminator`. Raises: KeyError."""
    names = {"weight_orig": "weight", "weight_u": "u", "weight_v": "v"}
    order = sorted({int(key.split(".")[1]) for key in tensors})
    layers = [f"convs.{index}" for index in range(len(order) - 1)] + ["verdict"]
    place = dict(zip(order, layers, strict=True))
    return {f"{place[int(number)]}.{names[kind]}": tensor
            for (_, number, kind), tensor in ((key.split("."), tensor) for key, tensor in tensors.items())}
