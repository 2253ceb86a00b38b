"""Which way a face looks, by 3DDFA_V2's smallest network (Guo et al., ECCV 2020): an estimator for `prepare.py`.

    python prepare.py folder source=photos resolution=256 poses=datasets.head_pose:estimate weights=mb05_120x120.pth

MobileNet-v1 of half width sees the face's square at 120² and gives the 3×4 weak-perspective camera of a mean face
(after scaling by the mean and spread below), its shape and its expression; only the camera is used here.
"""

import math
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy import ndarray as Array
from PIL import Image
from torch import Tensor, nn

SIDE = 120
FACE = 0.75  # the network sees so much of the picture, in its middle: what a face detector would cut from FFHQ's
WEIGHTS = Path("data/weights/mb05_120x120.pth")
SOURCE = "https://github.com/cleardusk/3DDFA_V2/tree/master/weights (mb05_120x120.pth, 3 MB, MIT)"
# The first 12 of the 62 means and spreads that come with the weights: a 3×4 matrix, rows x, y, z.
MEAN = (3.4926363e-04, 2.5279013e-07, -6.8751979e-07, 60.167957, -6.2955132e-07, 5.7572004e-04, -5.0853912e-05,
        74.278198, 5.4009172e-07, 6.5741384e-05, 3.4420125e-04, -66.671577)
SPREAD = (1.7632153e-04, 6.7379435e-05, 4.4708489e-04, 26.550232, 1.2313770e-04, 4.4930217e-05, 7.9236706e-05,
          6.9825630, 4.3504441e-04, 1.2314890e-04, 1.7400002e-04, 20.803040)


def estimate(picture: UInt8[Array, "h w 3"], weights: Path | str = WEIGHTS) -> tuple[float, float, float]:
    """(yaw, pitch, roll) in degrees, as `cameras.from_angles` takes them, of a face that fills a square as in FFHQ.

    Raises: FileNotFoundError saying where the weights are had; ValueError if the file holds others.
    """
    network = load(Path(weights))
    with torch.inference_mode():
        parameters = network(face(picture)[None])[0]
    return angles(rotation(parameters))


def face(picture: UInt8[Array, "h w 3"]) -> Float[Tensor, "3 120 120"]:
    """The part of the picture that the network sees, blue first, in [−1, 1)."""
    height, width, _ = picture.shape
    side = FACE * min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    seen = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BILINEAR,
                                           box=(left, top, left + side, top + side))
    bgr = torch.from_numpy(np.asarray(seen)[..., ::-1].copy())
    return (bgr.permute(2, 0, 1).float() - 127.5) / 128


def rotation(parameters: Float[Tensor, " p"]) -> Float[Array, "3 3"]:
    """From the head's axes (x to the picture's right, y up, z out of the face) to the viewer's, likewise."""
    matrix = (parameters[:12].double().numpy() * SPREAD + MEAN).reshape(3, 4)[:, :3]
    right, up = (row / np.linalg.norm(row) for row in matrix[:2])
    return np.stack([right, up, np.cross(right, up)])


def angles(turn: Float[Array, "3 3"]) -> tuple[float, float, float]:
    """Of the rotation roll ∘ pitch ∘ yaw: the inverse of what `cameras.from_angles` builds."""
    yaw = math.degrees(math.atan2(turn[2, 0], turn[2, 2]))
    pitch = math.degrees(math.asin(float(np.clip(turn[2, 1], -1, 1))))
    roll = math.degrees(math.atan2(turn[0, 1], turn[1, 1]))
    return -yaw, -pitch, roll


class Separable(nn.Module):
    """A 3×3 filter for each channel, then a mixture of channels; each normalised and cut at zero."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.conv_dw = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
        self.bn_dw = nn.BatchNorm2d(channels)
        self.conv_sep = nn.Conv2d(channels, out, 1, bias=False)
        self.bn_sep = nn.BatchNorm2d(out)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        x = self.bn_dw(self.conv_dw(x)).relu()
        return self.bn_sep(self.conv_sep(x)).relu()


LAYERS = {  # name as in the weights: output channels, stride (MobileNet, 2017, table 1, at half width)
    "dw2_1": (32, 1), "dw2_2": (64, 2), "dw3_1": (64, 1), "dw3_2": (128, 2), "dw4_1": (128, 1), "dw4_2": (256, 2),
    "dw5_1": (256, 1), "dw5_2": (256, 1), "dw5_3": (256, 1), "dw5_4": (256, 1), "dw5_5": (256, 1), "dw5_6": (512, 2),
    "dw6": (512, 1),
}


class MobileNet(nn.Module):
    """Faces `[b 3 120 120]` to 62 parameters, before they are scaled."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        channels = 16
        for name, (out, stride) in LAYERS.items():
            self.add_module(name, Separable(channels, out, stride))
            channels = out
        self.fc_param = nn.Linear(channels, 62)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 62"]:
        x = self.bn1(self.conv1(x)).relu()
        for name in LAYERS:
            x = getattr(self, name)(x)
        return self.fc_param(x.mean((-2, -1)))


@cache
def load(weights: Path) -> MobileNet:
    if not weights.exists():
        raise FileNotFoundError(f"weights={weights.absolute()} does not exist. The head pose network's weights are at\n"
                                f"  {SOURCE}\n  Put the file there, or say weights=/path/to/it")
    state = torch.load(weights, map_location="cpu", weights_only=True)
    state = {name.removeprefix("module."): value for name, value in state.get("state_dict", state).items()}
    network = MobileNet()
    try:
        network.load_state_dict({name: value for name, value in state.items() if not name.startswith("fc_lm.")})
    except RuntimeError as error:
        raise ValueError(f"{weights} holds other weights than {SOURCE}:\n{str(error)[:300]}") from error
    return network.eval().requires_grad_(False)
