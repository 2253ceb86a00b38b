"""Interpolation of dense features: voxel grids (DVGO, Plenoxels, VoxGRAF) and three planes (EG3D)."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gan3d.ops import extension
from gan3d.ops.autograd import differentiable, shaped_like
from gan3d.ops.reference import grids as reference

Padding = Literal["border", "zeros"]
PlaneAxes = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # of each plane: along its width, along its height

XY_XZ_ZY: PlaneAxes = ((0, 1), (0, 2), (2, 1))  # EG3D as the paper means it
XY_XZ_ZX: PlaneAxes = ((0, 1), (0, 2), (2, 0))  # EG3D's released code and weights: the third is the second, transposed


def grid_sample_3d(grid: Float[Tensor, "*b X Y Z c"], coordinates: Float[Tensor, "*b n 3"],
                   padding: Padding = "border") -> Float[Tensor, "*b n c"]:
    """Trilinear interpolation of a voxel grid: the eight nearest voxels, each weighted by how near it is per axis.

    Args:
        grid: channels last.
        coordinates: x, y, z in voxels; (i, j, k) is the centre of `grid[i, j, k]`. `voxel_coordinates` makes them.
        padding: "border" moves coordinates to [0, side − 1] first, and has no gradient in them at the ends and beyond;
            with "zeros" voxels beyond the sides are 0. Both as F.grid_sample does. A nan coordinate gives nan with
            "border", 0 with "zeros".

    What needs no gradient costs none. On CUDA the gradient of the grid is summed in no fixed order.
    Raises: ValueError for another padding or a grid with a side of 0.
    """
    if padding not in ("border", "zeros"):
        raise ValueError(f"grid_sample_3d: padding must be 'border' or 'zeros', got {padding!r}")
    lead, sides, c = grid.shape[:-4], grid.shape[-4:-1], grid.shape[-1]
    if min(sides) < 1:
        raise ValueError(f"grid_sample_3d: the grid must have sides of at least 1, got {tuple(sides)}")
    b, n = math.prod(lead), coordinates.shape[-2]
    values = extension.as_float(grid).reshape(b, *sides, c)
    where = extension.as_float(coordinates).to(values.dtype).reshape(b, n, 3)
    if extension.native(values):
        out = torch.ops.gan3d.grid_sample_3d(values.contiguous(), where.contiguous(), padding == "zeros")
    else:
        out = reference.grid_sample_3d(values, where, padding == "zeros")
    return out.reshape(*lead, n, c)


def voxel_coordinates(points: Float[Tensor, "*b 3"], aabb: Float[Tensor, "2 3"], resolution: Sequence[int],
                      align_corners: bool) -> Float[Tensor, "*b 3"]:
    """Points in scene units as coordinates in voxels, for `grid_sample_3d`.

    Args:
        aabb: min and max corner of the grid.
        resolution: voxels along x, y and z.
        align_corners: whether the first and the last voxel have their centres on the faces of the box (DVGO, TensoRF);
            else their outer faces lie there, half a voxel further (Plenoxels, VoxGRAF).
    """
    sides = torch.tensor([float(side) for side in resolution], dtype=points.dtype, device=points.device)
    unit = (points - aabb[0]) / (aabb[1] - aabb[0])
    return unit * (sides - 1) if align_corners else unit * sides - 0.5


def triplane_sample(planes: Float[Tensor, "b 3 c h w"], points: Float[Tensor, "b n 3"], axes: PlaneAxes = XY_XZ_ZY,
                    scale: float = 1.0) -> Float[Tensor, "b n c"]:
    """scale · Σ over the planes of their features at the point's projections. EG3D (2022), sec. 3.2.

    Args:
        planes: fastest, and never copied, where channels are contiguous: `image.unflatten(1, (3, c))` of an image
            `[b 3c h w]` in channels_last memory. The gradient then has the same layout.
        points: −1 and 1 are the outer edges of a plane's outer pixels; what lies beyond is 0 (F.grid_sample, bilinear,
            zeros, align_corners False). A nan is beyond.
        axes: for each plane the axes of a point that run along its width and along its height. `XY_XZ_ZX` reads EG3D's
            released weights.
        scale: 1 sums (the paper), 1/3 is the mean (the released code).

    What needs no gradient costs none. On CUDA the gradient of the planes is summed in no fixed order.
    Raises: ValueError for axes other than three pairs of 0, 1 and 2, or planes without pixels.
    """
    flat = [axis for pair in axes for axis in pair]
    if len(axes) != 3 or len(flat) != 6 or any(axis not in (0, 1, 2) for axis in flat):
        raise ValueError(f"triplane_sample: axes must be three pairs of 0, 1 and 2, got {axes}")
    if min(planes.shape[-2:]) < 1:
        raise ValueError(f"triplane_sample: planes must have pixels, got {tuple(planes.shape)}")
    values = extension.as_float(planes)
    where = extension.as_float(points).to(values.dtype)
    if not extension.native(values):
        return reference.triplane_sample(values, where, flat, scale)
    if values.shape[2] > 1 and values.stride(2) != 1:
        values = values.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    return torch.ops.gan3d.triplane_sample(values, where.contiguous(), flat, float(scale))


@extension.after_loading
def _register() -> None:
    @torch.library.register_fake("gan3d::grid_sample_3d")
    def _(grid: Tensor, coordinates: Tensor, zeros: bool) -> Tensor:
        return grid.new_empty(*coordinates.shape[:2], grid.shape[4])

    @torch.library.register_fake("gan3d::triplane_sample")
    def _(planes: Tensor, points: Tensor, axes: list[int], scale: float) -> Tensor:
        return planes.new_empty(*points.shape[:2], planes.shape[2])

    @torch.library.register_fake("gan3d::grid_sample_3d_backward")
    def _(grad: Tensor, grid: Tensor, coordinates: Tensor, zeros: bool, needed: list[bool]) -> tuple[Tensor, ...]:
        return shaped_like([grid, coordinates], needed)

    @torch.library.register_fake("gan3d::triplane_sample_backward")
    def _(grad: Tensor, planes: Tensor, points: Tensor, axes: list[int], scale: float,
          needed: list[bool]) -> tuple[Tensor, ...]:
        return shaped_like([planes, points], needed)

    def work(values: int, corners: int, needed: Sequence[bool] = (True,)) -> int:
        return 2 * values * corners * sum(needed)  # a multiply-add a corner and channel, for each result

    @register_flop_formula(torch.ops.gan3d.grid_sample_3d)
    def _(grid: tuple, coordinates: tuple, zeros: bool, *, out_shape: tuple, **_: object) -> int:
        return work(math.prod(out_shape), 8)

    @register_flop_formula(torch.ops.gan3d.triplane_sample)
    def _(planes: tuple, points: tuple, axes: list, scale: float, *, out_shape: tuple, **_: object) -> int:
        return work(math.prod(out_shape), 12)

    @register_flop_formula(torch.ops.gan3d.grid_sample_3d_backward)
    def _(grad: tuple, grid: tuple, coordinates: tuple, zeros: bool, needed: list, **_: object) -> int:
        return work(math.prod(grad), 8, needed)

    @register_flop_formula(torch.ops.gan3d.triplane_sample_backward)
    def _(grad: tuple, planes: tuple, points: tuple, axes: list, scale: float, needed: list, **_: object) -> int:
        return work(math.prod(grad), 12, needed)

    differentiable("grid_sample_3d", reference.grid_sample_3d, wanted=[0, 1], selective=True)
    differentiable("triplane_sample", reference.triplane_sample, wanted=[0, 1], selective=True)
