import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from gan3d.ops import grids
from gan3d.ops.reference import grids as reference


def rays(count: int, samples: int, random: bool) -> Tensor:
    """Points in [−1, 1]³ `[1, count·samples, 3]`, ordered along rays: of one picture, or of many (a training batch)."""
    generator = torch.Generator().manual_seed(0)
    if random:
        eye = F.normalize(torch.randn(count, 3, generator=generator), dim=-1)
        towards = F.normalize(0.4 * torch.randn(count, 3, generator=generator) - eye, dim=-1)
    else:
        side = round(count**0.5)
        v, u = torch.meshgrid(torch.linspace(-0.4, 0.4, side), torch.linspace(-0.4, 0.4, side), indexing="ij")
        eye = torch.tensor([[0.48, 0.36, 0.8]])
        right, up = torch.tensor([0.8, 0.0, -0.48]), torch.tensor([-0.1728, 0.768, -0.288])
        towards = F.normalize(u.reshape(-1, 1) * right + v.reshape(-1, 1) * up - eye, dim=-1)
    t = torch.linspace(0.1, 1.9, samples)[:, None]
    return (eye[:, None] + towards[:, None] * t).clamp(-1, 1).reshape(1, -1, 3)


def torch_grid_sample(grid: Tensor, coordinates: Tensor) -> Tensor:
    """F.grid_sample of a channels-first view: faster than of a grid stored channels first."""
    sides = torch.tensor(grid.shape[1:4])
    where = ((2 * coordinates + 1) / sides - 1).flip(-1)[:, None, None]
    return F.grid_sample(grid.permute(0, 4, 1, 2, 3), where, padding_mode="border", align_corners=False)[:, :, 0, 0].mT


def gather_voxels(grid: Tensor, coordinates: Tensor) -> Tensor:
    return reference.grid_sample_3d(grid, coordinates, False)


def gather_pixels(planes: Tensor, points: Tensor) -> Tensor:
    return reference.triplane_sample(planes, points, [0, 1, 0, 2, 2, 1], 1 / 3)


def torch_embedding_bag(grid: Tensor, coordinates: Tensor) -> Tensor:
    """A weighted sum of eight rows of a table: the fastest way in plain PyTorch, without a second derivative."""
    index, weight = reference.voxel_rows(grid.shape, coordinates, False)
    return F.embedding_bag(index.flatten(0, 1), grid.flatten(0, 3), per_sample_weights=weight.flatten(0, 1),
                           mode="sum")[None]


def torch_planes(planes: Tensor, points: Tensor) -> Tensor:
    """Three calls of F.grid_sample and a mean."""
    parts = [F.grid_sample(planes[:, i], points[:, None, :, list(pair)], align_corners=False)
             for i, pair in enumerate(grids.XY_XZ_ZY)]
    return torch.stack(parts).mean(0)[:, :, 0].mT


def cases() -> list[Case]:
    """Against F.grid_sample; the ops' own references (gather) win over it here and there, on one thread."""
    n, side = 1 << 18, 128
    found = []
    for c, needs, goal in ((13, False, 2.0), (1, False, None)):
        def grid_inputs(c: int = c, needs: bool = needs) -> tuple:
            grid = torch.randn(1, side, side, side, c, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
            return grid, ((rays(4096, 64, True) + 1) * (side - 1) / 2).requires_grad_(needs)

        # Forward: coordinates in, eight voxels a point (13 channels: the grid is larger than a core's cache; 1 channel:
        # at least each voxel's 64 bytes in pairs along z, four lines), the values out. Backward: gradients and
        # coordinates in, eight voxels a point read and written, and the whole gradient of the grid filled with zeros.
        gathered = n * 8 * c * 4 if c > 1 else n * 4 * 64
        found.append(Case(
            "grid_sample_3d", f"2^18 points on rays, 128³ × {c}", grids.grid_sample_3d, torch_grid_sample, grid_inputs,
            bytes_forward=gathered + n * (3 + c) * 4, bytes_backward=2 * gathered + n * (3 + c) * 4 + side**3 * c * 4,
            flops_forward=n * 16 * c, flops_backward=n * 16 * c,
            rivals={"gather": gather_voxels, "F.embedding_bag": torch_embedding_bag}, goal=goal))

    def plane_inputs() -> tuple:
        image = torch.randn(1, 96, 256, 256, generator=torch.Generator().manual_seed(1))
        planes = image.to(memory_format=torch.channels_last).unflatten(1, (3, 32))
        return planes.requires_grad_(True), rays(4096, 64, False).requires_grad_(True)

    # Forward: points and twelve pixels of 32 channels in, 32 values out. Backward: gradients and points in, the pixels
    # again, their gradients read and written, those of the points out; the gradient of the planes filled with zeros.
    gathered = n * 12 * 32 * 4
    found.append(Case(
        "triplane_sample", "2^18 points on rays, 3 × 32 × 256²",
        lambda planes, points: grids.triplane_sample(planes, points, scale=1 / 3),
        torch_planes, plane_inputs,
        bytes_forward=gathered + n * 35 * 4, bytes_backward=3 * gathered + n * 38 * 4 + 96 * 256**2 * 4,
        flops_forward=n * 24 * 32, flops_backward=2 * n * 24 * 32, rivals={"gather": gather_pixels}, goal=2.0))
    return found
