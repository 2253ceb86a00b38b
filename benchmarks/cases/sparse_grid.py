import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from benchmarks.cases import Case
from gan3d.ops.cells import Voxels, cell_index
from gan3d.ops.reference import sparse_grid as reference
from gan3d.ops.sh import sh
from gan3d.ops.sparse_grid import sparse_sample, sparse_sample_sh, visibility

SIDE = 128
RESOLUTION = (SIDE, SIDE, SIDE)


def shell() -> Voxels:
    """About 10 % of 128³: between two spheres, as pruning leaves a surface."""
    axis = torch.arange(SIDE) - (SIDE - 1) / 2
    radius = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
    position = ((radius > 40) & (radius < 49)).nonzero()
    exists = torch.zeros(SIDE**3, dtype=torch.bool)
    exists[cell_index(position, RESOLUTION)] = True
    bits = exists.reshape(-1, 64).long()
    words = (bits << torch.arange(64)).sum(1)
    rank = torch.cat([torch.zeros(1, dtype=torch.int64), bits.sum(1).cumsum(0)]).int()
    return Voxels(words, rank, RESOLUTION)


def points(n: int, per_ray: int) -> tuple[Tensor, Tensor]:
    """Coordinates half a voxel apart along rays that cross the shell, near to far, and the rays' directions."""
    random = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(n // per_ray, 3, generator=random), dim=-1)
    aim = torch.nn.functional.normalize(torch.randn(n // per_ray, 3, generator=random), dim=-1)
    steps = (torch.arange(per_ray) - per_ray / 2) * 0.5
    along = 44.5 * aim[:, None] + steps[:, None] * directions[:, None] + (SIDE - 1) / 2
    return along.reshape(-1, 3), directions


def cases() -> list[Case]:
    n, per_ray = 1 << 18, 32
    voxels = shell()
    rows = int(voxels.rank[-1])
    links = reference.link_table(voxels.words, voxels.rank, list(RESOLUTION))  # not timed: a gift to the rivals
    random = torch.Generator().manual_seed(1)

    def table(channels: int) -> Tensor:
        return torch.randn(rows, channels, generator=random).requires_grad_(True)

    def bag(values: Tensor, coordinates: Tensor) -> Tensor:
        lower = coordinates.clamp(0, SIDE - 1).long().clamp(max=SIDE - 2)
        upper = coordinates.clamp(0, SIDE - 1) - lower
        offset = torch.tensor([(i * SIDE + j) * SIDE + k for i in range(2) for j in range(2) for k in range(2)])
        row = links[((lower[:, 0] * SIDE + lower[:, 1]) * SIDE + lower[:, 2])[:, None] + offset]
        x, y, z = torch.stack([1 - upper, upper], -1).unbind(1)
        weight = (x[:, :, None, None] * y[:, None, :, None] * z[:, None, None, :]).flatten(1) * (row >= 0)
        return embedding_bag(row.clamp(min=0), values, mode="sum", per_sample_weights=weight)

    def bag_sh(values: Tensor, coordinates: Tensor, basis: Tensor, ray: Tensor) -> tuple[Tensor, Tensor]:
        channels = bag(values, coordinates)
        return channels[:, 0], (channels[:, 1:].reshape(n, 3, -1) * basis.index_select(0, ray)[:, None]).sum(-1)

    def inputs_sh(coordinates_too: bool) -> tuple:
        coordinates, directions = points(n, per_ray)
        ray = torch.arange(n // per_ray, dtype=torch.int32).repeat_interleave(per_ray)
        return table(28), coordinates.requires_grad_(coordinates_too), sh(directions, 2), ray

    def sh_case(coordinates_too: bool) -> Case:
        # Samples of a ray are half a voxel apart and the table lies in the last-level cache: a row asked for again is
        # in the first. Forward: coordinates, ray index, four outputs, and the table once. Backward: the same, with
        # gradients for outputs, and the table's gradient zeroed and written.
        per_point = (3 + 1 + 4) * 4
        return Case("sparse_sample_sh", "2^18 points, k = 9" + (", points' gradient too" if coordinates_too else ""),
                    lambda *a: sparse_sample_sh(voxels, *a),
                    lambda *a: reference.sample_links_sh(links, list(RESOLUTION), *a),
                    lambda: inputs_sh(coordinates_too),
                    n * per_point + rows * 28 * 4,
                    n * (per_point + 12 * coordinates_too) + rows * 28 * 4 * (2 + coordinates_too),
                    n * (16 * 28 + 6 * 9), n * (16 * 28 * (1 + coordinates_too) + 6 * 9),
                    rivals={} if coordinates_too else {"embedding_bag": bag_sh}, goal=6)

    def plain(channels: int) -> Case:
        return Case("sparse_sample", f"2^18 points, {channels} channels", lambda *a: sparse_sample(voxels, *a),
                    lambda *a: reference.sample_links(links, list(RESOLUTION), *a),
                    lambda: (table(channels), points(n, per_ray)[0]),
                    n * (3 + channels) * 4 + rows * channels * 4, n * (3 + channels) * 4 + rows * channels * 8,
                    n * 16 * channels, n * 16 * channels, rivals={"embedding_bag": bag}, goal=6)

    def rays() -> tuple:
        random = torch.Generator().manual_seed(2)
        origins = 3 * torch.nn.functional.normalize(torch.randn(4096, 3, generator=random), dim=-1)
        towards = torch.nn.functional.normalize(0.3 * torch.randn(4096, 3, generator=random) - origins, dim=-1)
        box = torch.tensor([[-1.0, -1, -1], [1, 1, 1]])
        return 20 * torch.rand(rows, generator=random), origins, towards, box

    def seen_from(density: Tensor, rays_o: Tensor, rays_d: Tensor, box: Tensor) -> Tensor:
        return visibility(voxels, density, rays_o, rays_d, box)

    def plainly(density: Tensor, rays_o: Tensor, rays_d: Tensor, box: Tensor) -> Tensor:
        arguments = (voxels.words, voxels.rank, list(RESOLUTION), density, rays_o, rays_d, box)
        return reference.visibility(*arguments, 0.5, 0.0)

    # About 230 samples a ray in the box, of which a fifth have voxels: 8 densities each; the table once.
    seen = Case("visibility", "2^12 rays", seen_from, plainly, rays,
                4096 * 24 + rows * 8, flops_forward=4096 * 230 * 30, goal=3)
    return [sh_case(False), sh_case(True), plain(4), plain(28), seen]
