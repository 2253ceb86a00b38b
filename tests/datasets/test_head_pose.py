"""The head pose network: the published file's shapes, and its camera in our angles. Weights are made here."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from datasets import head_pose
from datasets.cameras import Framing, from_angles
from datasets.head_pose import MEAN, SPREAD, MobileNet, angles, estimate, face, rotation

# Of the published state dict, in its order: block, input and output channels; and where the picture is halved.
BLOCKS = (("dw2_1", 16, 32), ("dw2_2", 32, 64), ("dw3_1", 64, 64), ("dw3_2", 64, 128), ("dw4_1", 128, 128),
          ("dw4_2", 128, 256), ("dw5_1", 256, 256), ("dw5_2", 256, 256), ("dw5_3", 256, 256), ("dw5_4", 256, 256),
          ("dw5_5", 256, 256), ("dw5_6", 256, 512), ("dw6", 512, 512))
HALVED = {"dw2_2", "dw3_2", "dw4_2", "dw5_6"}


def published():
    """Random weights with the names and shapes of mb05_120x120.pth."""
    draw = torch.Generator().manual_seed(0)

    def norm(channels):
        weight, bias, mean = torch.randn(3, channels, generator=draw)
        return {"weight": 1 + 0.1 * weight, "bias": bias, "running_mean": mean, "num_batches_tracked": torch.tensor(7),
                "running_var": 0.5 + torch.rand(channels, generator=draw)}

    def linear(*shape):
        return torch.randn(*shape, generator=draw) / np.prod(shape[1:]) ** 0.5

    state = {"conv1.weight": linear(16, 3, 3, 3), **{f"bn1.{name}": value for name, value in norm(16).items()}}
    for name, channels, out in BLOCKS:
        state |= {f"{name}.conv_dw.weight": linear(channels, 1, 3, 3)}
        state |= {f"{name}.conv_sep.weight": linear(out, channels, 1, 1)}
        state |= {f"{name}.bn_dw.{key}": value for key, value in norm(channels).items()}
        state |= {f"{name}.bn_sep.{key}": value for key, value in norm(out).items()}
    state |= {"fc_param.weight": linear(62, 512), "fc_param.bias": linear(62, 1)[:, 0]}
    return state | {"fc_lm.weight": linear(136, 512), "fc_lm.bias": linear(136, 1)[:, 0]}


def written_out(state, x):
    """The network once more, as its layers follow each other."""

    def norm(x, name):
        mean, var, weight, bias = (state[f"{name}.{part}"].view(1, -1, 1, 1)
                                   for part in ("running_mean", "running_var", "weight", "bias"))
        return ((x - mean) / (var + 1e-5).sqrt() * weight + bias).clamp(min=0)

    x = norm(F.conv2d(x, state["conv1.weight"], stride=2, padding=1), "bn1")
    for name, channels, _ in BLOCKS:
        x = F.conv2d(x, state[f"{name}.conv_dw.weight"], stride=2 if name in HALVED else 1, padding=1, groups=channels)
        x = norm(F.conv2d(norm(x, f"{name}.bn_dw"), state[f"{name}.conv_sep.weight"]), f"{name}.bn_sep")
    assert x.shape[-2:] == (4, 4)  # 120 halved five times, rounded up
    return F.linear(F.avg_pool2d(x, 4).flatten(1), state["fc_param.weight"], state["fc_param.bias"])


@pytest.fixture
def weights(tmp_path):
    torch.save(published(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def picture(side=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def test_the_network_computes_what_its_layers_say(weights):
    x = torch.stack([face(picture(seed=seed)) for seed in range(2)])
    with torch.no_grad():
        ours, expected = head_pose.load(weights)(x), written_out(published(), x)
    assert ours.shape == (2, 62) and torch.allclose(ours, expected, atol=1e-4)  # float32, 27 layers deep


@pytest.mark.smoke
def test_weights_are_read_with_the_authors_wrappings(weights, tmp_path):
    wrapped = {"state_dict": {f"module.{name}": value for name, value in published().items()}}
    torch.save(wrapped, tmp_path / "wrapped.pth")
    assert estimate(picture(), weights) == estimate(picture(), str(tmp_path / "wrapped.pth"))
    assert np.isfinite(estimate(picture(), weights)).all()


def test_missing_and_foreign_weights_say_what_is_expected_and_where(tmp_path):
    with pytest.raises(FileNotFoundError, match="(?s)absent.pth does not exist.*cleardusk/3DDFA_V2.*weights="):
        estimate(picture(), tmp_path / "absent.pth")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="(?s)other.pth holds other weights than .*3DDFA_V2"):
        estimate(picture(), tmp_path / "other.pth")


def test_the_network_sees_the_middle_of_the_picture_blue_first():
    red = np.zeros((100, 100, 3), np.uint8)
    red[..., 0] = 255
    red[:12] = red[-12:] = red[:, :12] = red[:, -12:] = (0, 255, 0)  # beyond the middle three quarters
    seen = face(red)
    assert seen.shape == (3, 120, 120)
    assert torch.equal(seen[:, 60, 60], torch.tensor([-127.5, -127.5, 127.5]) / 128)
    assert (seen[1, 2:-2, 2:-2] == -127.5 / 128).all()


@pytest.mark.parametrize("turn", [(0, 0, 0), (25, 0, 0), (0, -15, 0), (0, 0, 12), (-50, 20, -8)])
def test_the_network_s_camera_becomes_the_angles_of_ours(turn):
    """Parameters that stand for the camera of `from_angles`: its axes with y and z turned round, scaled."""
    pose = from_angles(*turn, framing=Framing(2.7, 13.374)).camera_to_world[:3, :3].double().numpy()
    viewer = (pose * [1, -1, -1]).T  # OpenCV to x right, y up, z towards the viewer; from the head to the viewer
    matrix = np.concatenate([5e-4 * viewer, np.array([[60], [70], [-66]])], 1)
    parameters = torch.zeros(62)
    parameters[:12] = torch.from_numpy((matrix.ravel() - MEAN) / SPREAD)
    assert np.allclose(rotation(parameters), viewer, atol=1e-5)
    assert angles(rotation(parameters)) == pytest.approx(turn, abs=1e-3)  # degrees, of float32 parameters


def test_the_network_has_the_parts_of_the_published_file():
    ours = {name: tuple(value.shape) for name, value in MobileNet().state_dict().items()}
    assert ours == {name: tuple(value.shape) for name, value in published().items() if not name.startswith("fc_lm")}
