"""StyleGAN2 for voxel grids, dense while coarse, then on existing voxels only. VoxGRAF (2022), sec. 3.1.

ws → modulated 3D convolutions from 4³ up, a grid of colours and densities summed up on the way ("skip" architecture).
Names and layouts of parameters are those of the authors' code; there is no noise, which their code has but never adds.
From the `dense_resolution` on the grids of a batch are tables of rows, joined, and may be pruned after every block; a
convolution's weight is then read with its axes reversed, as the authors' weights demand.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from gan3d import ops
from gan3d.cameras import Number
from gan3d.nn.stylegan2 import GAIN, FullyConnected, activate, channels_at, resolutions
from gan3d.ops import KernelMap, Pruned, Voxels

Prune = Callable[[int, Voxels, Tensor], Pruned]  # of the batch's i-th grid, by the raw densities of its rows


class Pattern(NamedTuple):
    """Which voxels exist in each grid of a batch. Tables are joined: all rows of one grid, then the next's."""

    grids: list[Voxels]
    rows: list[int]

    @property
    def owner(self) -> Int[Tensor, " rows"]:
        """The grid that each row belongs to."""
        rows = torch.tensor(self.rows, device=self.grids[0].words.device)
        return torch.repeat_interleave(rows, output_size=sum(self.rows))


def pattern_of(grids: list[Voxels]) -> Pattern:
    return Pattern(grids, torch.stack([grid.rank[-1] for grid in grids]).tolist())


def grown(voxels: Voxels) -> Voxels:
    """Where a transposed convolution of existing voxels has outputs: voxel q reaches 2q, 2q + 1 and 2q + 2."""
    mask = ops.mask_of(ops.upsample(voxels).voxels)
    for axis in range(3):
        shifted = mask.narrow(axis, 0, mask.shape[axis] - 1)
        mask = mask | F.pad(shifted, [1 if side == 4 - 2 * axis else 0 for side in range(6)])
    return ops.voxels_from_mask(mask)


class SynthesisLayer3d(nn.Module):
    """Modulated 3³ convolution, leaky ReLU. To twice the resolution it is transposed, and its last planes cut off."""

    def __init__(self, inputs: int, outputs: int, *, w_dim: int, up: bool, clamp: Number | None):
        super().__init__()
        self.up, self.clamp = up, clamp
        self.affine = FullyConnected(w_dim, inputs, bias_init=1)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3, 3))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def modulation(self, w: Float[Tensor, "b d"]) -> tuple[Float[Tensor, "b i"], Float[Tensor, "b o"]]:
        """What input channels are multiplied by, and output channels."""
        style = self.affine(w)
        return style, GAIN * (style.square() @ self.weight.square().sum((2, 3, 4)).T + 1e-8).rsqrt()

    def forward(self, x: Float[Tensor, "b i x y z"], w: Float[Tensor, "b d"]) -> Float[Tensor, "b o p q r"]:
        style, scale = (part[..., None, None, None] for part in self.modulation(w))
        if self.up:
            y = F.conv_transpose3d(x * style, self.weight.transpose(0, 1), stride=2)[..., :-1, :-1, :-1]
        else:
            y = F.conv3d(x * style, self.weight, padding=1)
        return activate(torch.addcmul(GAIN * self.bias[:, None, None, None], y, scale), "lrelu", self.clamp)

    def sparse(self, x: Float[Tensor, "rows i"], w: Float[Tensor, "b d"], kernel: KernelMap,
               before: Int[Tensor, " rows"], after: Int[Tensor, " m"]) -> Float[Tensor, "m o"]:
        """The same on tables; `before` and `after` say whose rows they are."""
        style, scale = self.modulation(w)
        y = ops.sparse_conv3d(x * style[before], self.weight.transpose(2, 4), kernel)
        return activate(torch.addcmul(GAIN * self.bias, y, scale[after]), "lrelu", self.clamp)


class ToVoxels(nn.Module):
    """Features → colour and density: a modulated 1³ convolution without demodulation."""

    def __init__(self, inputs: int, outputs: int, *, w_dim: int, clamp: Number | None):
        super().__init__()
        self.clamp = clamp
        self.affine = FullyConnected(w_dim, inputs, bias_init=1)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 1, 1, 1))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def matrices(self, w: Float[Tensor, "b d"]) -> Float[Tensor, "b i o"]:
        style = self.affine(w) / math.sqrt(self.weight.shape[1])
        return (self.weight.flatten(1) * style[:, None]).mT

    def forward(self, x: Float[Tensor, "b i x y z"], w: Float[Tensor, "b d"]) -> Float[Tensor, "b o x y z"]:
        y = torch.baddbmm(self.bias[:, None], self.matrices(w).mT, x.flatten(2))
        return activate(y.unflatten(2, x.shape[2:]), "linear", self.clamp)

    def sparse(self, x: Float[Tensor, "rows i"], w: Float[Tensor, "b d"], rows: list[int]) -> Float[Tensor, "rows o"]:
        parts = zip(x.split(rows), self.matrices(w), strict=True)
        return activate(torch.cat([torch.addmm(self.bias, part, matrix) for part, matrix in parts]), "linear",
                        self.clamp)


class SynthesisBlock3d(nn.Module):
    """All layers of one resolution."""

    def __init__(self, inputs: int, outputs: int, *, w_dim: int, resolution: int, channels: int, clamp: Number | None):
        super().__init__()
        if inputs == 0:
            self.const = nn.Parameter(torch.randn(outputs, resolution, resolution, resolution))
        else:
            self.conv0 = SynthesisLayer3d(inputs, outputs, w_dim=w_dim, up=True, clamp=clamp)
        self.conv1 = SynthesisLayer3d(outputs, outputs, w_dim=w_dim, up=False, clamp=clamp)
        self.torgb = ToVoxels(outputs, channels, w_dim=w_dim, clamp=clamp)
        self.num_conv = 1 if inputs == 0 else 2

    def forward(self, x: Tensor | None, voxels: Tensor | None, ws: Float[Tensor, "b l d"]) -> tuple[Tensor, Tensor]:
        """ws: of conv0 (where there is one), conv1 and torgb. The voxels so far are enlarged corner to corner."""
        w = list(ws.unbind(1))
        x = self.const.repeat(len(ws), 1, 1, 1, 1) if x is None else self.conv0(x, w.pop(0))
        x = self.conv1(x, w.pop(0))
        new = self.torgb(x, w.pop(0)).float()
        if voxels is not None:
            new = new + F.interpolate(voxels, scale_factor=2, mode="trilinear", align_corners=True)
        return x, new

    def sparse(self, x: Tensor, voxels: Tensor, ws: Float[Tensor, "b l d"], coarse: Pattern
               ) -> tuple[Tensor, Tensor, Pattern]:
        """The same on joined tables. The voxels so far are enlarged by [1, 2, 1]³/8, half a voxel off."""
        fine = pattern_of([grown(grid) for grid in coarse.grids])
        up = ops.join_maps([ops.upsampling_map(*pair) for pair in zip(coarse.grids, fine.grids, strict=True)])
        around = ops.join_maps([ops.kernel_map(grid) for grid in fine.grids])
        before, after = coarse.owner, fine.owner
        x = self.conv0.sparse(x, ws[:, 0], up, before, after)
        x = self.conv1.sparse(x, ws[:, 1], around, after, after)
        return x, ops.sparse_upsample(voxels, up) + self.torgb.sparse(x, ws[:, 2], fine.rows), fine


class Synthesis3d(nn.Module):
    """ws → voxel grids, 4³ to `resolution`³. The last channel is the density.

    Args:
        channels: of a voxel.
        dense_resolution: up to here all voxels exist; beyond it, those that pruning leaves, and what grows from them.
        channel_base, channel_max, channel_min: feature maps at a resolution: base / resolution, within bounds.
    """

    def __init__(self, *, w_dim: int, resolution: int, dense_resolution: int, channels: int, channel_base: int,
                 channel_max: int, channel_min: int, clamp: Number | None):
        super().__init__()
        self.resolutions, self.dense_resolution = resolutions(resolution), dense_resolution
        before = 0
        for r in self.resolutions:
            width = channels_at(r, channel_base, channel_max, channel_min)
            setattr(self, f"b{r}", SynthesisBlock3d(before, width, w_dim=w_dim, resolution=r, channels=channels,
                                                    clamp=clamp))
            before = width
        self.num_ws = 2 * len(self.resolutions)

    def forward(self, ws: Float[Tensor, "b l d"], resolution: int, prune: Prune, prune_last: bool
                ) -> tuple[Pattern, Float[Tensor, "rows c"]]:
        """Which voxels exist at `resolution`, and their joined table.

        Args:
            prune: is called after each block from the dense resolution on; after the last only if `prune_last`.
        """
        used = [r for r in self.resolutions if r <= resolution]
        dense = min(self.dense_resolution, used[-1])
        x = voxels = None
        for i, r in enumerate(r for r in used if r <= dense):
            x, voxels = getattr(self, f"b{r}")(x, voxels, self.of_block(ws, i))
        with torch.autocast(ws.device.type, enabled=False):
            everything = ops.voxels_from_mask(torch.ones(dense, dense, dense, dtype=torch.bool, device=ws.device))
            pattern = pattern_of([everything] * len(ws))
            x, voxels = (torch.cat([ops.gather_voxels(grid.permute(1, 2, 3, 0), everything) for grid in values])
                         for values in (x, voxels))
            for i, r in enumerate(used):
                if r > dense:
                    x, voxels, pattern = getattr(self, f"b{r}").sparse(x, voxels, self.of_block(ws.float(), i), pattern)
                if r >= dense and (r < used[-1] or prune_last):
                    x, voxels, pattern = pruned(x, voxels, pattern, prune)
        return pattern, voxels

    @staticmethod
    def of_block(ws: Float[Tensor, "b l d"], i: int) -> Float[Tensor, "b k d"]:
        """The ws of the i-th block; its torgb shares one with the next block's first layer."""
        return ws[:, max(2 * i - 1, 0):2 * i + 2]


def pruned(x: Tensor, voxels: Tensor, pattern: Pattern, prune: Prune) -> tuple[Tensor, Tensor, Pattern]:
    parts = zip(pattern.grids, x.split(pattern.rows), voxels.split(pattern.rows), strict=True)
    left = [(prune(i, grid, values[:, -1]), features, values) for i, (grid, features, values) in enumerate(parts)]
    return (torch.cat([ops.compact(features, kept) for kept, features, _ in left]),
            torch.cat([ops.compact(values, kept) for kept, _, values in left]),
            pattern_of([kept.voxels for kept, _, _ in left]))
